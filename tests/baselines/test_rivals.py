"""Expert steering and the update on fragile tokens do what their names say."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from roma_ray.baselines.bench import Bench
from roma_ray.baselines.expert_steering import activation_rates, steered_experts
from roma_ray.baselines.fragile_tokens import AnswerPass, better_routes, last_router
from roma_ray.baselines.method_registry import METHODS
from roma_ray.config.baseline_settings import SteeringConfig
from roma_ray.errors import TrainingError, UnmovedError
from roma_ray.moe.overriding import steer_routing
from roma_ray.moe.routers import find_routers
from tests.tiny import FAMILIES, MORE_FAMILIES, tiny_moe


def test_activation_rates_against_a_literal_count(bench: Bench) -> None:
    """Every question alone through the stock model, token by token."""
    rows = bench.rows["train"][:7]
    wanted = torch.tensor([n % 2 == 0 for n in range(len(rows))])
    rates_LE = activation_rates(bench, rows, wanted)
    counts_LE, tokens = torch.zeros_like(rates_LE), 0
    chosen: list[torch.Tensor] = []
    routers = [router for router in bench.whole.routers if router.layer in bench.setup.layers]
    handles = [router.module.register_forward_hook(lambda _m, _i, out: chosen.append(out[2])) for router in routers]
    for row in rows[::2]:
        ids = bench.data.prompts[row].prompt_ids
        chosen.clear()
        with torch.no_grad():
            bench.whole.model(torch.tensor([ids]))
        for layer, index_TK in enumerate(chosen):
            for token in range(bench.data.states.prefix, len(ids)):
                for expert in index_TK[token].tolist():
                    counts_LE[layer, expert] += 1
        tokens += len(ids) - bench.data.states.prefix
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(rates_LE, counts_LE / tokens)


def test_which_experts_are_steered() -> None:
    contrast_LE = torch.tensor([[0.5, 0.4, 0.3, -0.9], [0.2, -0.1, -0.6, 0.0]])
    # The third largest would be layer 0's third promoted one: it counts as taken.
    expected = [[1, 1, 0, -1], [1, 0, -1, 0]]
    assert steered_experts(contrast_LE, 4, 2, top_k=2).tolist() == expected
    assert steered_experts(contrast_LE, 3, 2, top_k=2).tolist() == [[1, 1, 0, -1], [0, 0, -1, 0]]
    # There are no more of a sign than there are.
    assert steered_experts(contrast_LE, 0, 9, top_k=2).tolist() == [[0, 0, 0, -1], [0, -1, -1, 0]]


@pytest.mark.parametrize("name", [*FAMILIES, *MORE_FAMILIES])
def test_steered_routers_choose_the_promoted_and_shun_the_demoted(name: str) -> None:
    model = tiny_moe(name, seed=4)
    routers = find_routers(model)
    steered_LE = torch.zeros(len(routers), routers[0].num_experts, dtype=torch.int8)
    steered_LE[:, 1], steered_LE[:, 2] = 1, -1
    chosen: list[torch.Tensor] = []
    handles = [router.module.register_forward_hook(lambda _m, _i, out: chosen.append(out[2])) for router in routers]
    ids = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids).logits
        usual = torch.cat([index.flatten() for index in chosen])
        chosen.clear()
        with steer_routing(model, routers, steered_LE, 0.01):
            model(ids)
        steered = torch.cat([index.flatten() for index in chosen])
        for handle in handles:
            handle.remove()
        assert torch.equal(model(ids).logits, before)
    share = [float((found == 1).float().mean()) for found in (usual, steered)]
    assert share[1] > share[0]
    assert (steered == 2).sum() < (usual == 2).sum()


def test_steered_logits_are_the_papers() -> None:
    """log softmax; the highest plus the margin for promoted experts, the lowest less the margin for demoted ones."""
    model = tiny_moe("olmoe", seed=4)
    router = find_routers(model)[-1]
    hidden_TD = torch.randn(6, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    steered_E = torch.zeros(router.num_experts, dtype=torch.int8)
    steered_E[3], steered_E[0] = 1, -1
    with torch.no_grad():
        own_TE = (hidden_TD @ router.gate.weight.T).log_softmax(-1)
        with steer_routing(model, [router], steered_E[None], 0.25):
            _, weights_TK, index_TK = router.module(hidden_TD)
    for t in range(6):
        scores = own_TE[t].clone()
        scores[3], scores[0] = own_TE[t].max() + 0.25, own_TE[t].min() - 0.25
        weights, index = scores.softmax(-1).topk(router.top_k)
        assert index_TK[t].tolist() == index.tolist()
        torch.testing.assert_close(weights_TK[t], weights)


def test_steering_takes_the_number_that_validation_prefers(letter: Bench) -> None:
    method = METHODS["expert_steering"]
    given = letter.blinded()
    fitted = method.fit(given, method.prepare(given, 0), 0.0, 0)
    trials = fitted.facts["trials"]
    assert len(trials) > 2
    assert fitted.facts["validation_accuracy"] == max(trials.values()) == trials[fitted.facts["chosen"]]
    # Of equals the first: the fewest experts.
    assert fitted.facts["chosen"] == next(n for n, accuracy in trials.items() if accuracy == max(trials.values()))
    again = letter.accuracy(method.predict(letter, fitted, letter.rows["validation"], 0))
    assert again == fitted.facts["validation_accuracy"]


def test_steering_needs_right_and_wrong_answers(letter: Bench) -> None:
    for answered in (True, False):
        data = dataclasses.replace(letter.data, successful_N=torch.full_like(letter.data.successful_N, answered))
        with pytest.raises(TrainingError, match="all are " + ("right" if answered else "wrong")):
            METHODS["expert_steering"].prepare(dataclasses.replace(letter, data=data), 0)
    with pytest.raises(ValueError, match="above 0"):
        SteeringConfig(promoted=(0,), demoted=(0,))


def test_answer_tokens_are_scored_as_the_engine_scores(bench: Bench) -> None:
    rows = bench.rows["train"][:6]
    run = AnswerPass(bench, rows)
    logp_G, routes_GE = run.likelihoods()
    scores = bench.answer(rows).scores
    for q, row in enumerate(rows):
        mine = sum(float(logp_G[n]) for n, question in enumerate(run.questions) if question == q)
        assert mine == pytest.approx(scores[q][bench.data.prompts[row].answer], abs=1e-4)
    torch.testing.assert_close(routes_GE.sum(1), torch.ones(len(routes_GE)))
    assert ((routes_GE > 0).sum(1) == last_router(bench).top_k).all()
    # Its own routing given back is its own answer.
    torch.testing.assert_close(run.likelihoods(run.routing().detach())[0], logp_G, atol=1e-4, rtol=1e-4)


def test_better_routes_are_better_and_over_other_experts(bench: Bench) -> None:
    run = AnswerPass(bench, bench.rows["train"])
    start_G, standard_GE = run.likelihoods()
    found = better_routes(run, 0.9, 8, torch.Generator().manual_seed(0))
    assert 0 < len(found.questions) <= found.fragile == int((start_G.exp() < 0.9).sum())
    at = [run.number(q, token) for q, token in zip(found.questions, found.tokens, strict=True)]
    # Each given to the last router with the token's own values of r beats the token's own route.
    own_GE = run.routing().detach()
    order_nE = found.routes_nE.argsort(dim=-1, descending=True)
    given_GE = own_GE.clone()
    given_GE[at] = torch.zeros_like(found.routes_nE).scatter(1, order_nE, own_GE[at].sort(-1, descending=True).values)
    logp_G, routes_GE = run.likelihoods(given_GE)
    torch.testing.assert_close(routes_GE[at], found.routes_nE, atol=1e-4, rtol=1e-4)
    assert ((routes_GE[at] > 0) != (standard_GE[at] > 0)).any(1).all()
    assert (logp_G[at] > start_G[at]).all()


def test_no_token_is_fragile_where_none_is_below_the_bound(letter: Bench) -> None:
    setup = letter.setup
    settings = setup.config.baselines.model_copy(
        update={"fragile": setup.config.baselines.fragile.model_copy(update={"confidence": 1e-12})}
    )
    config = setup.config.model_copy(update={"baselines": settings})
    sure = dataclasses.replace(letter, setup=dataclasses.replace(setup, config=config))
    with pytest.raises(UnmovedError, match="0 fragile answer tokens"):
        METHODS["fragile_tokens"].prepare(sure, 0)


def test_the_last_router_alone_moves_towards_the_better_routes(bench: Bench) -> None:
    method = METHODS["fragile_tokens"]
    prepared = method.prepare(bench, 0)
    fitted = method.fit(bench, prepared, 0.01, 0)
    router = last_router(bench)
    assert list(fitted.tensors) == [f"layers.{router.layer}.weight"]
    assert not torch.equal(fitted.tensors[f"layers.{router.layer}.weight"], router.gate.weight)
    # Its loss against a literal loop, before and after.
    values = []
    for state in (None, fitted.tensors):
        with bench.gates(state or {f"layers.{router.layer}.weight": router.gate.weight.detach()}, [router.layer]):
            total = 0.0
            for row in sorted(set(prepared["rows"].tolist())):
                routing_GE = AnswerPass(bench, [row]).routing().detach()
                mine = [n for n, other in enumerate(prepared["rows"].tolist()) if other == row]
                for n in mine:
                    r_E = routing_GE[int(prepared["tokens"][n])]
                    for e, weight in enumerate(prepared["routes"][n].tolist()):
                        if weight:
                            total -= weight * float(r_E[e].log()) / len(mine)
            values.append(total / len(set(prepared["rows"].tolist())))
    assert values[1] < values[0]
    one = method.fit(bench, prepared, 1e-12, 0)
    assert one.facts["losses"][0] == pytest.approx(values[0], rel=1e-3)
