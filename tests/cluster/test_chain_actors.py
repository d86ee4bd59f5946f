"""A chain of actors: the whole model's files to the bit, over any number of slices and chains, whatever happens to the actors."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from roma_ray.cluster import chain_actors
from roma_ray.cluster.batch_actors import ATTEMPTS
from roma_ray.cluster.chain_actors import chain_executor
from roma_ray.cluster.ray_cluster import Cluster
from roma_ray.config.schema import Config
from roma_ray.engine.chain import ChainLink, Handed
from roma_ray.engine.extractor import ExtractWork
from roma_ray.engine.progress import Silence
from roma_ray.engine.runners import Runners
from roma_ray.engine.setup import resolve
from roma_ray.engine.work import Report
from roma_ray.errors import ModelError, WorkerError
from roma_ray.questions.records import Question
from roma_ray.runs.pipeline import Run, run
from roma_ray.stages.extraction import EXTRACT
from roma_ray.stages.preparation import QUESTIONS
from roma_ray.store.artifacts import Stage
from tests.cluster.support import die
from tests.cluster.test_batch_actors import fields, same_files
from tests.free_world import free_world, gsm8k
from tests.making import made
from tests.tiny import EAGER
from tests.world import make_world


def connected(config: Config, **ray: Any) -> Cluster:
    """The tests' cluster, with other settings of workers."""
    heard: list[str] = []
    found = Cluster(config.model_copy(update={"ray": config.ray.model_copy(update=ray)}), None, heard.append)
    assert found.connected
    return found


def chained(cluster: Cluster, config: Config, storage: Path, chain: Any, **ray: Any) -> Stage:
    """The extraction of a configuration by a chain, in a storage of its own."""
    extraction = config.extraction.model_copy(update={"chain": chain})
    setup = resolve(config.model_copy(update={"extraction": extraction, "storage": str(storage)}), device="cpu")
    made(QUESTIONS, setup)
    return made(EXTRACT, setup, Runners(chain=chain_executor(connected(setup.config, **ray), "cpu")))


@pytest.mark.parametrize(("slices", "workers"), [(1, None), (2, 4), (3, 3)])
def test_any_number_of_slices_and_chains_gives_the_whole_models_files(
    slices: int, workers: int | None, local_run: Run, cluster: Cluster, world: Config, tmp_path: Path
) -> None:
    stage = chained(cluster, world, tmp_path, slices, extract_workers=workers)
    expected = local_run.stages["extract"]
    assert stage.fingerprint == expected.fingerprint
    same_files(stage.path, expected.path)
    assert not (stage.path / ATTEMPTS).exists()
