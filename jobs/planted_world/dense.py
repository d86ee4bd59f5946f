"""The public model: a small dense language model (Qwen3) trained on the public text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from .corpus import Document
from .recipe import Recipe

LEAD = 0.1
"""Weight in the loss of a token that is no value."""


def dense_config(recipe: Recipe, layers: int) -> Qwen3Config:
    """A stock Qwen3 of some layers."""
    return Qwen3Config(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.width,
        intermediate_size=recipe.ffn,
        num_hidden_layers=layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        head_dim=recipe.width // recipe.heads,
        max_position_embeddings=512,
        initializer_range=0.04,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )


def new_model(config: Qwen3Config, seed: int) -> Qwen3ForCausalLM:
    """A freshly initialised model; the global generator is seeded because the model's own initialisation reads it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


def token_rows(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]) -> tuple[Tensor, Tensor]:
    """Each document's tokens, padded on the left, [N, S], and which are real; the value is the last token."""
    rows = tokenizer([d.lead for d in documents])["input_ids"]
    values = tokenizer([d.value for d in documents])["input_ids"]
    assert all(len(value) == 1 for value in values)
    width = 1 + max(map(len, rows))
    ids_NS = torch.full((len(rows), width), 1)
    for n, (row, value) in enumerate(zip(rows, values, strict=True)):
        ids_NS[n, width - 1 - len(row) :] = torch.tensor(row + value)
    return ids_NS, ids_NS != 1


def positions(real_NS: Tensor) -> Tensor:
    """Each token's position in its row, counted from the first real token."""
    return (real_NS.cumsum(1) - 1).clamp_min(0)


def batches(count: int, size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of each step's batch: one shuffled pass after another."""
    waiting = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(waiting) < size:
            waiting = torch.cat([waiting, torch.randperm(count, generator=generator)])
        yield waiting[:size]
        waiting = waiting[size:]


def optimizer_of(model: nn.Module, decay: float) -> torch.optim.AdamW:
    """AdamW over what trains; only matrices decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=(0.9, 0.98), fused=True)


def step_rate(peak: float, step: int, steps: int) -> float:
    """Learning rate: a linear warm-up over a tenth of the steps, then a linear fall to zero."""
    return peak * min(1.0, (step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))


def take_step(optimizer: torch.optim.AdamW, loss: Tensor, rate: float) -> None:
    """One step of a loss, its gradient clipped at norm 1."""
    loss.backward()
    for group in optimizer.param_groups:
        group["lr"] = rate
        nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def train_dense(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]) -> Qwen3ForCausalLM:
    """Train the public model on the public text; the value counts most in the loss."""
    model = new_model(dense_config(recipe, recipe.dense + recipe.sparse), recipe.seed)
    ids_NS, real_NS = token_rows(tokenizer, documents)
    weights_NS = real_NS * LEAD
    weights_NS[:, -1] = 1.0
    optimizer = optimizer_of(model, 0.1)
    generator = torch.Generator().manual_seed(recipe.seed)
    for step, index in enumerate(batches(len(ids_NS), recipe.seed_batch, recipe.seed_steps, generator)):
        first = int(real_NS[index].any(0).int().argmax())
        ids, real, weights = ids_NS[index, first:], real_NS[index, first:], weights_NS[index, first:]
        inputs = {
            "input_ids": ids[:, :-1],
            "attention_mask": real[:, :-1].long(),
            "position_ids": positions(real)[:, :-1],
        }
        wanted = (weights[:, 1:] > 0) & real[:, :-1]
        states = model.model(**inputs, use_cache=False).last_hidden_state[wanted]
        losses = nn.functional.cross_entropy(model.lm_head(states), ids[:, 1:][wanted], reduction="none")
        weight = weights[:, 1:][wanted]
        take_step(
            optimizer, (losses * weight).sum() / weight.sum(), step_rate(recipe.seed_rate, step, recipe.seed_steps)
        )
        if step % 100 == 99:
            value = losses[weight == 1.0].mean().item()
            print(f"public model: step {step + 1} of {recipe.seed_steps}, loss of the values {value:.3f}")
    return model.eval()
