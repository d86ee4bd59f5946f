"""Runs side by side: the figures against plain formulas, pins, names of runs, and the forms of the table."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path

import numpy as np
import pytest

from roma_ray.benchmarks.judge import group_figures
from roma_ray.config.loading import load_config
from roma_ray.engine.question_table import write_table
from roma_ray.errors import ArtifactError, GuardError
from roma_ray.evaluation.benchmark_results import METRIC_COLUMNS, METRICS, SUMMARY, read_benchmarks
from roma_ray.evaluation.run_comparison import MACRO, ComparedModel, compare_columns, find_run, open_columns, plain
from roma_ray.evaluation.statistics import bootstrap_interval, mcnemar
from roma_ray.figures.comparison_page import render
from roma_ray.store.artifacts import Store, write_json

RNG = np.random.default_rng(0)
VERDICTS = {name: {task: RNG.integers(0, 2, 60) for task in ("one", "two")} for name in ("a", "b")}


def column(label: str, pins: dict[str, str] | None = None, tasks: tuple[str, ...] = ("one", "two")) -> ComparedModel:
    values = {(t, "acc"): dict(enumerate(map(float, VERDICTS[label][t]))) for t in tasks}
    return ComparedModel(label, values, pins or dict.fromkeys(tasks, "p"))


def test_figures_are_those_of_plain_formulas() -> None:
    found = compare_columns([column("a"), column("b")])
    first = found.rows[0]
    a, b = VERDICTS["a"]["one"], VERDICTS["b"]["one"]
    assert (first.task, first.metric, first.n) == ("one", "acc", 60)
    assert first.cells[0] is not None
    assert first.cells[1] is not None
    assert first.cells[0].score == pytest.approx(a.mean())
    assert first.cells[1].stderr == pytest.approx(b.std(ddof=1) / np.sqrt(60))
    assert first.cells[1].difference == pytest.approx((b - a).mean())
    assert first.cells[1].p == mcnemar(a, b)
    macro = found.rows[-1].cells[1]
    assert found.rows[-1].task == MACRO
    assert macro is not None
    assert macro.difference == pytest.approx(
        np.mean([(VERDICTS["b"][t] - VERDICTS["a"][t]).mean() for t in ("one", "two")])
    )


def test_log_likelihoods_stand_beside_accuracies_and_the_configured_metric_is_marked() -> None:
    nats = {label: RNG.normal(-1.5, 0.2, 60) for label in ("a", "b")}
    columns = [
        ComparedModel(
            label,
            {
                ("one", "acc"): column(label).values["one", "acc"],
                ("one", "gold_logp"): dict(enumerate(nats[label].tolist())),
            },
            {"one": "p"},
            "acc",
        )
        for label in ("a", "b")
    ]
    found = compare_columns(columns)
    verdicts, values = found.rows
    assert (verdicts.configured, values.configured) == (True, False)
    assert values.cells[1] is not None
    assert values.cells[1].difference == pytest.approx((nats["b"] - nats["a"]).mean())
    from scipy.stats import ttest_rel

    assert values.cells[1].p == pytest.approx(ttest_rel(nats["b"], nats["a"]).pvalue)
    table = render(found, "markdown")
    assert r"| one | acc\* | 60 |" in table
    error = nats["b"].std(ddof=1) / np.sqrt(60)
    assert f"| one | gold_logp | 60 | {nats['a'].mean():.3f} ±" in table
    assert f"{nats['b'].mean():.3f} ± {error:.3f}" in table, "in nats, not in percent"


def test_the_interval_is_that_of_drawing_questions_one_by_one() -> None:
    values = RNG.choice([-1.0, 0.0, 1.0], 200, p=[0.1, 0.6, 0.3])
    drawn = RNG.choice(values, (4000, 200)).mean(1)
    low, high = bootstrap_interval([values], seed=1)
    assert (low, high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.02)
    assert low < values.mean() < high
    many = RNG.normal(size=50)
    low, high = bootstrap_interval([many], seed=1, resamples=500)
    assert low < many.mean() < high
    assert bootstrap_interval([values], seed=1) == bootstrap_interval([values], seed=1)


@pytest.mark.parametrize(("tuned", "which"), [(False, ""), (True, ":base")])
def test_one_model_alone_is_compared_with_nothing(tmp_path: Path, tuned: bool, which: str) -> None:
    run = make_run(Store(tmp_path), "run", "b", tuned=tuned)
    with pytest.raises(ArtifactError, match="is one model alone: name another run"):
        open_columns([f"{run.name}{which}"], Store(tmp_path), lambda name: None)


def test_different_pins_are_refused_or_marked() -> None:
    columns = [column("a"), column("b", {"one": "p", "two": "q"})]
    with pytest.raises(GuardError, match=r"two \(b\).*--allow-different-pins"):
        compare_columns(columns)
    found = compare_columns(columns, allow_different_pins=True)
    marked = next(row for row in found.rows if row.task == "two").cells[1]
    assert marked is not None
    assert marked.other_pin
    assert marked.difference is None
    assert all(row.task != MACRO for row in found.rows)
    assert "≠ pin" in render(found, "markdown")
    with pytest.raises(GuardError, match="no benchmark in common"):
        compare_columns([column("a", tasks=("one",)), column("b", tasks=("two",))])


def test_a_benchmark_that_a_run_lacks_stands_in_every_form() -> None:
    two, one = column("a"), column("b", tasks=("two",))
    for columns in ([two, one], [one, two]):
        found = compare_columns(columns)
        assert [(row.task, row.n) for row in found.rows] == [("one", 60), ("two", 60)]
        absent = [n for n, c in enumerate(columns) if c is one]
        cells = found.rows[0].cells
        assert [n for n, cell in enumerate(cells) if cell is None] == absent
        assert [(c.score, c.difference) for c in cells if c] == [(pytest.approx(VERDICTS["a"]["one"].mean()), None)]
        line = next(line for line in render(found, "markdown").splitlines() if line.startswith("| one"))
        assert "–" in line
        assert f"{100 * VERDICTS['a']['one'].mean():.2f} ±" in line
        assert "<td>one</td>" in render(found, "html")
        rows = list(csv.DictReader(io.StringIO(render(found, "csv"))))
        assert [row["b score"] == "" for row in rows] == [True, False]
        assert plain(found)["a score"][0] == pytest.approx(VERDICTS["a"]["one"].mean())
    # Two runs with other questions are told apart where the first run has none too.
    three = [column("a", tasks=("two",)), column("b"), ComparedModel("c", two.values, {"one": "q", "two": "p"})]
    with pytest.raises(GuardError, match=r"one \(c\)"):
        compare_columns(three)
    marked = compare_columns(three, allow_different_pins=True).rows[0].cells
    assert [cell is not None and cell.other_pin for cell in marked] == [False, False, True]


def test_the_forms_hold_the_same_figures() -> None:
    found = compare_columns([column("a"), ComparedModel("<b|c>", column("b").values, column("b").pins)])
    table = plain(found)
    rows = list(csv.DictReader(io.StringIO(render(found, "csv"))))
    assert [float(row["<b|c> difference"]) for row in rows] == table["<b|c> difference"]
    html, markdown = render(found, "html"), render(found, "markdown")
    assert "&lt;b|c&gt;" in html
    assert "<b|c>" not in html
    width = {line.replace("\\|", "").count("|") for line in markdown.splitlines() if line.startswith("|")}
    assert len(width) == 1
    assert f"{100 * VERDICTS['a']['one'].mean():.2f} ±" in markdown


def make_run(
    store: Store, name: str, label: str, *, tuned: bool = True, groups: dict[str, list[str]] | None = None
) -> Path:
    stage = store.stage("benchmarks", {"name": name}, {}, 1)
    rows = [
        (t, n, float(v), float(w))
        for t in ("one", "two")
        for n, (v, w) in enumerate(zip(VERDICTS["a"][t], VERDICTS[label][t], strict=True))
    ]
    columns = {
        "task": [r[0] for r in rows],
        "doc": [r[1] for r in rows],
        "filter": ["none"] * len(rows),
        "metric": ["acc"] * len(rows),
        "base": [r[2] for r in rows],
        "tuned": [r[3] if tuned else None for r in rows],
    }
    write_table(stage.path / METRICS, columns, METRIC_COLUMNS)
    pins = {"one": "p", "two": "p"}
    summary = {
        "tasks": {task: {"pin": pin} for task, pin in pins.items()},
        "groups": group_figures(columns, groups or {}, pins, paired=tuned),
        "model": {"adapter": "x" if tuned else None},
    }
    write_json(stage.path / SUMMARY, summary)
    stage.finish(facts={}, seconds=0.0)
    return stage.path


def test_runs_are_found_by_path_fingerprint_and_run_id(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first, second = make_run(store, "first", "b"), make_run(store, "second", "b", tuned=False)
    assert find_run(str(first), store) == first
    assert find_run(first.name[:8], store) == first
    assert find_run("a" * 32, store, lambda name: second.name) == second
    for name in ("zzzzzzzz", first.name[:3], "*" * 16):
        with pytest.raises(ArtifactError, match="no finished evaluation"):
            find_run(name, store)
    alone = open_columns([str(first)], store, lambda name: None)
    assert [c.label for c in alone] == [f"{first}:base", str(first)]
    assert list(alone[1].values["one", "acc"].values()) == list(map(float, VERDICTS["b"]["one"]))
    both = open_columns([f"{first}:base", str(second)], store, lambda name: None)
    assert both[0].values == both[1].values
    (second / SUMMARY).write_text((second / SUMMARY).read_text().replace("null", '"x"'))
    with pytest.raises(ArtifactError, match=f"{SUMMARY} is not what was written"):
        open_columns([str(first), str(second)], store, lambda name: None)


def test_a_group_is_one_benchmark(tmp_path: Path) -> None:
    path = make_run(Store(tmp_path), "run", "b", groups={"both": ["one", "two"]})
    (row,) = compare_columns(open_columns([str(path)], Store(tmp_path), lambda name: None)).rows
    assert (row.task, row.n) == ("both", 120)
    pooled = np.concatenate([VERDICTS["b"][t] for t in ("one", "two")])
    assert row.cells[1] is not None
    assert row.cells[1].score == pytest.approx(pooled.mean())
    figures = read_benchmarks(path)["groups"]["both"]["metrics"]["acc,none"]
    assert (figures["n"], figures["tuned"]) == (120, pytest.approx(pooled.mean()))


def test_columns_are_headed_by_the_runs_names(tmp_path: Path) -> None:
    store, config = Store(tmp_path), load_config()
    one, two = (make_run(store, name, label) for name, label in (("one", "a"), ("two", "b")))
    for path, name in ((one, "olmoe"), (two, "olmoe, hotter")):
        (path / "config.yaml").write_text(config.model_copy(update={"name": name}).to_yaml())
    names = [str(one), f"{one}:base", two.name]
    columns = open_columns(names, store, lambda name: None)
    assert [c.label for c in columns] == ["olmoe", "olmoe, base", "olmoe, hotter"]
    # A report gives the evaluation another name, later than its own.
    report = store.stage("report", {"name": "olmoe"}, {"evaluate": two.name}, 1)
    with report.exclusive():
        (report.path / "config.yaml").write_text(config.model_copy(update={"name": "olmoe"}).to_yaml())
        report.finish(facts={}, seconds=0.0)
    os.utime(report.path / "config.yaml", (2e9, 2e9))
    columns = open_columns(names, store, lambda name: None)
    assert [c.label for c in columns] == [f"olmoe ({one.name[:6]})", "olmoe, base", f"olmoe ({two.name[:6]})"]
    table = render(compare_columns(columns), "markdown")
    assert table.startswith(f"| benchmark | metric | n | olmoe ({one.name[:6]}) | olmoe, base |")


def test_the_command_prints_writes_and_tracks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner
    from mlflow import MlflowClient

    from roma_ray.cli.commands import main
    from roma_ray.tracking.tracked_benchmarks import fingerprint_of

    store = Store(tmp_path)
    path = make_run(store, "run", "b")

    def call(*arguments: str) -> str:
        done = CliRunner().invoke(main, ["compare", *arguments, "--storage", str(tmp_path)])
        assert done.exit_code == 0, done.output
        return done.output

    printed = call(path.name)
    assert printed.startswith(f"| benchmark | metric | n | {path.name}:base | {path.name} | difference | p |")
    page = tmp_path / "table.html"
    call(str(path), "--out", str(page), "--track")
    assert "<table>" in page.read_text()
    call(str(path), "--track")
    # Loading tables, MLflow asks for runs at its global address.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    client = MlflowClient()
    (experiment,) = [e for e in client.search_experiments() if e.name != "Default"]
    (run,) = client.search_runs([experiment.experiment_id])
    table = client.load_table(experiment.experiment_id, "comparison.json", [run.info.run_id])
    assert list(table["task"]) == ["one", "two", MACRO]
    assert {a.path for a in client.list_artifacts(run.info.run_id)} == {
        f"comparison.{s}" for s in ("json", "md", "html", "csv")
    }
    judged = client.create_run(
        experiment.experiment_id, tags={"roma.stage": "benchmarks", "roma.fingerprint": path.name}
    )
    config = load_config().model_copy(update={"storage": str(tmp_path)})
    assert fingerprint_of(config, store, judged.info.run_id) == path.name
    assert fingerprint_of(config, store, "f" * 32) is None
