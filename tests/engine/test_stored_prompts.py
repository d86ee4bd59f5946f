"""Prompts that are decoded when they are indexed are the rows of their table, and their columns what a loop over them counts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from roma_ray.engine.batches import plan_batches
from roma_ray.engine.forward import own_tokens, shared_prefix
from roma_ray.engine.question_table import QUESTIONS, read_prompts, read_some_prompts, read_table
from roma_ray.engine.stored_prompts import PROMPT_COLUMNS, Measured, Prompts
from roma_ray.errors import ArtifactError
from roma_ray.questions.held_out import parts_in_force
from roma_ray.questions.prompts import Prompt
from roma_ray.store import scratch, tables
from roma_ray.store.tables import iterate_table


def write(path: Path, count: int, instruction: tuple[int, ...] = (7, 8, 9)) -> list[Prompt]:
    """A table of random prompts, in row groups of seven rows."""
    rng = random.Random(count)
    prompts = []
    for n in range(count):
        own = tuple(rng.choices(range(100), k=rng.randint(1, 6)))
        choices = tuple(tuple(rng.choices(range(100), k=rng.randint(1, 4))) for _ in range(rng.randint(2, 5)))
        chars = tuple(rng.randint(1, 30) for _ in choices)
        answer, split = rng.randrange(len(choices)), rng.choice(["train", "validation", "test"])
        prompts.append(
            Prompt(f"q{n}", f"t{n % 3}", split, instruction + own, choices, chars, answer, rng.random() < 0.5)
        )
    names = [field.name for field in QUESTIONS]
    columns = {name: [getattr(p, name, None) for p in prompts] for name in names} | {"row": range(count)}
    table = pa.table([pa.array(columns[name], QUESTIONS.field(name).type) for name in names], schema=QUESTIONS)
    tables.write_parts(path, QUESTIONS, [table.slice(start, 7) for start in range(0, count, 7)])
    return prompts


@pytest.fixture(params=["held", "mapped"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Where tables lie; small ones are held, and the same ones mapped where that is what large ones are."""
    monkeypatch.setattr(scratch, "scratch_root", lambda: tmp_path)
    if request.param == "mapped":
        monkeypatch.setattr(tables, "HELD_BYTES", 300)
    yield tmp_path / "questions.parquet"
    assert {path.suffix for path in tmp_path.iterdir()} <= {".parquet"}


def test_every_prompt_is_its_row(place: Path) -> None:
    expected = write(place, 40)
    prompts = read_prompts(place)
    assert len(prompts) == 40
    assert list(prompts) == expected
    assert [prompts[n] for n in (39, 0, 7, 6)] == [expected[n] for n in (39, 0, 7, 6)]
    assert (prompts[-1], prompts[3:12]) == (expected[-1], expected[3:12])
    assert prompts.ids.to_pylist() == [p.id for p in expected]
    with pytest.raises(IndexError, match="row 40 of 40"):
        prompts[40]


def test_columns_are_what_a_loop_counts(place: Path) -> None:
    expected = write(place, 40)
    prompts, measured = read_prompts(place), Measured(iterate_table(place, PROMPT_COLUMNS, 9))
    assert prompts.prompt_tokens.tolist() == measured.prompt_tokens.tolist() == [len(p.prompt_ids) for p in expected]
    assert prompts.fed_tokens.tolist() == [sum(len(ids) - 1 for ids in p.choice_ids) for p in expected]
    assert prompts.gold_tokens.tolist() == [len(p.choice_ids[p.answer]) for p in expected]
    assert prompts.answers.tolist() == [p.answer for p in expected]
    assert prompts.truncated.tolist() == [p.truncated for p in expected]
    assert list(prompts.tasks) == [p.task for p in expected]
    usable = np.arange(40) % 2 == 0
    assert prompts.rows_of("test", usable) == [n for n, p in enumerate(expected) if p.split == "test" and usable[n]]
    assert prompts.rows_of("nothing") == []
    own = measured.own_tokens().tolist()
    assert own == [own_tokens(p, 3) for p in expected]
    assert list(plan_batches(measured.own_tokens(), 30)) == list(plan_batches(own, 30))


@pytest.mark.parametrize("instruction", [(), (5,), (7, 8, 9), tuple(range(30))])
def test_the_shared_prefix_is_that_of_all_parts(tmp_path: Path, instruction: tuple[int, ...]) -> None:
    for count in (1, 2, 30):
        expected = write(tmp_path / "q.parquet", count, instruction)
        for rows in (1, 4, 100):
            measured = Measured(iterate_table(tmp_path / "q.parquet", PROMPT_COLUMNS, rows))
            assert measured.prefix == shared_prefix(expected)


def test_held_out_tasks_keep_their_test_questions_alone(place: Path) -> None:
    expected = write(place, 40)
    held_out = ["t1", "t2", "unheard"]
    parts = parts_in_force([(p.task, p.split) for p in expected], held_out)
    prompts = read_prompts(place, held_out=held_out)
    assert [p.split for p in prompts] == list(prompts.splits) == parts
    assert prompts.rows_of("unused") == [n for n, part in enumerate(parts) if part == "unused"]


def test_some_rows_are_read_in_the_order_asked_for(tmp_path: Path) -> None:
    expected = write(tmp_path / "q.parquet", 40)
    rows = [39, 0, 13, 14, 0]
    assert read_some_prompts(tmp_path / "q.parquet", rows) == [expected[n] for n in rows]
    assert read_some_prompts(tmp_path / "q.parquet", []) == []
    with pytest.raises(ArtifactError, match="has 40 rows"):
        read_some_prompts(tmp_path / "q.parquet", [40])


def test_a_table_of_other_types_or_with_empty_cells_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "q.parquet", 3)
    table = read_table(tmp_path / "q.parquet")
    for name, column in (("answer", [0.5, 1.0, 1.0]), ("prompt_ids", [[1], None, [2]]), ("id", [1, 2, 3])):
        changed = table.set_column(table.column_names.index(name), name, pa.array(column))
        with pytest.raises(ArtifactError, match="none of questions"):
            Prompts([changed])
