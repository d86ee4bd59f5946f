"""Rows of Parquet files; of questions the columns are checked against a fixed schema first, then read a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from roma_ray.borders.documents import first_repeated
from roma_ray.borders.text import printable
from roma_ray.config.schema import ColumnsConfig
from roma_ray.errors import QuestionError
from roma_ray.questions.free_records import FIELDS, FORMS, MANY
from roma_ray.questions.records import BadRow
from roma_ray.questions.shapes import KEY, KNOWN, Take, top_columns

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 1024
MAX_ROW_BYTES = 8 * 2**20
"""Rows whose texts are longer in sum are set aside, as over-long lines of a JSONL file are."""

COLUMNS = {
    "question": "text",
    "choices": "list of texts",
    "answer": "text or integer",
    "id": "text or integer",
    "task": "text",
    "split": "text",
    "context": "text",
}
REQUIRED = ("question", "choices", "answer")


def parquet_rows(
    path: Path, *, name: str, columns: ColumnsConfig | None = None, questions: bool = True, free: bool = False
) -> Iterator[Take]:
    """Each row of the file as what makes it; `name` stands for the file in errors.

    Of `questions` the columns that no question has are not read; rows of another shape (`columns`, or the known one of
    `shapes`, and `free` ones without choices) are nested: their types are looked at row by row, as those of other files are.

    Raises:
        QuestionError: not a Parquet file, a corrupt one, a missing column or one of the wrong type.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path, memory_map=False, pre_buffer=False, page_checksum_verification=True) as file:
            names = file.schema_arrow.names
            nested = _nested(file.schema_arrow, columns, name, free) if questions else list(names)
            wanted = nested or _checked(file.schema_arrow, name)
            twice = first_repeated(column for column in names if column in wanted)
            if twice is not None:
                raise QuestionError(f"{name} has the column `{printable(twice, 40)}` twice")
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=wanted):
                for take in _nested_rows(batch) if nested else _rows(batch):
                    number += 1
                    yield take
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        # Arrow decodes the names in a damaged file's schema itself, hence the second.
        raise QuestionError(
            f"{name} cannot be read after row {number}: it is not a whole Parquet file ({printable(str(error))})"
        ) from error


def _nested(schema: pa.Schema, columns: ColumnsConfig | None, name: str, free: bool) -> list[str]:
    """The columns of a file of another shape; none where it holds question rows. Raises QuestionError when one is missing."""
    held = ", ".join(printable(column, 40) for column in schema.names[:20])
    if columns is None and free:
        if not any(form in schema.names for form in FORMS):
            raise QuestionError(
                f"{name} has no column `question`, `prompt`, `messages` or `text` (its columns: {held})"
            )
        return [column for column in (*FIELDS, *MANY) if column in schema.names]
    if columns is None:
        known = KEY in schema.names and "answer" not in schema.names
        return [column for column in KNOWN if column in schema.names] if known else []
    needed, optional = top_columns(columns, free=free)
    missing = [column for column in needed if column not in schema.names]
    if missing:
        raise QuestionError(f"{name} has no column `{printable(missing[0], 40)}` (its columns: {held})")
    return [*needed, *(column for column in optional if column in schema.names)]


def _nested_rows(batch: pa.RecordBatch) -> Iterator[Take]:
    """The rows as plain values, each made by itself: one bad text must not spoil the others."""
    columns = {name: batch.column(name) for name in batch.schema.names}

    def row(i: int) -> dict[str, Any]:
        try:
            values = {name: column[i].as_py() for name, column in columns.items()}
        except UnicodeDecodeError as error:
            raise BadRow(f"invalid UTF-8 at byte {error.start + 1} of a text") from None
        if _size(values) > MAX_ROW_BYTES:
            raise BadRow(f"the row is longer than {MAX_ROW_BYTES} bytes")
        return values

    for i in range(batch.num_rows):
        yield partial(row, i)


def _size(value: Any) -> int:
    """Characters of all texts in a value."""
    if isinstance(value, Mapping):
        return sum(map(_size, value.values()))
    if isinstance(value, list):
        return sum(map(_size, value))
    return len(value) if isinstance(value, str | bytes) else 0


def _checked(schema: pa.Schema, name: str) -> list[str]:
    """The names of the columns to read, after a check of their types."""
    found = [column for column in COLUMNS if column in schema.names]
    missing = [column for column in REQUIRED if column not in found]
    if missing:
        held = ", ".join(printable(column, 40) for column in schema.names[:20])
        lacking = "no column " + " and no column ".join(f"`{column}`" for column in missing)
        open_ended = "; open-ended questions cannot be scored by their choices (questions.prompt.format=free asks them)"
        hint = open_ended if "choices" in missing else ""
        raise QuestionError(f"{name} has {lacking} (its columns: {held}){hint}")
    for column in found:
        type_ = schema.field(schema.names.index(column)).type
        if not _KINDS[COLUMNS[column]](type_):
            raise QuestionError(f"{name}: column `{column}` is of type {type_}, not {COLUMNS[column]}")
    return found


def _is_text(type_: pa.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    # A column of nothing but nulls has no type of its own.
    return pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_null(type_)


def _is_text_or_integer(type_: pa.DataType) -> bool:
    import pyarrow as pa

    return _is_text(type_) or pa.types.is_integer(type_)


def _is_text_list(type_: pa.DataType) -> bool:
    import pyarrow as pa

    is_list = pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_)
    return is_list and _is_text(type_.value_type)


_KINDS: dict[str, Callable[[pa.DataType], bool]] = {
    "text": _is_text,
    "text or integer": _is_text_or_integer,
    "list of texts": _is_text_list,
}


def _rows(batch: pa.RecordBatch) -> Iterator[Take]:
    """The rows with texts as bytes: Arrow does not check a file's UTF-8, and one bad text must not spoil the others."""
    columns = {name: _as_bytes(batch.column(name)) for name in batch.schema.names}
    for i in range(batch.num_rows):
        yield partial(_decoded, {name: column[i].as_py() for name, column in columns.items()})


def _as_bytes(column: pa.Array) -> pa.Array:
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return column.cast(pa.large_binary())
    if not pa.types.is_integer(column.type) and not pa.types.is_null(column.type):
        return column.cast(pa.large_list(pa.large_binary()))
    return column


def _decoded(cells: dict[str, Any]) -> dict[str, Any]:
    size = sum(
        len(text)
        for cell in cells.values()
        for text in (cell if isinstance(cell, list) else [cell])
        if isinstance(text, bytes)
    )
    if size > MAX_ROW_BYTES:
        raise BadRow(f"the row is longer than {MAX_ROW_BYTES} bytes")
    row: dict[str, Any] = {}
    for name, cell in cells.items():
        try:
            if isinstance(cell, list):
                row[name] = [text.decode("utf-8") if isinstance(text, bytes) else text for text in cell]
            else:
                row[name] = cell.decode("utf-8") if isinstance(cell, bytes) else cell
        except UnicodeDecodeError as error:
            raise BadRow(f"invalid UTF-8 in `{name}` at byte {error.start + 1}") from None
    return row
