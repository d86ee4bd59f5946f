"""The evaluate stage: base and tuned routers on the same questions, from the exported adapter."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from roma_ray.engine.cache import ROWS
from roma_ray.engine.identity import answer_rule, is_free, prompt_settings
from roma_ray.engine.progress import Progress
from roma_ray.engine.question_table import TABLE, iterate_rows, read_prompts, read_rows
from roma_ray.engine.runners import Runners
from roma_ray.engine.scoring import Scores
from roma_ray.engine.setup import Setup
from roma_ray.engine.steps import Facts, Step
from roma_ray.engine.stored_prompts import Prompts
from roma_ray.engine.tokenizer import load_tokenizer
from roma_ray.engine.work import Job
from roma_ray.errors import QuestionError
from roma_ray.evaluation.free_results import Texts
from roma_ray.evaluation.guards import Text, beside_chance, by_chance, overlap
from roma_ray.evaluation.measures import RULES, pair_measures
from roma_ray.evaluation.results_file import RESULTS, read_judged, write_results
from roma_ray.evaluation.shares import answer_shares
from roma_ray.evaluation.statistics import compare
from roma_ray.evaluation.transfer import by_group
from roma_ray.questions.prompts import Prompt, PromptBuilder
from roma_ray.questions.records import Question
from roma_ray.stages import routing_change
from roma_ray.stages.answer_work import writes
from roma_ray.stages.answering import answer
from roma_ray.stages.base_scores import PARTS
from roma_ray.stages.embedding import read_embeddings
from roma_ray.stages.finetuning import FINETUNE, epochs_of
from roma_ray.stages.free_evaluation import Asking, Judgement, judge_free, shortened
from roma_ray.stages.neighborhoods import read_neighborhoods, usable_rows
from roma_ray.store.artifacts import Stage, fingerprint, write_json
from roma_ray.store.files import read_json, remove_folder

VERSION = 7
SUMMARY = "evaluation.json"


def evaluate(job: Job, runners: Runners, progress: Progress) -> Facts:
    """Judge base and exported tuned routers on the test questions. Raises GuardError, QuestionError, CacheError, CheckpointError.

    Only what is read is scored, by whoever works (`answering.py`): with the tuned routers the test questions and a sample of the
    trained ones, whose routing `diagnostics` measures; with the base's the test and validation questions, once for all that start
    from it.
    """
    setup, stage, stages = job.setup, job.stage, job.stages
    questions, extraction, tuned = (stages[name] for name in ("questions", "extract", "finetune"))
    held_out = setup.config.questions.held_out_tasks
    usable = usable_rows(extraction)
    # The base's scores are shared by runs that hold out other tasks, so they are of all questions that any of them judges.
    every = _judged_rows(read_prompts(questions.path / TABLE), usable)
    prompts = read_prompts(questions.path / TABLE, held_out=held_out)
    of_split = _judged_rows(prompts, usable)
    test, judged = of_split["test"], sorted(every["validation"] + every["test"])
    near = read_neighborhoods(stages["neighbors"], len(prompts))
    trained = routing_change.sampled(near.queried & (near.sizes > 0))
    prompt = setup.config.questions.prompt
    asked = {"base": judged, "tuned": test, "trained": trained, "texts": test if writes(setup) else []}
    answers = answer(job, runners, progress, prompts, asked)
    base, validation = answers.base.of(test), answers.base.of(of_split["validation"])
    after = answers.tuned
    columns = [n for n, layer in enumerate(answers.routers) if layer in setup.layers]
    tasks = [prompts.tasks[row] for row in test]
    trained_tasks = prompts.tasks.present(near.queried.numpy())
    asking = Asking(setup, stage, questions, prompts, columns, trained_tasks)
    found = (judge_free if is_free(setup.config) else _judge_choices)(asking, base, after, answers.texts)
    embeddings = stages["embed"]
    changed = routing_change.routing_change(
        setup, answers.top_k, tasks, base, after, columns, read_embeddings(embeddings)
    )
    lived = {"train": answers.trained, "test": after}
    distance = routing_change.manifold_distance(setup, questions, extraction, embeddings, near, lived, columns)
    result = {
        "splits": {"test": by_task(tasks, *found.verdicts)},
        "validation": _validation(validation, tuned, prompts),
        **found.figures,
        "guards": found.guards,
        "diagnostics": {**changed, "manifold_distance": distance},
        "pin": evaluation_pin(
            questions, {**prompt_settings(prompt), "rule": answer_rule(prompt), **found.pinned}, test
        ),
    }
    write_json(stage.path / SUMMARY, result)
    remove_folder(stage.path / PARTS)
    return {"rows": len(test), "pin": result["pin"], "metric": found.metric}


def _judge_choices(asked: Asking, base: Scores, tuned: Scores, _: Texts | None) -> Judgement:
    """The test questions of multiple choice, by every measure. Raises StorageError."""
    setup, stage, questions, prompts = asked.setup, asked.stage, asked.questions, asked.prompts
    prompt, rule = setup.config.questions.prompt, answer_rule(setup.config.questions.prompt)
    metric = _by_lm_eval(setup, stage, questions, prompts, {"base": base, "tuned": tuned}, rule)
    letter = prompt.format == "letter"
    write_results(stage.path / RESULTS, prompts, base, tuned, asked.columns, rule, letter=letter)
    figures = _test_figures(stage, questions, asked.trained, setup.config.questions.held_out_tasks)
    guards = _guards(questions, prompts, base.rows, base, tuned)
    return Judgement(metric, (base.correct, tuned.correct), figures, guards)


EVALUATE = Step(
    "evaluate",
    VERSION,
    (FINETUNE,),
    lambda setup: {},
    evaluate,
    reads_states=True,
    shown=((SUMMARY, None),),
)


def _judged_rows(prompts: Prompts, usable: torch.Tensor) -> dict[str, list[int]]:
    """The validation and the test questions that came through extraction. Raises QuestionError where no test question did."""
    rows = {split: prompts.rows_of(split, usable) for split in ("validation", "test")}
    if not rows["test"]:
        raise QuestionError(
            f"no test question came through extraction, so nothing can be judged; see `error` in its {ROWS}, and give more rows "
            "or a larger questions.test_fraction"
        )
    return rows


def _validation(base: Scores, tuned: Stage, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Accuracy on the validation questions with standard errors: the base's, and of the exported epoch what training measured; of
    free-form ones the answers' log-likelihoods too.
    """
    reached = epochs_of(tuned)[tuned.manifest()["facts"]["selected_epoch"]]
    free: dict[str, Any] = {}
    if "validation_logp" in reached:
        free = {"base_logp": base.answer_logp(prompts), "tuned_logp": reached["validation_logp"]}
    return {
        "n": len(base.rows),
        **free,
        "base_accuracy": base.accuracy,
        "base_stderr": base.stderr,
        "tuned_accuracy": reached["validation_accuracy"],
        "tuned_stderr": reached["validation_stderr"],
    }


def _by_lm_eval(
    setup: Setup,
    stage: Stage,
    questions: Stage,
    prompts: Sequence[Prompt],
    scored: Mapping[str, Scores],
    rule: str,
) -> str:
    """Have lm-evaluation-harness judge the test questions and write its results; the metric that answers are chosen by."""
    from roma_ray.benchmarks.pipeline_tasks import lm_eval_results

    rows = scored["base"].rows
    table = read_rows(questions.path / TABLE, ["question", "choices", "context"], rows)
    asked = [
        Question(
            prompts[row].id, prompts[row].task, q["question"], tuple(q["choices"]), prompts[row].answer, q["context"]
        )
        for row, q in zip(rows, table.to_pylist(), strict=True)
    ]
    known = {
        name: {prompts[row].id: s for row, s in zip(rows, found.scores, strict=True)} for name, found in scored.items()
    }
    builder = PromptBuilder(load_tokenizer(setup.model.path, setup.model.revision), setup.config.questions.prompt)
    metric = RULES[rule]
    for name, judged in lm_eval_results(asked, known, builder).items():
        write_json(stage.path / f"lm_eval_{name}.json", json.loads(json.dumps(judged, default=str)))
        verdicts: dict[str, list[bool]] = {}
        for row, right in zip(rows, scored[name].correct.tolist(), strict=True):
            verdicts.setdefault(prompts[row].task, []).append(right)
        for task, own in verdicts.items():
            theirs = judged["results"][task][f"{metric},none"]
            assert abs(theirs - float(np.mean(own))) < 1e-9, f"{task}: lm-eval says {theirs}, we {np.mean(own)}"
    return metric


def _test_figures(stage: Stage, questions: Stage, trained: set[str], held_out: Sequence[str]) -> dict[str, Any]:
    """The test questions by every measure, and which answers were given; from what is stored, as any reader has it.

    Where tasks are `held_out`, also by group: beside them the tasks that were `trained` on.
    """
    found = read_judged(stage.path)
    choices = read_rows(questions.path / TABLE, ["choices"], found.rows).column("choices").to_pylist()
    base, tuned, tasks = found.values("base"), found.values("tuned"), found.asked.tasks
    paired = pair_measures(base, tuned, tasks)
    groups = by_group(base, tuned, tasks, trained, held_out, RULES[found.asked.rule]) if held_out else None
    return {
        **({} if groups is None else {"held_out": groups}),
        "measures": {
            "configured": RULES[found.asked.rule],
            "coincide": found.asked.coincide,
            "figures": {name: figures.plain() for name, figures in paired.items()},
        },
        "shares": answer_shares(found.scores["base"], found.scores["tuned"], found.asked, choices),
    }


def evaluation_pin(questions: Stage, prompt: dict[str, Any], rows: Sequence[int]) -> str:
    """Hash of rows, prompts, metric and its version: scores with different pins are not comparable."""
    columns = ["id", "task", "split", "prompt_ids", "choice_ids", "answer"]
    table = read_rows(questions.path / TABLE, columns, rows)
    return fingerprint({"rows": table.to_pylist(), "prompt": prompt, "version": VERSION})


def by_task(tasks: Sequence[str], base: np.ndarray, tuned: np.ndarray) -> dict[str, Any]:
    """Paired figures of `all` and of each task, by name."""
    names = np.asarray(tasks)
    chosen = {"all": np.full(len(names), True), **{task: names == task for task in sorted(set(tasks))}}
    return {name: compare(base[mask], tuned[mask]) for name, mask in chosen.items()}


def _guards(questions: Stage, prompts: Prompts, rows: Sequence[int], base: Scores, tuned: Scores) -> dict[str, Any]:
    """Findings that a reader of the table must know; empty lists and zeros are good news."""

    def asked(split: str) -> Iterator[Text]:
        return iterate_rows(questions.path / TABLE, ["question", "choices"], prompts.splits.mask([split]))

    chance: list[tuple[str, str | None]] = []
    tasks, choices = [prompts.tasks[row] for row in rows], [len(prompts[row].choice_ids) for row in rows]
    for name, scores in (("base", base), ("tuned", tuned)):
        for task in ["all", *sorted(set(tasks))]:
            members = [n for n, own in enumerate(tasks) if task in ("all", own)]
            right = int(scores.correct[members].sum())
            chance.append((f"{name}/{task}", beside_chance(right, [choices[n] for n in members])))
    return {
        "identical_scores": False,
        **by_chance(chance),
        **shortened(prompts),
        "test_questions_in_training": overlap(asked("train"), asked("test")),
    }


def read_evaluation(stage: Stage) -> dict[str, Any]:
    """The figures of a finished evaluation."""
    value: dict[str, Any] = read_json(Path(stage.path / SUMMARY))
    return value
