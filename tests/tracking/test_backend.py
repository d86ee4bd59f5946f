"""Another tracker than MLflow is one class: what follows a run knows none by name."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest

import roma_ray
from roma_ray.config.schema import Config
from roma_ray.evaluation.run_comparison import Cell, Comparison, Row
from roma_ray.store.artifacts import Store
from roma_ray.tracking.backend import Backend, Input, MetricValue, OwnFault, RunState, Unavailable
from roma_ray.tracking.delivery import Delivery
from roma_ray.tracking.tracked_benchmarks import record_comparison


class Notebook(Backend):
    """A tracker of this process."""

    title = "the notebook"
    kept: ClassVar[dict[str, RunState]] = {}
    files: ClassVar[dict[str, bytes]] = {}
    away: ClassVar[bool] = False

    @staticmethod
    def address(config: Config, store: Store) -> str:
        return "notebook:"

    @classmethod
    def connect(cls, config: Config, store: Store) -> Self:
        if cls.away:
            raise Unavailable("it is closed")
        return cls()

    def place(self, run: RunState | None = None) -> str:
        return "page 1"

    def runs(self, tag: str, value: str) -> list[RunState]:
        return [run for run in self.kept.values() if run.tags.get(tag) == value]

    def create(self, name: str, tags: Mapping[str, str], start: int) -> RunState:
        return self.kept.setdefault(name, RunState(name, start, "RUNNING", dict(tags), set(), set()))

    def log(
        self,
        run: RunState,
        *,
        metrics: Sequence[MetricValue] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        run.tags |= dict(tags or {})

    def upload(self, run: RunState, path: Path, folder: str | None = None) -> None:
        if not path.exists():
            raise OwnFault(f"{path} is missing")
        self.files[path.name] = path.read_bytes()

    def set_status(self, run: RunState, status: str, end: int | None = None) -> None:
        run.status = status

    def page(self, run: RunState | None = None) -> str:
        return "page 1"

    def run(self, id: str) -> RunState:
        return self.kept[id]

    def rename(self, run: RunState, name: str) -> None:
        run.tags["name"] = name

    def remove_tag(self, run: RunState, key: str) -> None:
        run.tags.pop(key, None)

    # What a notebook has no pages for.

    def steps(self, run: RunState, key: str) -> set[int]:
        return set()

    def add_inputs(self, run: RunState, inputs: Sequence[Input]) -> None:
        pass

    def log_model(self, run: RunState, name: str, folder: Path, params: Mapping[str, str]) -> str:
        return ""

    def register(self, run: RunState, model: str, name: str) -> str:
        return ""

    def monitor(self, run: RunState) -> Callable[[], None]:
        return lambda: None


class Said:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def meter(self, *arguments: Any, **named: Any) -> Any:
        raise AssertionError("nothing is counted here")


def test_a_tracker_that_lacks_a_method_is_told_before_any_run() -> None:
    class Half(Backend):
        title = "half"

    with pytest.raises(TypeError, match="abstract"):
        Half()  # type: ignore[abstract]


def test_another_tracker_is_one_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Delivery, "backend", Notebook)
    config = Config.model_validate({"model": {"path": "m"}, "questions": {"sources": [{"path": "q.jsonl"}]}})
    comparison = Comparison(("a", "b"), (Row("t", "acc", 4, (Cell(0.5, 0.1), Cell(0.75, 0.1)), True),))
    store, said = Store(tmp_path), Said()
    monkeypatch.setattr(Notebook, "away", True)
    record_comparison(config, store, comparison, said)
    assert "the notebook at notebook: cannot be used (it is closed)" in said.lines[0]
    assert "still lacks: comparison" in said.lines[-1]
    monkeypatch.setattr(Notebook, "away", False)
    record_comparison(config, store, comparison, said)
    (run,) = Notebook.kept.values()
    assert (run.id, run.status) == ("comparison: a, b", "FINISHED")
    assert run.tags["source"] == "roma-ray"
    assert set(Notebook.files) == {"comparison.json", "comparison.md", "comparison.html", "comparison.csv"}
    assert said.lines[-1] == "the notebook: page 1"
    # What is there already is not delivered again.
    Notebook.files.clear()
    record_comparison(config, store, comparison, said)
    assert not Notebook.files


def test_mlflow_s_own_words_stand_in_one_file() -> None:
    package = Path(roma_ray.__file__).parent
    with_words = {
        file.relative_to(package).as_posix()
        for file in package.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("mlflow.")
    }
    assert with_words == {"tracking/mlflow.py"}
