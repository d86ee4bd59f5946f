"""The embed stage's executor: every worker holds the sentence-embedding model."""

from __future__ import annotations

from roma_ray.engine.work import Executor
from roma_ray.stages.batches import ray_executor
from roma_ray.stages.cluster import Cluster


def embed_on_ray(cluster: Cluster, device: str) -> Executor:
    """Embedding on the cluster's workers; GPUs where `device` is `cuda`."""
    return ray_executor(cluster, "embed", device)
