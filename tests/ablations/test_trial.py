"""A trial in this process: what a scheduler is told of it."""

from __future__ import annotations

from typing import Any

from roma_ray.ablations.trial import TrialWork, here
from roma_ray.engine.steps import locate
from roma_ray.runs.pipeline import Run
from roma_ray.stages.finetuning import epochs_of
from roma_ray.stages.paired_evaluation import EVALUATE
from tests.engine.test_collapse import COLLAPSING, guard
from tests.making import with_settings


def test_a_training_that_the_guard_ends_is_closed_as_any_other(letter_run: Run) -> None:
    """A scheduler is not asked about its last epoch: it would stop what is done."""
    setup = with_settings(letter_run.setup, "finetune", **COLLAPSING, guard=guard("stop"))
    stages = locate(EVALUATE, setup)
    heard: list[dict[str, Any]] = []
    closing = here(TrialWork("t", setup, stages), heard.append)
    assert [record["epoch"] for record in heard] == [1]
    epochs = epochs_of(stages["finetune"])
    assert len(epochs) == closing["epoch"] == 2
    assert closing["validation_accuracy"] == epochs[0]["validation_accuracy"]
    assert stages["evaluate"].complete
