"""What faults happen to: a cluster, a configuration, and the undisturbed run that everything must equal afterwards."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from click.testing import CliRunner

from roma_ray.cli.commands import main
from roma_ray.config.schema import Config
from roma_ray.engine.steps import order
from roma_ray.runs.pipeline import STEPS, Run
from roma_ray.store.artifacts import MANIFEST, Stage
from roma_ray.store.buckets import as_path
from roma_ray.store.files import below, exists, for_libraries, listed, read_bytes, write_bytes
from tests.bucket import Proxy
from tests.chaos.simulated import PATIENCE, Driver, Nodes

# What is there as soon as a stage has begun to do what a fault may interrupt.
BEGUN = {
    "extract": "batches/*.parquet",
    "embed": "batches/*.parquet",
    "finetune": "checkpoint.safetensors",
    "evaluate": ".parts/*/*.parquet",
}


def names_up_to(stage: str) -> list[str]:
    """The stages up to this one, in the order of a run."""
    return [step.name for step in order(STEPS[stage])]


@dataclass
class Scene:
    """What faults happen to: a cluster, a configuration and its undisturbed run."""

    nodes: Nodes
    config: Config
    reference: Run
    folder: Path
    proxy: Proxy | None = None
    """Before a bucket, where there is one."""
    root: Path | None = None
    """Where storages lie, if that is not the folder."""
    count: int = 0

    @property
    def far(self) -> Scene:
        """The same with storages in the bucket."""
        assert self.proxy is not None
        self.count += 1
        self.proxy.reset()
        return replace(self, root=as_path(self.proxy.address(f"chaos-{self.count}")))

    def storage(self, until: str | None = None) -> Path:
        """A fresh storage; with the undisturbed run's stages before `until` in it, to save their time."""
        self.count += 1
        storage = (self.root or self.folder) / f"storage-{self.count}"
        for name in names_up_to(until)[:-1] if until else ():
            stage = self.reference.stages[name]
            for file in below(stage.path):
                write_bytes(storage / name / stage.fingerprint / file.relative_to(stage.path), read_bytes(file))
        return storage

    def place(self, storage: Path, stage: str) -> Path:
        """Where a stage lies in a storage."""
        return storage / stage / self.reference.stages[stage].fingerprint

    def begun(self, storage: Path, stage: str) -> Callable[[], bool]:
        """Whether a stage is at work; it fails when the stage is over before the fault could happen."""
        folder = self.place(storage, stage)

        def ready() -> bool:
            assert not exists(folder / MANIFEST), f"{stage} was over before the fault"
            return bool(listed(folder, BEGUN[stage]))

        return ready

    def start(self, storage: Path, until: str, *words: str, uri: str | None = None) -> Driver:
        """A driver that runs up to a stage on the cluster; tracked where there is a server."""
        log = self.folder / f"driver-{uuid.uuid4().hex[:8]}.log"
        where = [until, "--address", self.nodes.address, "--config", str(self.settings(storage, uri))]
        return Driver([*where, *words], self.nodes.environment, log)

    def command(self, storage: Path, until: str) -> tuple[int, str]:
        """Exit code and words of such a driver."""
        driver = self.start(storage, until)
        return driver.process.wait(timeout=PATIENCE), driver.said

    def here(self, storage: Path, *words: str) -> tuple[int, str]:
        """Exit code and words of `roma-ray local`, or another command, in this process."""
        done = CliRunner().invoke(main, [*(words or ("local",)), "--config", str(self.settings(storage))])
        return done.exit_code, done.output

    def settings(self, storage: Path, uri: str | None = None) -> Path:
        """The configuration as a file, with this storage."""
        tracking = self.config.tracking.model_copy(
            update={"enabled": uri is not None, "uri": uri, "system_metrics": False}
        )
        config = self.config.model_copy(update={"storage": for_libraries(storage), "tracking": tracking})
        file = self.folder / f"config-{storage.name}.yaml"
        file.write_text(config.to_yaml())
        return file

    def same(self, storage: Path, until: str) -> None:
        """Every file of the undisturbed run up to a stage is here to the bit, so its rows once each, and no other file."""
        for name in names_up_to(until):
            expected = self.reference.stages[name]
            got = Stage(self.place(storage, name), name, expected.identity)
            got.verify()
            files, known = got.manifest()["files"], expected.manifest()["files"]
            differing = sorted(f for f in {*files, *known} if files.get(f) != known.get(f) and f != "config.yaml")
            assert not differing, f"{name}: {differing[:3]} differ"
