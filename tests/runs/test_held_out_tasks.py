"""Held-out tasks in a run: what they never enter, what is shared with runs that hold out others, and where they are told."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from roma_ray.ablations.plan import describe, make_plan
from roma_ray.ablations.space import load_space
from roma_ray.ablations.sweep import DONE, open_sweep
from roma_ray.ablations.sweep_command import result
from roma_ray.ablations.sweep_report import write_report
from roma_ray.ablations.trial import TrialWork, here
from roma_ray.api import Finished
from roma_ray.baselines.bench import HIDDEN, open_bench
from roma_ray.cli.commands import main
from roma_ray.cli.judging import training_texts
from roma_ray.cli.printing import print_comparison
from roma_ray.config.loading import with_overrides
from roma_ray.config.schema import Config
from roma_ray.engine.progress import Silence
from roma_ray.engine.question_table import TABLE, read_prompts
from roma_ray.engine.setup import resolve
from roma_ray.errors import ConfigError
from roma_ray.evaluation.method_table import held_out_rows
from roma_ray.evaluation.results_file import read_judged
from roma_ray.evaluation.statistics import compare
from roma_ray.evaluation.transfer import ALL, HELD_OUT, TRAINED
from roma_ray.runs.method_comparison import compare as compare_methods
from roma_ray.runs.pipeline import Run, locate, run
from roma_ray.stages.finetuning import ADAPTER
from roma_ray.stages.neighborhoods import read_neighborhoods
from roma_ray.tracking import run_records
from roma_ray.tracking.tracked_comparison import table_text
from tests.making import train_job
from tests.world import make_world

COPY = "questions.held_out_tasks=[copy]"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return make_world(tmp_path_factory.mktemp("held"), count=90)


@pytest.fixture(scope="module")
def finished(config: Config) -> Run:
    return run(resolve(with_overrides(config, [COPY])), Silence(), until="report")


def test_nothing_of_a_held_out_task_is_trained_on_validated_on_or_a_neighbor(finished: Run) -> None:
    prompts = read_prompts(finished.stages["questions"].path / TABLE)
    near = read_neighborhoods(finished.stages["neighbors"], len(prompts))
    queried = near.queried.nonzero()[:, 0].tolist()
    assert {prompts[row].task for row in queried} == {"pick"}
    assert {prompts[row].task for row in near.indices.tolist()} == {"pick"}
    data = train_job(finished).open_data()
    assert {(prompts[row].task, prompts[row].split) for row in data.train} == {("pick", "train")}
    assert {(prompts[row].task, prompts[row].split) for row in data.validation} == {("pick", "validation")}
    judged = read_judged(finished.stages["evaluate"].path)
    assert {(prompts[row].task, prompts[row].split) for row in judged.rows} == {("pick", "test"), ("copy", "test")}


def test_answers_of_a_held_out_task_cannot_reach_the_routers(config: Config, finished: Run) -> None:
    """Other answers of its training and validation questions, the same bits."""
    source = Path(str(config.questions.sources[0].path))
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    for row in rows:
        if row["task"] == "copy" and row["split"] == "train":
            row["answer"] = "ABCD"[("ABCD".index(row["answer"]) + 1) % len(row["choices"])]
    other = source.with_name("elsewhere")
    other.mkdir()
    (other / source.name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    changed = with_overrides(config, [COPY, f"questions.sources=[{{path: {other / source.name}}}]"])
    again = run(resolve(changed), Silence(), until="finetune")
    assert again.stages["questions"].path != finished.stages["questions"].path
    names = [path.name for path in (finished.stages["finetune"].path / ADAPTER).glob("*.safetensors")]
    assert names
    for name in names:
        mine, theirs = (one.stages["finetune"].path / ADAPTER / name for one in (again, finished))
        assert mine.read_bytes() == theirs.read_bytes()
    # The control: without holding out, they do reach them.
    free = run(resolve(with_overrides(changed, ["questions.held_out_tasks=[]"])), Silence(), until="finetune")
    plain = run(resolve(config), Silence(), until="finetune")
    one, two = ((r.stages["finetune"].path / ADAPTER / names[0]).read_bytes() for r in (free, plain))
    assert one != two


def test_questions_extraction_and_base_scores_are_shared_whatever_is_held_out(config: Config, finished: Run) -> None:
    plain, other = (locate(resolve(with_overrides(config, held))) for held in ([], ["questions.held_out_tasks=[pick]"]))
    for name in ("questions", "extract", "embed"):
        assert plain[name].path == other[name].path == finished.stages[name].path
    done = run(resolve(with_overrides(config, ["questions.held_out_tasks=[pick]"])), Silence())
    assert len(list((Path(str(config.storage)) / "base").glob("*/manifest.json"))) == 1
    mine, theirs = (one.summary for one in (finished, done))
    assert mine["evaluation_pin"] == theirs["evaluation_pin"]
    parts = finished.stages["questions"].manifest()["facts"]["splits"]
    assert mine["validation"]["n"] + theirs["validation"]["n"] == parts["validation"]


def test_figures_of_both_groups_are_those_of_their_questions(finished: Run) -> None:
    judged = read_judged(finished.stages["evaluate"].path)
    base, tuned = judged.values("base")["acc"], judged.values("tuned")["acc"]
    tasks = np.asarray(judged.asked.tasks)
    found = finished.summary["held_out"]
    assert found["tasks"] == ["copy"]
    for group, task in ((TRAINED, "pick"), (HELD_OUT, "copy")):
        assert found["groups"][group]["accuracy"] == compare(base[tasks == task], tuned[tasks == task])
    assert finished.summary["splits"]["test"]["all"]["n"] == len(tasks)


def test_every_place_tells_the_groups_apart(finished: Run) -> None:
    folder = finished.stages["report"].path
    for name in ("report.html", "report.md", "model_card.md"):
        text = (folder / name).read_text()
        assert TRAINED in text
        assert HELD_OUT in text
        assert "CTGI" in text
        assert ALL in text
        assert "test questions are of held-out tasks (copy)" in text
    rows = [row["task"] for row in csv.DictReader((folder / "tables" / "results.csv").open())]
    assert rows == ["pick", TRAINED, "copy", HELD_OUT, ALL]
    indices = list(csv.DictReader((folder / "tables" / "ctgi.csv").open()))
    assert [row["measure"] for row in indices] == ["acc", "choice_logp"]
    told = {value.key: value.value for value in run_records.headline(finished.stages["evaluate"])}
    found = finished.summary["held_out"]
    assert told["transfer/held-out_tasks/difference"] == found["groups"][HELD_OUT]["accuracy"]["difference"]
    assert told["transfer/ctgi/acc/trained_gain"] == found["ctgi"]["acc"]["trained_gain"]
    assert ("transfer/ctgi/acc/value" in told) == (found["ctgi"]["acc"]["value"] is not None)
    assert HELD_OUT in run_records.note(finished.stages["report"], finished.stages["evaluate"])
    table = Finished({}, finished.summary).results()
    assert {"all", "copy", "pick", TRAINED, HELD_OUT} == set(table.index)


def test_an_unknown_task_is_told_before_any_work_and_on_finished_questions(config: Config, finished: Run) -> None:
    wrong = with_overrides(config, ["questions.held_out_tasks=[coppy]"])
    with pytest.raises(ConfigError, match="no question is of a task 'coppy'; did you mean copy"):
        run(resolve(wrong), Silence())
    fresh = with_overrides(wrong, [f"storage={config.storage}-fresh"])
    with pytest.raises(ConfigError, match="did you mean copy"):
        run(resolve(fresh), Silence())
    assert not (Path(f"{config.storage}-fresh") / "extract").exists()


def test_a_benchmark_of_a_held_out_task_is_not_searched_in_its_own_questions(config: Config, finished: Run) -> None:
    prompts = read_prompts(finished.stages["questions"].path / TABLE)
    plain = run(resolve(config), Silence(), until="finetune").stages["finetune"].path / ADAPTER
    for adapter, tasks in ((finished.stages["finetune"].path / ADAPTER, {"pick"}), (plain, {"pick", "copy"})):
        texts = training_texts(finished.setup.store, str(adapter))
        assert texts is not None
        assert len(texts) == sum(p.task in tasks and p.split == "train" for p in prompts)


def test_methods_see_nothing_of_a_held_out_task(finished: Run, capsys: pytest.CaptureFixture[str]) -> None:
    bench = open_bench(finished.setup, dict(finished.stages))
    tasks = {part: {bench.data.prompts[row].task for row in rows} for part, rows in bench.rows.items()}
    assert tasks == {"train": {"pick"}, "validation": {"pick"}, "test": {"pick", "copy"}}
    assert {p.answer for p in bench.blinded().data.prompts if p.task == "copy"} == {HIDDEN}
    summary = compare_methods(finished.setup, ["base", "icl"], 1, Silence()).summary
    assert summary["budget"]["validation_questions"] == len(bench.rows["validation"])
    # Each method is told by group, against the base model.
    (row,) = held_out_rows(summary)
    assert row[0] == "icl"
    (found,) = (one["held_out"] for one in summary["methods"] if one["name"] == "icl")
    assert {name: one["tasks"] for name, one in found["groups"].items()} == {TRAINED: ["pick"], HELD_OUT: ["copy"]}
    assert f"| icl | {row[1]}" in table_text(summary)
    print_comparison(summary)
    assert "gains over the base model" in capsys.readouterr().out


def test_leaving_one_task_out_is_a_factor_of_a_space_file(config: Config, tmp_path: Path) -> None:
    """One extraction serves all: only neighbors, training and evaluation are each trial's own."""
    base = {**config.model_dump(mode="json"), "finetune": {**config.finetune.model_dump(mode="json"), "epochs": 1}}
    factor = {"held out": {"setting": "questions.held_out_tasks", "values": [["copy"], ["pick"]]}}
    path = tmp_path / "space.yaml"
    path.write_text(json.dumps({"name": "leave one out", "base": base, "one_at_a_time": factor}))
    plan = make_plan(load_space(path))
    assert [planned.trial.name for planned in plan.trials] == ["centre", "held out=[copy]", "held out=[pick]"]
    counts = {name: len(plan.stages(name)) for name in ("questions", "extract", "embed", "neighbors", "evaluate")}
    assert counts == {"questions": 1, "extract": 1, "embed": 1, "neighbors": 3, "evaluate": 3}
    for planned in plan.trials:
        here(TrialWork(planned.trial.id, planned.setup, planned.stages), lambda record: None)
    sweep = open_sweep(plan)
    assert len(sweep.having(DONE)) == 3
    found = result(sweep)
    assert found is not None
    assert found.held_out is not None
    assert sorted(row[:2] for row in found.held_out.rows) == [("[copy]", "copy"), ("[pick]", "pick")]
    assert all("±" in row[-1] for row in found.held_out.rows), "paired with the centre, which trains on all"
    assert any("their validation accuracies rank nothing" in note for note in found.notes)
    page = write_report(sweep, Silence())
    assert page is not None
    assert "Held-out tasks" in page.read_text()
    assert "held-out tasks, to centre" in page.with_name("report.md").read_text()


def test_a_level_that_names_no_task_is_refused_by_the_plan(config: Config, tmp_path: Path) -> None:
    factor = {"held out": {"setting": "questions.held_out_tasks", "values": [["copy"], ["pik"]]}}
    path = tmp_path / "space.yaml"
    path.write_text(json.dumps({"base": config.model_dump(mode="json"), "one_at_a_time": factor}))
    with pytest.raises(ConfigError, match=r"held out=\[pik\]: questions.held_out_tasks: .*did you mean pick"):
        describe(make_plan(load_space(path)))
    said = CliRunner().invoke(main, ["tune", "--space", str(path), "--dry-run"])
    assert said.exit_code == 2
    assert "did you mean pick" in said.output
