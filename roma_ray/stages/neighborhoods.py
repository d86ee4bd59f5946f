"""The neighbors stage: S, N(x_i) and W of eq. 2-6 for the training questions in use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from roma_ray.config.schema import Config
from roma_ray.engine.cache import ROWS
from roma_ray.engine.identity import data_seed, is_free, neighbors_settings
from roma_ray.engine.progress import Progress
from roma_ray.engine.question_table import TABLE, iterate_table, read_table, write_table
from roma_ray.engine.runners import Runners
from roma_ray.engine.setup import Setup
from roma_ray.engine.steps import Facts, Step
from roma_ray.engine.success import successes
from roma_ray.engine.work import Job
from roma_ray.errors import ArtifactError, NeighborError
from roma_ray.manifold.inverted import SHARD_ROWS, Propose, propose
from roma_ray.manifold.neighborhood_summary import NeighborSummary, summarise
from roma_ray.manifold.neighbors import BLOCK_ROWS, DRAWN, Neighborhoods, find_neighbors, successful_set
from roma_ray.manifold.search import TILE_SCORES
from roma_ray.stages.embedding import EMBED, VECTORS, read_embeddings, text_numbers
from roma_ray.stages.extraction import EXTRACT
from roma_ray.stages.neighbor_lists import LISTS, spread
from roma_ray.stages.preparation import training_rows
from roma_ray.store.artifacts import Stage, note_device
from roma_ray.store.files import remove_folder
from roma_ray.store.tensors import shapes

VERSION = 2
PAIRS = "neighbors.parquet"
# The offsets of a Parquet list are 32-bit numbers.
_MOST_PAIRS = 2**31 - 1
_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("neighbors", pa.list_(pa.int64())),
        ("similarities", pa.list_(pa.float64())),
        ("weights", pa.list_(pa.float64())),
    ]
)


def neighbors(job: Job, runners: Runners, progress: Progress) -> Facts:
    """Find every training question's successful neighbors. Raises NeighborError, ArtifactError."""
    setup, config = job.setup, job.setup.config
    questions, extraction, embeddings = (job.stages[name] for name in ("questions", "extract", "embed"))
    training_N = _trained(config, questions) & usable_rows(extraction)
    correct_N = answered_rightly(setup, job.stages)
    successful_N = _successful(config, extraction, correct_N, training_N)
    successful = int(successful_N.sum())
    rows, width = shapes(embeddings.path / VECTORS)["embeddings"]
    progress.say(describe_search(rows, width, successful))
    if config.neighbors.method in ("knn", "shuffled") and successful > config.neighbors.exact_up_to:
        note_device(job.folder, "cpu")  # where the ranking is decided, whatever searched
        searched = spread(job, runners.search, progress)
        found = search(setup, questions, embeddings, successful_N, training_N, propose=searched)
        facts = _write(job.stage, found)
        remove_folder(job.stage.path / LISTS)
    else:
        facts = runners.call(job.name, _alone, job, successful_N, training_N, progress=progress)
    return {**facts, "successful": int((correct_N & training_N).sum()), "training": int(training_N.sum())}


def _trained(config: Config, questions: Stage) -> torch.Tensor:
    """Mask [N] of the training questions in use."""
    table, asked = read_table(questions.path / TABLE, ["id", "task", "split"]), config.questions
    training_N = torch.zeros(len(table), dtype=torch.bool)
    training_N[training_rows(table, asked.fraction, data_seed(config), asked.held_out_tasks)] = True
    return training_N


def _alone(job: Job, successful_N: torch.Tensor, training_N: torch.Tensor, progress: Progress) -> Facts:
    """Search in one process, near a device where there is one, and write what it found."""
    note_device(job.folder, "cpu")
    return _write(job.stage, search(job.setup, job.stages["questions"], job.stages["embed"], successful_N, training_N))


def _successful(config: Config, extraction: Stage, correct_N: torch.Tensor, training_N: torch.Tensor) -> torch.Tensor:
    """S of eq. 2. Raises NeighborError where it is empty, of free-form questions with the settings that decide it."""
    try:
        return successful_set(correct_N, training_N)
    except NeighborError as error:
        if not is_free(config):
            raise
        success = config.extraction.success
        scores = "`scores` (the answers' log-likelihoods)"
        seen = f"`text` (what was written) and {scores}" if success.writes else scores
        raise NeighborError(
            f"{error}. They are judged by extraction.success.metric: {success.metric}; {seen} stand in {extraction.path / ROWS}. Another "
            "metric, stop or threshold may fit this model"
        ) from None


def search(
    setup: Setup,
    questions: Stage,
    embeddings: Stage,
    successful_N: torch.Tensor,
    training_N: torch.Tensor,
    queried_N: torch.Tensor | None = None,
    propose: Propose = propose,
) -> Neighborhoods:
    """Neighborhoods by the configured rule, of the training questions or of those that are asked for. Raises NeighborError."""
    config = setup.config
    settings = config.neighbors
    drawn = settings.method in DRAWN
    ids = read_table(questions.path / TABLE, ["id"]).column("id")
    return find_neighbors(
        read_embeddings(embeddings),
        successful_N,
        training_N=training_N,
        queried_N=queried_N,
        ids=ids.to_pylist() if drawn else _places(ids),
        tasks=read_table(questions.path / TABLE, ["task"]).column("task").to_pylist() if drawn else None,
        text_keys=text_numbers(questions, config.embedding.context),
        method=settings.method,
        k=settings.k,
        epsilon=settings.epsilon,
        similarity=settings.similarity,
        sigma=settings.sigma,
        seed=config.seed,
        backend=settings.backend,
        exact_up_to=settings.exact_up_to,
        propose=propose,
    )


def _places(ids: pa.ChunkedArray) -> torch.Tensor:
    """Each id's place among all, sorted [N]: UTF-8's bytes sort as its characters do."""
    order_N = torch.from_numpy(pc.sort_indices(ids).to_numpy().astype("int64"))
    return torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N)))


def answered_rightly(setup: Setup, stages: Mapping[str, Stage]) -> torch.Tensor:
    """Mask [N] of the questions that the base model answers rightly in extraction; free-form ones by their metric of success.

    Raises ArtifactError, QuestionError.
    """
    rows = stages["extract"].path / ROWS
    if is_free(setup.config):
        return torch.tensor(successes(setup.config.extraction.success, stages["questions"].path / TABLE, rows))
    return _mask(read_table(rows, ["is_correct"]).column("is_correct"))


def describe_search(questions: int, width: int, successful: int) -> str:
    """The line that states the search and its memory: embeddings (fp32), one shard of S, twice while it is sorted, and scores."""
    held = questions * width * 4 + 2 * min(successful, SHARD_ROWS) * width * 4
    block = min(TILE_SCORES, BLOCK_ROWS * successful) * 4
    return f"neighbors: searching {successful:,} successes, about {(held + block) / 2**20:,.0f} MiB of memory"


def describe(facts: dict[str, Any]) -> str:
    """The line about neighborhoods that every run prints."""
    summary = NeighborSummary(**{k: v for k, v in facts.items() if k not in {"successful", "training", "recall"}})
    sizes, near = summary.sizes, summary.similarities
    return (
        f"neighborhoods: {facts['successful']} of {facts['training']} training questions are answered rightly (S); sizes "
        f"5/50/95 %: {sizes['q5']:.0f}/{sizes['q50']:.0f}/{sizes['q95']:.0f}; similarities 5/50/95 %: "
        f"{near['q5']:.3f}/{near['q50']:.3f}/{near['q95']:.3f}; empty: {summary.empty} ({summary.empty_fraction:.1%})"
        + (f"; approximate search, recall {facts['recall']:.1%}" if facts["recall"] < 1 else "")
    )


def usable_rows(extraction: Stage) -> torch.Tensor:
    """Mask [N] of the questions that extraction did not set aside."""
    return _mask(read_table(extraction.path / ROWS, ["error"]).column("error").is_null())


def _mask(column: pa.ChunkedArray) -> torch.Tensor:
    return torch.from_numpy(column.to_numpy().astype(bool))


def _write(stage: Stage, found: Neighborhoods) -> Facts:
    """Put the neighborhoods; what the manifest says of them."""
    if len(found.indices) > _MOST_PAIRS:
        raise NeighborError(
            f"{len(found.indices):,} pairs of neighbors are more than their table can hold; take a larger neighbors.epsilon or a "
            "smaller neighbors.k"
        )
    rows = found.queried.nonzero()[:, 0]
    # Questions that nothing was looked for have no pairs, so those of the others lie one after another.
    offsets = pa.array(torch.cat([found.offsets[rows], found.offsets[-1:]]).numpy().astype("int32"))
    flat = {"neighbors": found.indices, "similarities": found.similarities, "weights": found.weights}
    columns = {name: pa.ListArray.from_arrays(offsets, pa.array(values.numpy())) for name, values in flat.items()}
    write_table(stage.path / PAIRS, {"row": rows.numpy(), **columns}, _SCHEMA, {"questions": len(found.queried)})
    return {**asdict(summarise(found)), "recall": found.recall}


def read_neighborhoods(stage: Stage, questions: int) -> Neighborhoods:
    """The neighborhoods over all `questions` rows of the question table. Raises ArtifactError."""
    path = stage.path / PAIRS
    rows, lengths = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
    for part in iterate_table(path, ["row", "neighbors"]):
        rows.append(torch.from_numpy(part.column("row").to_numpy().copy()))
        lengths.append(torch.from_numpy(pc.list_value_length(part.column("neighbors")).to_numpy().astype("int64")))
    row_R = torch.cat(rows)
    if (row_R.diff() < 1).any() or (len(row_R) and not 0 <= row_R[0] <= row_R[-1] < questions):
        raise ArtifactError(f"{path} does not belong to these questions; remove its folder and run again")
    sizes = torch.zeros(questions, dtype=torch.int64)
    sizes[row_R] = torch.cat(lengths)
    queried = torch.zeros(questions, dtype=torch.bool)
    queried[row_R] = True
    return Neighborhoods(
        offsets=torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]),
        indices=_flat(path, "neighbors", torch.int64),
        similarities=_flat(path, "similarities", torch.float64),
        weights=_flat(path, "weights", torch.float64),
        queried=queried,
    )


def _flat(path: Path, column: str, dtype: torch.dtype) -> torch.Tensor:
    """The values of a column of lists. A column at a time, and a part: of many pairs the whole table would be held twice."""
    parts = [torch.empty(0, dtype=dtype)]
    for part in iterate_table(path, [column]):
        values: Sequence[Any] = part.column(column).combine_chunks().flatten().to_numpy(zero_copy_only=False)
        parts.append(torch.tensor(values, dtype=dtype))
    return torch.cat(parts)


NEIGHBORS = Step(
    "neighbors",
    VERSION,
    (EXTRACT, EMBED),
    lambda setup: neighbors_settings(setup.config),
    neighbors,
    lines=lambda stage: [describe(stage.manifest()["facts"])],
)
