"""Where a stage's work is done: short work in the driver, what is worth it on workers; neither changes a bit. Starts no Ray."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest

from roma_ray.cluster import ray_training as finetune_module
from roma_ray.cluster import worth
from roma_ray.cluster.placement import Need
from roma_ray.cluster.ray_cluster import Cluster
from roma_ray.cluster.ray_runners import expecting
from roma_ray.cluster.ray_training import finetune_on_ray, most_workers
from roma_ray.cluster.worth import begun_here, share_of
from roma_ray.config.schema import Config
from roma_ray.engine.model_spec import ModelSpec
from roma_ray.engine.work import Report, Work
from roma_ray.runs.pipeline import Run
from roma_ray.stages.finetuning import ADAPTER
from roma_ray.store.artifacts import file_digest
from tests.making import train_job


class Unstarted(Cluster):
    """A cluster of this process's own that was never needed; it must not start."""

    def __init__(self, config: Config, *, elsewhere: bool = False) -> None:
        self.said: list[str] = []
        self.config, self.say, self.compared = config, self.said.append, False
        self._started, self.address = False, "head:6379" if elsewhere else None

    @property
    def connected(self) -> bool:
        return False

    def connect(self) -> None:
        raise AssertionError("Ray was started")


@dataclass(frozen=True)
class Slow:
    """Work of a known length."""

    seconds: float
    model: ModelSpec | str | None
    folder: str = field(default_factory=mkdtemp)
    name: str = "extract"
    loads_model: bool = True

    def open(self) -> Callable[[int], Report]:
        return lambda batch: Report(batch, 1, 0, 0, self.seconds)


def shared_out(
    cluster: Cluster, work: Slow, count: int, stage: str = "extract"
) -> tuple[list[int], list[int], float | None]:
    """The batches done here, those left for workers, and what their work was measured to take."""
    rest: list[int] = []
    told: list[float | None] = [None]

    def others(work: Work, batches: Sequence[int], left: float | None) -> Iterator[Report]:
        rest.extend(batches)
        told[0] = left
        yield from (Report(batch, 1, 0, 0, 0.0) for batch in batches)

    done = [report.batch for report in begun_here(cluster, stage, "cpu", others)(work, range(count))]
    assert done == list(range(count))
    return done[: count - len(rest)], rest, told[0]


def test_short_work_stays_and_the_rest_of_long_work_goes_to_workers(local_run: Run, world: Config) -> None:
    spec = local_run.setup.model
    assert shared_out(Unstarted(world), Slow(0.1, spec), 100) == (list(range(100)), [], None)
    # Once started, two workers halve what is left: after the first of 100 batches of a second, 99 s are left, and 42 would do.
    here, rest, left = shared_out(Unstarted(world), Slow(1.0, spec), 100)
    assert (len(here), len(rest), left) == (1, 99, 99)
    assert shared_out(Unstarted(world), Slow(1.0, spec), 40)[1] == []
    assert share_of(left) == 6
    assert share_of(1.0) == 1
    assert share_of(None) is None


@pytest.mark.parametrize(
    "settings",
    [{"extract_workers": 2}, {"extract": {"labels": {"pool": "x"}}}, {"extract": {"memory_gib": 1}}],
)
def test_settings_of_workers_are_kept(settings: dict[str, Any], local_run: Run, world: Config) -> None:
    ray = type(world.ray).model_validate({**world.ray.model_dump(), **settings})
    asked = world.model_copy(update={"ray": ray})
    assert shared_out(Unstarted(asked), Slow(0.0, local_run.setup.model), 3) == ([], [0, 1, 2], None)


def test_clusters_large_models_and_streaming_get_workers(
    local_run: Run, world: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = local_run.setup.model
    assert shared_out(Unstarted(world, elsewhere=True), Slow(0.0, spec), 2)[1] == [0, 1]
    # An evaluation is short: also beside others' clusters it begins here.
    assert shared_out(Unstarted(world, elsewhere=True), Slow(0.0, spec), 2, "evaluate")[1] == []
    assert shared_out(Unstarted(world, elsewhere=True), Slow(1.0, spec), 100, "evaluate")[1] == list(range(1, 100))
    assert shared_out(Unstarted(world), Slow(0.0, None), 2)[1] == [0, 1]
    assert shared_out(Unstarted(world), Slow(0.0, "minilm"), 2)[1] == []
    assert shared_out(Unstarted(world), Slow(0.0, world.embedding.model), 2)[1] == []
    assert shared_out(Unstarted(world), Slow(0.0, "some/hub-model"), 2)[1] == [0, 1]
    streamed = world.model_copy(update={"extraction": world.extraction.model_copy(update={"memory_gb": 1.0})})
    assert shared_out(Unstarted(streamed), Slow(0.0, spec), 2)[1] == [0, 1]
    size = spec.weight_bytes()
    stored = (Path(spec.path) / "model.safetensors").stat().st_size
    assert 0.95 * stored < size <= stored
    monkeypatch.setattr(worth, "_SMALL_BYTES", size - 1)
    assert shared_out(Unstarted(world), Slow(0.0, spec), 2)[1] == [0, 1]


def test_what_loads_no_model_begins_here_on_a_cluster_of_our_own(world: Config) -> None:
    """Whether models are streamed says nothing of it; a setting of workers does, and a cluster that stands has them already."""
    light = Slow(0.0, None, loads_model=False)
    streamed = world.model_copy(update={"extraction": world.extraction.model_copy(update={"memory_gb": 1.0})})
    assert shared_out(Unstarted(streamed), light, 2)[1] == []
    assert shared_out(Unstarted(world), Slow(1.0, None, loads_model=False), 100)[1] == list(range(1, 100))
    assert shared_out(Unstarted(world, elsewhere=True), light, 2)[1] == [0, 1]
    asked = type(world.ray).model_validate({**world.ray.model_dump(), "extract_workers": 2})
    assert shared_out(Unstarted(world.model_copy(update={"ray": asked})), light, 2)[1] == [0, 1]


def test_a_chain_has_no_workers_of_a_pool(world: Config) -> None:
    """Those of whole models would take its place."""
    warmed: list[str] = []

    class Standing(Unstarted):
        def place(self, stage: str, *rest: Any, **more: Any) -> tuple[int, Need]:
            return 1, Need(1)

    for chain in (None, 2):
        extraction = world.extraction.model_copy(update={"chain": chain})
        cluster = Standing(world.model_copy(update={"extraction": extraction}), elsewhere=True)
        cluster.pool.warm = lambda *asked: warmed.append(asked[3])  # type: ignore[method-assign]
        expecting(cluster, "cpu")("extract")
        assert warmed == ["roma_ray.engine.extractor"], chain
        expecting(cluster, "cpu")("embed")
        assert warmed.pop() == "roma_ray.stages.embedding"
        warmed[:] = warmed[:1]


def test_short_training_starts_no_ray(local_run: Run, world: Config, tmp_path: Path) -> None:
    """In the driver, each epoch told once, with the bits of a local run."""
    job = train_job(local_run, tmp_path)
    told: list[int] = []
    counts: list[int] = []
    finetune_on_ray(Unstarted(world), "cpu")(job, lambda e: told.append(e["epoch"]), lambda n, _: counts.append(n))
    assert told == [0, 1]
    assert sum(counts) == 2 * local_run.stages["neighbors"].manifest()["facts"]["training"]
    name = f"{ADAPTER}/adapter_model.safetensors"
    assert file_digest(Path(job.folder) / name) == file_digest(local_run.stages["finetune"].path / name)


def test_long_training_is_handed_over(
    local_run: Run, world: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a few steps; the count goes back to where workers begin, and they are told how long it would take."""
    clock = itertools.count(step=1000)
    monkeypatch.setattr(worth.time, "monotonic", lambda: float(next(clock)))
    seen: list[float | None] = []
    monkeypatch.setattr(finetune_module, "_on_workers", lambda *arguments: seen.append(arguments[-1]))
    job = train_job(local_run, tmp_path)
    (Path(job.folder) / "epochs.jsonl").touch()
    counts: list[int] = []
    finetune_on_ray(Unstarted(world), "cpu")(job, lambda epoch: None, lambda n, _: counts.append(n))
    assert len(seen) == 1
    assert (seen[0] or 0) > 1000
    assert len(counts) == 4
    assert sum(counts) == 0


def test_training_workers_by_work(local_run: Run) -> None:
    """Seven steps are one worker's; as many as were asked for where a step has micro-batches for them."""
    rows = local_run.stages["neighbors"].manifest()["facts"]["training"]

    def most(epochs: int, wanted: int | None = None, left: float | None = None) -> int:
        job = train_job(local_run, epochs=epochs, batch_size=8, micro_batch_size=2)
        return most_workers(job, wanted, left)

    steps = -(-rows // 8)
    assert most(1) == 1
    assert most(100 // (4 * steps) + 1) == 2
    assert most(1000) == 4
    assert most(1, wanted=3) == 4
    assert most(1000, left=31.0) == 2
