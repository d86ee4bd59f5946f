"""Prefix tuning (Li and Liang 2021) and prompt tuning (Lester et al. 2021) through `peft`, every base weight frozen."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from roma_ray.baselines.bench import Bench
from roma_ray.baselines.budgeted_training import loop_settings, train
from roma_ray.baselines.contract import Fitted, Method
from roma_ray.baselines.head_passes import loss_kind, task_loss
from roma_ray.baselines.whole_model import padded_likelihoods, score_padded
from roma_ray.config.schema import Config
from roma_ray.engine.answers import Answers

# Random keys and values of size 1 would drown the real ones.
_PREFIX_DEVIATION = 0.02


class SoftPrompt(Method):
    """A method that trains positions before the prompt."""

    trains = True
    seeded = True
    runs_whole_model = True

    def configure(self, config: Config) -> dict[str, Any]:
        """The budget, the number of positions, and the loop's settings."""
        settings = {**loop_settings(config), "task_loss": loss_kind(config)}
        return {**super().configure(config), "finetune": settings, "virtual_tokens": config.baselines.virtual_tokens}

    def attached(self, bench: Bench, seed: int) -> Any:
        """The whole model with fresh trainable positions before it: a context manager of (model, parameters)."""
        return _attached(bench, self._peft_config(bench), lambda weight: self._start(bench, weight, seed))

    def before(self, bench: Bench) -> int:
        """How many positions the model itself adds to each sequence's hidden states."""
        return 0

    def fit(self, bench: Bench, prepared: dict[str, Tensor], learning_rate: float, seed: int) -> Fitted:
        """Train the positions by the task loss (eq. 8), as many steps over the same questions as the gates get."""
        over = loss_kind(bench.setup.config)
        with self.attached(bench, seed) as (model, weight):

            def loss(rows: Sequence[int]) -> Tensor:
                prompts = [bench.data.prompts[row] for row in rows]
                # Of a continuation only the right one is trained on; letters stand in one sequence anyway.
                gold_only = over == "continuation"
                found_QC = padded_likelihoods(model, prompts, before=self.before(bench), gold_only=gold_only)
                return task_loss(found_QC, [p.answer for p in prompts], prompts, over).sum()

            losses = train(bench, [weight], loss, bench.rows["train"], learning_rate, seed)
            return Fitted({"positions": weight.detach().cpu().clone()}, weight.numel(), {"task_losses": losses})

    def predict(self, bench: Bench, fitted: Fitted, rows: Sequence[int], seed: int) -> Answers:
        """The answers with the trained positions."""
        with self.attached(bench, seed) as (model, weight):
            with torch.no_grad():
                weight.copy_(fitted.tensors["positions"])
            prompts = [bench.data.prompts[row] for row in rows]
            return Answers(list(rows), score_padded(bench, model, prompts, before=self.before(bench)))

    @abstractmethod
    def _peft_config(self, bench: Bench) -> Any:
        """The kind of positions and their number."""

    @abstractmethod
    def _start(self, bench: Bench, weight: Tensor, seed: int) -> Tensor:
        """Their values before training."""


class PrefixTuning(SoftPrompt):
    """Trained keys and values before the prompt, in every layer."""

    name = "prefix_tuning"
    title = "trained keys and values before the prompt in every layer (peft)"

    def _peft_config(self, bench: Bench) -> Any:
        from peft import PrefixTuningConfig, TaskType

        return PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=bench.config.virtual_tokens)

    def _start(self, bench: Bench, weight: Tensor, seed: int) -> Tensor:
        """Small random numbers."""
        generator = torch.Generator().manual_seed(seed)
        return _PREFIX_DEVIATION * torch.randn(weight.shape, generator=generator)


class PromptTuning(SoftPrompt):
    """Trained input embeddings before the prompt."""

    name = "prompt_tuning"
    title = "trained input embeddings before the prompt (peft)"

    def before(self, bench: Bench) -> int:
        """They are positions of the sequence."""
        return bench.config.virtual_tokens

    def _peft_config(self, bench: Bench) -> Any:
        from peft import PromptTuningConfig, TaskType

        return PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=bench.config.virtual_tokens)

    def _start(self, bench: Bench, weight: Tensor, seed: int) -> Tensor:
        """The embeddings of random tokens of the vocabulary (Lester et al. 2021)."""
        table = bench.whole.model.get_input_embeddings().weight
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randint(len(table), (len(weight),), generator=generator)
        return table.detach()[chosen.to(table.device)].float().cpu()


@contextmanager
def _attached(bench: Bench, config: Any, start: Callable[[Tensor], Tensor]) -> Iterator[tuple[Any, nn.Parameter]]:
    """The whole model inside a `peft` wrapper; what peft makes at random is drawn aside and replaced at once."""
    from peft import get_peft_model

    with torch.random.fork_rng():
        wrapped: Any = get_peft_model(bench.whole.model, config)
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    assert len(trained) == 1, "peft trains one table of positions and nothing of the base"
    with torch.no_grad():
        trained[0].copy_(start(trained[0]))
    try:
        yield wrapped.eval(), trained[0]
    finally:
        # peft leaves its settings on the model that it wraps, and would warn at the next wrapping.
        if hasattr(bench.whole.model, "peft_config"):
            del bench.whole.model.peft_config
