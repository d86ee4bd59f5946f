"""The evaluate stage: base and tuned routers on the same questions, in one process, from the exported adapter."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from roma_ray.artifacts import Stage, fingerprint, note_device, write_json
from roma_ray.engine.cache import open_states
from roma_ray.engine.devices import device_kind
from roma_ray.engine.embedding import embed_stage, read_embeddings
from roma_ray.engine.extraction import extract_stage
from roma_ray.engine.finetuning import ADAPTER, finetune_stage
from roma_ray.engine.heads import FRESH, Heads
from roma_ray.engine.identity import answer_rule, data_seed, prompt_settings
from roma_ray.engine.neighborhoods import neighbors_stage, read_neighborhoods, usable_rows
from roma_ray.engine.prepare import TABLE, load_tokenizer, questions_stage
from roma_ray.engine.progress import Progress
from roma_ray.engine.scoring import Scores, score_rows
from roma_ray.engine.setup import Setup
from roma_ray.engine.tables import read_prompts, read_table
from roma_ray.evaluation.base import base_scores, base_stage
from roma_ray.evaluation.guards import TRUNCATED_LIMIT, beside_chance, by_chance, check_not_identical, overlap
from roma_ray.evaluation.judged import RESULTS, read_judged, write_results
from roma_ray.evaluation.measures import RULES, pair_measures
from roma_ray.evaluation.shares import answer_shares
from roma_ray.evaluation.statistics import compare
from roma_ray.manifold import diagnostics
from roma_ray.moe.checkpoints import load_adapter
from roma_ray.moe.slices import Slice
from roma_ray.questions.prompts import Prompt, PromptBuilder
from roma_ray.questions.records import Question

VERSION = 6
SUMMARY = "evaluation.json"
_DIAGNOSED_ROWS = 2000


def evaluate_stage(setup: Setup, tuned: Stage) -> Stage:
    """Where the paired evaluation of this tuned model lives."""
    return setup.store.stage("evaluate", {}, {"finetune": tuned.fingerprint}, VERSION)


def locate_stages(setup: Setup, questions: Stage | None = None) -> dict[str, Stage]:
    """Where each stage up to the evaluation lives, by name in their order; `questions` where its place is known.

    Raises QuestionError when a question file is gone.
    """
    questions = questions or questions_stage(setup)
    extraction = extract_stage(setup, questions)
    embeddings = embed_stage(setup, questions)
    nearby = neighbors_stage(setup, extraction, embeddings)
    tuned = finetune_stage(setup, extraction, nearby)
    stages = (questions, extraction, embeddings, nearby, tuned, evaluate_stage(setup, tuned))
    return {stage.name: stage for stage in stages}


def evaluate(
    setup: Setup,
    questions: Stage,
    extraction: Stage,
    embeddings: Stage,
    neighbors: Stage,
    tuned: Stage,
    progress: Progress,
    heads: Heads = FRESH,
) -> Stage:
    """Score every question with base and exported tuned routers. Raises GuardError, CacheError, CheckpointError."""
    stage = evaluate_stage(setup, tuned)
    if stage.complete:
        return stage
    started = time.monotonic()
    with stage.exclusive():
        prompts = read_prompts(questions.path / TABLE)
        usable = usable_rows(extraction).tolist()
        rows = [row for row in range(len(prompts)) if usable[row]]
        prompt = setup.config.questions.prompt
        arguments: dict[str, Any] = {
            "tokens": setup.config.routing.tokens,
            "rule": answer_rule(prompt),
            "batch_tokens": setup.config.extraction.batch_tokens,
        }
        note_device(stage.path, device_kind(setup.model.device))
        states = open_states(setup.model, extraction.path, setup.cut)
        kept = base_stage(setup, extraction, arguments)
        with heads.lend(setup.model, setup.cut) as head:
            with progress.meter("evaluate", 2 * len(rows), "questions", len(rows) * kept.complete) as meter:

                def score() -> Scores:
                    return score_rows(head, states, prompts, rows, **arguments, advance=meter.advance)

                base = base_scores(kept, rows, score)
                load_adapter(tuned.path / ADAPTER, head)
                after = score()
        check_not_identical(base.scores, after.scores)
        metric = _by_lm_eval(setup, stage, questions, prompts, {"base": base, "tuned": after}, arguments["rule"])
        columns = [n for n, router in enumerate(head.routers) if router.layer in setup.layers]
        letter = prompt.format == "letter"
        write_results(stage.path / RESULTS, prompts, base, after, columns, arguments["rule"], letter=letter)
        neighborhoods = read_neighborhoods(neighbors, len(prompts))
        result = {
            "splits": by_split_and_task(
                [(p.split, p.task) for p in (prompts[r] for r in rows)], base.correct, after.correct
            ),
            **_test_figures(stage, questions),
            "guards": _guards(questions, prompts, rows, base, after),
            "diagnostics": _diagnostics(
                setup, head, prompts, rows, base, after, columns, read_embeddings(embeddings), neighborhoods
            ),
            "pin": evaluation_pin(questions, {**prompt_settings(prompt), "rule": arguments["rule"]}, rows),
        }
        write_json(stage.path / SUMMARY, result)
        stage.finish(
            facts={"rows": len(rows), "pin": result["pin"], "metric": metric}, seconds=time.monotonic() - started
        )
    return stage


def _by_lm_eval(
    setup: Setup,
    stage: Stage,
    questions: Stage,
    prompts: Sequence[Prompt],
    scored: Mapping[str, Scores],
    rule: str,
) -> str:
    """Have lm-evaluation-harness judge the test questions and write its results; the metric that answers are chosen by."""
    from roma_ray.evaluation.own import METRICS, lm_eval_results

    rows = [row for row in scored["base"].rows if prompts[row].split == "test"]
    table = read_table(questions.path / TABLE, ["question", "choices", "context"]).take(pa.array(rows, pa.int64()))
    asked = [
        Question(
            prompts[row].id, prompts[row].task, q["question"], tuple(q["choices"]), prompts[row].answer, q["context"]
        )
        for row, q in zip(rows, table.to_pylist(), strict=True)
    ]
    wanted = set(rows)
    known = {
        name: {prompts[row].id: s for row, s in zip(found.rows, found.scores, strict=True) if row in wanted}
        for name, found in scored.items()
    }
    builder = PromptBuilder(load_tokenizer(setup.model.path, setup.model.revision), setup.config.questions.prompt)
    metric = METRICS[rule]
    for name, judged in lm_eval_results(asked, known, builder).items():
        write_json(stage.path / f"lm_eval_{name}.json", json.loads(json.dumps(judged, default=str)))
        verdicts: dict[str, list[bool]] = {}
        for row, right in zip(scored[name].rows, scored[name].correct.tolist(), strict=True):
            if row in wanted:
                verdicts.setdefault(prompts[row].task, []).append(right)
        for task, own in verdicts.items():
            theirs = judged["results"][task][f"{metric},none"]
            assert abs(theirs - float(np.mean(own))) < 1e-9, f"{task}: lm-eval says {theirs}, we {np.mean(own)}"
    return metric


def _test_figures(stage: Stage, questions: Stage) -> dict[str, Any]:
    """The test questions by every measure, and which answers were given; from what is stored, as any reader has it."""
    found = read_judged(stage.path, "test")
    table = read_table(questions.path / TABLE, ["choices"]).column("choices")
    choices = table.take(pa.array(found.rows, pa.int64())).to_pylist()
    paired = pair_measures(found.values("base"), found.values("tuned"), found.asked.tasks)
    return {
        "measures": {
            "configured": RULES[found.asked.rule],
            "coincide": found.asked.coincide,
            "figures": {name: figures.plain() for name, figures in paired.items()},
        },
        "shares": answer_shares(found.scores["base"], found.scores["tuned"], found.asked, choices),
    }


def evaluation_pin(questions: Stage, prompt: dict[str, Any], rows: Sequence[int]) -> str:
    """Hash of rows, prompts, metric and its version: scores with different pins are not comparable."""
    table = read_table(questions.path / TABLE, ["id", "task", "split", "prompt_ids", "choice_ids", "answer"]).take(
        pa.array(rows, pa.int64())
    )
    return fingerprint({"rows": table.to_pylist(), "prompt": prompt, "version": VERSION})


def by_split_and_task(
    keys: Sequence[tuple[str, str]], base: np.ndarray, tuned: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Paired figures per split: `all` and each task. Order: train, validation, test; tasks by name."""
    result: dict[str, dict[str, Any]] = {}
    for split in [s for s in ("train", "validation", "test") if any(k[0] == s for k in keys)]:
        tasks = sorted({task for which, task in keys if which == split})
        chosen = {"all": [k[0] == split for k in keys], **{t: [k == (split, t) for k in keys] for t in tasks}}
        result[split] = {name: compare(base[mask], tuned[mask]) for name, mask in chosen.items()}
    return result


def _guards(
    questions: Stage, prompts: Sequence[Any], rows: Sequence[int], base: Scores, tuned: Scores
) -> dict[str, Any]:
    """Findings that a reader of the table must know; empty lists and zeros are good news."""
    table = read_table(questions.path / TABLE, ["question", "choices", "split"]).to_pylist()
    parts: dict[str, list[tuple[str, list[str]]]] = {"train": [], "validation": [], "test": []}
    for row in table:
        parts[row["split"]].append((row["question"], row["choices"]))
    chance: list[tuple[str, str | None]] = []
    for name, scores in (("base", base), ("tuned", tuned)):
        test = [n for n, row in enumerate(rows) if prompts[row].split == "test"]
        for task in ["all", *sorted({prompts[rows[n]].task for n in test})]:
            members = [n for n in test if task in ("all", prompts[rows[n]].task)]
            choices = [len(prompts[rows[n]].choice_ids) for n in members]
            chance.append((f"{name}/{task}", beside_chance(int(scores.correct[members].sum()), choices)))
    truncated = sum(p.truncated for p in prompts)
    return {
        "identical_scores": False,
        **by_chance(chance),
        "truncated": truncated,
        "too_many_truncated": truncated > TRUNCATED_LIMIT * len(prompts),
        "test_questions_in_training": overlap(parts["train"], parts["test"]),
    }


def _diagnostics(
    setup: Setup,
    head: Slice,
    prompts: Sequence[Any],
    rows: Sequence[int],
    base: Scores,
    tuned: Scores,
    columns: list[int],
    embeddings_NC: torch.Tensor,
    neighborhoods: Any,
) -> dict[str, Any]:
    """How routing changed on the held-out questions, and how far it agrees with the embeddings, before and after."""
    test = [n for n, row in enumerate(rows) if prompts[row].split == "test"]
    seed = data_seed(setup.config)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(test), generator=generator)[:_DIAGNOSED_ROWS].sort().values.tolist()
    members = [test[n] for n in drawn]
    before, after = (torch.from_numpy(s.routing_NLE[members][:, columns]) for s in (base, tuned))
    top_k, experts = head.routers[0].top_k, head.routers[0].num_experts
    chosen = [diagnostics.top_k_selection(r, top_k) for r in (before, after)]
    tasks = [prompts[rows[n]].task for n in members]
    points = embeddings_NC[[rows[n] for n in members]]
    overlap_k = min(10, len(members) - 1)
    result: dict[str, Any] = {
        "layers": list(setup.layers),
        "questions": len(members),
        "routing_kl": diagnostics.routing_kl(after, before).tolist(),
        "selection_overlap": diagnostics.selection_overlap(chosen[1], chosen[0]).tolist(),
        "embedding_silhouette": _silhouette(points, tasks, seed),
    }
    for name, routing, picks in (("base", before, chosen[0]), ("tuned", after, chosen[1])):
        result[name] = {
            "routing_entropy": diagnostics.routing_entropy(routing).tolist(),
            "expert_load": diagnostics.expert_load(picks, experts).tolist(),
            "task_silhouette": _silhouette(routing.flatten(1), tasks, seed),
            "neighbor_overlap": diagnostics.neighbor_overlap(points, routing.flatten(1), overlap_k).__dict__
            if overlap_k > 0
            else None,
        }
    place = {row: n for n, row in enumerate(rows)}
    pairs = [
        (place[i], place[j])
        for i, j in zip(neighborhoods.rows.tolist(), neighborhoods.indices.tolist(), strict=True)
        if i in place
    ]
    picked = torch.tensor(pairs[:: max(1, len(pairs) // 20000)], dtype=torch.int64).reshape(-1, 2)
    for name, scores in (("base", base), ("tuned", tuned)):
        routing = torch.from_numpy(scores.routing_NLE[:, columns])
        result[name]["neighbor_distance"] = diagnostics.routing_distance_quantiles(routing, picked[:, 0], picked[:, 1])
    return result


def _silhouette(points: torch.Tensor, tasks: Sequence[str], seed: int) -> float | None:
    return diagnostics.silhouette(points, tasks, torch.Generator().manual_seed(seed))


def read_evaluation(stage: Stage) -> dict[str, Any]:
    """The figures of a finished evaluation."""
    value: dict[str, Any] = json.loads(Path(stage.path / SUMMARY).read_text())
    return value
