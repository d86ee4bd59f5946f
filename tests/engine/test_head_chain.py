"""A head in slices: the same bits as the head as a whole, in training, validation and evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from roma_ray.ablations.plan import make_plan
from roma_ray.ablations.space import seeds_space
from roma_ray.config.finetune_settings import LogitsConfig, RegularizerConfig
from roma_ray.config.loading import with_overrides
from roma_ray.engine.progress import Silence
from roma_ray.engine.scoring import score_rows
from roma_ray.engine.setup import resolve
from roma_ray.errors import ConfigError, GuardError
from roma_ray.moe.adapters import load_adapter, save_adapter
from roma_ray.moe.head_chain import HereLinks
from roma_ray.runs.method_comparison import compare
from roma_ray.runs.pipeline import Run, run
from tests.engine.loops import assert_same, in_slices, stop_at, train, trained
from tests.making import train_job
from tests.progress import Told
from tests.tiny import EAGER
from tests.world import make_world


def prepared(root: Path, family: str, layers: str, **sections: Any) -> Run:
    """A run up to what training reads, of a tiny model of six layers."""
    world = make_world(root, family, count=40, model={"attention": "eager" if family in EAGER else "sdpa"}, **sections)
    world = world.model_copy(update={"routing": world.routing.model_copy(update={"layers": layers})})
    return run(resolve(world), Silence(), until="finetune")


@pytest.mark.parametrize("keep", [True, False])
def test_two_slices_train_the_same_bits(letter_run: Run, keep: bool) -> None:
    job = train_job(letter_run)
    assert job.setup.layers == (4, 5)
    assert_same(train(job), trained(job, in_slices(job, 5, keep=keep)))


SETTINGS: dict[str, dict[str, Any]] = {
    "no term": {"regularizer": RegularizerConfig(kind="none")},
    "auto": {"regularizer": RegularizerConfig(weight="auto", refresh=True)},
    "kl": {"regularizer": RegularizerConfig(weight=3.0, distance="kl")},
    "base": {"regularizer": RegularizerConfig(kind="base", weight=1.0)},
    "task prior": {"regularizer": RegularizerConfig(kind="prior", prior="task", weight=1.0)},
    "entropy": {"regularizer": RegularizerConfig(kind="entropy", weight=0.1)},
    "l1": {"regularizer": RegularizerConfig(kind="l1", weight=1e-3)},
    "l2": {"regularizer": RegularizerConfig(kind="l2", weight=1e-3)},
    "temperature and dropout": {"logits": LogitsConfig(temperature=2.0, dropout=0.2)},
    "decay, best epoch": {"weight_decay": 0.1, "decay_to": "base", "select": "best_validation"},
    "vocabulary": {"task_loss": "vocabulary", "micro_batch_size": 3},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("keep", [True, False], ids=["keep", "recompute"])
def test_every_term_and_setting_gives_the_same_bits(letter_run: Run, name: str, keep: bool) -> None:
    job = train_job(letter_run, **SETTINGS[name])
    assert_same(train(job), trained(job, in_slices(job, 5, keep=keep)))


LAYOUTS = [
    # Three slices of all layers; a dense first layer; a slice whose layers are not tuned, in the middle and at the end.
    ("olmoe", "All", (2, 4), "Last3"),
    ("deepseek", "All", (2, 5), "Last1"),
    ("deepseek_v3", (2, 4), (3, 5), "Last1"),
    ("gpt_oss", (1, 2), (3,), "First1"),
    # Recurrent layers, layers of one part, a language model of a multimodal one, a multiplier of the embeddings.
    ("qwen3_next", "L3", (4, 5), "Last1"),
    ("nemotron_h", "All", (3,), "Last1"),
    ("gemma4", "L3", (4,), "Middle1"),
    ("granitemoehybrid", "L3", (4, 5), "Last3"),
]


@pytest.mark.parametrize(("family", "layers", "cuts", "tokens"), LAYOUTS, ids=[layout[0] for layout in LAYOUTS])
def test_families_train_and_answer_with_the_same_bits(
    family: str, layers: Any, cuts: tuple[int, ...], tokens: str, tmp_path: Path
) -> None:
    made = prepared(tmp_path, family, layers, routing={"tokens": tokens})
    job = train_job(made)
    assert job.setup.cut < cuts[0]
    whole, chain = train(job), in_slices(job, *cuts)
    sliced = trained(job, chain)
    assert_same(whole, sliced)

    head, adapters = job.load_head(), [tmp_path / "whole", tmp_path / "sliced"]
    parts: list[Any] = [head, chain]
    for folder, part, outcome in zip(adapters, parts, (whole, sliced), strict=True):
        save_adapter(folder, part, outcome.gates, base="model", revision=None, fingerprint="f")
    names = sorted(file.name for file in adapters[0].iterdir())
    assert names == sorted(file.name for file in adapters[1].iterdir())
    for name in names:
        assert (adapters[0] / name).read_bytes() == (adapters[1] / name).read_bytes(), name

    data = job.open_data()
    rows: dict[str, Any] = {"tokens": tokens, "rule": data.rule, "batch_tokens": 300}
    for load in (False, True):
        if load:
            for part in parts:
                load_adapter(adapters[0], part)
        one, other = (score_rows(part, data.states, data.prompts, data.validation, **rows) for part in parts)
        assert (one.scores, one.predictions) == (other.scores, other.predictions)
        assert (one.routing_NLE == other.routing_NLE).all()


def test_the_continuations_of_choices_and_each_positions_pull(cloze_run: Run) -> None:
    job = train_job(cloze_run, regularizer=RegularizerConfig(weight=3.0, positions="sum", refresh=True))
    assert_same(train(job), trained(job, in_slices(job, 5)))


def test_in_bf16_the_same_bits(tmp_path: Path) -> None:
    job = train_job(prepared(tmp_path, "olmoe", "L3", dtype=torch.bfloat16))
    assert job.model.dtype == "bfloat16"
    assert_same(train(job), trained(job, in_slices(job, 4, 5, keep=False)))


def test_a_value_that_is_not_finite_is_traced_to_its_layer(letter_run: Run) -> None:
    """Also in a slice below the last one."""
    job = train_job(letter_run)
    chain, data = in_slices(job, 5), job.open_data()
    assert isinstance(chain.links, HereLinks)
    broken = next(p for name, p in chain.links.links[0].part.model.named_parameters() if "down_proj" in name)
    with torch.no_grad():
        broken[...] = float("nan")
    with pytest.raises(GuardError, match=r"of 9 questions are not finite.*layer 4 \(mlp\).*layers\.4\.mlp\.experts"):
        score_rows(chain, data.states, data.prompts, range(9), tokens="Last1", rule="raw", batch_tokens=500)


def test_a_run_goes_on_from_a_checkpoint_whoever_holds_the_layers(letter_run: Run, tmp_path: Path) -> None:
    job = train_job(letter_run, checkpoint_steps=1)
    checkpoint = tmp_path / "checkpoint.safetensors"
    stop_at(3, job, checkpoint)
    assert_same(train(job), trained(job, in_slices(job, 5), checkpoint=checkpoint))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (["extraction.cache=false"], "extraction.cache"),
        (["questions.prompt.format=free"], r"extraction\.success\.metric: exact_match writes answers"),
    ],
)
def test_what_does_not_go_with_a_chain_is_refused(letter_run: Run, settings: list[str], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        with_overrides(letter_run.setup.config, ["finetune.chain=2", *settings])


def test_what_holds_a_head_whole_says_so(letter_run: Run, tmp_path: Path) -> None:
    config = with_overrides(letter_run.setup.config, ["finetune.chain=2", f"storage={tmp_path}"])
    setup = resolve(config)
    with pytest.raises(ConfigError, match=r"baselines` holds the head whole, and finetune\.chain divides it"):
        compare(setup, ["icl"], 1, Silence())
    with pytest.raises(ConfigError, match=r"a trial of a sweep.*finetune\.chain"):
        make_plan(seeds_space(config, 2))
    told = Told()
    run(setup, told, until="finetune")
    assert any("finetune.chain needs the workers of a cluster" in line for line in told.lines)


def test_only_gates_have_gradients_and_each_link_holds_its_layers(letter_run: Run) -> None:
    job = train_job(letter_run)
    chain = in_slices(job, 5)
    assert isinstance(chain.links, HereLinks)
    (link,) = chain.links.links
    assert (link.part.start, link.part.stop, chain.part.start) == (4, 5, 5)
    trained(job, chain)
    for part in (link.part, chain.part):
        assert all(not p.requires_grad and p.grad is None for p in part.model.parameters())
    assert not link._held
    # Nothing of a pass is left, and the head is as it was: another run gives the same.
    again = trained(job, chain)
    assert_same(train(job), again)
    assert {router.layer for router in chain.routers} == {4, 5}
