"""What test_nodes.py runs in a process of its own: stages on a simulated cluster of nodes of several kinds. Prints JSON.

The GPUs are counted by Ray and by nobody else: the work that runs on them only says where it is.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roma_ray.config.loading import load_config
from roma_ray.config.ray_settings import PlacementConfig
from roma_ray.config.schema import Config
from roma_ray.engine.progress import Progress, Silence
from roma_ray.engine.work import Report
from roma_ray.errors import ConfigError
from tests.chaos.simulated import Nodes, simulated_cluster


@dataclass(frozen=True)
class WhereWork:
    """Batches that note the labels of the node that they run on."""

    folder: str
    kinds: int = 1
    """So many kinds of nodes must have begun before a batch ends: on a slow machine one worker would do all of them."""
    name: str = "extract"

    def open(self) -> Callable[[int], Report]:
        import ray

        context = ray.get_runtime_context()
        labels = {node["NodeID"]: node["Labels"] for node in ray.nodes()}[context.get_node_id()]
        note = json.dumps({"kind": labels["gpu-type"], "gpus": len(ray.get_gpu_ids())})

        def do(batch: int) -> Report:
            (Path(self.folder) / f"{batch}.json").write_text(note)
            (Path(self.folder) / f"on-{labels['gpu-type']}").touch()
            limit = time.monotonic() + 120
            while len(list(Path(self.folder).glob("on-*"))) < self.kinds and time.monotonic() < limit:
                time.sleep(0.05)
            # Long enough that a node can go away in the middle.
            time.sleep(0.2)
            return Report(batch, 1, 0, 0, 0.0)

        return do


def where(config: Config, folder: Path, batches: int = 24, kinds: int = 1) -> list[dict[str, Any]]:
    """On which kinds of nodes the batches of an extraction ran, and with how many GPUs."""
    from roma_ray.cluster.batch_actors import ray_executor
    from roma_ray.cluster.ray_cluster import open_cluster

    folder.mkdir()
    with open_cluster(config) as cluster:
        list(ray_executor(cluster, "extract", cluster.device())(WhereWork(str(folder), kinds), range(batches)))
    notes = [json.loads((folder / f"{n}.json").read_text()) for n in range(batches)]
    return [json.loads(text) for text in sorted({json.dumps(note) for note in notes})]


def disturbed(nodes: Nodes, config: Config, folder: Path, batches: int = 24) -> dict[str, Any]:
    """Batches while a node with one of their workers goes away: how often each was reported, and where the last ran."""
    from roma_ray.cluster.batch_actors import ray_executor
    from roma_ray.cluster.ray_cluster import open_cluster

    folder.mkdir()

    def remove() -> None:
        while not list(folder.glob("*.json")):
            time.sleep(0.01)
        nodes.remove(nodes.workers[0])

    thread = threading.Thread(target=remove)
    with open_cluster(config) as cluster:
        thread.start()
        reports = list(ray_executor(cluster, "extract", cluster.device())(WhereWork(str(folder)), range(batches)))
        thread.join()
    return {"reported": sorted(r.batch for r in reports), "written": len(list(folder.glob("*.json")))}


def kept(address: str, folder: Path) -> list[list[int]]:
    """The processes of three runs' workers: two that may stay, and a last one whose workers are those of other settings."""
    from roma_ray.cluster.batch_actors import ray_executor
    from roma_ray.cluster.ray_cluster import open_cluster
    from tests.cluster.support import NotingWork, begun

    found = []
    for number, seconds in enumerate((600, 600, 601)):
        place = folder / str(number)
        place.mkdir(parents=True)
        settings = [f"ray.address={address}", "device=cpu", "ray.extract_workers=2"]
        with open_cluster(load_config(None, [*settings, f"ray.keep_workers_seconds={seconds}"])) as cluster:
            list(ray_executor(cluster, "extract", "cpu")(NotingWork(str(place)), range(200)))
        found.append(sorted({pid for _, pid in begun(place)}))
    return found


def dies_once(folder: Path, progress: Progress) -> dict[str, Any]:
    """A stage's function that says where it runs, whose first process is killed."""
    import ray

    marker = folder / "died"
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    context = ray.get_runtime_context()
    return {"gpus": len(ray.get_gpu_ids()), "driver": context.get_task_id() is None}


def reports_until_killed(folder: Path) -> Iterator[Report]:
    """Batches done one after another, whose first process is killed after the first."""
    for batch in range(3):
        if batch == 1 and not (folder / "killed").exists():
            (folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        yield Report(batch, 1, 0, 0, 0.0)


def called(config: Config, folder: Path) -> dict[str, Any]:
    """A stage that needs a GPU, asked for by a driver without one: evaluation, neighbors."""
    import torch

    from roma_ray.cluster.ray_cluster import open_cluster
    from roma_ray.cluster.ray_runners import batches_near, near_device

    folder.mkdir()
    torch.cuda.is_available = lambda: False
    with open_cluster(config) as cluster:
        found: dict[str, Any] = near_device(cluster, "cuda")("dies_once", dies_once, folder, progress=Silence())
        found["batches"] = [r.batch for r in batches_near(cluster, "cuda")("evaluate", reports_until_killed, folder)]
    return found


def main() -> None:
    """Run on an A100, an MI300X and a plain node; print what happened."""
    folder = Path(sys.argv[1])
    found: dict[str, Any] = {}
    with simulated_cluster(folder / "ray") as nodes:
        kinds = {"a100": "A100", "mi300x": "AMD-Instinct-MI300X-OAM"}
        for label, kind in kinds.items():
            nodes.add(num_gpus=1, resources={f"accelerator_type:{kind}": 1}, labels={"gpu-type": label})
        nodes.add(labels={"gpu-type": "none"})

        def config(**settings: Any) -> Config:
            base = load_config(None, ["device=cuda"])
            return base.model_copy(update={"ray": base.ray.model_copy(update={"address": nodes.address, **settings})})

        found["any GPU"] = where(config(), folder / "any", kinds=2)
        amd = PlacementConfig(accelerator=kinds["mi300x"])
        found["one kind"] = where(config(extract=amd), folder / "kind", 4)
        found["by label"] = where(config(extract=PlacementConfig(labels={"gpu-type": "!mi300x"})), folder / "label", 4)
        found["training"] = training(config())
        found["called"] = called(config(), folder / "called")
        found["node removed"] = disturbed(nodes, config(), folder / "removed")
        found["kept"] = kept(nodes.address, folder / "kept")
        try:
            where(config(extract=PlacementConfig(accelerator="H100")), folder / "none")
        except ConfigError as error:
            found["refused"] = str(error)
    print(json.dumps(found))


def training(config: Config) -> dict[str, Any]:
    """Where workers of Ray Train land with what finetuning asks for; on gloo, since there is no GPU to speak NCCL."""
    import ray.train
    from ray.train import RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from roma_ray.cluster.ray_cluster import open_cluster

    def loop() -> dict[str, Any]:
        context = ray.get_runtime_context()
        labels = {node["NodeID"]: node["Labels"] for node in ray.nodes()}[context.get_node_id()]
        return {"kind": labels["gpu-type"], "gpus": len(ray.get_gpu_ids())}

    with open_cluster(config) as cluster:
        workers, need = cluster.place("finetune", None, 3, "cuda")
        result = DataParallelTrainer(
            loop,
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=True,
                resources_per_worker=need.resources(),
                label_selector=dict(need.labels) or None,
            ),
            run_config=RunConfig(name="where", storage_path=str(Path(sys.argv[1]) / "train")),
        ).fit()
    return {"workers": workers, **result.return_value}


if __name__ == "__main__":
    main()
