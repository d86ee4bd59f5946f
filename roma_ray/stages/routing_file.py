"""The routing JSON of a finished extraction: every question's last-token routing rows in all MoE layers, in the reference's form."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from roma_ray.engine.cache import ROWS
from roma_ray.engine.identity import refuse_free_form
from roma_ray.engine.progress import Progress
from roma_ray.engine.question_table import TABLE, matrix, read_table, table_facts
from roma_ray.engine.setup import Setup
from roma_ray.engine.tokenizer import load_tokenizer
from roma_ray.errors import ArtifactError, ConfigError
from roma_ray.moe.routing_json import RoutingEntry, write_routing_json
from roma_ray.questions.records import LETTERS
from roma_ray.store.artifacts import Stage

_RULE = "Last1"
_ROWS_AT_ONCE = 256


def write_routing(
    path: str | Path, setup: Setup, questions: Stage, extraction: Stage, progress: Progress, *, split: str | None = None
) -> int:
    """Write the rows r of a finished extraction (of one split, or of all questions); returns how many questions there are.

    Questions that failed in extraction are left out. Raises ArtifactError, ConfigError, StorageError.
    """
    refuse_free_form(setup.config, "the reference's routing JSON")
    if not extraction.complete:
        raise ArtifactError(
            f"no extraction of this configuration is finished in {setup.store.root}. Give the options that it was made with, or "
            "make it: `roma-ray extract`."
        )
    if _RULE not in setup.token_rules:
        raise ConfigError(
            f"the file holds the routing of the last token, and this extraction kept {', '.join(setup.token_rules)} alone: "
            f"extract with --set routing.tokens={_RULE}"
        )
    table = _rows(questions, extraction, split)
    if not len(table):
        raise ArtifactError(f"no question of {split or 'any split'} came through extraction: there is nothing to write")
    with progress.meter("routing", len(table), "questions") as meter:

        def entries() -> Iterator[RoutingEntry]:
            for start in range(0, len(table), _ROWS_AT_ONCE):
                part = table.slice(start, _ROWS_AT_ONCE)
                yield from _entries(part, setup, tokenizer)
                meter.advance(len(part))

        tokenizer = load_tokenizer(setup.model.path, setup.model.revision)
        write_routing_json(path, entries())
    return len(table)


def _rows(questions: Stage, extraction: Stage, split: str | None) -> pa.Table:
    """The wanted questions that came through extraction, with what the extraction says of them."""
    column = f"routing_{_RULE}"
    found = read_table(extraction.path / ROWS, ["row", "error", "prediction", "is_correct", column])
    asked = read_table(questions.path / TABLE, ["row", "id", "split", "prompt_ids", "answer"])
    assert found.column("row").equals(asked.column("row")), "both hold every question once, in order"
    for name in ("id", "split", "prompt_ids", "answer"):
        found = found.append_column(name, asked.column(name))
    wanted = pa.compute.is_null(found.column("error"))
    if split is not None:
        wanted = pa.compute.and_(wanted, pa.compute.equal(found.column("split"), split))
    return found.filter(wanted)


def _entries(part: pa.Table, setup: Setup, tokenizer: Any) -> Iterator[RoutingEntry]:
    facts = table_facts(part, "layers", "experts")
    layers, experts = facts["layers"], facts["experts"]
    assert layers == len(setup.moe_layers)
    routing_NLE = torch.from_numpy(matrix(part, f"routing_{_RULE}", layers * experts).copy()).reshape(
        -1, layers, experts
    )
    rows = part.drop_columns([f"routing_{_RULE}"]).to_pylist()
    texts = tokenizer.batch_decode([row["prompt_ids"] for row in rows])
    last = tokenizer.batch_decode([row["prompt_ids"][-1:] for row in rows])
    for row, routing_LE, text, token in zip(rows, routing_NLE, texts, last, strict=True):
        yield RoutingEntry(
            id=row["id"],
            input_text=text,
            token_id=row["prompt_ids"][-1],
            token_text=token,
            layers=setup.moe_layers,
            routing_LE=routing_LE,
            correct_answer=LETTERS[row["answer"]],
            model_answer=LETTERS[row["prediction"]],
            is_correct=row["is_correct"],
        )
