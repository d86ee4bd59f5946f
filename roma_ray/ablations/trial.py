"""What a process does for one trial: the engine's own stages, one after another, on a head that stays loaded."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from roma_ray.cluster.ray_cluster import Cluster
from roma_ray.cluster.ray_runners import in_one_process
from roma_ray.cluster.ray_training import finetune_on_ray
from roma_ray.engine.heads import FRESH, Heads, KeptHeads
from roma_ray.engine.model_spec import set_threads
from roma_ray.engine.progress import Silence
from roma_ray.engine.runners import Runners, Trainer
from roma_ray.engine.setup import Setup
from roma_ray.engine.steps import complete, order
from roma_ray.engine.work import Executor
from roma_ray.errors import BusyError
from roma_ray.stages.finetuning import TrainJob, epochs_of
from roma_ray.stages.paired_evaluation import EVALUATE, read_evaluation
from roma_ray.store.artifacts import Stage

T = TypeVar("T")
Report = Callable[[dict[str, Any]], None]

# The locks of a process that was killed go when the system has buried it.
_PATIENCE_SECONDS = 60.0


@dataclass(frozen=True)
class TrialWork:
    """A trial as it travels to the process that does it."""

    id: str
    setup: Setup
    stages: Mapping[str, Stage]


# Lives as long as the process: Tune hands one trial after another to the same actors.
_HEADS = KeptHeads()


def here(work: TrialWork, report: Report) -> dict[str, Any]:
    """A trial of one worker: this process."""
    return do_trial(work, report, _HEADS)


def with_train(work: TrialWork, report: Report) -> dict[str, Any]:
    """A trial of several workers: this process only directs them; evaluation goes, as one process, where a device is."""
    cluster = Cluster(work.setup.config)
    device = work.setup.model.device
    return do_trial(work, report, FRESH, finetune_on_ray(cluster, device), in_one_process(cluster, device))


def do_trial(
    work: TrialWork,
    hear: Report,
    heads: Heads,
    trainer: Trainer | None = None,
    evaluate: Executor | None = None,
) -> dict[str, Any]:
    """Do what is missing of a trial; `hear` is told of each epoch. Returns the closing record. Raises RomaError.

    `trainer` trains, and `evaluate` answers the evaluation's questions, in place of this process.
    """
    set_threads(work.setup.model.threads)
    setup, stages = work.setup, work.stages
    train: Trainer = trainer or partial(_train, heads=heads)

    def each(job: TrainJob, report: Callable[[dict[str, Any]], None], advance: Callable[[int, str], None]) -> None:
        def told(epoch: dict[str, Any]) -> None:
            report(epoch)
            # The closing record stands for the last one: a scheduler must not stop a trial whose training is done.
            if epoch["epoch"] + 1 < setup.config.finetune.epochs and not epoch.get("stopped"):
                hear({"epoch": epoch["epoch"] + 1, "validation_accuracy": epoch["validation_accuracy"]})

        train(job, told, advance)

    runners = Runners(finetune=each, evaluate=evaluate, heads=heads)
    for step in order(EVALUATE):
        # What trials share was compared with its digests before any of them started.
        patiently(partial(complete, step, step.job(setup, stages), runners, Silence(), verify=False))
    return closing(stages["finetune"], stages["evaluate"])


def _train(
    job: TrainJob,
    report: Callable[[dict[str, Any]], None],
    advance: Callable[[int, str], None],
    heads: Heads,
) -> None:
    with heads.lend(job.model, job.setup.cut) as head:
        job.run(report=report, advance=advance, head=head)


def closing(tuned: Stage, judged: Stage) -> dict[str, Any]:
    """The last record of a finished trial: the validation accuracy of the exported epoch, and the test comparison."""
    selected = tuned.manifest()["facts"]["selected_epoch"]
    epochs = epochs_of(tuned)
    test = read_evaluation(judged)["splits"]["test"]["all"]
    return {
        "epoch": len(epochs),
        "validation_accuracy": epochs[selected]["validation_accuracy"],
        "test_accuracy": test["tuned_accuracy"],
        "test_difference": test["difference"],
    }


def patiently(do: Callable[[], T], seconds: float = _PATIENCE_SECONDS) -> T:
    """Try again while another process, most likely a dead one's remains, holds a stage. Raises BusyError in the end."""
    limit = time.monotonic() + seconds
    while True:
        try:
            return do()
        except BusyError:
            if time.monotonic() > limit:
                raise
            time.sleep(0.5)
