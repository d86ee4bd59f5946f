"""Environment settings that keep Ray and the libraries quiet; a user's own settings win. Imports nothing heavy."""

from __future__ import annotations

import json
import os

_LIBRARIES = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
}
_RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # The core's own log on stderr; its files in the session folder stay.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    # What batches in flight through a chain say when one of its actors dies: the first to say so has been heard.
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
    # How long Ray Train takes to see that a worker ended; its own 2 s add up over short runs.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Of workers. glibc gives each of Ray's many threads a heap of its own (eight for each core), and each trial's freed memory
    # stays in some of them: a worker of a 692 M-parameter model grew by 1.5 GB a trial; with two heaps it stays, at the same speed.
    "MALLOC_ARENA_MAX": "2",
}
# Settings of the driver that its workers must share; a cluster's workers do not inherit them by themselves.
_FORWARDED = (
    *_LIBRARIES, "MALLOC_ARENA_MAX", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT", "HF_HOME",
    # Where a bucket is asked for, and how long its leases last; credentials are the nodes' own.
    "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION", "ROMA_RAY_LEASE_SECONDS",
)  # fmt: skip


def quiet_libraries() -> None:
    """Keep the libraries' own progress bars and notices out of ours."""
    for name, value in _LIBRARIES.items():
        os.environ.setdefault(name, value)


def quiet_ray() -> None:
    """The same for Ray, before it is imported."""
    quiet_libraries()
    for name, value in _RAY.items():
        os.environ.setdefault(name, value)


def forwarded() -> dict[str, str]:
    """What the workers of an existing cluster get from this process's environment, but for what a job's own settings say."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    own = (job.get("runtime_env") or {}).get("env_vars") or {}
    return {name: os.environ[name] for name in _FORWARDED if name in os.environ and name not in own}
