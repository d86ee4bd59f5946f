"""What `roma-ray doctor` finds out about a cluster: authentication, nodes, GPUs by kind, versions, and the storage from each node."""

from __future__ import annotations

import os
import platform
import uuid
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from roma_ray.cluster.ray_cluster import Cluster, find_address, token_known
from roma_ray.config.loading import load_config
from roma_ray.doctor.check import Check
from roma_ray.errors import BucketError, RomaError, StorageError
from roma_ray.store.artifacts import Store
from roma_ray.store.buckets import is_object
from roma_ray.store.files import exists, read_text, remove_folder, write_text
from roma_ray.store.staging import SCRATCH, scratch_facts

_NODE_SECONDS = 60
_COMPARED = ("ray", "torch", "transformers", "roma-ray")


def examine_cluster(address: str | None, storage: str | None) -> Iterator[Check]:
    """Check authentication and the cluster in sight; starts none."""
    yield _authentication()
    try:
        if find_address(address) is None:
            yield Check("ray cluster", "ok", "none in sight; `roma-ray run` starts one on this machine")
            return
        cluster = Cluster(load_config(), address)
    except RomaError as error:
        yield Check("ray cluster", "broken", str(error))
        return
    try:
        yield Check("ray cluster", "ok", cluster.describe())
        yield from _nodes(storage)
    finally:
        cluster.close()


def _authentication() -> Check:
    mode, token = os.environ.get("RAY_AUTH_MODE"), token_known()
    detail = f"RAY_AUTH_MODE is {mode or 'not set'}; a token is {'known' if token else 'not known'} here"
    if mode is None and token:
        return Check(
            "ray authentication",
            "note",
            detail,
            "`ray start --head` will ask for the token, and `ray job submit` sends none unless RAY_AUTH_MODE=token is set: set it "
            "on both sides (or RAY_AUTH_MODE=disabled on both)",
        )
    if mode == "token" and not token:
        return Check(
            "ray authentication",
            "broken",
            detail,
            "set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token, or copy the head's ~/.ray/auth_token",
        )
    return Check("ray authentication", "ok", detail)


def _nodes(storage: str | None) -> Iterator[Check]:
    """One probe task a node: its versions and whether it sees and writes the driver's storage."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    try:
        probe = Store(storage).root / f".doctor-{uuid.uuid4().hex[:8]}"
        write_text(probe / "driver", probe.name)
    except (StorageError, BucketError):
        # This machine's own check has told why.
        yield Check("nodes", "note", "not asked, for the storage cannot be written from here")
        return
    here = versions()
    task = ray.remote(num_cpus=0, max_retries=0)(probe_node)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    pending = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(str(probe))
        for node in nodes
    ]
    ray.wait(pending, num_returns=len(pending), timeout=_NODE_SECONDS)
    for node, reference in zip(nodes, pending, strict=True):
        yield from _judge(node, reference, probe, here)
    remove_folder(probe)


def _judge(node: dict[str, Any], reference: Any, probe: Path, here: dict[str, str]) -> Iterator[Check]:
    import ray

    name = f"node {node['NodeManagerAddress']}"
    try:
        found = ray.get(reference, timeout=1)
    except ray.exceptions.RayError as error:
        text = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        yield Check(name, "broken", f"cannot run a task: {text[0]}", "install roma-ray there, with the same versions")
        return
    resources = node["Resources"]
    kinds = [r.partition(":")[2] for r in resources if r.startswith("accelerator_type:")]
    gpus = f"{resources.get('GPU', 0):.0f} GPU(s){' ' + ', '.join(kinds) if kinds else ''}"
    yield Check(name, "ok", f"{resources.get('CPU', 0):.0f} logical CPUs, {gpus}")
    differ = [f"{k} {found['versions'].get(k)} (here {v})" for k, v in here.items() if found["versions"].get(k) != v]
    if differ:
        yield Check(name, "broken", f"other versions: {', '.join(differ)}", "install the same versions on every node")
    written = exists(probe / found["wrote"]) if found["wrote"] else False
    if found["read"] != probe.name or not written:
        yield Check(
            name,
            "broken",
            f"does not share the storage {probe.parent} ({found['error'] or 'its files are not visible here'})",
            "give each node the bucket's credentials or a role (cluster/README.md), and the extra `objects`"
            if is_object(probe)
            else "give a bucket, or a folder that every node sees (NFS, FSx, Filestore), with --storage or $ROMA_RAY_STORAGE",
        )
    elif found["error"]:
        yield Check(name, "broken", found["error"], f"give it another place with ${SCRATCH}")
    else:
        scratch = f"; scratch {found['scratch']}" if found["scratch"] else ""
        yield Check(name, "ok", f"reads and writes {probe.parent}{scratch}")


def versions() -> dict[str, str]:
    """Versions that must be the same on every node."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for package in _COMPARED:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def probe_node(folder: str) -> dict[str, Any]:
    """Runs on a node: read the driver's probe, write one back, look at the node's scratch."""
    result: dict[str, Any] = {"versions": versions(), "read": "", "wrote": "", "error": "", "scratch": ""}
    try:
        result["read"] = read_text(Path(folder) / "driver")
        name = uuid.uuid4().hex[:8]
        write_text(Path(folder) / name, "seen")
        result["wrote"] = name
        scratch = scratch_facts()
        result["scratch"] = (
            str(scratch) if is_object(folder) else f"{scratch.root}: {scratch.free / 2**30:.1f} GiB free"
        )
    except (StorageError, BucketError) as error:
        result["error"] = str(error)
    except OSError as error:
        result["error"] = f"{error.strerror or error}: {error.filename}"
    return result
