"""The extraction pass: routing weights, choice scores, answers and the activations at the cut, one forward a question.

Each planned batch writes `batches/NNNNNN.safetensors` (activations, flat tokens x width) and then, as the mark that it is
done, `batches/NNNNNN.parquet` (one row a question). `rows.parquet` gathers the rows at the end.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from roma_ray.artifacts import Stage, note_device, write_atomically, write_json
from roma_ray.engine.batches import is_letter, plan_batches, prompt_shape
from roma_ray.engine.devices import device_kind
from roma_ray.engine.forward import Layout, choice_scores, lay_out, mean_routing, predict, routing_positions
from roma_ray.engine.prepare import TABLE
from roma_ray.engine.progress import Progress
from roma_ray.engine.setup import ModelSpec, Setup
from roma_ray.engine.tables import WRITING, read_prompts, read_table, write_table
from roma_ray.engine.work import Executor, Report
from roma_ray.errors import ArtifactError, ModelError
from roma_ray.moe.reading import read_routing
from roma_ray.moe.slices import slice_hidden, slice_logits
from roma_ray.questions.prompts import Prompt

VERSION = 1
ROWS = "rows.parquet"
PLAN = "plan.json"


def extract_stage(setup: Setup, questions: Stage) -> Stage:
    """Where the extraction of these questions with this model and cut lives."""
    extraction = setup.config.extraction
    settings = {
        **setup.numeric_identity(),
        "cut": setup.cut,
        "tokens": [setup.config.routing.tokens],
        "batch_tokens": extraction.batch_tokens,
        "activation_dtype": activation_dtype(setup),
    }
    return setup.store.stage("extract", settings, {"questions": questions.fingerprint}, VERSION)


def activation_dtype(setup: Setup) -> str:
    """Type of the cached activations; `auto` is the model's own."""
    chosen = setup.config.extraction.activation_dtype
    return setup.model.dtype if chosen == "auto" else chosen


def extract(setup: Setup, questions: Stage, execute: Executor, progress: Progress) -> Stage:
    """Run the batches that are not done yet with `execute`, then gather their rows. Raises ModelError, StorageError."""
    stage = extract_stage(setup, questions)
    if stage.complete:
        return stage
    started = time.monotonic()
    with stage.exclusive():
        prompts = read_prompts(questions.path / TABLE)
        plan = _plan(stage, prompts, setup.config.extraction.batch_tokens)
        done = [n for n in range(len(plan)) if batch_table(stage.path, n).exists()]
        pending = sorted(set(range(len(plan))) - set(done))
        work = ExtractWork(
            folder=str(stage.path),
            questions=str(questions.path / TABLE),
            model=setup.model,
            cut=setup.cut,
            tokens=(setup.config.routing.tokens,),
            rule=setup.config.questions.prompt.cloze_score
            if setup.config.questions.prompt.format == "cloze"
            else "raw",
            activation_dtype=activation_dtype(setup),
        )
        finished = sum(len(plan[n]) for n in done)
        with progress.meter("extract", len(prompts), "questions", finished) as meter:
            for report in execute(work, pending):
                meter.advance(report.rows)
        facts = gather(stage, len(plan), [p.id for p in prompts])
        stage.finish(facts=facts, seconds=time.monotonic() - started)
    if facts["errors"]:
        progress.say(
            f"{facts['errors']} question(s) failed in extraction and are left out; see `error` in {stage.path / ROWS}"
        )
    return stage


def _plan(stage: Stage, prompts: Sequence[Prompt], batch_tokens: int) -> list[list[int]]:
    """The planned batches, as saved by the first attempt or made now."""
    path = stage.path / PLAN
    if not path.exists():
        shapes = [prompt_shape(p) for p in prompts]
        write_json(path, plan_batches([s[0] for s in shapes], [s[1] for s in shapes], batch_tokens))
    plan: list[list[int]] = json.loads(path.read_text())
    return plan


def batch_table(folder: str | Path, batch: int) -> Path:
    """The table of a batch; its presence marks the batch as done."""
    return Path(folder) / "batches" / f"{batch:06d}.parquet"


def batch_activations(folder: str | Path, batch: int) -> Path:
    """The activations of a batch."""
    return Path(folder) / "batches" / f"{batch:06d}.safetensors"


@dataclass(frozen=True)
class ExtractWork:
    """What a worker needs to extract planned batches."""

    folder: str
    questions: str
    model: ModelSpec
    cut: int
    tokens: tuple[str, ...]
    rule: str
    activation_dtype: str
    name: str = "extract"

    def open(self) -> Callable[[int], Report]:
        """Load trunk and head; returns the function that extracts one planned batch."""
        note_device(self.folder, device_kind(self.model.device))
        return Extractor(self)


class Extractor:
    """A loaded model that extracts planned batches."""

    def __init__(self, work: ExtractWork) -> None:
        self.work = work
        self.plan: list[list[int]] = json.loads((Path(work.folder) / PLAN).read_text())
        self.prompts = read_prompts(work.questions)
        # A cut at layer 0 leaves no trunk: the prompts themselves are the cache.
        self.trunk = work.model.load(0, work.cut, with_lm_head=False) if work.cut else None
        self.head = work.model.load(work.cut, None, with_lm_head=True)
        self.vocabulary = self.head.model.config.get_text_config().vocab_size

    def __call__(self, batch: int, excluded: frozenset[int] = frozenset()) -> Report:
        """Extract one batch and write its files; `excluded` rows are set aside as having killed a worker."""
        started = time.monotonic()
        rows = self.plan[batch]
        errors = {row: "killed its worker" for row in rows if row in excluded}
        for row in rows:
            ids = (*self.prompts[row].prompt_ids, *(t for c in self.prompts[row].choice_ids for t in c))
            if max(ids) >= self.vocabulary:
                errors.setdefault(row, f"token {max(ids)} is beyond the model's vocabulary of {self.vocabulary}")
        result = self._survivors(rows, errors)
        if result.hidden_TD is not None:
            _write_tensor(batch_activations(self.work.folder, batch), result.hidden_TD)
        self._write_rows(batch, rows, result, errors)
        return Report(batch, len(rows), result.tokens, len(errors), time.monotonic() - started)

    def rows(self, batch: int) -> list[int]:
        """The rows of a planned batch."""
        return self.plan[batch]

    def probe(self, row: int) -> None:
        """Run one row alone and keep nothing, to find out whether it kills the process."""
        with contextlib.suppress(RuntimeError, ValueError, IndexError):
            self._forward([row])

    def _survivors(self, rows: Sequence[int], errors: dict[int, str]) -> _Result:
        """The batch's result without the rows in `errors`, to which rows that fail on their own are added."""
        good = [row for row in rows if row not in errors]
        try:
            result = self._forward(good)
        except (RuntimeError, ValueError, IndexError) as failure:
            for row in good:
                try:
                    self._forward([row])
                except (RuntimeError, ValueError, IndexError) as own:
                    errors[row] = f"{type(own).__name__}: {str(own).splitlines()[0]}"
            good = [row for row in rows if row not in errors]
            try:
                result = self._forward(good)
            except (RuntimeError, ValueError, IndexError):
                raise ModelError(
                    f"a batch of {len(good)} questions fails though each alone succeeds: {failure}. "
                    "If memory ran out, lower extraction.batch_tokens."
                ) from failure
        infinite = [row for row, scores in result.scores.items() if not all(np.isfinite(scores))]
        if infinite:
            errors.update(dict.fromkeys(infinite, "the model's scores are not finite"))
            return self._survivors(rows, errors)
        return result

    @torch.inference_mode()
    def _forward(self, rows: Sequence[int]) -> _Result:
        if not rows:
            return _Result.empty()
        prompts = [self.prompts[row] for row in rows]
        layout = lay_out(prompts).to(self.work.model.device)
        rules = {rule: routing_positions(layout, rule) for rule in self.work.tokens}
        positions_BP = torch.cat(list(rules.values()), dim=1)
        hidden_BSD, parts = layout.ids_BS, []
        if self.trunk is not None:
            with read_routing(self.trunk.model, self.trunk.routers, positions_BP) as tape:
                hidden_BSD = slice_hidden(self.trunk, layout.ids_BS, layout.mask_BS)
            parts = [tape.routing_BPLE] if self.trunk.routers else []
        with read_routing(self.head.model, self.head.routers, positions_BP) as tape:
            logits_BPV = slice_logits(self.head, hidden_BSD, layout.mask_BS, layout.score_positions_BP)
        routing_BPLE = torch.cat([*parts, tape.routing_BPLE], dim=2)
        routing = {}
        start = 0
        for rule, wanted_BP in rules.items():
            section = routing_BPLE[:, start : start + wanted_BP.shape[1]]
            start += wanted_BP.shape[1]
            routing[rule] = mean_routing(section, wanted_BP, layout).float().cpu().numpy()
        scores = choice_scores(logits_BPV, layout, prompts)
        dtype = getattr(torch, self.work.activation_dtype)
        hidden_TD = keep_states(hidden_BSD, layout, prompts).to(dtype).cpu() if self.trunk is not None else None
        return _Result(
            rows=list(rows),
            hidden_TD=hidden_TD,
            routing=routing,
            scores=dict(zip(rows, scores, strict=True)),
            tokens=int(layout.mask_BS.sum()),
        )

    def _write_rows(self, batch: int, rows: Sequence[int], result: _Result, errors: dict[int, str]) -> None:
        place = {row: n for n, row in enumerate(result.rows)}
        lengths = [kept_tokens(self.prompts[row]) for row in result.rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(int).tolist()
        columns: dict[str, list[Any]] = {name: [] for name in _schema(self.work.tokens).names}
        for row in rows:
            prompt, at = self.prompts[row], place.get(row)
            scores = result.scores.get(row)
            answer = predict(scores, prompt, self.work.rule) if scores is not None else None
            columns["row"].append(row)
            columns["id"].append(prompt.id)
            columns["batch"].append(batch)
            columns["error"].append(errors.get(row))
            columns["scores"].append(scores)
            columns["prediction"].append(answer)
            columns["is_correct"].append(answer is not None and answer == prompt.answer)
            columns["offset"].append(None if at is None else offsets[at])
            columns["tokens"].append(None if at is None else lengths[at])
            for rule in self.work.tokens:
                columns[f"routing_{rule}"].append(None if at is None else result.routing[rule][at].ravel())
        shape = next(iter(result.routing.values())).shape[1:] if result.routing else None
        facts = {"layers": shape[0], "experts": shape[1]} if shape else {}
        write_table(batch_table(self.work.folder, batch), columns, _schema(self.work.tokens), facts)


@dataclass(frozen=True)
class _Result:
    rows: list[int]
    hidden_TD: Tensor | None
    routing: dict[str, np.ndarray]
    scores: dict[int, list[float]]
    tokens: int

    @staticmethod
    def empty() -> _Result:
        return _Result([], None, {}, {}, 0)


def kept_tokens(prompt: Prompt) -> int:
    """Tokens whose activations are kept: the prompt once, then each continuation's fed tokens."""
    return len(prompt.prompt_ids) + (0 if is_letter(prompt) else sum(len(c) - 1 for c in prompt.choice_ids))


def keep_states(hidden_BSD: Tensor, layout: Layout, prompts: Sequence[Prompt]) -> Tensor:
    """Flat [T, D] activations: per question its prompt, once, then each choice's fed continuation tokens."""
    parts = []
    for number, prompt in enumerate(prompts):
        length = len(prompt.prompt_ids)
        start = layout.first[number]
        parts.append(hidden_BSD[start, :length])
        if not is_letter(prompt):
            for choice, ids in enumerate(prompt.choice_ids):
                parts.append(hidden_BSD[start + choice, length : length + len(ids) - 1])
    return torch.cat(parts)


def _write_tensor(path: Path, hidden_TD: Tensor) -> None:
    from safetensors.torch import save_file

    tensors = {"hidden": hidden_TD.contiguous()}
    write_atomically(path, lambda aside: save_file(tensors, aside))


def _schema(tokens: Sequence[str]) -> pa.Schema:
    fields = [
        ("row", pa.int64()),
        ("id", pa.string()),
        ("batch", pa.int64()),
        ("error", pa.string()),
        ("scores", pa.list_(pa.float32())),
        ("prediction", pa.int32()),
        ("is_correct", pa.bool_()),
        ("offset", pa.int64()),
        ("tokens", pa.int64()),
        *((f"routing_{rule}", pa.list_(pa.float32())) for rule in tokens),
    ]
    return pa.schema(fields)


def gather(stage: Stage, batches: int, ids: Sequence[str]) -> dict[str, Any]:
    """Gather the batches' rows, in row order, into `rows.parquet`; returns counts. Raises ArtifactError when rows lack."""
    tables = [read_table(batch_table(stage.path, n)) for n in range(batches)]
    facts = next(
        (json.loads(t.schema.metadata[b"roma"]) for t in tables if t.schema.metadata.get(b"roma") != b"{}"), None
    )
    if facts is None:
        reason = tables[0].column("error")[0].as_py()
        raise ModelError(
            f"every question failed in extraction, the first one with: {reason}. All reasons are in the tables under "
            f"{stage.path / 'batches'}; remove {stage.path} to try again"
        )
    table = pa.concat_tables([t.replace_schema_metadata(None) for t in tables]).sort_by("row")
    if table.column("id").to_pylist() != list(ids):
        raise ArtifactError(f"{stage.path} does not hold each question once; remove it and run again")
    table = table.replace_schema_metadata({"roma": json.dumps(facts)})
    import pyarrow.parquet as pq

    write_atomically(stage.path / ROWS, lambda aside: pq.write_table(table, aside, **WRITING))
    errors = len(table) - table.column("error").null_count
    correct = sum(table.column("is_correct").to_pylist())
    tokens = sum(n or 0 for n in table.column("tokens").to_pylist())
    return {**facts, "rows": len(table), "errors": errors, "correct": correct, "tokens": tokens, "batches": batches}
