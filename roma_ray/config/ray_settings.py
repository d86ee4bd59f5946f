"""Settings of a cluster: how many workers, where they are placed, how long they are waited for (`ray`)."""

from __future__ import annotations

from pydantic import Field

from roma_ray.config.section import Section


class PlacementConfig(Section):
    """What a stage's workers need of a node beside CPUs and GPUs."""

    accelerator: str | None = None
    """Kind of GPU, as Ray names it: A100, H100, AMD-Instinct-MI300X-OAM ... Default: any; for finetuning the kind with
    the most room, since its workers must be alike. Not asked for on a CPU."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Labels that the node must have, as in Ray's selectors: `gpu-vendor: amd`, `pool: "!head"`, `gpu-type: in(a100, h100)`."""
    memory_gib: float | None = Field(default=None, gt=0)
    """Memory that Ray sets aside for each worker. Default: none, and only CPUs and GPUs are counted."""


class RayConfig(Section):
    """Where `roma-ray run` and the jobs run. No part of any fingerprint: the results are the same bits anywhere."""

    address: str | None = None
    """A cluster's address (host:6379). Default: $RAY_ADDRESS, a cluster that runs on this machine, else one of its own.
    `new` always starts its own; `local` is the command's own process, without Ray."""
    extract_workers: int | None = Field(default=None, ge=1)
    """Processes that each hold a model, or with `extraction.chain` a slice of one; many questions are encoded by as many. Default:
    one a GPU, or the cluster's CPUs by `threads`; without a cluster in sight, none for work that starting them would lengthen
    (roma_ray/cluster/worth.py)."""
    embed_workers: int | None = Field(default=None, ge=1)
    """As `extract_workers`."""
    evaluate_workers: int | None = Field(default=None, ge=1)
    """As `extract_workers`, for a run's own test questions and for benchmarks; an evaluation by a small model begins in the driver
    also where there is a cluster."""
    finetune_workers: int | None = Field(default=None, ge=1)
    """Training processes, with `finetune.chain` those of all slices; never more than a step has micro-batches (chains: as many).
    Default as for `extract_workers`, and one for each 50 micro-batches of the whole run."""
    baselines_workers: int | None = Field(default=None, ge=1)
    """Processes that fit and ask methods, one each at a time, or work on a part of a method's questions. Default as for
    `extract_workers`."""
    cpus_per_worker: float = Field(default=0.5, gt=0)
    """Logical CPUs that Ray sets aside for a worker: a fraction, so that Ray's own tasks always find a CPU."""
    gpus_per_worker: float = Field(default=1.0, gt=0)
    """GPUs of a worker on a cluster that has any; a fraction lets workers share one."""
    extract: PlacementConfig = PlacementConfig()
    embed: PlacementConfig = PlacementConfig()
    finetune: PlacementConfig = PlacementConfig()
    evaluate: PlacementConfig = PlacementConfig()
    baselines: PlacementConfig = PlacementConfig()
    """`evaluate` also says where the work of one process (neighbors, repair) runs when the driver's machine has no GPU."""
    wait_seconds: int = Field(default=0, ge=0)
    """On a cluster that scales: ask for the workers' nodes, and wait so long for them. Then name the number of workers
    and `device: cuda`, for neither can be counted before the nodes are there. 0: the nodes that are there must do."""
    max_failures: int = Field(default=3, ge=0)
    """Deaths of finetuning workers, trials and tasks, for memory or otherwise, that are answered by another try, from the last
    checkpoint where there is one."""
    keep_workers_seconds: int = Field(default=0, ge=0)
    """On a cluster that stands: how long the workers of batches stay after the run, with their place and their model, for another
    run of the same code to begin at once. They hold CPUs, GPUs and memory until then. 0: they end with the run."""
    no_progress_seconds: int = Field(default=1800, ge=10)
    """Extraction, embedding and evaluation give up when so long no batch is finished and no worker starts."""
