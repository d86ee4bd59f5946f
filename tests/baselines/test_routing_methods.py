"""The oracle and C3PO do what their names say."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from roma_ray.baselines.bench import Bench, training_mask
from roma_ray.baselines.c3po import Neighborhood, core_experts, mean_shift, mixed, reference_routing
from roma_ray.baselines.contract import Fitted
from roma_ray.baselines.head_passes import HeadRun, loss_kind, task_loss
from roma_ray.baselines.method_registry import METHODS
from roma_ray.baselines.oracle import optimise, wrong_choice
from roma_ray.baselines.oracle_tuning import OracleTuning
from roma_ray.config.baseline_settings import C3poConfig, OracleConfig
from roma_ray.engine.forward import lay_out, task_losses
from roma_ray.manifold.losses import manifold_loss, neighbor_targets
from roma_ray.manifold.neighbors import Neighborhoods, own_neighborhoods
from roma_ray.moe.passes import run_packed

SETTINGS = OracleConfig(steps=6, step_size=0.3)


def test_scores_and_losses_are_the_engines(bench: Bench) -> None:
    """The differentiable reading of choices against the engine's own scoring and task loss."""
    rows = bench.rows["test"][:9]
    run = HeadRun(bench, rows)
    likelihoods_QC = run.likelihoods()
    for row, mine, theirs in zip(rows, likelihoods_QC.tolist(), bench.answer(rows).scores, strict=True):
        assert mine[: len(theirs)] == pytest.approx(theirs, abs=1e-5)
        assert all(value == -torch.inf for value in mine[len(theirs) :]), row
    prompts = [bench.data.prompts[row] for row in rows]
    layout = lay_out(prompts, prefix=bench.data.states.prefix, gold_only=bench.data.cloze)
    keep = layout.keep()
    states_TD = bench.data.states.packed(rows, layout)
    out = run_packed(bench.head, layout.packing, states_TD, resume=True, keep=keep)
    expected = task_losses(out.states, keep, layout, over=loss_kind(bench.setup.config))
    mine_Q = task_loss(likelihoods_QC, [p.answer for p in prompts], prompts, loss_kind(bench.setup.config))
    torch.testing.assert_close(mine_Q.sum(), expected)


def test_the_models_own_routing_gives_its_own_answers(bench: Bench) -> None:
    run = HeadRun(bench, bench.rows["test"])
    torch.testing.assert_close(run.likelihoods(run.own_routing()), run.likelihoods(), atol=1e-4, rtol=1e-4)


def test_the_oracle_never_ends_above_its_start_and_mostly_below(bench: Bench) -> None:
    rows = bench.rows["test"]
    best = optimise(bench, rows, [bench.data.prompts[row].answer for row in rows], SETTINGS)
    assert (best.best_Q <= best.start_Q).all()
    assert (best.best_Q < best.start_Q).float().mean() > 0.5
    torch.testing.assert_close(best.routing_QLE.sum(-1), torch.ones(best.routing_QLE.shape[:2]))
    # What is reported was really computed under the routing that is reported.
    run = HeadRun(bench, rows)
    again = task_loss(
        run.likelihoods(best.routing_QLE), [p.answer for p in run.prompts], run.prompts, loss_kind(bench.setup.config)
    )
    torch.testing.assert_close(again.detach(), best.best_Q, atol=1e-4, rtol=1e-4)


def test_questions_of_a_batch_do_not_touch_one_another(letter: Bench) -> None:
    rows = letter.rows["test"][:3]
    aims = [letter.data.prompts[row].answer for row in rows]
    together = optimise(letter, rows, aims, SETTINGS)
    for number, row in enumerate(rows):
        alone = optimise(letter, [row], [aims[number]], SETTINGS)
        torch.testing.assert_close(alone.routing_QLE[0], together.routing_QLE[number], atol=1e-3, rtol=1e-3)


def test_the_control_aims_at_a_wrong_choice_and_says_which(letter: Bench) -> None:
    rows = letter.rows["test"]
    answers = METHODS["oracle_control"].predict(letter, METHODS["oracle_control"].fit(letter, {}, 0, 1), rows, 1)
    assert answers.aims == [wrong_choice(letter, row, 1) for row in rows]
    assert all(aim != letter.data.prompts[row].answer for aim, row in zip(answers.aims, rows, strict=True))
    assert answers.aims != [wrong_choice(letter, row, 2) for row in rows]
    predictions = answers.predictions(letter.data.prompts, letter.data.rule)
    base = letter.answer(rows).predictions(letter.data.prompts, letter.data.rule)
    reached, anyway = (
        np.mean([p == a for p, a in zip(found, answers.aims, strict=True)]) for found in (predictions, base)
    )
    assert reached > anyway


def test_oracle_tuning_pulls_to_each_questions_own_optimum(letter: Bench) -> None:
    """Its regularizer against the literal sum over questions of ||r_i - r*_i||^2."""
    targets_NLE = OracleTuning().prepare(letter, 0)["routing"]
    rows = letter.rows["train"]
    assert targets_NLE[rows].sum(-1).allclose(torch.ones(1))
    mask = torch.ones(len(targets_NLE), dtype=torch.bool)
    mask[rows] = False
    assert not targets_NLE[mask].any()
    mine_NLE = torch.rand(len(rows), *targets_NLE.shape[1:])
    targets = neighbor_targets(own_neighborhoods(training_mask(letter)), targets_NLE).take(torch.tensor(rows))
    loss = manifold_loss(mine_NLE, targets)
    literal = sum(float((mine_NLE[n] - targets_NLE[row]).square().sum()) for n, row in enumerate(rows))
    assert float(loss) == pytest.approx(literal, rel=1e-5)


def test_core_experts_are_the_highest_weighed_ones_and_the_only_ones_that_move(letter: Bench) -> None:
    rows = letter.rows["test"][:8]
    own_QLE = HeadRun(letter, rows).own_routing()
    core_QLE = core_experts(letter, own_QLE)
    top_k, experts = letter.head.routers[0].top_k, letter.head.routers[0].num_experts
    count = max(top_k, round(letter.config.c3po.core_fraction * experts))
    assert count < experts
    assert (core_QLE.sum(-1) == count).all()
    assert own_QLE[core_QLE].min() >= 0
    lowest_core = own_QLE.masked_fill(~core_QLE, torch.inf).amin(-1)
    assert (own_QLE.masked_fill(core_QLE, -torch.inf).amax(-1) <= lowest_core).all()
    for name in ("c3po", "c3po_kernel"):
        near = Neighborhood(letter, rows, letter.neighbors_of(rows))
        new_QLE = METHODS[name].remix(near, own_QLE, core_QLE)  # type: ignore[attr-defined]
        # Outside the core all weights keep their proportions: only the common scale may move.
        ratio_QLE = (new_QLE / own_QLE).masked_fill(core_QLE, torch.nan)
        spread = torch.nan_to_num(ratio_QLE - ratio_QLE.nanmean(-1, keepdim=True))
        assert spread.abs().max() < 1e-3
    assert not torch.allclose(new_QLE, own_QLE)


def test_c3po_lowers_the_neighbors_loss(letter: Bench) -> None:
    rows = letter.rows["test"]
    own_QLE = HeadRun(letter, rows).own_routing()
    core_QLE = core_experts(letter, own_QLE)
    near = Neighborhood(letter, rows, letter.neighbors_of(rows))
    assert set(near.rows) <= set(letter.data.successful_N.nonzero()[:, 0].tolist())
    with torch.no_grad():
        start_Q = near.losses(own_QLE)
        kernel_Q = near.losses(METHODS["c3po_kernel"].remix(near, own_QLE, core_QLE))  # type: ignore[attr-defined]
    descended_QLE = METHODS["c3po"].remix(near, own_QLE, core_QLE)  # type: ignore[attr-defined]
    with torch.no_grad():
        descended_Q = near.losses(descended_QLE)
    assert descended_Q.mean() < start_Q.mean()
    # Alpha 1, the question's own routing, is among those that kernel regression tries.
    assert (kernel_Q <= start_Q + 1e-5).all()
    # The kernel-weighted loss against a literal sum over the neighbors of one question.
    found = letter.neighbors_of(rows)
    indices, _, weights = found.of(rows[0])
    run = HeadRun(letter, indices.tolist())
    losses = task_loss(
        run.likelihoods(own_QLE[:1].expand(len(indices), -1, -1)),
        [p.answer for p in run.prompts],
        run.prompts,
        loss_kind(letter.setup.config),
    )
    assert float(start_Q[0]) == pytest.approx(float((losses * weights).sum()), rel=1e-4)


@pytest.mark.parametrize("name", ["c3po", "c3po_kernel"])
def test_a_question_without_neighbors_keeps_its_own_routing(
    letter: Bench, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, method = letter.rows["test"][:4], METHODS[name]
    full = method.predict(letter, Fitted({}), rows, 0).routing_NLE
    found = letter.neighbors_of(rows)
    for alone in ([rows[1]], rows):
        kept = ~torch.isin(found.rows, torch.tensor(alone))
        sizes = found.sizes.clone()
        sizes[alone] = 0
        fewer = Neighborhoods(
            torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)]),
            found.indices[kept],
            found.similarities[kept],
            found.weights[kept],
            found.queried,
        )
        monkeypatch.setattr(Bench, "neighbors_of", lambda self, rows, fewer=fewer: fewer)
        mine = method.predict(letter, Fitted({}), rows, 0).routing_NLE
        own = HeadRun(letter, rows).own_routing().numpy()
        assert full is not None
        assert mine is not None
        for number, row in enumerate(rows):
            assert mine[number] == pytest.approx(own[number] if row in alone else full[number], abs=1e-5)


def test_of_equally_good_mixtures_the_nearest_to_the_own_routing_is_taken(
    letter: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = letter.rows["test"][:4]
    own_QLE = HeadRun(letter, rows).own_routing()
    near = Neighborhood(letter, rows, letter.neighbors_of(rows))
    monkeypatch.setattr(near, "losses", lambda routing_QLE: torch.zeros(len(routing_QLE)))
    chosen_QLE = METHODS["c3po_kernel"].remix(near, own_QLE, core_experts(letter, own_QLE))  # type: ignore[attr-defined]
    torch.testing.assert_close(chosen_QLE, own_QLE)


def test_mean_shift_against_a_literal_step(letter: Bench) -> None:
    references_SLE = reference_routing(letter, letter.data.successful_N.nonzero()[:, 0].tolist())
    own_QLE = HeadRun(letter, letter.rows["test"][:4]).own_routing()
    core_QLE = torch.ones_like(own_QLE, dtype=torch.bool)
    settings = C3poConfig(steps=1, neighbors=2, mode_alpha=0.25)
    moved_QLE = mean_shift(own_QLE, references_SLE, core_QLE, settings)
    for own, moved in zip(own_QLE, moved_QLE, strict=True):
        distances = [float((own - reference).norm()) for reference in references_SLE]
        near = sorted(range(len(distances)), key=lambda n: distances[n])[:2]
        weights = np.array([np.exp(-0.5 * (distances[n] / distances[near[-1]]) ** 2) for n in near])
        mean = sum(w * references_SLE[n] for w, n in zip(weights / weights.sum(), near, strict=True))
        torch.testing.assert_close(moved, 0.25 * own + 0.75 * mean, atol=1e-5, rtol=1e-4)


def test_mixing_keeps_distributions() -> None:
    own, other = torch.rand(3, 2, 5).softmax(-1), torch.rand(3, 2, 5).softmax(-1)
    core = torch.rand(3, 2, 5) > 0.5
    torch.testing.assert_close(mixed(own, other, 0.3, core).sum(-1), torch.ones(3, 2))
    torch.testing.assert_close(mixed(own, other, 1.0, core), own)


@pytest.mark.parametrize("name", ["oracle", "c3po"])
def test_memory_is_bounded_by_the_batch(letter: Bench, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No pass holds more tokens (what all share aside) than `extraction.batch_tokens`, neighbors included, whatever is asked at once."""
    most = 0
    real = HeadRun.__init__

    def counting(self: HeadRun, bench: Bench, rows: list[int]) -> None:
        nonlocal most
        real(self, bench, rows)
        most = max(most, len(self.layout.packing) - bench.data.states.prefix)

    monkeypatch.setattr(HeadRun, "__init__", counting)
    small = dataclasses.replace(letter, data=dataclasses.replace(letter.data, batch_tokens=200))
    METHODS[name].predict(small, METHODS[name].fit(small, {}, 0, 0), letter.rows["test"], 0)
    assert 0 < most <= 200
