"""A model that drops more than a few questions is refused, by the first layer whose values are not finite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from roma_ray.config.schema import Config
from roma_ray.engine.cache import open_states
from roma_ray.engine.progress import Silence
from roma_ray.engine.question_table import TABLE, read_prompts
from roma_ray.engine.runners import LOCAL, Runners
from roma_ray.engine.scoring import score_rows
from roma_ray.engine.setup import Setup, resolve
from roma_ray.engine.steps import locate
from roma_ray.engine.work import serial
from roma_ray.errors import GuardError, ModelError
from roma_ray.runs.pipeline import Run, run
from roma_ray.stages import answer_work, paired_evaluation
from roma_ray.stages.extraction import EXTRACT
from roma_ray.stages.failed_questions import OriginWork
from roma_ray.stages.preparation import QUESTIONS
from roma_ray.store.artifacts import Stage
from tests.engine.test_streaming import largest_gb
from tests.making import made
from tests.world import make_world


def damage(config: Config, key: str, place: Callable[[torch.Tensor], Any]) -> None:
    """Make one value, or row, of a checkpoint's tensor NaN."""
    file = Path(config.model.path) / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(key))
    tensors[name][place(tensors[name])] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})


def with_extraction(config: Config, **settings: Any) -> Setup:
    return resolve(config.model_copy(update={"extraction": config.extraction.model_copy(update=settings)}))


@pytest.fixture
def damaged_layer(tmp_path: Path) -> Config:
    config = make_world(tmp_path)
    damage(config, "layers.2.mlp.experts.5.down_proj.weight", lambda tensor: (3, 4))
    return config


@pytest.fixture
def damaged_word(tmp_path: Path) -> Config:
    """A model that has no number for one of the words, which a part of the questions holds."""
    config = make_world(tmp_path)
    (token,) = AutoTokenizer.from_pretrained(config.model.path)(" plum", add_special_tokens=False)["input_ids"]
    damage(config, "embed_tokens.weight", lambda tensor: token)
    return config


@pytest.mark.parametrize("streamed", [False, True])
def test_the_error_names_the_first_layer_and_its_damaged_weight(damaged_layer: Config, streamed: bool) -> None:
    limit = largest_gb(damaged_layer.model.path) if streamed else None
    setup = with_extraction(damaged_layer, memory_gb=limit)
    with pytest.raises(ModelError, match=r"questions failed in extraction.*extraction\.max_failed tolerates") as caught:
        run(setup, Silence())
    text = str(caught.value)
    assert "comes from layer 2 (mlp), whose weights are not finite themselves (layers.2.mlp.experts.down_proj" in text
    assert "the model's scores are not finite" in text
    assert not locate(EXTRACT, setup)["extract"].complete


def test_more_failures_than_are_tolerated_are_refused_as_early_as_they_are_known(damaged_word: Config) -> None:
    given: list[Any] = []

    def counting(work: Any, batches: Sequence[int]) -> Any:
        for report in serial(work, batches):
            given.append((type(work).__name__, report.batch))
            yield report

    setup = with_extraction(damaged_word, batch_tokens=128)
    made(QUESTIONS, setup)
    with pytest.raises(ModelError, match=r"so far \(of 60 in all\).*comes from embed_tokens"):
        made(EXTRACT, setup, Runners(extract=counting))
    assert given[-1] == (OriginWork.__name__, 0)
    plan = given[:-1]
    assert len(plan) > 1
    given.clear()
    # Again: what is known already is enough.
    with pytest.raises(ModelError, match="so far"):
        made(EXTRACT, setup, Runners(extract=counting))
    assert given == [(OriginWork.__name__, 0)]
    # Who wants it may have it, of the same batches; a stricter run is refused on what is finished then.
    given.clear()
    tolerant = with_extraction(damaged_word, batch_tokens=128, max_failed=1)
    stage = made(EXTRACT, tolerant, Runners(extract=counting))
    assert not {place for place in given if place in plan}
    errors = stage.manifest()["facts"]["errors"]
    assert 3 < errors < 60
    with pytest.raises(ModelError, match=f"{errors} of 60 questions failed in extraction, more than the 5.0%"):
        made(EXTRACT, setup, Runners(extract=counting))
    enough = with_extraction(damaged_word, batch_tokens=128, max_failed=errors / 60)
    assert made(EXTRACT, enough, Runners(extract=counting))


def test_tuned_routers_whose_scores_are_not_finite_are_refused(
    letter_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = letter_run.setup
    broken = setup.layers[-1]

    def load_broken(folder: Path, head: Any) -> None:
        router = next(router for router in head.routers if router.layer == broken)
        with torch.no_grad():
            router.module.weight[1, 1] = float("nan")

    head = setup.model.load(setup.cut, None, with_lm_head=True)
    load_broken(tmp_path, head)
    states = open_states(setup.model, letter_run.stages["extract"].path, setup.cut)
    prompts = read_prompts(letter_run.stages["questions"].path / TABLE)
    with pytest.raises(GuardError, match=rf"of 9 questions are not finite.*layer {broken} \(mlp\).*mlp\.gate\.weight"):
        score_rows(head, states, prompts, range(9), tokens="Last1", rule="raw", batch_tokens=500)

    monkeypatch.setattr(answer_work, "load_adapter", load_broken)
    stages = letter_run.stages
    monkeypatch.setattr(Stage, "complete", property(lambda stage: stage.name != "evaluate"))
    with pytest.raises(GuardError, match=rf"layer {broken} \(mlp\)"):
        paired_evaluation.evaluate(paired_evaluation.EVALUATE.job(setup, stages), LOCAL, Silence())
