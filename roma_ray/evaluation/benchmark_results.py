"""A finished evaluation's folder: what its files are called, which columns they have, and reading it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pyarrow as pa

from roma_ray.errors import ArtifactError
from roma_ray.store.artifacts import Stage, read_manifest
from roma_ray.store.files import read_json

SUMMARY, METRICS, RESPONSES = "evaluation.json", "metrics.parquet", "responses.parquet"
METRIC_COLUMNS = pa.schema(
    [
        ("task", pa.string()),
        ("doc", pa.int64()),
        ("filter", pa.string()),
        ("metric", pa.string()),
        ("base", pa.float64()),
        ("tuned", pa.float64()),
    ]
)
RESPONSE_COLUMNS = pa.schema(
    [
        ("task", pa.string()),
        ("doc", pa.int64()),
        ("id", pa.string()),
        ("target", pa.string()),
        ("base", pa.list_(pa.string())),
        ("tuned", pa.list_(pa.string())),
    ]
)


def read_benchmarks(folder: str | Path) -> dict[str, Any]:
    """`evaluation.json` of a finished folder of benchmarks.

    Keys: `model` {path, identity, dtype, adapter, adapter_identity, layers}; `tasks` {task: {pin, version, num_fewshot, metrics
    {"metric,filter": n, base, base_stderr and, paired, tuned, tuned_stderr, difference, difference_stderr, lost, won, mcnemar_p (of
    verdicts, else null), t_p (of other values, else null)}}};
    `groups` {group: {pin, tasks, metrics}}; `guards`; `cost`; `versions` (that made it) and `other_versions` (sentences, where those
    here are others). Raises ArtifactError.
    """
    path = Path(folder) / SUMMARY
    try:
        value: dict[str, Any] = read_json(path)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}; remove the folder and evaluate again") from None
    return {**value, "other_versions": _other_versions(path.parent)}


def _other_versions(folder: Path) -> list[str]:
    """A sentence for each stage behind a folder of benchmarks that other library versions than those here made."""
    found = []
    with contextlib.suppress(ArtifactError):
        asked = read_manifest(folder)["identity"]["inputs"].values()
        stages = [Stage(folder, "benchmarks", {})]
        stages += [Stage(folder.parents[1] / "requests" / name, "requests", {}) for name in asked]
        found = [other for stage in stages if (other := stage.other_versions()) is not None]
    return list(dict.fromkeys(found))
