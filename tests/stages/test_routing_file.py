"""An extraction's routing, written in the reference's form and read back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from roma_ray.cli.commands import main
from roma_ray.engine.progress import Silence
from roma_ray.engine.question_table import TABLE, read_table
from roma_ray.engine.setup import resolve
from roma_ray.errors import ArtifactError, ConfigError
from roma_ray.moe.routing_json import read_routing_json
from roma_ray.runs.pipeline import Run
from roma_ray.stages.finetuning import read_routing_rows
from roma_ray.stages.routing_file import write_routing


def test_every_layer_and_expert_of_every_question(letter_run: Run, tmp_path: Path) -> None:
    setup, stages = letter_run.setup, letter_run.stages
    count = write_routing(tmp_path / "r.json", setup, stages["questions"], stages["extract"], Silence())
    entries = read_routing_json(tmp_path / "r.json", layers=setup.moe_layers, num_experts=8)
    rows = read_table(stages["questions"].path / TABLE).to_pylist()
    extracted = read_table(stages["extract"].path / "rows.parquet", ["prediction", "is_correct"]).to_pylist()
    assert count == len(entries) == len(rows)
    assert setup.moe_layers == (0, 1, 2, 3, 4, 5), "all of them, not those that are tuned"
    routing_NLE = read_routing_rows(stages["extract"].path, "Last1")
    for entry, row, found, routing_LE in zip(entries, rows, extracted, routing_NLE, strict=True):
        assert torch.equal(entry.routing_LE, routing_LE)
        assert entry.id == row["id"]
        assert entry.input_text.endswith("Answer:")
        assert row["question"] in entry.input_text
        assert (entry.token_text, entry.token_id) == (":", row["prompt_ids"][-1])
        assert entry.correct_answer == "ABCD"[row["answer"]]
        assert entry.model_answer == "ABCD"[found["prediction"]]
        assert entry.is_correct == found["is_correct"] == (entry.correct_answer == entry.model_answer)


def test_one_split(letter_run: Run, tmp_path: Path) -> None:
    setup, stages = letter_run.setup, letter_run.stages
    write_routing(tmp_path / "r.json", setup, stages["questions"], stages["extract"], Silence(), split="test")
    rows = read_table(stages["questions"].path / TABLE, ["id", "split"]).to_pylist()
    assert [e.id for e in read_routing_json(tmp_path / "r.json")] == [r["id"] for r in rows if r["split"] == "test"]


def test_what_cannot_be_written_is_said(letter_run: Run, tmp_path: Path) -> None:
    setup, stages = letter_run.setup, letter_run.stages
    config = setup.config.model_copy(update={"storage": str(tmp_path / "empty")})
    empty = resolve(config)
    nowhere = empty.store.stage("extract", {}, {}, 1)
    with pytest.raises(ArtifactError, match=r"no extraction .* is finished .*roma-ray extract"):
        write_routing(tmp_path / "r.json", empty, stages["questions"], nowhere, Silence())
    middle = resolve(
        setup.config.model_copy(update={"routing": setup.config.routing.model_copy(update={"tokens": "Mid1"})})
    )
    with pytest.raises(ConfigError, match=r"kept Mid1 alone: extract with --set routing.tokens=Last1"):
        write_routing(tmp_path / "r.json", middle, stages["questions"], stages["extract"], Silence())
    assert not (tmp_path / "r.json").exists()


def test_the_command(letter_run: Run, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(letter_run.setup.config.to_yaml())
    out = tmp_path / "routing.json"
    done = CliRunner().invoke(main, ["routing", str(out), "--config", str(config), "--split", "test"])
    assert done.exit_code == 0, done.output
    count = len(read_routing_json(out))
    assert f"written: {out} ({count} questions, 6 layers)" in done.output
    told = CliRunner().invoke(main, ["inspect", str(out)]).output
    assert f"questions: {count}\n" in told
    assert CliRunner().invoke(main, ["routing", str(out), "--config", str(config)]).exit_code == 2, (
        "nothing is replaced"
    )
    elsewhere = ["--set", "seed=99", "--storage", str(tmp_path / "none"), "--force"]
    done = CliRunner().invoke(main, ["routing", str(out), "--config", str(config), *elsewhere])
    assert done.exit_code == 1
    assert "roma-ray extract" in done.output
