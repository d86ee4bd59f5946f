"""The readers of strangers' files, each with what must hold of whatever it accepts."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st
from pydantic import TypeAdapter

from roma_ray.ablations.space import load_space
from roma_ray.config.loading import load_config, parse_config
from roma_ray.config.schema import QuestionSource
from roma_ray.questions.readers import read_questions
from roma_ray.questions.records import Question
from tests.fuzzing.artifacts import ARTIFACTS
from tests.fuzzing.borders import BORDERS
from tests.fuzzing.checkpoints import CHECKPOINTS
from tests.fuzzing.damage import VALUES, as_json, damaged, damaged_values
from tests.fuzzing.runner import Target

Opened = tuple[st.SearchStrategy[Any], Callable[[Any], None]]

_ROWS: list[dict[str, Any]] = [
    {"id": f"q{n}", "question": f"Which is {n}?", "choices": ["x", "y", f"z{n}"], "answer": "ABC"[n % 3]}
    for n in range(12)
] + [{"question": "Why?", "choices": ["so", "not"], "answer": 1, "context": "c", "task": "t", "split": "test"}]


def check_questions(questions: list[Question]) -> None:
    """What every accepted question must be."""
    assert questions
    assert len({q.id for q in questions}) == len(questions)
    for q in questions:
        assert q.question.strip()
        assert 2 <= len(set(q.choices)) == len(q.choices) <= 26
        assert 0 <= q.answer < len(q.choices)
        assert q.split in ("train", "validation", "test")
        "".join([q.id, q.task, q.question, *q.choices, q.context or ""]).encode()


def _read(path: Path, data: bytes, **source: Any) -> None:
    path.write_bytes(data)
    check_questions(read_questions([QuestionSource(path=str(path), **source)])[0])


_SHAPED: list[dict[str, Any]] = [
    {"question": "Why?", "choices": {"text": ["so", "not"], "label": ["A", "B"]}, "answerKey": "B"},
    {
        "question": {"stem": "Why?", "choices": [{"text": "so", "label": "1"}, {"text": "not", "label": "2"}]},
        "answerKey": "1",
    },
    {"question_stem": "Why?", "choices": {"text": ["so", "not"], "label": ["A", "B"]}, "answerKey": "A", "id": "s"},
]


def shaped_rows(folder: Path) -> Opened:
    """Rows of other shapes with damaged fields, with a mapping and without, as JSON lines and as Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"question": "question", "choices": "choices.text", "answer": "answerKey"}
    rows = st.lists(st.sampled_from(_SHAPED).flatmap(damaged_values).map(as_json), min_size=1, max_size=4).map(
        b"\n".join
    )
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([_SHAPED[0]] * 3), sink)
    files = st.one_of(
        rows.map(lambda d: ("s.jsonl", d)), damaged([sink.getvalue().to_pybytes()]).map(lambda d: ("s.parquet", d))
    )
    strategy = st.tuples(files, st.sampled_from([None, columns]))
    return strategy, lambda case: _read(folder / case[0][0], case[0][1], columns=case[1])


def json_lines(folder: Path) -> Opened:
    """Rows with damaged fields, damaged files, and gzipped ones."""
    good = b"".join(json.dumps(row).encode() + b"\n" for row in _ROWS)
    rows = st.lists(st.sampled_from(_ROWS).flatmap(damaged_values).map(as_json), max_size=5).map(b"\n".join)
    strategy = st.one_of(
        rows.map(lambda d: ("q.jsonl", d)),
        rows.map(lambda d: ("q.jsonl.gz", gzip.compress(d))),
        damaged([good]).map(lambda d: ("q.jsonl", d)),
        damaged([gzip.compress(good)]).map(lambda d: ("q.jsonl.gz", d)),
    )
    return strategy, lambda named: _read(folder / named[0], named[1])


def parquet(folder: Path) -> Opened:
    """Damaged Parquet files, and whole ones with columns of all kinds of types."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def packed(table: pa.Table, **options: Any) -> bytes:
        """The table as a file's bytes."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, **options)
        return sink.getvalue().to_pybytes()

    table = pa.Table.from_pylist([{**row, "answer": str(row["answer"])} for row in _ROWS])
    good = [packed(table), packed(table, compression="zstd", use_dictionary=False), packed(table, version="1.0")]
    columns = {
        "text": pa.array(["a", "b"]),
        "large": pa.array(["a", "b"], pa.large_string()),
        "null": pa.array([None, None]),
        "integer": pa.array([0, 1]),
        "unsigned": pa.array([2**64 - 1, 0], pa.uint64()),
        "float": pa.array([0.5, math.nan]),
        "list": pa.array([["x", "y"], ["y", None]]),
        "empty": pa.array([[], None], pa.list_(pa.string())),
        "nested": pa.array([[["x"]], [["y"]]]),
        "struct": pa.array([{"a": 1}, {"a": 2}]),
        "binary": pa.array([b"\xff", b"a"]),
        "dictionary": pa.array(["a", "b"]).dictionary_encode(),
        "fixed": pa.array([["a", "b"], ["c", "d"]], pa.list_(pa.string(), 2)),
        "date": pa.array([0, 1], pa.date32()),
    }
    kinds = st.sampled_from(sorted(columns))
    names = ["question", "choices", "answer", "id", "task", "split", "context", "other"]
    odd = st.dictionaries(st.sampled_from(names), kinds, max_size=8).map(
        lambda chosen: packed(pa.table({name: columns[kind] for name, kind in chosen.items()}))
    )
    return st.one_of(damaged(good), damaged(good), odd), lambda data: _read(folder / "q.parquet", data)


def configurations(folder: Path) -> Opened:
    """YAML files with damaged settings or bytes, and overrides."""
    path = folder / "run.yaml"
    good = {
        **load_config().model_dump(mode="json"),
        "name": "fuzz",
        "finetune": {"epochs": 2, "learning_rate": 1e-3, "regularizer": {"kind": "manifold", "weight": "auto"}},
    }
    text = yaml.safe_dump(good, sort_keys=False).encode()
    anchors = b"a: &a [x, x, x]\nb: &b [*a, *a, *a]\nc: &c [*b, *b, *b]\nmodel: {path: m}\n"
    keys = st.sampled_from([*_keys(good), "", "a", "model.path.x", "questions.sources.0.path", "finetune..epochs"])
    override = st.tuples(keys, st.text(max_size=8) | VALUES.map(repr)).map(lambda pair: f"{pair[0]}={pair[1]}")

    def read(value: Any) -> None:
        data, overrides, given = value
        path.write_bytes(data)
        config = load_config(path, overrides)
        assert parse_config(yaml.safe_load(config.to_yaml())) == config
        if given is not None and not overrides:
            _nothing_swallowed(given, config.model_dump(mode="json"), "")

    structured = damaged_values(good).map(lambda v: (as_json(v), (), v))
    return (
        st.one_of(
            structured,
            structured,
            damaged([text, anchors]).map(lambda d: (d, (), None)),
            st.lists(override, min_size=1, max_size=2).map(lambda o: (text, tuple(o), None)),
        ),
        read,
    )


def _keys(value: Any, prefix: str = "") -> list[str]:
    if not isinstance(value, dict):
        return [prefix]
    return [key for name, part in value.items() for key in _keys(part, f"{prefix}.{name}" if prefix else name)]


def _nothing_swallowed(given: Any, got: Any, place: str) -> None:
    """What the file says is what the configuration holds; numbers may be written as other types of themselves."""
    if isinstance(given, dict):
        assert isinstance(got, dict), place
        for key, part in given.items():
            assert key in got, f"{place}.{key} was swallowed"
            _nothing_swallowed(part, got[key], f"{place}.{key}")
    elif isinstance(given, list):
        assert isinstance(got, list), place
        assert len(given) == len(got), place
        for number, part in enumerate(given):
            _nothing_swallowed(part, got[number], f"{place}.{number}")
    elif isinstance(got, float) or (isinstance(got, int) and not isinstance(got, bool)):
        assert float(given) == float(got), f"{place}: {given!r} became {got!r}"
    elif isinstance(got, bool):
        # Quoted, as 'no' or '0', it is the same to pydantic.
        assert TypeAdapter(bool).validate_python(given) is got, f"{place}: {given!r} became {got!r}"
    else:
        assert given == got, f"{place}: {given!r} became {got!r}"


def spaces(folder: Path) -> Opened:
    """Files of sweeps, with damaged factors, ranges and base configurations."""
    path = folder / "space.yaml"
    good = {
        "name": "fuzz",
        "base": "assets:demo.yaml",
        "set": {"finetune.epochs": 1},
        "seeds": [0, 1],
        "one_at_a_time": {
            "layers": {"setting": "routing.layers", "values": ["F5", "L1"]},
            "near": {"levels": {"random": {"neighbors.method": "random"}, "k = 1": {"neighbors.k": 1}}},
        },
    }
    search = {
        "name": "fuzz",
        "base": "assets:demo.yaml",
        "sample": {"finetune.learning_rate": {"log_uniform": [1e-4, 1e-2]}},
        "samples": 3,
        "scheduler": {"kind": "asha"},
    }

    def read(data: bytes) -> None:
        path.write_bytes(data)
        space = load_space(path)
        assert len({trial.id for trial in space.trials}) == len(space.trials)
        for trial in space.trials:
            assert parse_config(yaml.safe_load(trial.config.to_yaml())) == trial.config
            for _, level in trial.factors:
                assert isinstance(level, str)

    texts = [yaml.safe_dump(value, sort_keys=False).encode() for value in (good, search)]
    values = st.one_of(damaged_values(good), damaged_values(search)).map(as_json)
    return st.one_of(values, values, damaged(texts)), read


TARGETS = (
    Target("questions: JSON lines", json_lines, 20),
    Target("questions: Parquet", parquet, 15),
    Target("questions: other shapes", shaped_rows, 10),
    Target("configurations", configurations, 10),
    Target("spaces", spaces, 3),
    *CHECKPOINTS,
    *ARTIFACTS,
    *BORDERS,
)
