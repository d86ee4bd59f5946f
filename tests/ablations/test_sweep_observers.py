"""Who follows a sweep, without one: states are made by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from roma_ray.ablations.sweep import DONE, RUNNING, State, Sweep
from roma_ray.ablations.sweep_observers import Lines
from tests.progress import Told


def test_a_log_tells_every_epoch_of_a_trial_once() -> None:
    planned = SimpleNamespace(trial=SimpleNamespace(id="1", name="layers=F2"), epochs=2)
    state = State(cast(Any, planned))
    sweep = SimpleNamespace(states={"1": state}, missing_samples=0)
    sweep.having = lambda *names: [s for s in sweep.states.values() if s.state in names]
    told = Told()
    lines = Lines(told)
    for now, epoch in ((RUNNING, 0), (RUNNING, 1), (RUNNING, 1), (DONE, 2)):
        state.state, state.epoch = now, epoch
        state.validation_accuracy = 0.5 if epoch else None
        lines.changed(cast(Sweep, sweep), state)
    assert [line.split("] ")[1] for line in told.lines] == [
        "layers=F2: running",
        "layers=F2: running, epoch 1/2, validation 50.00%",
        "layers=F2: done, epoch 2/2, validation 50.00%",
    ]
