"""A chain of actors: the whole model's files to the bit, over any number of slices and chains, whatever happens to the actors."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from roma_ray.cluster import chain_actors
from roma_ray.cluster.batch_actors import ATTEMPTS
from roma_ray.cluster.chain_actors import chain_executor, run_chains
from roma_ray.cluster.chain_plans import ChainPlan
from roma_ray.cluster.placement import Need
from roma_ray.cluster.ray_cluster import Cluster
from roma_ray.config.schema import Config
from roma_ray.engine.progress import Silence
from roma_ray.engine.runners import Runners
from roma_ray.engine.setup import resolve
from roma_ray.engine.work import Executor, Report
from roma_ray.errors import ModelError, RomaError, WorkerError
from roma_ray.runs.pipeline import Run, run
from roma_ray.stages.extraction import EXTRACT
from roma_ray.stages.preparation import QUESTIONS
from roma_ray.store.artifacts import Stage
from tests.cluster.support import die
from tests.cluster.test_batch_actors import same_files
from tests.free_world import free_world, gsm8k
from tests.making import made


def connected(config: Config, **ray: Any) -> Cluster:
    """The tests' cluster, with other settings of workers."""
    found = Cluster(config.model_copy(update={"ray": config.ray.model_copy(update=ray)}))
    assert found.connected
    return found


def chained(
    config: Config, storage: Path, chain: Any, through: Callable[[Executor], Executor] = lambda plain: plain, **ray: Any
) -> Stage:
    """The extraction of a configuration by a chain, in a storage of its own, its batches run `through` something."""
    extraction = config.extraction.model_copy(update={"chain": chain})
    setup = resolve(config.model_copy(update={"extraction": extraction, "storage": str(storage)}), device="cpu")
    made(QUESTIONS, setup)
    return made(EXTRACT, setup, Runners(chain=through(chain_executor(connected(setup.config, **ray), "cpu"))))


def test_two_chains_of_two_slices_give_the_whole_models_files(
    local_run: Run, cluster: Cluster, world: Config, tmp_path: Path
) -> None:
    stage = chained(world, tmp_path, 2, extract_workers=4)
    expected = local_run.stages["extract"]
    assert stage.fingerprint == expected.fingerprint
    same_files(stage.path, expected.path)
    assert not (stage.path / ATTEMPTS).exists()


def test_free_answers_over_three_slices(cluster: Cluster, tmp_path: Path) -> None:
    """Dense first, shared experts, continuations of several tokens; as few slices as a limit allows."""
    sections = {"routing": {"layers": "L2", "tokens": "Answer"}, "extraction": {"batch_tokens": 256}}
    success = {"metric": "likelihood", "threshold": -6.8}
    sections["extraction"] |= {"success": success}  # type: ignore[dict-item]
    config = free_world(tmp_path, gsm8k(24), "deepseek_v3", **sections)
    whole = run(resolve(config), Silence(), until="extract").stages["extract"]
    limited = config.model_copy(update={"extraction": config.extraction.model_copy(update={"memory_gb": 3e-4})})
    heard: list[str] = []

    def told(plain: Executor) -> Executor:
        def execute(work: Any, batches: Sequence[int]) -> Iterator[Report]:
            heard.extend(str(len(batches)))
            return plain(work, batches)

        return execute

    stage = chained(limited, tmp_path / "chained", "auto", told)
    assert heard
    same_files(stage.path, whole.path)


def slice_actors() -> list[int]:
    """The processes of the tests' cluster that hold slices, the oldest first."""
    found = []
    for process in psutil.Process().children(recursive=True):
        # It may end while it is looked at.
        with contextlib.suppress(psutil.Error):
            if "ray::SliceActor" in " ".join(process.cmdline()):
                found.append(process.pid)
    return sorted(found)


def test_killed_actors_come_back_and_a_resume_does_what_lacks(cluster: Cluster, world: Config, tmp_path: Path) -> None:
    """kill -9 of each of two slices while batches are on their way; then the driver stops, and goes on."""
    config = world.model_copy(update={"extraction": world.extraction.model_copy(update={"batch_tokens": 64})})
    expected = run(resolve(config, device="cpu"), Silence(), until="extract").stages["extract"]
    total = expected.manifest()["facts"]["batches"]
    assert total > 20
    killed: list[int] = []
    done: Counter[int] = Counter()

    def killing(plain: Executor) -> Executor:
        def execute(work: Any, batches: Sequence[int]) -> Iterator[Report]:
            for report in plain(work, batches):
                done[report.batch] += 1
                # Four are on their way; the fifth after a death has come through an actor made anew.
                if len(done) in (1, 8):
                    victims = slice_actors()
                    assert len(victims) == 2
                    # Then the one that was there from the beginning: the other slice.
                    os.kill(victims[0], signal.SIGKILL)
                    killed.append(victims[0])
                yield report
                if len(done) == total - 2:
                    raise KeyboardInterrupt

        return execute

    with pytest.raises(KeyboardInterrupt):
        chained(config, tmp_path, 2, killing, extract_workers=2)
    assert len(killed) == 2
    assert set(done.values()) == {1}
    limit = time.monotonic() + 60
    while slice_actors():
        assert time.monotonic() < limit
        time.sleep(0.1)
    left: list[int] = []

    def counting(plain: Executor) -> Executor:
        def execute(work: Any, batches: Sequence[int]) -> Iterator[Report]:
            left.extend(batches)
            return plain(work, batches)

        return execute

    stage = chained(config, tmp_path, 2, counting, extract_workers=2)
    # What landed after the last report was done too.
    assert len(left) <= 2
    same_files(stage.path, expected.path)


@dataclass(frozen=True)
class Deadly:
    """A link without a model that counts the actors before it, and dies or fails where it is told."""

    folder: str
    dies_at: int | None = None
    dies_loading: bool = False
    fails_loading: bool = False
    bug_at: int | None = None

    def open(self) -> Callable[[int, Any], Any]:
        if self.dies_loading:
            die()
        if self.fails_loading:
            raise ModelError("no such model; give another")

        def do(batch: int, before: int | None) -> int:
            with open(Path(self.folder) / f"begun-{batch}", "a") as stream:
                stream.write("x")
            if batch == self.dies_at:
                die()
            return (before or 0) + 1 // (batch != self.bug_at)

        return do


@dataclass(frozen=True)
class Named:
    """As much of a work as a chain asks for."""

    folder: str
    name: str = "extract"


def ran(cluster: Cluster, folder: Path, links: Sequence[Deadly], batches: int, cpus: float = 0.1) -> list[Any]:
    """What the last of these links leaves of each batch."""
    plan = ChainPlan(((0, 1),) * len(links), (1,) * len(links), (Need(cpus),) * len(links), 1)
    return list(run_chains(cluster, plan, links, Named(str(folder)), range(batches)))  # type: ignore[arg-type]


def test_a_batch_that_kills_its_actor_again_and_again_is_named(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In company first, then alone; the batches beside it are not blamed."""
    monkeypatch.setattr(chain_actors, "_DEATHS", 1)
    place = str(tmp_path)
    with pytest.raises(WorkerError, match="batch 2 killed a worker of its chain 2 times, at last 1 times alone"):
        ran(cluster, tmp_path, [Deadly(place, dies_at=2)], 6)


def test_a_slice_that_cannot_be_loaded_is_named(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain_actors, "_OPENINGS", 2)
    with pytest.raises(WorkerError, match="loading slice 1 of 1 killed its worker 2 times"):
        ran(cluster, tmp_path, [Deadly(str(tmp_path), dies_loading=True)], 6)


@pytest.mark.parametrize(
    ("link", "kind", "text"),
    [({"fails_loading": True}, ModelError, "no such model; give another"), ({"bug_at": 1}, WorkerError, "Zero")],
)
def test_failures_are_one_message(
    link: dict[str, Any], kind: type[RomaError], text: str, cluster: Cluster, tmp_path: Path
) -> None:
    """Of the first slice: those behind it pass it on, as what it is."""
    place = str(tmp_path)
    with pytest.raises(kind) as caught:
        ran(cluster, tmp_path, [Deadly(place, **link), Deadly(place)], 3)
    message, _, traceback = str(caught.value).partition("\nThe worker's traceback: ")
    assert text in message
    assert "\n" not in message
    assert "test_chain_actors.py" in Path(traceback).read_text()


def test_a_chain_that_never_gets_its_places_is_given_up(cluster: Cluster, world: Config, tmp_path: Path) -> None:
    impatient = connected(world, no_progress_seconds=2)
    with pytest.raises(WorkerError, match=r"no worker got ready for 2 s \(ray\.no_progress_seconds\)"):
        ran(impatient, tmp_path, [Deadly(str(tmp_path))] * 2, 3, cpus=1000)
