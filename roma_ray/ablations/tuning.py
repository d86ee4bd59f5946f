"""Trials on Ray Tune, which decides where and when a trial runs; what it does and where it resumes is decided here.

Tune's own experiment state is thrown away: a trial's stages on the storage say what is done, and its checkpoint where it
goes on. So a killed driver, a killed trial and a lost node all end in the same command finishing what is missing.
"""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.stopper import Stopper

from roma_ray.ablations.space_file import Range, Scheduler
from roma_ray.cluster.environment import quiet_libraries
from roma_ray.cluster.failures import as_deaths, packed
from roma_ray.cluster.ray_cluster import Cluster, place_of_runs
from roma_ray.errors import ConfigError
from roma_ray.store.files import for_libraries, remove_folder

METRIC = "validation_accuracy"
_FAILURE, _COMPLETE = "failure", "complete"
_RUNS = ".tune"
# The process that directs a trial of several workers only waits; its workers ask for CPUs and GPUs themselves.
_DIRECTOR_CPUS = 0.1
_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # The first Ctrl-C ends the sweep; by itself Tune would only stop handing out trials.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # Nothing is resumed from Tune's own state, and writing it costs more than a short trial.
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",
    # No tables and tracebacks of Tune's own: a failed trial is reported once, by its name.
    "RAY_AIR_NEW_OUTPUT": "0",
}

Do = Callable[[Any, Callable[[dict[str, Any]], None]], dict[str, Any]]
"""Does a trial's work, given a function that hears of each epoch; returns the closing record."""


@dataclass(frozen=True)
class Event:
    """What happened to a trial: `started`, `epoch`, `done`, `stopped` (by the scheduler), `failed` or `restarted`."""

    kind: str
    config: Mapping[str, Any]
    record: Mapping[str, Any]


Hear = Callable[[Event], None]


@dataclass(frozen=True)
class Room:
    """What a trial gets of the cluster, and how many run at a time."""

    resources: Mapping[str, float]
    trials: int
    labels: Mapping[str, str] = field(default_factory=dict)
    """Labels of the nodes that trials may run on."""

    def bundle(self) -> tune.PlacementGroupFactory:
        """As Ray Tune takes it."""
        selectors = [dict(self.labels)] if self.labels else None
        return tune.PlacementGroupFactory([dict(self.resources)], bundle_label_selector=selectors)


def make_room(cluster: Cluster, device: str, trials: int, wanted: int | None) -> Room:
    """Divide the cluster among trials. Raises ConfigError when not one fits.

    Trials of several workers hold nothing themselves, so no more may start than have room for all their workers: two that
    each wait for the other's would wait for ever.
    """
    settings = cluster.config.ray
    workers = settings.finetune_workers or 1
    if workers == 1:
        fit, need = cluster.place("tune", None, trials, device)
        return Room(need.resources(), min(fit, wanted or fit), need.labels)
    cpus = cluster.resource("CPU") / (workers * settings.cpus_per_worker + _DIRECTOR_CPUS)
    # Ray Train gives each worker a GPU of its own.
    gpus = cluster.resource("GPU") / (workers * max(1.0, settings.gpus_per_worker)) if device == "cuda" else cpus
    fit = int(min(cpus, gpus))
    if fit < 1:
        raise ConfigError(
            f"ray.finetune_workers: no trial of {workers} workers fits on the cluster ({cluster.resource('CPU'):.0f} CPUs, "
            f"{cluster.resource('GPU'):.0f} GPUs). Lower ray.finetune_workers or ray.cpus_per_worker."
        )
    return Room({"CPU": _DIRECTOR_CPUS}, min(fit, wanted or fit, trials))


def tune_trials(
    cluster: Cluster,
    works: Mapping[str, Any],
    do: Do,
    hear: Hear,
    *,
    room: Room,
    folder: Path,
    scheduler: Scheduler,
    epochs: int,
    stop_on_failure: bool = False,
) -> None:
    """Run `do(work, report)` for every work, by key; `hear` is told of everything, in this process."""
    if not works:
        return
    trainable = tune.with_parameters(_listed_trial, works=dict(works), do=do)
    space = {"trial": tune.grid_search(list(works))}
    config = tune.TuneConfig(scheduler=_scheduler(scheduler, epochs), **_common(room))
    _fit(cluster, trainable, space, config, hear, room, folder, stop_on_failure)


def tune_search(
    cluster: Cluster,
    make: Callable[[dict[str, Any]], Any],
    do: Do,
    hear: Hear,
    *,
    ranges: Mapping[str, Range],
    known: Sequence[tuple[Mapping[str, Any], float]],
    samples: int,
    seed: int,
    room: Room,
    folder: Path,
    scheduler: Scheduler,
    epochs: int,
    stop_on_failure: bool = False,
) -> None:
    """Let optuna choose `samples` more trials within `ranges`; `make(values)` gives a trial's work, in its own process.

    `known` are the values and validation accuracies of earlier trials: optuna starts from them.
    """
    if samples < 1:
        return
    search = _optuna(ranges, known, seed)
    trainable = tune.with_parameters(_searched_trial, make=make, do=do)
    config = tune.TuneConfig(
        search_alg=search, num_samples=samples, scheduler=_scheduler(scheduler, epochs, METRIC), **_common(room)
    )
    _fit(cluster, trainable, {}, config, hear, room, folder, stop_on_failure)


def _common(room: Room) -> dict[str, Any]:
    # Actors go from trial to trial, and with them the loaded head.
    return {"max_concurrent_trials": room.trials, "reuse_actors": True}


def _fit(
    cluster: Cluster,
    trainable: Any,
    space: dict[str, Any],
    config: Any,
    hear: Hear,
    room: Room,
    folder: Path,
    stop_on_failure: bool,
) -> None:
    os.environ.update({name: os.environ.get(name, value) for name, value in _ENVIRONMENT.items()})
    logging.getLogger("ray.tune.execution.tune_controller").setLevel(logging.CRITICAL)
    cluster.connect()
    as_deaths()
    runs = place_of_runs(folder) / _RUNS
    try:
        tune.Tuner(
            tune.with_resources(trainable, room.bundle()),
            param_space=space,
            tune_config=config,
            run_config=tune.RunConfig(
                name=uuid.uuid4().hex[:12],
                storage_path=for_libraries(runs),
                # Retries after deaths of the process only: an exception in a trial never reaches Tune.
                failure_config=tune.FailureConfig(max_failures=cluster.config.ray.max_failures),
                callbacks=[_Relay(hear)],
                stop=_StopAll() if stop_on_failure else None,
                verbose=0,
            ),
        ).fit()
    finally:
        remove_folder(runs)


def _scheduler(settings: Scheduler, epochs: int, metric: str = METRIC) -> Any:
    from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler

    if settings.kind == "fifo":
        return FIFOScheduler()
    return AsyncHyperBandScheduler(
        time_attr="epoch",
        metric=metric,
        mode="max",
        max_t=max(epochs, 2),
        stop_last_trials=False,
        grace_period=min(settings.grace_epochs, max(epochs, 2) - 1),
        reduction_factor=settings.reduction_factor,
    )


def _optuna(ranges: Mapping[str, Range], known: Sequence[tuple[Mapping[str, Any], float]], seed: int) -> Any:
    from ray.tune.search.optuna import OptunaSearch

    try:
        import optuna
    except ImportError:
        raise ConfigError("`search: optuna` needs optuna: pip install 'roma-ray[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space: dict[str, Any] = {}
    for key, drawn in ranges.items():
        if drawn.choice is not None:
            space[key] = optuna.distributions.CategoricalDistribution(list(drawn.choice))
        elif drawn.integer is not None:
            space[key] = optuna.distributions.IntDistribution(*drawn.integer)
        else:
            low, high = drawn.uniform or drawn.log_uniform or (0.0, 1.0)
            space[key] = optuna.distributions.FloatDistribution(low, high, log=drawn.log_uniform is not None)
    points = [dict(values) for values, _ in known]
    rewards = [accuracy for _, accuracy in known]
    return OptunaSearch(
        space,
        metric=METRIC,
        mode="max",
        seed=seed,
        points_to_evaluate=points or None,
        evaluated_rewards=rewards or None,
    )


def _listed_trial(config: dict[str, Any], works: Mapping[str, Any], do: Do) -> None:
    _guarded(lambda: works[config["trial"]], do)


def _searched_trial(config: dict[str, Any], make: Callable[[dict[str, Any]], Any], do: Do) -> None:
    _guarded(lambda: make(config), do)


def _guarded(work: Callable[[], Any], do: Do) -> None:
    """Do a trial's work; whatever it raises becomes a record, so that only deaths are tried again."""
    quiet_libraries()
    try:
        record = do(work(), tune.report)
    except Exception as error:  # noqa: BLE001 - the border of the process; the driver tells it
        tune.report({"epoch": 0, METRIC: 0.0, _FAILURE: json.dumps(packed(error))})
    else:
        tune.report({**record, _COMPLETE: True})


class _Relay(tune.Callback):
    """Passes on what Tune tells, in the driver's process."""

    def __init__(self, hear: Hear | None) -> None:
        self._hear = hear

    def __getstate__(self) -> dict[str, Any]:
        # Tune saves its settings, callbacks included; nothing is ever restored from them.
        return {"_hear": None}

    def _tell(self, kind: str, trial: Any, record: Mapping[str, Any]) -> None:
        if self._hear is not None:
            self._hear(Event(kind, dict(trial.config), dict(record)))

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._tell("started", trial, {})

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if _FAILURE in result:
            self._tell("failed", trial, json.loads(result[_FAILURE]))
        elif _COMPLETE in result:
            self._tell("done", trial, result)
        else:
            self._tell("epoch", trial, result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        last = trial.last_result or {}
        if _FAILURE not in last and _COMPLETE not in last:
            self._tell("stopped", trial, last)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._tell("restarted", trial, {})

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        deaths = trial.num_failures
        text = f"its process died {deaths} time(s); most likely memory ran out, or its node was lost"
        self._tell("failed", trial, {"kind": "WorkerError", "text": text, "traceback": ""})


class _StopAll(Stopper):
    """Ends the sweep with the first failed trial."""

    def __init__(self) -> None:
        self._failed = False

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        self._failed = self._failed or _FAILURE in result
        return False

    def stop_all(self) -> bool:
        return self._failed
