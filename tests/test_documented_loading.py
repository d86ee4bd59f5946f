"""What the model card and README tell a reader to do gives the model whose figures they show."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest
import torch

from roma_ray.engine.progress import Silence
from roma_ray.engine.question_table import TABLE, read_prompts, read_table
from roma_ray.engine.setup import resolve
from roma_ray.moe.exporting import export_routers
from roma_ray.runs.pipeline import Run, run
from roma_ray.stages.paired_evaluation import RESULTS
from tests.world import make_world

# A reader with transformers and peft: what the snippet calls `model` scores each lettered choice after the prompt.
_READER = """
import json, sys
sys.modules["roma_ray"] = None
import torch
snippets, questions = json.load(open("snippets.json")), json.load(open("questions.json"))
found = {}
for name, code in snippets.items():
    names = {}
    exec(code, names)
    answers = []
    with torch.inference_mode():
        for prompt, choices in questions:
            # A letter is one token: all choices are read after the same ones.
            assert all(len(choice) == 1 for choice in choices)
            logits = names["model"](torch.tensor([prompt])).logits[0, -1].float()
            answers.append(torch.log_softmax(logits, -1)[[choice[0] for choice in choices]].tolist())
    found[name] = answers
json.dump(found, open("found.json", "w"))
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A checkpoint in bf16, tuned and judged in fp32."""
    root = tmp_path_factory.mktemp("documented")
    config = make_world(root, dtype=torch.bfloat16, count=33, finetune={"epochs": 1})
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "float32"})})
    return run(resolve(config), Silence(), until="report")


def snippet_of(card: str) -> str:
    """The card's one block of Python."""
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return str(code)


@pytest.fixture(scope="module")
def read(finished: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[float]]]:
    """Scores of the test questions as a reader gets them: by the card, by the merged export, by the card without its dtype."""
    folder = tmp_path_factory.mktemp("reader")
    adapter = finished.stages["finetune"].path / "adapter"
    (folder / "model").symlink_to(finished.setup.model.path)
    (folder / "adapter").symlink_to(adapter)
    export_routers(adapter, folder / "merged", form="merged")
    code = snippet_of((finished.stages["report"].path / "model_card.md").read_text())
    snippets = {
        "card": code,
        "merged": 'from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained("merged")',
        "careless": code.replace(", dtype=torch.float32", ""),
    }
    assert snippets["careless"] != code
    prompts = read_prompts(finished.stages["questions"].path / TABLE)
    asked = [prompts[row["row"]] for row in judged(finished)]
    (folder / "snippets.json").write_text(json.dumps(snippets))
    (folder / "questions.json").write_text(
        json.dumps([[list(p.prompt_ids), [*map(list, p.choice_ids)]] for p in asked])
    )
    done = subprocess.run(
        [sys.executable, "-c", _READER], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, list[list[float]]] = json.loads((folder / "found.json").read_text())
    return found


def judged(finished: Run) -> list[dict[str, Any]]:
    """The test questions' results."""
    rows = read_table(finished.stages["evaluate"].path / RESULTS).to_pylist()
    return [row for row in rows if row["split"] == "test"]


def answers(scores: list[list[float]]) -> list[int]:
    return [max(range(len(row)), key=row.__getitem__) for row in scores]


@pytest.mark.parametrize("way", ["card", "merged"])
def test_the_documented_ways_give_the_table_s_accuracy(finished: Run, read: dict[str, Any], way: str) -> None:
    rows = judged(finished)
    assert answers(read[way]) == [row["tuned_prediction"] for row in rows]
    accuracy = sum(a == row["answer"] for a, row in zip(answers(read[way]), rows, strict=True)) / len(rows)
    assert accuracy == finished.summary["splits"]["test"]["all"]["tuned_accuracy"]
    assert f"{100 * accuracy:.2f}" in (finished.stages["report"].path / "model_card.md").read_text()
    for mine, row in zip(read[way], rows, strict=True):
        assert mine == pytest.approx(row["tuned_scores"], abs=1e-4)


def test_the_type_makes_the_difference(finished: Run, read: dict[str, Any]) -> None:
    """Else the test above could not fail."""
    pairs = zip(read["careless"], judged(finished), strict=True)
    assert max(abs(a - b) for mine, row in pairs for a, b in zip(mine, row["tuned_scores"], strict=True)) > 1e-2
