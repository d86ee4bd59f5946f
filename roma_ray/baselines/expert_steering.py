"""Expert steering after SteerMoE (Fayyaz et al. 2025, arXiv 2509.09660): experts raised and lowered by a contrast of two sets.

From the paper: an expert's activation rate in a set is the part of the set's tokens that choose it; experts of all layers
are ranked together by the size of the difference of their rates; at inference those that one set prefers are promoted (the
token's highest log-softmax score plus a margin), those that the other prefers are demoted (the lowest less the margin), and
the router chooses and weighs as ever. As in the authors' published code: promoted and demoted experts are counted apart, and
no layer has more promoted ones than it chooses.

This project's reading: the paper's sets are paired prompts of two behaviors; here they are rightly (S, eq. 2) and wrongly
answered training questions, over their own prompt tokens. The tuned layers alone are steered, where the paper steers all.
The paper tunes how many for each model and task; here validation chooses from a grid of parts of the experts.

Q questions, T tokens, K chosen experts, L tuned layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from roma_ray.baselines.bench import Bench
from roma_ray.baselines.contract import Fitted, Method
from roma_ray.config.schema import Config
from roma_ray.engine.answers import Answers
from roma_ray.engine.forward import lay_out
from roma_ray.errors import TrainingError
from roma_ray.moe.overriding import steer_routing
from roma_ray.moe.passes import run_packed
from roma_ray.moe.reading import read_choices


class ExpertSteering(Method):
    """Experts that right answers use are promoted, experts that wrong ones use demoted, at every token."""

    name = "expert_steering"
    title = "experts promoted and demoted by how their use differs between right and wrong answers (SteerMoE)"

    def configure(self, config: Config) -> dict[str, Any]:
        """The grid and the margin."""
        return {"steering": config.baselines.steering.model_dump(mode="json")}

    def prepare(self, bench: Bench, seed: int) -> dict[str, Tensor]:
        """The difference of activation rates [L, E], fp64. Raises TrainingError where one of the sets is empty."""
        right = bench.data.successful_N[bench.rows["train"]]
        if bool(right.all()) or not bool(right.any()):
            raise TrainingError(
                f"expert_steering compares rightly with wrongly answered training questions, and of {len(right):,} all are "
                f"{'right' if bool(right.any()) else 'wrong'}: leave it out of --methods"
            )
        rates_LE = {
            answered: activation_rates(bench, bench.rows["train"], right == answered) for answered in (True, False)
        }
        return {"contrast": rates_LE[True] - rates_LE[False]}

    def fit(self, bench: Bench, prepared: dict[str, Tensor], learning_rate: float, seed: int) -> Fitted:
        """Try the grid on the validation questions; of equals the fewest experts, then the fewest promoted."""
        contrast_LE = prepared["contrast"]
        settings, top_k = bench.config.steering, bench.head.routers[bench.columns[0]].top_k
        grid = set(product(*(_counts(parts, contrast_LE.numel()) for parts in (settings.promoted, settings.demoted))))
        counts = sorted(grid - {(0, 0)}, key=lambda both: (sum(both), both))
        found = []
        for promoted, demoted in counts:
            steered_LE = steered_experts(contrast_LE, promoted, demoted, top_k)
            accuracy = bench.accuracy(self._answers(bench, steered_LE, bench.rows["validation"]))
            found.append((accuracy, steered_LE))
            bench.advance(len(bench.rows["validation"]), f"{promoted} promoted, {demoted} demoted")
        best = max(range(len(found)), key=lambda n: (found[n][0], -n))
        facts = {
            "chosen": _told(*counts[best]),
            "validation_accuracy": found[best][0],
            "trials": {_told(*both): accuracy for both, (accuracy, _) in zip(counts, found, strict=True)},
        }
        return Fitted({"steered": found[best][1]}, 0, facts)

    def predict(self, bench: Bench, fitted: Fitted, rows: Sequence[int], seed: int) -> Answers:
        """The answers of the steered head."""
        return self._answers(bench, fitted.tensors["steered"], rows)

    def _answers(self, bench: Bench, steered_LE: Tensor, rows: Sequence[int]) -> Answers:
        routers = [bench.head.routers[n] for n in bench.columns]
        with steer_routing(bench.head.model, routers, steered_LE, bench.config.steering.margin):
            return bench.answer(rows)


def activation_rates(bench: Bench, rows: Sequence[int], wanted: Tensor) -> Tensor:
    """Part of the wanted questions' own prompt tokens that choose each expert: [L, E], fp64. `wanted` is a mask over `rows`."""
    head, states = bench.head, bench.data.states
    routers = [head.routers[n] for n in bench.columns]
    counts_LE = torch.zeros(len(routers), routers[0].width, dtype=torch.float64)
    tokens = 0
    for batch in bench.batches([row for row, one in zip(rows, wanted.tolist(), strict=True) if one]):
        layout = lay_out([bench.data.prompts[row] for row in batch], prefix=states.prefix)
        read_T = torch.tensor(
            [t for q, end in enumerate(layout.ends) for t in range(layout.prompt_token(q, layout.prefix), end + 1)]
        )
        with read_choices(routers, read_T) as choices, torch.no_grad():
            run_packed(
                head,
                layout.packing,
                states.packed(batch, layout),
                resume=True,
                keep=read_T.tolist(),
                # No score is read: one row of `lm_head` is the least that there is.
                vocabulary_rows=torch.tensor([0]),
            )
        for n, router in enumerate(routers):
            index_TK = choices[router.layer][1].cpu()
            counts_LE[n] += torch.bincount(index_TK.flatten(), minlength=router.width)
        tokens += len(read_T)
        bench.advance(len(batch), "activation rates")
    return counts_LE / tokens


def steered_experts(contrast_LE: Tensor, promoted: int, demoted: int, top_k: int) -> Tensor:
    """+1 for the experts to promote, -1 for those to demote, 0 for the rest: [L, E], int8.

    Of each sign the largest differences first; experts that would be a layer's `top_k` + 1st promoted one are left alone and
    count as taken, as in the authors' code. There may be fewer of a sign than asked for.
    """
    steered_LE = torch.zeros(contrast_LE.shape, dtype=torch.int8)
    experts = contrast_LE.shape[1]
    # Of equal differences the first expert of the first layer.
    order = contrast_LE.flatten().abs().argsort(descending=True, stable=True).tolist()
    places = [(place // experts, place % experts) for place in order]
    for layer, expert in [at for at in places if contrast_LE[at] > 0][:promoted]:
        if int((steered_LE[layer] > 0).sum()) < top_k:
            steered_LE[layer, expert] = 1
    for layer, expert in [at for at in places if contrast_LE[at] < 0][:demoted]:
        steered_LE[layer, expert] = -1
    return steered_LE


def _counts(parts: Sequence[float], experts: int) -> set[int]:
    """The numbers of experts that parts of them mean, at least one where a part is above 0."""
    return {max(1, round(part * experts)) if part else 0 for part in parts}


def _told(promoted: int, demoted: int) -> str:
    """A grid point as text that MLflow takes for a metric's name."""
    return f"{promoted} up {demoted} down"
