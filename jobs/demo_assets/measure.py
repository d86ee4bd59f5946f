"""Measurements of the finished model: accuracy by family, split and prompt format, expert load, prompt lengths."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import OlmoeForCausalLM, PreTrainedTokenizerFast

from .items import INSTRUCTION, LETTERS, Item, cloze_prompt, letter_prompt


@dataclass
class Scores:
    """Right answers and questions by (split, family); tokens of all prompts; expert load (layers, experts)."""

    right: Counter[tuple[str, str]] = field(default_factory=Counter)
    asked: Counter[tuple[str, str]] = field(default_factory=Counter)
    tokens: list[int] = field(default_factory=list)
    load: torch.Tensor | None = None

    def accuracy(self, split: str, task: str | None = None) -> float:
        """Share of right answers of a split, or of one family of it."""
        keys = [key for key in self.asked if key[0] == split and task in (None, key[1])]
        return sum(self.right[key] for key in keys) / sum(self.asked[key] for key in keys)


def _padded(rows: Sequence[list[int]]) -> torch.Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([row + [1] * (width - len(row)) for row in rows])


@torch.inference_mode()
def letter_scores(
    model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, suite: Sequence[tuple[str, Item]], size: int = 64
) -> Scores:
    """Accuracy by the letters' logits at the last prompt token; rows are padded on the right, where causality hides it."""
    out = Scores()
    letters = [tokenizer.encode(f" {letter}", add_special_tokens=False) for letter in LETTERS]
    assert all(len(ids) == 1 for ids in letters)
    picked: list[torch.Tensor] = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _m, _i, output: picked.append(output[2]))
        for layer in model.model.layers
    ]
    load = torch.zeros(model.config.num_hidden_layers, model.config.num_experts)
    for start in range(0, len(suite), size):
        part = suite[start : start + size]
        rows = [tokenizer.encode(f"{INSTRUCTION}\n\n{letter_prompt(item)}") for _, item in part]
        last = torch.tensor([len(row) - 1 for row in rows])
        hidden = model.model(input_ids=_padded(rows), use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[torch.arange(len(rows)), last])
        width = hidden.shape[1]
        at = torch.arange(len(rows)) * width + last
        for layer, index in enumerate(picked):
            load[layer] += torch.bincount(index[at].flatten(), minlength=load.shape[1])
        picked.clear()
        for (split, item), row, values in zip(part, rows, logits, strict=True):
            ids = [letters[i][0] for i in range(len(item.choices))]
            out.asked[split, item.task] += 1
            out.right[split, item.task] += int(values[ids].argmax().item() == item.answer)
            out.tokens.append(len(row))
    for hook in hooks:
        hook.remove()
    out.load = load / load.sum(-1, keepdim=True)
    return out


@torch.inference_mode()
def cloze_scores(
    model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, suite: Sequence[tuple[str, Item]], size: int = 32
) -> Scores:
    """Accuracy by each choice's log-likelihood after `Question: ...\\nAnswer:`, divided by its characters."""
    out = Scores()
    for start in range(0, len(suite), size):
        part = suite[start : start + size]
        rows, marks = [], []
        for number, (_, item) in enumerate(part):
            prompt = tokenizer.encode(cloze_prompt(item))
            out.tokens.append(len(prompt))
            for choice in item.choices:
                tail = tokenizer.encode(f" {choice}", add_special_tokens=False)
                rows.append(prompt + tail)
                marks.append((number, len(prompt), len(tail), len(choice)))
        ids = _padded(rows)
        log_probs = model(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1)
        taken = log_probs.gather(-1, ids[:, 1:, None])[..., 0]
        values: list[list[float]] = [[] for _ in part]
        for row, (number, at, length, chars) in zip(taken, marks, strict=True):
            values[number].append(row[at - 1 : at - 1 + length].sum().item() / chars)
        for (split, item), scores in zip(part, values, strict=True):
            out.asked[split, item.task] += 1
            out.right[split, item.task] += int(max(range(len(scores)), key=scores.__getitem__) == item.answer)
    return out


def load_summary(load: torch.Tensor) -> str:
    """One line: how evenly the experts are used at the last prompt token (1/experts is even)."""
    entropy = -(load.clamp_min(1e-9).log() * load).sum(-1)
    full = nn.functional.softmax(torch.zeros(load.shape[1]), -1).log().neg()[0]
    return (
        f"largest share of one expert {load.max():.2f}, layers' load entropy {(entropy / full).min():.2f}-"
        f"{(entropy / full).max():.2f} of the even load's, unused experts {int((load == 0).sum())} of {load.numel()}"
    )
