"""The paired evaluation judges the exported adapter, on the same questions, and refuses a tuned model equal to its base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from roma_ray.artifacts import Stage
from roma_ray.config import QuestionSource
from roma_ray.engine.finetuning import ADAPTER
from roma_ray.engine.prepare import TABLE, prepare
from roma_ray.engine.progress import Silence
from roma_ray.engine.setup import resolve
from roma_ray.engine.tables import read_prompts, read_table
from roma_ray.errors import ArtifactError
from roma_ray.evaluation.judged import RESULTS
from roma_ray.evaluation.paired import by_split_and_task, evaluate, evaluation_pin
from roma_ray.evaluation.summary import result_rows, warnings_of
from roma_ray.pipeline import Run, run
from tests.world import make_world


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(resolve(make_world(tmp_path_factory.mktemp("paired"))), Silence())


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
    parts = [finished.stages[n] for n in ("questions", "extract", "embed", "neighbors")]
    with pytest.raises(Exception, match=r"was changed|equal the base"):
        evaluate(setup, *parts, tampered, Silence())


def test_splits_and_tasks_add_up(finished: Run) -> None:
    for split, tasks in finished.summary["splits"].items():
        assert tasks["all"]["n"] == sum(f["n"] for name, f in tasks.items() if name != "all"), split
    rows = read_table(finished.stages["evaluate"].path / RESULTS).to_pylist()
    test = [r for r in rows if r["split"] == "test"]
    figures = finished.summary["splits"]["test"]["all"]
    assert figures["base_accuracy"] == pytest.approx(sum(r["base_correct"] for r in test) / len(test))
    assert figures["tuned_accuracy"] == pytest.approx(sum(r["tuned_correct"] for r in test) / len(test))
    table = result_rows(finished.summary)
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


def test_grouping() -> None:
    keys = [("test", "a"), ("train", "a"), ("test", "b"), ("test", "a")]
    found = by_split_and_task(keys, np.array([True, False, True, False]), np.array([True, True, False, True]))
    assert list(found) == ["train", "test"]
    assert found["test"]["a"] == found["test"]["a"] | {"n": 2, "won": 1, "lost": 0}
    assert found["test"]["all"]["n"] == 3


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
        pins.append(evaluation_pin(prepare(resolve(config), Silence()), {}, range(len(rows))))
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
