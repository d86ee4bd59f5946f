"""Benchmarks from files: question records become the data sets' columns, and stock prompts come out; task files with code are refused."""

from __future__ import annotations

import gzip
import os
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from roma_ray.benchmarks.local_data import find_files, read_splits
from roma_ray.benchmarks.task_files import check_task_file
from roma_ray.benchmarks.tasks import leaves, load_tasks
from roma_ray.borders.templates import Renderer
from roma_ray.errors import ConfigError, QuestionError
from roma_ray.questions.jsonl import MAX_LINE_BYTES
from roma_ray.questions.prompts import PromptBuilder
from tests.benchmarks.conftest import write_rows


def unused() -> PromptBuilder:
    raise AssertionError("no question file is among these tasks")


FOUR = {"question": "What melts?", "choices": ["ice", "tea", "air", "sun"], "answer": "A"}
RECORDS: dict[str, dict[str, Any]] = {
    "arc_challenge": FOUR,
    "arc_easy": FOUR,
    "hellaswag": {**FOUR, "question": "Cooking: A man stirs the tea. He"},
    "piqa": {"question": "How to melt ice?", "choices": ["heat it", "cool it"], "answer": 0},
    "winogrande": {"question": "The ice met the tea so _ melted.", "choices": ["the ice", "the tea"], "answer": "B"},
    "boolq": {"question": "is ice cold?", "choices": ["no", "yes"], "answer": 1, "context": "Ice -- cold."},
    "mmlu_anatomy": {**FOUR, "subject": "anatomy"},
    "gsm8k": {"question": "1 + 1?", "answer": "2", "solution": "It is 2.\n#### 2"},
}
# (the stock prompt, the choices or the target, the right one)
EXPECTED: dict[str, tuple[Any, Any, Any]] = {
    "arc_challenge": ("Question: What melts?\nAnswer:", FOUR["choices"], 0),
    "arc_easy": ("Question: What melts?\nAnswer:", FOUR["choices"], 0),
    "hellaswag": ("Cooking: A man stirs the tea. He", FOUR["choices"], 0),
    "piqa": ("Question: How to melt ice?\nAnswer:", ["heat it", "cool it"], 0),
    # WinoGrande scores the rest of the sentence after each option: its "text" is the right option's number.
    "winogrande": (1, ["The ice met the tea so the ice", "The ice met the tea so the tea"], "melted."),
    "boolq": ("Ice -- cold.\nQuestion: is ice cold?\nAnswer:", ["no", "yes"], 1),
    "mmlu_anatomy": ("What melts?\nA. ice\nB. tea\nC. air\nD. sun\nAnswer:", ["A", "B", "C", "D"], 0),
    "gsm8k": ("Question: 1 + 1?\nAnswer:", None, "It is 2.\n#### 2"),
}
JUDGED = {"hellaswag": "validation", "piqa": "validation", "winogrande": "validation", "boolq": "validation"}


def test_records_of_all_eight_benchmarks_give_the_stock_prompts(tmp_path: Path) -> None:
    for task, record in RECORDS.items():
        name = "mmlu" if task.startswith("mmlu") else task
        write_rows(tmp_path / name / f"{JUDGED.get(task, 'test')}.jsonl", [record])
    write_rows(tmp_path / "mmlu" / "dev.jsonl", [{**FOUR, "subject": "virology"}])
    tasks = leaves(load_tasks(list(RECORDS), data_dir=str(tmp_path), builder=unused, allow_code=False))
    for name, (text, choices, target) in EXPECTED.items():
        task = tasks[name]
        (doc,) = task.eval_docs
        assert task.doc_to_text(doc) == text, name
        assert choices is None or list(task.doc_to_choice(doc)) == choices
        assert task.doc_to_target(doc) in (target, str(target)), name
        assert task.config.dataset_path, "the definition still names the hub's data set"


@pytest.mark.parametrize(
    ("task", "row", "reason"),
    [
        ("boolq", {**RECORDS["boolq"], "choices": ["yes", "no"]}, "no and yes"),
        ("winogrande", {**RECORDS["winogrande"], "question": "no blank"}, "blank"),
        ("piqa", FOUR, "4 choices"),
        ("hellaswag", FOUR, "activity: context"),
        ("arc_easy", {"text": "?"}, "neither the data set's own nor"),
        ("gsm8k", {"question": "1 + 1?", "answer": 2}, "texts"),
    ],
)
def test_a_row_that_does_not_fit_is_named(tmp_path: Path, task: str, row: dict[str, Any], reason: str) -> None:
    write_rows(tmp_path / f"{task}.jsonl", [RECORDS[task], row])
    with pytest.raises(QuestionError, match=rf"{task}\.jsonl, row 2: .*{reason}"):
        read(tmp_path, task, default="test")


def read(folder: Path, task: str, part: str | None = None, default: str = "validation") -> dict[str, list[Any]]:
    splits = ("train", default)
    return read_splits(find_files(folder, task, part, splits), task, part, default, splits)


OWN = {"goal": "g", "sol1": "a", "sol2": "b", "label": 1}


def test_own_columns_pass_unchanged_and_damage_is_named(tmp_path: Path) -> None:
    write_rows(tmp_path / "piqa" / "validation.jsonl", [OWN])
    # The hub's test rows have no labels, and this benchmark does not ask them.
    write_rows(tmp_path / "piqa" / "test.jsonl", [{**OWN, "label": -1}])
    assert read(tmp_path, "piqa") == {"validation": [OWN]}
    (tmp_path / "piqa" / "validation.jsonl").write_text("{broken\n")
    with pytest.raises(QuestionError, match="row 1: invalid JSON"):
        read(tmp_path, "piqa")
    (tmp_path / "piqa" / "validation.jsonl").rename(tmp_path / "piqa" / "validation.parquet")
    with pytest.raises(QuestionError, match="not a whole Parquet file"):
        read(tmp_path, "piqa")


def test_rows_are_read_as_question_files_are(tmp_path: Path) -> None:
    """Blank lines and gzip pass; over-long lines, repeated fields and bad UTF-8 are named with their line."""
    place = tmp_path / "piqa" / "validation.jsonl"
    write_rows(place, [OWN])
    good = place.read_bytes()
    place.write_bytes(b"\n" + good + b"  \n" + good)
    assert read(tmp_path, "piqa") == {"validation": [OWN, OWN]}
    for bad, reason in (
        (b'{"goal": "' + b"x" * MAX_LINE_BYTES + b'"}', "longer than"),
        (b'{"goal": 1, "goal": 2}', "`goal` occurs twice"),
        (b'{"goal": "\xff"}', "invalid UTF-8"),
    ):
        place.write_bytes(good + bad)
        with pytest.raises(QuestionError, match=f"row 2: .*{reason}"):
            read(tmp_path, "piqa")
    place.unlink()
    place.with_suffix(".jsonl.gz").write_bytes(gzip.compress(good))
    assert read(tmp_path, "piqa") == {"validation": [OWN]}


@pytest.mark.parametrize("label", ["2", 2])
def test_hellaswags_labels_are_the_hubs_or_its_authors(tmp_path: Path, label: object) -> None:
    row = {"activity_label": "a", "ctx_a": "b", "ctx_b": "", "endings": ["1", "2", "3", "4"], "label": label}
    write_rows(tmp_path / "hellaswag" / "validation.jsonl", [row])
    assert read(tmp_path, "hellaswag") == {"validation": [row]}


@pytest.mark.parametrize("inner", ["", "data", "plain_text"])
def test_the_hubs_layout_is_read_shard_after_shard(tmp_path: Path, inner: str) -> None:
    place = tmp_path / "piqa" / inner
    place.mkdir(parents=True)
    rows = [{**OWN, "goal": str(n)} for n in range(3)]
    for number, part in enumerate((rows[:2], rows[2:])):
        pq.write_table(pa.Table.from_pylist(part), place / f"validation-0000{number}-of-00002.parquet")
    assert read(tmp_path, "piqa", "plain_text") == {"validation": rows}
    (place / "validation-00000-of-00002.parquet").unlink()
    with pytest.raises(QuestionError, match=r"holds 1 of the 2 shards of piqa's validation split"):
        read(tmp_path, "piqa", "plain_text")


@pytest.mark.parametrize(
    "names",
    [
        ("piqa/validation.jsonl", "piqa/validation.parquet"),
        ("piqa/validation.jsonl", "piqa/validation-00000-of-00001.jsonl"),
        ("piqa/validation.jsonl", "piqa/data/validation.jsonl"),
        ("piqa.jsonl", "piqa/train.jsonl"),
        ("piqa.jsonl", "piqa.jsonl.gz"),
    ],
)
def test_two_files_for_one_split_are_refused_by_name(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(QuestionError, match="could be read from") as caught:
        read(tmp_path, "piqa")
    assert all(str(tmp_path / name) in str(caught.value) for name in names)


def test_mmlus_table_of_all_parts_is_read_and_a_link_is_no_second_claim(tmp_path: Path) -> None:
    (tmp_path / "mmlu" / "all").mkdir(parents=True)
    rows = [{"question": "q", "choices": ["a", "b", "c", "d"], "answer": 1, "subject": s} for s in ("anatomy", "law")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "mmlu" / "all" / "validation-00000-of-00001.parquet")
    (tmp_path / "mmlu" / "data").symlink_to("all")
    assert [row["subject"] for row in read(tmp_path, "mmlu_anatomy", "anatomy")["validation"]] == ["anatomy"]


def test_rows_of_an_unknown_split_are_refused_and_those_of_an_unused_one_passed_over(tmp_path: Path) -> None:
    write_rows(tmp_path / "piqa.jsonl", [{**OWN, "split": split} for split in ("validation", "test", "train", None)])
    assert {split: len(rows) for split, rows in read(tmp_path, "piqa").items()} == {"validation": 2, "train": 1}
    write_rows(tmp_path / "piqa.jsonl", [{**OWN, "split": split} for split in ("validation", "val")])
    with pytest.raises(QuestionError, match=r"row 2: its split is 'val', none of test, train, validation"):
        read(tmp_path, "piqa")


CODE = "import pathlib\npathlib.Path({mark!r}).touch()\ndef text(doc):\n    return doc['question']\n"
PLAIN = "task: own\noutput_type: generate_until\ntest_split: test\ndoc_to_text: 'x'\ndoc_to_target: 'y'\n"


@pytest.mark.parametrize(
    "text",
    [
        PLAIN.replace("'x'", "!function code.text"),
        PLAIN + "process_results: !function code.text\n",
        "include: base.yaml\ntask: own\n",
        PLAIN + "metric_list:\n  - metric: exact_match\n    hf_evaluate: true\n",
        PLAIN + "unsafe_code: true\n",
        PLAIN + "x: !!python/object/apply:os.system ['true']\n",
        "class: !function code.Task\ntask: own\n",
    ],
)
def test_task_files_with_code_are_refused_before_it_runs(tmp_path: Path, text: str) -> None:
    mark = tmp_path / "ran"
    (tmp_path / "code.py").write_text(CODE.format(mark=str(mark)))
    (tmp_path / "base.yaml").write_text(PLAIN.replace("'x'", "!function code.text"))
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"would run code .*--allow-code"):
        load_tasks([str(path)], data_dir=None, builder=unused, allow_code=False)
    assert not mark.exists()
    check_task_file(path, allow_code=True)


def test_a_template_reaches_no_internals(tmp_path: Path) -> None:
    write_rows(tmp_path / "data" / "own" / "test.jsonl", [{"question": "q"}])
    task = {**yaml.safe_load(PLAIN), "doc_to_text": "{{ question.__class__.__mro__ }}"}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(task))
    with pytest.raises(ConfigError, match="SecurityError"):
        load_tasks([str(tmp_path / "own.yaml")], data_dir=str(tmp_path / "data"), builder=unused, allow_code=False)


@pytest.mark.parametrize("code", [False, True], ids=["", "allowed"])
@pytest.mark.parametrize(
    ("include", "reason"),
    [
        ("/dev/zero", "no regular file"),
        ("pipe", "no regular file"),
        (".", "no regular file|Is a directory"),
        ("missing.yaml", "No such file"),
        ("loop.yaml", "[Ss]ymlink|symbolic|Too many levels"),
        ('"a\\0b"', "null"),
        ("bomb.yaml", "aliases"),
        ("long.yaml", "longer than"),
        ("twice.yaml", "stands twice"),
    ],
)
def test_a_task_file_includes_nothing_endless(include: str, reason: str, code: bool, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    (tmp_path / "long.yaml").write_text("x: " + "y" * (1 << 20))
    (tmp_path / "twice.yaml").write_text("x: 1\nx: 2\n")
    levels = "\n".join(f"a{n}: &a{n} [{', '.join(['x' if n == 0 else f'*a{n - 1}'] * 9)}]" for n in range(12))
    (tmp_path / "bomb.yaml").write_text(levels)
    path = tmp_path / "own.yaml"
    for text in (f"include: {include}\ntask: own\n", f"include: [{include}]\ntask: own\n"):
        path.write_text(text)
        with pytest.raises(ConfigError, match=rf"the task file .* cannot be read: .*({reason})"):
            check_task_file(path, allow_code=code)


@pytest.mark.parametrize("field", ["doc_to_text", "description"])
def test_a_template_of_a_task_file_has_an_end(field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("roma_ray.benchmarks.task_files.Renderer", partial(Renderer, seconds=1))
    write_rows(tmp_path / "data" / "own" / "test.jsonl", [{"question": "q"}])
    task = {
        **yaml.safe_load(PLAIN),
        field: "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(task))

    def ask() -> None:
        tasks = load_tasks(
            [str(tmp_path / "own.yaml")], data_dir=str(tmp_path / "data"), builder=unused, allow_code=False
        )
        leaves(tasks)["own"].build_all_requests(limit=1)

    with pytest.raises(ConfigError, match=r"a template of .*own.yaml takes more than 1 s"):
        ask()
