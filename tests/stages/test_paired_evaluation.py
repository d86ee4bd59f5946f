"""The paired evaluation judges the exported adapter, on the same questions, and refuses a tuned model equal to its base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from roma_ray.borders.text import with_error
from roma_ray.config.schema import QuestionSource
from roma_ray.engine.progress import Silence
from roma_ray.engine.question_table import QUESTIONS as QUESTION_COLUMNS
from roma_ray.engine.question_table import TABLE, read_prompts, read_table, write_table
from roma_ray.engine.runners import LOCAL
from roma_ray.engine.scoring import Scores
from roma_ray.engine.setup import resolve
from roma_ray.engine.steps import complete
from roma_ray.engine.work import Job
from roma_ray.errors import ArtifactError, QuestionError
from roma_ray.evaluation.guards import occurring
from roma_ray.evaluation.measures import figure_cells
from roma_ray.evaluation.results_file import RESULTS
from roma_ray.evaluation.run_comparison import MACRO, compare_columns, open_columns
from roma_ray.questions.held_out import UNUSED
from roma_ray.runs.pipeline import Run, run
from roma_ray.stages import paired_evaluation
from roma_ray.stages.finetuning import ADAPTER, read_routing_rows
from roma_ray.stages.neighborhoods import read_neighborhoods
from roma_ray.stages.paired_evaluation import EVALUATE, _guards, by_task, evaluation_pin
from roma_ray.stages.preparation import QUESTIONS
from roma_ray.stages.routing_change import describe_distance
from roma_ray.stages.run_summary import result_rows, warnings_of
from roma_ray.store.artifacts import Stage
from tests.making import made
from tests.progress import Told
from tests.world import make_world


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(resolve(make_world(tmp_path_factory.mktemp("paired"))), Silence())


def test_without_a_test_question_that_came_through_nothing_is_judged(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = read_prompts(finished.stages["questions"].path / TABLE)
    monkeypatch.setattr(paired_evaluation, "usable_rows", lambda _: torch.from_numpy(~prompts.splits.mask(["test"])))
    stage = Stage(tmp_path / ("0" * 16), "evaluate", {})
    with pytest.raises(QuestionError, match="no test question came through"):
        paired_evaluation.evaluate(Job(finished.setup, finished.stages, stage), LOCAL, Silence())


def test_progress_counts_tokens_for_the_longest_questions_run_first(finished: Run, tmp_path: Path) -> None:
    """With the base's scores kept from an earlier evaluation, what they took counts as done."""
    storage = Path(str(finished.setup.config.storage))
    shutil.copytree(storage, tmp_path / "storage")
    setup = resolve(finished.setup.config.model_copy(update={"storage": str(tmp_path / "storage")}))
    told = []
    for again in (("evaluate", "base"), ("evaluate",)):
        for name in again:
            shutil.rmtree(tmp_path / "storage" / name)
        told.append(Told())
        made(EVALUATE, setup, progress=told[-1])
    first, second = (progress.meters["evaluate"] for progress in told)
    assert first[:2] == second[:2]
    assert (first[1], first[2]) == ("tokens", 0)
    assert sum(told[0].counted) == first[0]
    assert second[2] > 0
    assert second[2] + sum(told[1].counted) == second[0]
    prompts = read_prompts(finished.stages["questions"].path / TABLE)
    assert first[0] > sum(len(prompt.prompt_ids) for prompt in prompts if prompt.split == "test")


def adapter_of(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.stages["finetune"].path / ADAPTER / "adapter_model.safetensors")


def test_tuned_answers_are_those_of_the_whole_model_with_the_exported_routers(finished: Run) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        finished.setup.model.path, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    prompts = read_prompts(finished.stages["questions"].path / TABLE)
    rows = read_table(finished.stages["evaluate"].path / RESULTS).to_pylist()
    tensors = adapter_of(finished)
    with torch.no_grad():
        for layer in finished.setup.layers:
            (key,) = [k for k in tensors if f"layers.{layer}." in k]
            model.model.layers[layer].mlp.gate.weight.copy_(tensors[key])
    for row in rows[::5]:
        prompt = prompts[row["row"]]
        with torch.inference_mode():
            logits = model(torch.tensor([prompt.prompt_ids]), use_cache=False).logits[0, -1].float()
        expected = torch.log_softmax(logits, -1)[[c[0] for c in prompt.choice_ids]]
        assert row["tuned_scores"] == pytest.approx(expected.tolist(), abs=1e-4)


def test_every_measure_and_share_is_recomputed_from_the_stored_scores(finished: Run) -> None:
    rows = [r for r in read_table(finished.stages["evaluate"].path / RESULTS).to_pylist() if r["split"] == "test"]
    prompts = read_prompts(finished.stages["questions"].path / TABLE)
    found = finished.summary["measures"]
    # Letters: both rules choose the same, which is said and not shown twice.
    assert (found["configured"], found["coincide"]) == ("acc", True)
    assert list(found["figures"]) == ["acc", "gold_logp", "choice_logp"]
    overall = finished.summary["splits"]["test"]["all"]
    micro = found["figures"]["acc"]["micro"]
    assert (micro["tuned"], micro["difference"]) == (overall["tuned_accuracy"], overall["difference"])
    for which in ("base", "tuned"):
        gold = [r[f"{which}_scores"][r["answer"]] / len(prompts[r["row"]].choice_ids[r["answer"]]) for r in rows]
        assert found["figures"]["gold_logp"]["micro"][which] == pytest.approx(np.mean(gold))
        among = [
            r[f"{which}_scores"][r["answer"]] - np.log(np.exp(np.float64(r[f"{which}_scores"])).sum()) for r in rows
        ]
        assert found["figures"]["choice_logp"]["micro"][which] == pytest.approx(np.mean(among))
    for task, shares in finished.summary["shares"].items():
        own = [r for r in rows if r["task"] == task]
        for n, letter in enumerate(shares["positions"]):
            share = sum(r["tuned_prediction"] == n for r in own) / len(own)
            assert shares["positions"][letter]["tuned"] == pytest.approx(share)


def test_the_result_is_printed_on_80_columns_with_every_measure(
    finished: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    from roma_ray.cli.printing import print_result

    print_result(finished.summary)
    shown = capsys.readouterr().out
    drawn = [line for line in shown.splitlines() if line[:1] in "│┃┏┡└"]
    assert max(map(len, drawn)) <= 80
    for name, found in finished.summary["measures"]["figures"].items():
        mark = "*" if name == "acc" else ""
        row = next(line for line in drawn if line.startswith(f"│ {name}{mark} "))
        assert figure_cells(name, found["micro"])[2] in row
    assert sum("│   macro " in line for line in drawn) == 3
    assert "acc and acc_norm are the same" in shown
    assert "beyond what shrinks anyway" in shown
    valid = finished.summary["validation"]
    assert f"exported epoch {with_error(valid['tuned_accuracy'], valid['tuned_stderr'])} %" in shown


def test_a_run_is_compared_with_its_base_by_every_measure(finished: Run) -> None:
    folder = finished.stages["evaluate"].path
    found = compare_columns(open_columns([str(folder)], finished.setup.store, lambda name: None))
    rows = {(row.task, row.metric): row for row in found.rows}
    for name, figures in finished.summary["measures"]["figures"].items():
        for task, one in [*figures["tasks"].items(), (MACRO, figures["macro"])]:
            row = rows[task, name]
            assert row.configured == (name == "acc")
            assert row.cells[1] is not None
            assert row.cells[1].score == pytest.approx(one["tuned"])
            assert row.cells[1].difference == pytest.approx(one["difference"])


def copy_with_adapter(finished: Run, target: Path, scale: float) -> Stage:
    """The finetune stage with its adapter's tensors moved by a factor, or back to the base's for 0."""
    source = finished.stages["finetune"]
    shutil.copytree(source.path, target / source.fingerprint)
    file = target / source.fingerprint / ADAPTER / "adapter_model.safetensors"
    base = AutoModelForCausalLM.from_pretrained(finished.setup.model.path, dtype=torch.float32)
    tensors = {}
    for key, value in load_file(file).items():
        layer = next(n for n in finished.setup.layers if f"layers.{n}." in key)
        start = base.model.layers[layer].mlp.gate.weight.detach()
        tensors[key] = (start + scale * (value - start)).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    (target / source.fingerprint / ADAPTER / "roma.json").unlink(missing_ok=True)
    shutil.copy(source.path / ADAPTER / "roma.json", target / source.fingerprint / ADAPTER / "roma.json")
    return Stage(target / source.fingerprint, "finetune", {})


def test_a_tampered_adapter_is_refused(finished: Run, tmp_path: Path) -> None:
    tampered = copy_with_adapter(finished, tmp_path / "finetune", 0.0)
    setup = resolve(finished.setup.config.model_copy(update={"storage": str(tmp_path / "storage")}))
    stages = {**finished.stages, "finetune": tampered}
    job = Job(setup, stages, EVALUATE.at(setup, stages))
    with pytest.raises(Exception, match=r"was changed|equal the base"):
        complete(EVALUATE, job, LOCAL, Silence())


def test_splits_and_tasks_add_up(finished: Run) -> None:
    for split, tasks in finished.summary["splits"].items():
        assert tasks["all"]["n"] == sum(f["n"] for name, f in tasks.items() if name != "all"), split
    rows = read_table(finished.stages["evaluate"].path / RESULTS).to_pylist()
    test = [r for r in rows if r["split"] == "test"]
    figures = finished.summary["splits"]["test"]["all"]
    assert figures["base_accuracy"] == pytest.approx(sum(r["base_correct"] for r in test) / len(test))
    assert figures["tuned_accuracy"] == pytest.approx(sum(r["tuned_correct"] for r in test) / len(test))
    table = result_rows(finished.summary["splits"]["test"])
    assert table[-1][0] == "all"
    assert table[-1][1] == str(len(test))


def test_base_answers_equal_those_of_extraction(finished: Run) -> None:
    rows = read_table(finished.stages["evaluate"].path / RESULTS).to_pylist()
    extracted = (
        read_table(finished.stages["extract"].path / "rows.parquet", ["prediction"]).column("prediction").to_pylist()
    )
    assert [r["base_prediction"] for r in rows] == [extracted[r["row"]] for r in rows]


def test_the_pin_follows_the_questions(finished: Run) -> None:
    prompt = {"format": "letter"}
    stage = finished.stages["questions"]
    assert evaluation_pin(stage, prompt, [0, 1]) == evaluation_pin(stage, prompt, [0, 1])
    assert evaluation_pin(stage, prompt, [0, 1]) != evaluation_pin(stage, prompt, [0, 2])
    assert evaluation_pin(stage, prompt, [0, 1]) != evaluation_pin(stage, {"format": "cloze"}, [0, 1])


def test_the_guards_are_those_of_all_questions_side_by_side(finished: Run, tmp_path: Path) -> None:
    """Of a table with repeated questions and shortened prompts, a task of which is held out."""
    table = read_table(finished.stages["questions"].path / TABLE)
    rows = table.to_pylist()
    for n, row in enumerate(rows):
        row["question"] = "Which!" if row["split"] == "test" and n % 5 == 0 else "Which?"
        row["choices"], row["truncated"] = [f"this {n // 9}", "that"][:: 1 if n % 4 else -1], n % 5 == 0
    stage = Stage(tmp_path, "questions", {})
    write_table(tmp_path / TABLE, {name: [row[name] for row in rows] for name in table.column_names}, QUESTION_COLUMNS)
    prompts = read_prompts(tmp_path / TABLE, held_out=[rows[0]["task"]])
    test = prompts.rows_of("test")
    right = np.arange(len(test)) % 2 == 0
    scores = Scores(test, [], [], right, np.zeros((len(test), 1, 1), dtype=np.float32))
    parts: dict[str, list[Any]] = {}
    for row, prompt in zip(rows, prompts, strict=True):
        parts.setdefault(prompt.split, []).append((row["question"], row["choices"]))
    found = _guards(stage, prompts, test, scores, scores)
    expected = occurring(parts["train"], enumerate(parts["test"]), lambda _, choices, others: choices == others)
    assert UNUSED in parts
    assert found["test_questions_in_training"] == {name: len(keys) for name, keys in expected.items()}
    assert 0 < found["test_questions_in_training"]["exact"] < found["test_questions_in_training"]["normalised"]
    assert found["truncated"] == sum(prompt.truncated for prompt in prompts) > 0
    assert found["too_many_truncated"]
    assert json.dumps(found)


def test_grouping() -> None:
    found = by_task(["a", "b", "a"], np.array([True, True, False]), np.array([True, False, True]))
    assert list(found) == ["all", "a", "b"]
    assert found["a"] == found["a"] | {"n": 2, "won": 1, "lost": 0}
    assert found["all"]["n"] == 3


def test_only_what_is_read_is_scored(finished: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tuned routers answer the test questions and a sample of the trained ones; validation was measured in training."""
    from roma_ray.stages import answer_work, routing_change

    asked: dict[str, list[int]] = {}
    score = answer_work.Answerer._score

    def noting(self: answer_work.Answerer, section: str, part: int, planned: answer_work.Part) -> None:
        asked.setdefault(section, []).extend(planned.rows)
        score(self, section, part, planned)

    monkeypatch.setattr(answer_work.Answerer, "_score", noting)
    monkeypatch.setattr(routing_change, "TRAINED_ROWS", 5)
    storage = tmp_path / "storage"
    shutil.copytree(finished.setup.store.root, storage)
    for stage in ("evaluate", "base"):
        shutil.rmtree(storage / stage)
    again = run(resolve(finished.setup.config.model_copy(update={"storage": str(storage)})), Silence())
    prompts = read_prompts(finished.stages["questions"].path / TABLE)
    assert list(asked) == ["base", "tuned", "trained"]
    base, tuned, trained = asked.values()
    assert {prompts[row].split for row in base} == {"validation", "test"}
    assert {prompts[row].split for row in tuned} == {"test"}
    assert {prompts[row].split for row in trained} == {"train"}
    assert len(trained) == 5
    assert again.summary["splits"] == finished.summary["splits"]
    table = read_table(again.stages["evaluate"].path / RESULTS)
    assert set(table.column("split").to_pylist()) == {"test"}
    valid, epochs = again.summary["validation"], again.summary["epochs"]
    exported = epochs[again.summary["selected_epoch"]]
    assert (valid["tuned_accuracy"], valid["tuned_stderr"]) == (
        exported["validation_accuracy"],
        exported["validation_stderr"],
    )
    n, share = valid["n"], valid["tuned_accuracy"]
    assert n == sum(p.split == "validation" for p in prompts)
    assert valid["tuned_stderr"] == pytest.approx((share * (1 - share) / (n - 1)) ** 0.5)


def test_the_trained_distance_is_of_live_against_stored_routing(finished: Run) -> None:
    found = finished.summary["diagnostics"]["manifold_distance"]
    rows = read_table(finished.stages["evaluate"].path / RESULTS)
    width = len(finished.setup.layers)
    live = np.array(rows.column("tuned_routing").to_pylist())
    stored = read_routing_rows(finished.stages["extract"].path, finished.setup.config.routing.tokens)
    stored = stored[:, list(finished.setup.layer_columns)].flatten(1).numpy()
    assert live.shape[1] == stored.shape[1] == width * (live.shape[1] // width)
    for split in ("train", "test"):
        assert found[split]["questions"] > 0
        for name in ("neighbors", "random"):
            one = found[split][name]
            assert one["relative"] == pytest.approx(one["tuned"] / one["base"] - 1)
        pull = found[split]["neighbors"]["relative"] - found[split]["random"]["relative"]
        assert found[split]["pull"]["relative"] == pytest.approx(pull)
    # Of the trained questions' base: stored against stored, eq. 7 by hand.
    near = read_neighborhoods(finished.stages["neighbors"], len(stored))
    by_hand = []
    for row in near.queried.nonzero()[:, 0].tolist():
        others, _, weights = near.of(row)
        squares = ((stored[row] - stored[others.numpy()]).astype(np.float64) ** 2).sum(1)
        by_hand.append(float(squares @ weights.numpy()))
    assert found["train"]["neighbors"]["base"] == pytest.approx(np.mean(by_hand))
    lines = describe_distance({"train": found["train"], "test": None})
    assert len(lines) == 1
    assert "trained questions" in lines[0]


def test_warnings_name_what_a_reader_must_know(finished: Run) -> None:
    summary = {
        **finished.summary,
        "guards": {
            "identical_scores": False,
            "at_chance": ["base/all"],
            "below_chance": ["base/boolq"],
            "truncated": 9,
            "too_many_truncated": True,
            "test_questions_in_training": {"exact": 1, "normalised": 2},
        },
        "rejected": 3,
        "errors": 4,
    }
    text = "\n".join(warnings_of(summary))
    for part in ("at chance", "points at the prompt", "9 prompts", "2 test questions", "3 rows", "4 questions"):
        assert part in text


def test_the_pin_follows_the_split(finished: Run, tmp_path: Path) -> None:
    pins = []
    for seed in (0, 1):
        source = tmp_path / "plain.jsonl"
        rows = [
            json.loads(line)
            for line in Path(finished.setup.config.questions.sources[0].path or "").read_text().splitlines()
        ]
        source.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "split"}) + "\n" for row in rows))
        questions = finished.setup.config.questions.model_copy(update={"sources": (QuestionSource(path=str(source)),)})
        config = finished.setup.config.model_copy(
            update={"questions": questions, "seed": seed, "storage": str(tmp_path / "s")}
        )
        pins.append(evaluation_pin(made(QUESTIONS, resolve(config)), {}, range(len(rows))))
    assert pins[0] != pins[1]


@pytest.mark.parametrize(
    "part", ["extract/*/batches/000000.*.safetensors", "finetune/*/adapter/adapter_model.safetensors"]
)
def test_a_finished_artifact_that_changed_is_refused_on_the_next_run(tmp_path: Path, part: str) -> None:
    setup = resolve(make_world(tmp_path, count=30))
    run(setup, Silence())
    (file,) = setup.store.root.glob(part)
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match="not what was written"):
        run(setup, Silence())
