"""The manifold term beside somebody else's loss: in any training loop over a stock model, and in Hugging Face's Trainer.

B questions of a batch, S tokens of a padded row, P read positions of a question, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from roma_ray.errors import ConfigError, ModelError
from roma_ray.manifold.losses import DISTANCES, DistanceName, NeighborTargets
from roma_ray.moe.reading import RoutingTape, read_routing
from roma_ray.moe.routers import router_parameters
from roma_ray.moe.text_routing import chosen_routers, mean_rows, prompt_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer

IGNORED = -100
"""The label of tokens that carry no loss, as in transformers: of a prompt."""


def train_only_routers(model: PreTrainedModel, layers: Sequence[int] | None = None) -> list[nn.Parameter]:
    """Freeze a model but for the gates of `layers` (all MoE layers unless given); returns the gates' parameters.

    Raises ModelError for gates that are not fp32, which lose updates smaller than their last bit.
    """
    model.requires_grad_(False)
    gates = [p for router in chosen_routers(model, layers) for p in router_parameters(router).values()]
    if any(gate.dtype != torch.float32 for gate in gates):
        raise ModelError(
            f"these gates are {gates[0].dtype}, which loses small updates: load the model with dtype=torch.float32, or let "
            "roma_ray.run train them as fp32 masters"
        )
    for gate in gates:
        gate.requires_grad_(True)
    return gates


class ManifoldTerm:
    """Eq. 7, weighed, for batches of a model's own forward pass: `with term.reading(positions): model(...)`, then `loss`."""

    def __init__(
        self,
        model: PreTrainedModel,
        targets: NeighborTargets,
        *,
        weight: float,
        layers: Sequence[int] | None = None,
        tokens: str = "Last1",
        distance: DistanceName = "squared",
    ) -> None:
        """`targets` are those of all questions, of `neighbor_targets`; their layers are `layers` of the model."""
        self.model, self.targets, self.weight, self.tokens = model, targets, weight, tokens
        self.distance = DISTANCES[distance]
        self.routers = chosen_routers(model, layers)
        if targets.mean.shape[1] != len(self.routers):
            raise ConfigError(f"the targets are of {targets.mean.shape[1]} layers, the term of {len(self.routers)}")
        self._tape: RoutingTape | None = None
        self._positions = torch.empty(0)

    @contextmanager
    def reading(self, mask_BS: Tensor) -> Iterator[None]:
        """Inside the block, the model's next forward pass leaves its live routing here; `mask_BS` is 1 at prompt tokens."""
        self._positions = prompt_positions(mask_BS, self.tokens)
        with read_routing(self.model, self.routers, self._positions) as self._tape:
            yield

    def loss(self, rows: Tensor) -> Tensor:
        """weight x the mean over the batch of the chosen distance, with graph; `rows` are the questions' numbers in the targets."""
        assert self._tape is not None, "run the model inside `with term.reading(...)` first"
        routing_BLE = mean_rows(self._tape.routing_BPLE, self._positions)
        targets = self.targets.take(rows, routing_BLE.device)
        return self.weight * self.distance(routing_BLE, targets) / len(rows)


def manifold_trainer(term: ManifoldTerm) -> type[Trainer]:
    """Hugging Face's Trainer with the term added to its loss: a class, used as Trainer is.

    Each example needs `row`, its question's number in the targets, and labels that are -100 at the prompt's tokens and
    nowhere else but padding. Set `remove_unused_columns=False`, or the Trainer drops `row`.
    """
    from transformers import Trainer

    class ManifoldTrainer(Trainer):
        def compute_loss(
            self,
            model: nn.Module,
            inputs: dict[str, Any],
            return_outputs: bool = False,
            num_items_in_batch: Tensor | int | None = None,
        ) -> Any:
            if "row" not in inputs or "labels" not in inputs:
                raise ConfigError(
                    "each example needs `row` and `labels`; with TrainingArguments(remove_unused_columns=False) the Trainer "
                    "keeps `row`"
                )
            rows = inputs["row"].reshape(-1)
            others = {name: value for name, value in inputs.items() if name != "row"}
            prompt_BS = (inputs["labels"] == IGNORED) & inputs["attention_mask"].bool()
            with term.reading(prompt_BS):
                loss, outputs = super().compute_loss(model, others, True, num_items_in_batch)
            added = term.loss(rows)
            if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
                # The Trainer's own loss is then scaled for gradient accumulation already.
                added = added / self.current_gradient_accumulation_steps
            return (loss + added, outputs) if return_outputs else loss + added

    return ManifoldTrainer
