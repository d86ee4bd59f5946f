"""The extract stage's executor: every worker holds trunk and head, and each batch writes its own files."""

from __future__ import annotations

from roma_ray.engine.work import Executor
from roma_ray.stages.batches import ray_executor
from roma_ray.stages.cluster import Cluster


def extract_on_ray(cluster: Cluster, device: str) -> Executor:
    """Extraction on the cluster's workers; GPUs where `device` is `cuda`."""
    return ray_executor(cluster, "extract", device)
