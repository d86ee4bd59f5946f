"""Data of GSM8K's and SQuAD's form from end to end by the command, on the embedded model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from roma_ray.assets import assets_path
from roma_ray.cli.commands import main
from tests.free_world import gsm8k, write_rows


def facts(count: int) -> list[dict[str, Any]]:
    """Questions of the embedded suite without their choices, in SQuAD's form."""
    rows = [json.loads(line) for line in (assets_path() / "questions" / "train.jsonl").read_text().splitlines()]
    found = []
    for row in [row for row in rows if row["task"] in ("color", "food")][:count]:
        right = row["choices"]["ABCDEFGH".index(row["answer"])]
        found.append({"question": row["question"], "answers": {"text": [right], "answer_start": [0]}, "id": row["id"]})
    return found


@pytest.mark.parametrize(
    ("rows", "success", "measures"),
    [
        # It cannot reckon and knows no `####`: every sum is at chance, and success is set to what it reaches.
        (gsm8k(60), {"metric": "likelihood", "threshold": -30}, ["likelihood", "greedy", "gold_logp"]),
        (
            facts(120),
            {"metric": "contains", "max_new_tokens": 3},
            ["contains", "greedy", "gold_logp", "exact_match", "f1", "rouge_l", "bleu"],
        ),
    ],
    ids=["gsm8k", "squad"],
)
def test_a_file_runs_from_end_to_end(
    rows: list[dict[str, Any]], success: dict[str, Any], measures: list[str], tmp_path: Path
) -> None:
    config = {
        "model": {"path": "assets:model", "dtype": "float32"},
        "questions": {
            "sources": [{"path": str(write_rows(tmp_path / "rows.jsonl", rows))}],
            "prompt": {"format": "free"},
        },
        "extraction": {"success": success},
        "finetune": {"epochs": 2, "learning_rate": 5e-3},
        "tracking": {"enabled": False},
        "evaluation": {"task_loss_alone": measures[0] == "contains"},
    }
    (tmp_path / "free.yaml").write_text(yaml.safe_dump(config))
    arguments = ["--config", str(tmp_path / "free.yaml"), "--storage", str(tmp_path / "storage")]
    done = CliRunner().invoke(
        main, ["run", *arguments, "--address", "local", "--summary", str(tmp_path / "summary.json")]
    )
    assert done.exit_code == 0, done.output
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary["measures"]["figures"]) == measures
    assert summary["measures"]["configured"] == measures[0]
    assert "nats a token" in done.output
    test = summary["splits"]["test"]["all"]
    assert test["n"] == len(rows) // 5
    if measures[0] == "contains":
        assert test["base_accuracy"] > 0.2, "it was told these facts"
        assert "Written answers that were cut" in done.output
        alone = summary["task_loss_alone"]
        assert alone["alone"]["base"] == test["base_accuracy"]
        assert alone["added"]["tuned"] == test["tuned_accuracy"]
        assert set(alone) == {"alone", "added", "tasks", "gold_logp"}
    # The base beside the tuned model, as of any run.
    run = summary["fingerprints"]["evaluate"]
    compared = CliRunner().invoke(main, ["compare", f"{run}:base", run, "--storage", str(tmp_path / "storage")])
    assert compared.exit_code == 0, compared.output
    assert "gold_logp" in compared.output
