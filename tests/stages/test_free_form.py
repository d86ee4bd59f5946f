"""Free-form questions through the stages: losses, routing, success and measures against literal loops on the whole stock model."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
import torch
from rouge_score import rouge_scorer
from transformers import AutoModelForCausalLM, AutoTokenizer

from roma_ray.ablations.plan import make_plan
from roma_ray.ablations.space import load_space
from roma_ray.config.free_form import ANSWER, SuccessConfig
from roma_ray.config.schema import Config
from roma_ray.engine.cache import ROWS
from roma_ray.engine.progress import Silence
from roma_ray.engine.question_table import TABLE, read_prompts, read_table
from roma_ray.engine.runners import Runners
from roma_ray.engine.setup import resolve
from roma_ray.engine.work import serial
from roma_ray.errors import ConfigError, NeighborError, QuestionError
from roma_ray.evaluation.free_results import read_free
from roma_ray.evaluation.results_file import RESULTS, read_verdicts
from roma_ray.moe import layers
from roma_ray.moe.adapters import load_adapter
from roma_ray.moe.routers import find_routers
from roma_ray.moe.slices import load_slice
from roma_ray.questions.answer_metrics import WRITTEN
from roma_ray.runs.method_comparison import compare
from roma_ray.runs.pipeline import Run, locate, run
from roma_ray.stages.extraction import EXTRACT
from roma_ray.stages.finetuning import ADAPTER, epochs_of, read_routing_rows
from roma_ray.stages.neighborhoods import answered_rightly
from roma_ray.stages.paired_evaluation import read_evaluation
from roma_ray.stages.preparation import QUESTIONS
from roma_ray.stages.routing_file import write_routing
from tests.engine.loops import gradients_of, train
from tests.free_world import free_world, gsm8k, squad, write_rows
from tests.making import made, train_job

THRESHOLD = -6.8
LIMIT = 6


def finished(root: Path, rows: list[dict[str, Any]], **sections: Any) -> Run:
    return run(resolve(free_world(root, rows, **sections)), Silence())


@pytest.fixture(scope="module")
def likely_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Success by likelihood, routing where the answer is predicted."""
    root = tmp_path_factory.mktemp("likely")
    return finished(root, gsm8k(40), routing={"layers": "L2", "tokens": ANSWER})


@pytest.fixture(scope="module")
def written_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Success by what the model writes. A random model writes nothing right, so the rows' answers are what it writes."""
    root = tmp_path_factory.mktemp("written")
    success = {"metric": "exact_match", "max_new_tokens": LIMIT, "generation_batch": 3, "stop": ["zzz"]}
    sections: dict[str, Any] = {"extraction": {"batch_tokens": 512, "success": success}}
    setup = resolve(free_world(root / "first", squad(40), **sections))
    made(QUESTIONS, setup)
    prompts = read_prompts(QUESTIONS.at(setup, {}).path / TABLE)
    model, tokenizer = whole(setup), AutoTokenizer.from_pretrained(setup.model.path)
    rows = squad(40)
    for number, prompt in enumerate(prompts):
        if number % 2:
            # What the model writes, in part: capitals and articles are no difference.
            said = decoded(tokenizer, stock(model, tokenizer, prompt))
            rows[number]["answers"] = {"text": [rows[number]["answers"]["text"][0], said.upper()]}
    return finished(root / "second", rows, **sections)


def whole(setup: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        setup.model.path, dtype=torch.float32, experts_implementation="eager"
    ).eval()


def stock(model: Any, tokenizer: Any, prompt: Any) -> list[int]:
    ids = torch.tensor([prompt.prompt_ids])
    settings = {"do_sample": False, "max_new_tokens": LIMIT, "pad_token_id": 0, "eos_token_id": tokenizer.eos_token_id}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    found: list[int] = out[0, ids.shape[1] :].tolist()
    return found


def decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@torch.inference_mode()
def literal(model: Any, prompt: Any) -> tuple[float, bool, torch.Tensor]:
    """The answer's log-likelihood, whether each of its tokens is the likeliest, and every layer's mean routing row there."""
    (answer,) = prompt.choice_ids
    ids = [*prompt.prompt_ids, *answer]
    out = model(torch.tensor([ids[:-1]]), output_router_logits=True, use_cache=False)
    logp = torch.log_softmax(out.logits[0].float(), -1)
    start, total, greedy = len(prompt.prompt_ids) - 1, 0.0, True
    for n, token in enumerate(answer):
        total += logp[start + n, token].item()
        greedy &= int(logp[start + n].argmax()) == token
    rows = [torch.softmax(layer.float()[start:], -1).mean(0) for layer in out.router_logits]
    return total, greedy, torch.stack(rows)


def test_scores_success_and_answer_routing_equal_the_plain_forward(likely_run: Run) -> None:
    model, stages = whole(likely_run.setup), likely_run.stages
    prompts = read_prompts(stages["questions"].path / TABLE)
    rows = read_table(stages["extract"].path / ROWS).to_pylist()
    routing = read_routing_rows(stages["extract"].path, ANSWER)
    found = answered_rightly(likely_run.setup, stages)
    rights = []
    for number in range(0, len(prompts), 3):
        prompt = prompts[number]
        assert prompt.choice_ids[0][-1] == 1, "the tokenizer's end of text ends the answer"
        score, greedy, mean = literal(model, prompt)
        assert rows[number]["scores"] == pytest.approx([score], abs=1e-3)
        assert rows[number]["prediction"] == (0 if greedy else -1)
        rights.append(score / len(prompt.choice_ids[0]) >= THRESHOLD)
        assert bool(found[number]) == rights[-1]
        torch.testing.assert_close(routing[number], mean, rtol=1e-4, atol=1e-6)
    assert 0 < sum(rights) < len(rights)
    assert layers.ANSWER == ANSWER


def test_the_task_loss_and_its_gradient_are_the_answers_mean_cross_entropy(likely_run: Run) -> None:
    objective, masters, _, data = gradients_of(likely_run, "none")
    rows = data.train[:5]
    task, _, _ = objective.losses(objective.prepare(rows))
    found = torch.autograd.grad(task, masters.parameters())
    model = whole(likely_run.setup).requires_grad_(False)
    gates = [router.module.weight for router in find_routers(model) if router.layer in likely_run.setup.layers]
    for gate in gates:
        gate.requires_grad_(True)
    losses = []
    for row in rows:
        prompt = data.prompts[row]
        (answer,) = prompt.choice_ids
        logits = model(torch.tensor([[*prompt.prompt_ids, *answer[:-1]]]), use_cache=False).logits[0]
        own = logits[len(prompt.prompt_ids) - 1 :]
        losses.append(-sum(torch.log_softmax(own[n], -1)[token] for n, token in enumerate(answer)) / len(answer))
    expected = sum(losses)
    torch.testing.assert_close(task, expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(found, torch.autograd.grad(expected, gates), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)
    masters.detach()


def test_each_epoch_tells_the_answers_likelihood_and_the_best_is_chosen_by_it(likely_run: Run) -> None:
    epochs = epochs_of(likely_run.stages["finetune"])
    evaluation = read_evaluation(likely_run.stages["evaluate"])
    assert evaluation["validation"]["tuned_logp"] == epochs[-1]["validation_logp"]
    assert evaluation["validation"]["base_logp"] < evaluation["validation"]["tuned_logp"]
    model = whole(likely_run.setup)
    prompts = read_prompts(likely_run.stages["questions"].path / TABLE)
    each = [literal(model, p)[0] / len(p.choice_ids[0]) for p in prompts if p.split == "validation"]
    assert evaluation["validation"]["base_logp"] == pytest.approx(np.mean(each), abs=1e-4)
    outcome = train(train_job(likely_run, select="best_validation", epochs=3))
    logps = [epoch["validation_logp"] for epoch in outcome.epochs]
    assert outcome.selected_epoch == logps.index(max(logps)) > 0
    assert {epoch["validation_accuracy"] for epoch in outcome.epochs} == {0.0}


def test_measures_of_the_evaluation_are_literal(likely_run: Run) -> None:
    stage = likely_run.stages["evaluate"]
    found, summary = read_free(Path(stage.path / RESULTS)), likely_run.summary
    assert list(summary["measures"]["figures"]) == ["likelihood", "greedy", "gold_logp"]
    model, prompts = whole(likely_run.setup), read_prompts(likely_run.stages["questions"].path / TABLE)
    each, total, tokens = [], 0.0, 0
    for row in found.rows:
        score, _, _ = literal(model, prompts[row])
        count = len(prompts[row].choice_ids[0])
        each.append(score / count)
        total, tokens = total + score, tokens + count
    figures = summary["measures"]["figures"]
    assert figures["gold_logp"]["micro"]["base"] == pytest.approx(np.mean(each), abs=1e-4)
    assert figures["likelihood"]["micro"]["base"] == pytest.approx(np.mean([e >= THRESHOLD for e in each]))
    assert summary["free"] == {"tokens": tokens, "perplexity": summary["free"]["perplexity"]}
    assert summary["free"]["perplexity"]["base"] == pytest.approx(math.exp(-total / tokens), rel=1e-4)
    assert summary["splits"]["test"]["all"]["base_accuracy"] == figures["likelihood"]["micro"]["base"]
    keys, ids, values, pins = read_verdicts(stage.path, "tuned")
    assert {metric for _, metric in keys} == {"likelihood", "greedy", "gold_logp"}
    assert len(keys) == len(ids) == len(values) == 3 * len(found.rows)
    assert set(pins.values()) == {stage.manifest()["facts"]["pin"]}


def test_answers_are_stocks_and_judged_once_in_the_extraction(written_run: Run) -> None:
    model, tokenizer = whole(written_run.setup), AutoTokenizer.from_pretrained(written_run.setup.model.path)
    questions, extraction = written_run.stages["questions"], written_run.stages["extract"]
    prompts = read_prompts(questions.path / TABLE)
    accepted = read_table(questions.path / TABLE, ["choices"]).column("choices").to_pylist()
    rows = read_table(extraction.path / ROWS).to_pylist()
    found = answered_rightly(written_run.setup, written_run.stages).tolist()
    right = tokens = 0
    for prompt, row, answers, success in zip(prompts, rows, accepted, found, strict=True):
        if prompt.split != "train":
            assert row["text"] is row["ended"] is row["new_tokens"] is None, "the others' answers are the evaluation's"
            assert not success
            continue
        ids = stock(model, tokenizer, prompt)
        assert row["text"] == decoded(tokenizer, ids)
        assert (row["new_tokens"], row["ended"]) == (len(ids), "end" if ids[-1] == tokenizer.eos_token_id else "length")
        assert success == bool(WRITTEN["exact_match"](row["text"], answers))
        right, tokens = right + success, tokens + len(ids)
    facts = extraction.manifest()["facts"]
    assert written_run.summary["neighborhoods"]["successful"] == right > 2
    assert facts["written"]["tokens"] == tokens
    assert facts["written"]["answers"] == sum(facts["written"][name] for name in ("end", "stop", "length"))


def test_base_and_tuned_write_to_the_same_questions_and_every_metric_is_literal(written_run: Run) -> None:
    stage, setup = written_run.stages["evaluate"], written_run.setup
    found = read_free(Path(stage.path / RESULTS))
    prompts = read_prompts(written_run.stages["questions"].path / TABLE)
    tokenizer, base, tuned = AutoTokenizer.from_pretrained(setup.model.path), whole(setup), whole(setup)
    head = load_slice(setup.model.path, dtype=torch.float32, with_lm_head=True)
    load_adapter(written_run.stages["finetune"].path / ADAPTER, head)
    tuned.load_state_dict(head.model.state_dict())
    for which, model in (("base", base), ("tuned", tuned)):
        texts = [decoded(tokenizer, stock(model, tokenizer, prompts[row])) for row in found.rows]
        assert list(found.texts[which]) == texts
        values = found.values(which)
        assert list(values) == ["exact_match", "greedy", "gold_logp", "contains", "f1", "rouge_l", "bleu"]
        scorer = rouge_scorer.RougeScorer(["rougeL"])
        for n, (text, accepted) in enumerate(zip(texts, found.accepted, strict=True)):
            for name in ("exact_match", "contains", "f1"):
                assert values[name][n] == float(WRITTEN[name](text, accepted))
            best = max(scorer.score(answer, text)["rougeL"].fmeasure for answer in accepted)
            assert values["rouge_l"][n] == pytest.approx(best)
            assert values["bleu"][n] == pytest.approx(sacrebleu.sentence_bleu(text, list(accepted)).score)
    figures = written_run.summary["measures"]["figures"]["exact_match"]["micro"]
    assert figures["base"] == pytest.approx(found.values("base")["exact_match"].mean())
    assert figures["base"] > 0.2
    assert figures["mcnemar_p"] is not None
    written = written_run.summary["free"]["written"]
    assert sum(written["tuned"].values()) == sum(written["base"].values()) == len(found.rows)
    assert tuple(written["base"]) == ("end", "stop", "length")


def test_a_killed_extraction_goes_on_to_the_same_answers(written_run: Run, tmp_path: Path) -> None:
    config: Config = written_run.setup.config.model_copy(update={"storage": str(tmp_path)})
    setup = resolve(config)
    made(QUESTIONS, setup)

    def stopping(work: Any, batches: Any) -> Any:
        yield from serial(work, batches[:2])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(EXTRACT, setup, Runners(extract=stopping))
    stage = made(EXTRACT, setup)
    assert stage.manifest()["files"][ROWS] == written_run.stages["extract"].manifest()["files"][ROWS]


def test_a_judges_verdicts_are_taken_from_the_rows(tmp_path: Path) -> None:
    verdicts = [None, True, False]
    rows = [{**row, "correct": verdicts[n % 3]} for n, row in enumerate(gsm8k(40))]
    sections = {"extraction": {"batch_tokens": 512, "success": {"metric": "verdict"}}}
    setup = resolve(free_world(tmp_path, rows, **sections))
    made(QUESTIONS, setup)
    extraction = made(EXTRACT, setup)
    found = answered_rightly(setup, {"questions": QUESTIONS.at(setup, {}), "extract": extraction})
    assert found.tolist() == [n % 3 == 1 for n in range(40)]
    assert "text" not in read_table(extraction.path / ROWS).column_names
    write_rows(tmp_path / "free.jsonl", gsm8k(40))
    with pytest.raises(QuestionError, match="no row has the field `correct`"):
        run(resolve(setup.config), Silence(), until="neighbors")


def test_another_metric_or_threshold_extracts_nothing_anew(written_run: Run) -> None:
    def places(**changes: Any) -> tuple[str, str]:
        success = written_run.setup.config.extraction.success.model_copy(update=changes)
        extraction = written_run.setup.config.extraction.model_copy(update={"success": success})
        config = written_run.setup.config.model_copy(update={"extraction": extraction})
        found = locate(dataclasses.replace(written_run.setup, config=config))
        return found["extract"].fingerprint, found["neighbors"].fingerprint

    exact = places()
    assert places(threshold=-3.0) == exact, "it does nothing here"
    assert places(metric="contains")[0] == exact[0]
    assert places(metric="contains")[1] != exact[1]
    likely = places(metric="likelihood")
    assert places(metric="likelihood", threshold=-3.0, max_new_tokens=9)[0] == likely[0] != exact[0]
    assert places(metric="likelihood", threshold=-3.0)[1] != likely[1]
    assert places(max_new_tokens=9)[0] != exact[0]


def test_texts_are_trained_on_by_all_their_tokens(tmp_path: Path) -> None:
    rows = [{"text": f"{row['question']} {row['answer']}"} for row in gsm8k(40)]
    config = free_world(tmp_path, rows)
    with pytest.raises(ConfigError, match=r"set routing\.tokens=Answer"):
        run(resolve(config), Silence())
    answer = config.model_copy(update={"routing": config.routing.model_copy(update={"tokens": ANSWER})})
    writing = answer.extraction.model_copy(update={"success": SuccessConfig()})
    with pytest.raises(ConfigError, match=r"set extraction\.success\.metric=likelihood"):
        run(resolve(answer.model_copy(update={"extraction": writing})), Silence())
    finished_run = run(resolve(answer), Silence())
    assert finished_run.summary["free"]["tokens"] > 300
    with pytest.raises(ConfigError, match=r"set routing\.tokens=Answer"):
        run(resolve(config), Silence())


def test_what_knows_choices_alone_refuses_free_questions(likely_run: Run, tmp_path: Path) -> None:
    setup, remedy = likely_run.setup, "ask questions with choices"
    with pytest.raises(ConfigError, match=remedy):
        compare(setup, ["base"], 1, Silence())
    with pytest.raises(ConfigError, match=remedy):
        write_routing(
            tmp_path / "r.json", setup, likely_run.stages["questions"], likely_run.stages["extract"], Silence()
        )
    base = tmp_path / "base.yaml"
    base.write_text(setup.config.to_yaml())
    (tmp_path / "space.yaml").write_text(f"base: {base}\ngrid: {{finetune.epochs: [1, 2]}}\n")
    with pytest.raises(ConfigError, match=remedy):
        make_plan(load_space(str(tmp_path / "space.yaml")))


def test_an_empty_s_names_what_decides_it(likely_run: Run) -> None:
    config = likely_run.setup.config
    success = config.extraction.success.model_copy(update={"threshold": 0.0})
    extraction = config.extraction.model_copy(update={"success": success})
    setup = dataclasses.replace(likely_run.setup, config=config.model_copy(update={"extraction": extraction}))
    with pytest.raises(NeighborError, match=r"extraction\.success\.metric: likelihood; `scores`"):
        run(setup, Silence())


def test_held_out_tasks_and_repeated_questions_are_told(tmp_path: Path) -> None:
    """The same words about another passage are no repeated question."""
    rows = [{**row, "task": "ab"[n % 2], "question": f"What lies in box {n // 4}?"} for n, row in enumerate(squad(48))]
    rows[1] = {**rows[3], "id": "copy", "split": "test"}
    sections = {"extraction": {"batch_tokens": 512, "success": {"metric": "likelihood", "threshold": -30}}}
    config = free_world(tmp_path, rows, **sections)
    questions = config.questions.model_copy(update={"held_out_tasks": ("b",), "sources": config.questions.sources})
    for row in rows[4::3]:
        row["split"] = "test"
    write_rows(tmp_path / "free.jsonl", rows)
    plain = run(resolve(config), Silence())
    assert plain.summary["guards"]["test_questions_in_training"] == {"exact": 1, "normalised": 1}
    done = run(resolve(config.model_copy(update={"questions": questions})), Silence(), until="report")
    assert set(done.summary["held_out"]["ctgi"]) == {"likelihood", "gold_logp"}
    assert "CTGI" in (done.stages["report"].path / "report.md").read_text()


def test_the_report_shows_the_measures(likely_run: Run) -> None:
    done = run(likely_run.setup, Silence(), until="report")
    page = (done.stages["report"].path / "report.md").read_text()
    assert "Perplexity of the answers" in page
    assert "gold_logp" in page
    assert "Which answers are given" not in (done.stages["report"].path / "report.html").read_text()
    card = (done.stages["report"].path / "model_card.md").read_text()
    assert "in free text" in card
    assert "multiple-choice" not in card
    json.dumps(done.summary, allow_nan=False)
