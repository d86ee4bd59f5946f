"""`roma-ray repair`: a pruned model against the whole one, from the command to its figures and exports."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from jobs.prune_experts import write_pruned
from roma_ray.cli.commands import main
from roma_ray.config.repair_settings import asked_config, repair_config
from roma_ray.engine.question_table import TABLE, read_prompts
from roma_ray.moe.slices import load_slice, model_facts
from roma_ray.runs.repair import Repair
from roma_ray.stages.repairing import change_a_token
from tests.stages.test_teaching import texts
from tests.world import make_world

KEPT = {0: range(8), 1: range(6), 2: range(5), 3: range(8), 4: range(7), 5: (1, 2, 3, 5, 6)}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def repaired(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """The command's folder, its summary and what it printed."""
    root = tmp_path_factory.mktemp("repair")
    config = make_world(root, "olmoe", count=30)
    write_pruned(str(root / "model"), root / "pruned", {layer: list(found) for layer, found in KEPT.items()}, 8)
    command = [
        *("repair", str(root / "pruned"), "--teacher", str(root / "model")),
        *("--texts", write(root / "texts.jsonl", texts(60)), "--questions", str(root / "questions.jsonl")),
        *("--storage", str(root / "storage"), "--summary", str(root / "found.json"), "--merged", str(root / "merged")),
        *(
            "--set",
            f"embedding.model={config.embedding.model}",
            "--set",
            "device=cpu",
            "--set",
            "finetune.batch_size=8",
        ),
        *("--set", "finetune.epochs=4", "--set", "finetune.learning_rate=0.01", "--set", "model.dtype=float32"),
    ]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    return root, json.loads((root / "found.json").read_text()), done.output


def test_the_figures_are_those_of_literal_passes(repaired: tuple[Path, dict[str, Any], str]) -> None:
    """Teacher by stock transformers, students by whole slices, text by text and token by token."""
    root, found, _ = repaired
    table = next((root / "storage" / "questions").glob(f"*/{TABLE}"))
    prompts = [p for p in read_prompts(table) if p.split == "test"]
    teacher = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32)
    before, after = (
        load_slice(str(root / name), dtype=torch.float32, with_lm_head=True).model for name in ("pruned", "merged")
    )
    nll: dict[str, list[float]] = {"teacher": [], "before": [], "after": []}
    agreed: dict[str, list[bool]] = {"before": [], "after": []}
    for prompt in prompts:
        ids = torch.tensor([[*prompt.prompt_ids, *prompt.choice_ids[0]]])
        start = len(prompt.prompt_ids) - 1
        with torch.no_grad():
            logits = {
                name: model(input_ids=ids).logits[0, start:-1]
                for name, model in (("teacher", teacher), ("before", before), ("after", after))
            }
        for place, token in enumerate(prompt.choice_ids[0]):
            for name, logits_GV in logits.items():
                nll[name].append(-float(logits_GV[place].log_softmax(-1)[token]))
                if name != "teacher":
                    agreed[name].append(bool(logits_GV[place].argmax() == logits["teacher"][place].argmax()))
    assert (found["texts"], found["tokens"]) == (len(prompts), len(nll["teacher"]))
    for name, values in nll.items():
        assert found[name]["nll"] == pytest.approx(np.mean(values), rel=1e-4)
        assert found[name]["perplexity"] == pytest.approx(math.exp(np.mean(values)), rel=1e-4)
    for name, verdicts in agreed.items():
        assert found[name]["agreement"] == pytest.approx(np.mean(verdicts), abs=1e-9)
    assert found["change"]["nll"]["difference"] == pytest.approx(found["after"]["nll"] - found["before"]["nll"])


def test_the_student_comes_nearer_to_its_teacher(repaired: tuple[Path, dict[str, Any], str]) -> None:
    _, found, output = repaired
    assert found["after"]["divergence"] < found["before"]["divergence"]
    assert found["change"]["divergence"]["stderr"] > 0
    for word in ("teacher", "before", "after", "adapter:", "merged:", "30 questions: right answers"):
        assert word in output
    answers = found["answers"]
    assert answers["questions"] == 30
    assert 0 <= answers["agreement"]["base"] <= 1


def test_only_routers_differ_in_the_merged_model(repaired: tuple[Path, dict[str, Any], str]) -> None:
    root, _, _ = repaired
    assert model_facts(str(root / "merged"))["experts_by_layer"] == [len(kept) for kept in KEPT.values()]
    one, two = (load_slice(str(root / n), dtype=torch.float32, with_lm_head=True).model for n in ("pruned", "merged"))
    moved = {
        name
        for (name, mine), theirs in zip(one.named_parameters(), two.parameters(), strict=True)
        if not torch.equal(mine, theirs)
    }
    assert moved == {f"model.layers.{layer}.mlp.gate.weight" for layer in range(6)}


def test_a_second_call_computes_nothing(repaired: tuple[Path, dict[str, Any], str]) -> None:
    root, found, _ = repaired
    stamps = {file: file.stat().st_mtime_ns for file in (root / "storage").rglob("manifest.json")}
    assert {file.parent.parent.name for file in stamps} >= {"teacher", "finetune", "repair"}
    made = [
        *("repair", str(root / "pruned"), "--teacher", str(root / "model")),
        *("--texts", str(root / "texts.jsonl"), "--questions", str(root / "questions.jsonl")),
        *(
            "--storage",
            str(root / "storage"),
            "--summary",
            str(root / "again.json"),
            "--set",
            f"embedding.model={root}/encoder",
        ),
        *("--set", "device=cpu", "--set", "finetune.batch_size=8", "--set", "finetune.epochs=4"),
        *("--set", "finetune.learning_rate=0.01", "--set", "model.dtype=float32"),
    ]
    done = CliRunner().invoke(main, made)
    assert done.exit_code == 0, done.output
    assert json.loads((root / "again.json").read_text()) == found
    assert {file: file.stat().st_mtime_ns for file in (root / "storage").rglob("manifest.json")} == stamps


def test_standard_errors_are_over_texts() -> None:
    before, after = np.array([2.0, 4.0, 9.0]), np.array([1.0, 5.0, 6.0])
    tokens = np.array([2.0, 3.0, 5.0])
    found = change_a_token(before, after, tokens)
    mean = -3 / 10
    spread = sum((float(a - b) - mean * float(t)) ** 2 for b, a, t in zip(before, after, tokens, strict=True))
    assert found["difference"] == pytest.approx(mean)
    assert found["stderr"] == pytest.approx(math.sqrt(3 / 2 * spread) / 10)


def test_what_a_repair_configures(tmp_path: Path) -> None:
    config = repair_config("student", "teacher", ["a.jsonl", "b.jsonl"], None, ["routing.layers=L2"])
    tuned = config.finetune
    assert (tuned.task_loss, tuned.distill.teacher, tuned.regularizer.kind) == ("distill", "teacher", "none")
    assert (config.routing.tokens, config.routing.layers, config.questions.prompt.format) == ("Answer", "L2", "free")
    assert [source.path for source in config.questions.sources] == ["a.jsonl", "b.jsonl"]
    # A file's settings stay, but for what makes it a repair; the manifold term may ride along.
    file = tmp_path / "own.yaml"
    file.write_text("finetune: {epochs: 7, regularizer: {kind: manifold, weight: 0.5}}\nrouting: {layers: L3}\n")
    config = repair_config("student", None, ["a.jsonl"], str(file), [])
    assert (config.finetune.epochs, config.finetune.regularizer.weight, config.routing.layers) == (7, 0.5, "L3")
    assert (config.finetune.distill.teacher, config.finetune.task_loss) == (None, "distill")
    asked = asked_config(config, "q.jsonl", "letter")
    assert (asked.model.path, asked.questions.prompt.format) == ("student", "letter")


def test_words_say_when_nothing_came_back() -> None:
    one = {"difference": 0.1, "stderr": 0.05}
    found = {
        "texts": 3,
        "tokens": 30,
        "teacher": {"nll": 1.0, "perplexity": math.e},
        "before": {"nll": 2.0, "perplexity": 7.4, "agreement": 0.5, "divergence": 0.3},
        "after": {"nll": 2.1, "perplexity": 8.2, "agreement": 0.6, "divergence": 0.2},
        "change": {"nll": one, "agreement": one, "divergence": one},
        "answers": None,
    }
    assert "nothing came back" in Repair({}, found).words()[0]
    found["change"] = {**found["change"], "nll": {"difference": -0.5, "stderr": 0.05}}
    assert "50.0 % came back" in Repair({}, found).words()[0]
