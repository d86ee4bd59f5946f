"""The report of a real small run: whole in itself, escaped, complete, and made once."""

from __future__ import annotations

import csv
import inspect
import re
import shlex
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from lm_eval.models.huggingface import HFLM

from roma_ray.engine.collapse import FIGURES
from roma_ray.engine.progress import Silence
from roma_ray.errors import ArtifactError
from roma_ray.evaluation.measures import figure_cells
from roma_ray.figures.escaping import markdown
from roma_ray.figures.report_tables import routing_table
from roma_ray.figures.report_words import verdict
from roma_ray.runs.pipeline import Run, locate, revisit
from tests.figures.conftest import HOSTILE, finished

__all__ = ["finished"]


class _Page(HTMLParser):
    """Collects tags with their attributes, and the text of table cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("th", "td"):
            self._in_cell = True
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("th", "td")

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.cells[-1] += data


def folder(run: Run) -> Path:
    return run.stages["report"].path


def test_the_page_needs_nothing_else(finished: Run) -> None:
    text = (folder(finished) / "report.html").read_text()
    page = _Page(text)
    sources = [
        v for _, attributes in page.tags for k, v in attributes.items() if k in {"src", "href", "srcset", "data"}
    ]
    assert len(sources) == 9
    assert all(str(v).startswith("data:image/svg+xml;base64,") for v in sources)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not re.search(r"url\(|@import|https?://", re.sub(r"base64,[A-Za-z0-9+/=]+", "", text))
    assert any(tag == "meta" and a.get("name") == "viewport" for tag, a in page.tags)
    assert all(a.get("alt") for tag, a in page.tags if tag == "img")


def test_hostile_names_are_text(finished: Run) -> None:
    text = (folder(finished) / "report.html").read_text()
    assert "<script" not in text
    assert "<b>last" not in text
    cells = _Page(text).cells
    assert any("alert(" in cell and "<script>" in cell for cell in cells), "the name itself must be shown"
    assert "<script" not in (folder(finished) / "report.md").read_text()
    # The card's YAML header is data, not markup; its body is shown.
    assert "<script" not in (folder(finished) / "model_card.md").read_text().split("---\n", 2)[2]


def test_the_table_holds_the_summary_to_the_digit(finished: Run) -> None:
    cells = _Page((folder(finished) / "report.html").read_text()).cells
    for figures in finished.summary["splits"]["test"].values():
        assert f"{100 * figures['base_accuracy']:.2f} ± {100 * figures['base_stderr']:.2f}" in cells
        assert f"{100 * figures['difference']:+.2f} ± {100 * figures['difference_stderr']:.2f}" in cells
    with open(folder(finished) / "tables" / "results.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    expected = {(s, t): f for s, tasks in finished.summary["splits"].items() for t, f in tasks.items()}
    assert {(r["split"], r["task"]): float(r["mcnemar_p"]) for r in rows} == {
        k: f["mcnemar_p"] for k, f in expected.items()
    }
    assert {(r["split"], r["task"]): float(r["difference"]) for r in rows} == {
        k: f["difference"] for k, f in expected.items()
    }


def test_every_measure_and_the_shares_stand_in_the_page_and_the_files(finished: Run) -> None:
    cells = _Page((folder(finished) / "report.html").read_text()).cells
    for name, found in finished.summary["measures"]["figures"].items():
        assert any(cell.rstrip("*") == name for cell in cells)
        for figures in (found["micro"], *found["tasks"].values()):
            assert figure_cells(name, figures)[2] in cells
    with open(folder(finished) / "tables" / "measures.csv", newline="") as stream:
        rows = {(r["measure"], r["task"]): r for r in csv.DictReader(stream)}
    found = finished.summary["measures"]["figures"]["gold_logp"]
    assert float(rows["gold_logp", "all"]["difference"]) == found["micro"]["difference"]
    assert float(rows["gold_logp", "macro average"]["difference"]) == found["macro"]["difference"]
    with open(folder(finished) / "tables" / "answer_shares.csv", newline="") as stream:
        shares = list(csv.DictReader(stream))
    for task, both in finished.summary["shares"].items():
        own = [r for r in shares if r["task"] == task and r["by"] == "position"]
        assert {r["answer"]: float(r["tuned"]) for r in own} == {k: v["tuned"] for k, v in both["positions"].items()}
    assert "beyond what shrinks anyway" in (folder(finished) / "report.md").read_text()


def test_every_layer_after_every_epoch_is_told(finished: Run) -> None:
    epochs = finished.summary["epochs"]
    layers = finished.summary["model"]["layers"]
    with open(folder(finished) / "tables" / "epoch_routing.csv", newline="") as stream:
        rows = {(int(r["epoch"]), int(r["layer"])): r for r in csv.DictReader(stream)}
    assert set(rows) == {(epoch["epoch"], layer) for epoch in epochs for layer in layers}
    for epoch in epochs:
        for n, layer in enumerate(layers):
            for name in FIGURES:
                assert float(rows[epoch["epoch"], layer][name]) == epoch["routing"][name][n]
    shown = routing_table(epochs)
    assert shown is not None
    assert len(shown.rows) == (1 + len(epochs)) * len(layers)
    base, first = shown.rows[0], shown.rows[len(layers)]
    assert base[:3] == ("base", f"layer {layers[0]}", f"{epochs[0]['routing']['base_entropy'][0]:.3g}")
    assert first[:3] == ("1", f"layer {layers[0]}", f"{epochs[0]['routing']['entropy'][0]:.3g}")
    cells = _Page((folder(finished) / "report.html").read_text()).cells
    assert all(cell in cells for cell in first)
    with open(folder(finished) / "tables" / "epochs.csv", newline="") as stream:
        assert [float(r["task_loss"]) for r in csv.DictReader(stream)] == [epoch["task_loss"] for epoch in epochs]
    # Epochs of an earlier version, which measured nothing.
    assert routing_table([{k: v for k, v in epoch.items() if k != "routing"} for epoch in epochs]) is None


def test_that_there_is_no_auxiliary_loss_stands_in_every_text(finished: Run) -> None:
    for name in ("report.html", "report.md", "model_card.md"):
        assert "uxiliary loss: 0. The load-balancing loss" in (folder(finished) / name).read_text()


def test_the_verdict_stands_in_every_text(finished: Run) -> None:
    headline = verdict(finished.summary).headline
    for name in ("report.html", "report.md", "model_card.md"):
        assert headline in (folder(finished) / name).read_text()


def test_markdown_tables_keep_their_columns(finished: Run) -> None:
    rows = [line for line in (folder(finished) / "report.md").read_text().splitlines() if line.startswith("| ")]
    header = next(n for n, row in enumerate(rows) if row.startswith("| task "))
    tasks = rows[header : header + 2 + len(finished.summary["splits"]["test"])]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in tasks}) == 1
    assert markdown("a|b\n*c*") == r"a\|b \*c\*"
    assert markdown("<img src=x>") == "&lt;img src=x&gt;"


def test_the_model_card_has_a_header_that_hubs_read(finished: Run) -> None:
    text = (folder(finished) / "model_card.md").read_text()
    _, header, body = text.split("---\n", 2)
    card = yaml.safe_load(header)
    assert card["library_name"] == "peft"
    assert card["base_model"] == "model"
    (index,) = card["model-index"]
    by_name = {entry["dataset"]["name"]: entry for entry in index["results"]}
    assert HOSTILE in by_name
    figures = finished.summary["splits"]["test"]["all"]
    metrics = {m["type"]: m["value"] for m in by_name["all tasks"]["metrics"]}
    assert metrics["accuracy"] == figures["tuned_accuracy"]
    assert metrics["mcnemar_p"] == figures["mcnemar_p"]
    assert all(entry["dataset"]["type"] for entry in index["results"])
    for section in ("Intended use", "Training data", "Procedure", "Evaluation", "Limitations and guards"):
        assert f"## {section}\n" in body
    # The card's warning, and stock's code that it warns of.
    assert "do not use `peft=`" in body
    assert "self._model.resize_token_embeddings(len(self.tokenizer))" in inspect.getsource(HFLM._create_model)
    assert str(finished.setup.store.root) not in text, "a card is published: no path of this machine"
    assert str(Path(finished.setup.model.path).parent) not in text


def test_the_page_says_what_to_do_next_with_the_run_s_own_paths(finished: Run) -> None:
    from roma_ray.cli.commands import main

    for name in ("report.html", "report.md"):
        text = unescape((folder(finished) / name).read_text())
        commands = [shlex.split(line) for line in re.findall(r"^(?:<pre>)?(roma-ray [^\n<]+)", text, re.MULTILINE)]
        assert {command[1] for command in commands} >= {"inspect", "export", "evaluate", "compare", "show"}
        for command in commands:
            main.commands[command[1]].make_context(command[1], command[2:])  # as the command line reads it
        paths = [part for command in commands for part in command if part.startswith("/")]
        assert paths
        missing = [path for path in paths if not Path(path).exists()]
        assert not missing


def test_words_of_the_page_are_not_broken_in_the_middle(finished: Run) -> None:
    style = (folder(finished) / "report.html").read_text().partition("<style>")[2].partition("</style>")[0]
    breaking = [rule for rule in style.split("}") if "anywhere" in rule or "break-all" in rule]
    # Paths and fingerprints are no words.
    assert all(rule.strip().startswith(("code", "ul", "dl", "dd")) or " dd {" in rule for rule in breaking), breaking


def test_all_files_are_there_and_named_in_the_manifest(finished: Run) -> None:
    files = finished.stages["report"].manifest()["files"]
    pictures = {name.removeprefix("figures/").removesuffix(".svg") for name in files if name.endswith(".svg")}
    assert len(pictures) == 9
    assert all(f"figures/{name}.png" in files for name in pictures)
    assert {"tables/results.csv", "tables/epochs.csv", "tables/layers.csv", "tables/expert_load.csv"} <= set(files)
    finished.stages["report"].verify()


def test_a_finished_report_is_not_made_again(finished: Run) -> None:
    page = folder(finished) / "report.html"
    before = page.stat().st_mtime_ns
    assert revisit(finished.setup, Silence()).stages["report"].path == folder(finished)
    assert page.stat().st_mtime_ns == before


def test_the_same_artifacts_give_the_same_report(finished: Run) -> None:
    stage = finished.stages["report"]
    first = stage.manifest()["files"]
    stage.discard()
    again = revisit(finished.setup, Silence()).stages["report"].manifest()["files"]
    assert {k: v["sha256"] for k, v in again.items()} == {k: v["sha256"] for k, v in first.items()}


def test_an_unfinished_run_has_no_report(finished: Run) -> None:
    other = finished.setup.config.model_copy(update={"seed": 99})
    from roma_ray.engine.setup import resolve

    setup = resolve(other)
    with pytest.raises(ArtifactError, match=r"not finished .*missing: questions, extract.*roma-ray local"):
        revisit(setup, Silence())
    assert not locate(setup)["questions"].path.exists(), "asking must not leave folders behind"
