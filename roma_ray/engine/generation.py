"""Greedy decoding by the slices of a model, with key-value caches: what stock `generate` writes, token for token.

Prompts of a batch are padded on the left. The slices below the last run the prompts once for all who go on from there: base
and tuned routers of the head share them.

B prompts of a batch, S padded tokens, D width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from roma_ray.config.free_form import SuccessConfig
from roma_ray.engine.batches import chunks
from roma_ray.engine.model_spec import ModelSpec
from roma_ray.errors import GuardError, ModelError
from roma_ray.moe.slices import Slice, position_ids
from roma_ray.moe.snapshot import open_snapshot
from roma_ray.questions.free_prompts import special_ids
from roma_ray.questions.prompts import Prompt

ENDINGS = ("end", "stop", "length")
"""By what an answer ends: one of the model's ends, a stop text, or the limit of its length."""
_TAIL = 4
"""Tokens that are decoded to look for a stop string beyond as many as it has bytes: the first of a text may lose its blank."""


@dataclass(frozen=True)
class Rules:
    """When an answer ends."""

    ends: frozenset[int]
    """Tokens that end it."""
    stops: tuple[str, ...]
    """Texts that end it, themselves cut off."""
    max_new_tokens: int


@dataclass(frozen=True)
class Written:
    """An answer: its text, its tokens with the one that ends it, and why it ends."""

    text: str
    ids: tuple[int, ...]
    ended: str
    """One of `ENDINGS`."""


@dataclass(frozen=True)
class Begun:
    """Prompts after all slices but the last."""

    prompts: tuple[tuple[int, ...], ...]
    mask_BS: Tensor
    entering: Tensor
    """What the last slice takes: ids [B, S], or states [B, S, D]."""
    caches: tuple[DynamicCache, ...]


def rules_for(model: ModelSpec, tokenizer: Any, prompts: Sequence[Prompt], success: SuccessConfig) -> Rules:
    """The configured rules with this model's ends: its generation settings', its tokenizer's, and what ends the answers of
    `prompts` (an end of turn, say).
    """
    told = generation_config(model).eos_token_id
    ends = {*([told] if isinstance(told, int) else told or []), tokenizer.eos_token_id} - {None}
    last = {prompt.choice_ids[prompt.answer][-1] for prompt in prompts}
    return Rules(frozenset(ends | (last & special_ids(tokenizer))), success.stop, success.max_new_tokens)


def generation_config(model: ModelSpec) -> GenerationConfig:
    """How a model's authors have it generate."""
    try:
        return GenerationConfig.from_pretrained(model.path, revision=model.revision)
    except OSError:
        # A model without the file generates by what its configuration says, as stock does.
        return GenerationConfig.from_model_config(open_snapshot(model.path, model.revision).backbone())


def begun_batches(decoder: Decoder, prompts: Sequence[Prompt], batch: int) -> Iterator[tuple[list[int], Begun]]:
    """The prompts in batches of like length, the longest first: their numbers, and where all who continue them begin."""
    order = sorted(range(len(prompts)), key=lambda n: (-len(prompts[n].prompt_ids), n))
    for numbers in chunks(order, batch):
        yield numbers, decoder.begin([prompts[n].prompt_ids for n in numbers])


class Decoder:
    """A chain of slices, from the first layer to the last, that continues prompts."""

    def __init__(self, parts: Sequence[Slice], tokenizer: Any, rules: Rules) -> None:
        assert parts[0].start == 0
        assert parts[-1].has_lm_head
        self.parts, self.tokenizer, self.rules = tuple(parts), tokenizer, rules
        config = parts[-1].model.config.get_text_config()
        self.positions: int | None = getattr(config, "max_position_embeddings", None)
        self.device = parts[-1].device

    @torch.inference_mode()
    def begin(self, prompts: Sequence[Sequence[int]]) -> Begun:
        """Run some prompts through all slices but the last."""
        width = max(map(len, prompts))
        ids_BS = torch.zeros(len(prompts), width, dtype=torch.long)
        mask_BS = torch.zeros_like(ids_BS)
        for row, ids in enumerate(prompts):
            ids_BS[row, width - len(ids) :] = torch.tensor(ids)
            mask_BS[row, width - len(ids) :] = 1
        mask_BS = mask_BS.to(self.device)
        caches = tuple(map(_cache, self.parts[:-1]))
        entering = self._through(ids_BS.to(self.device), mask_BS, position_ids(mask_BS), caches)
        return Begun(tuple(map(tuple, prompts)), mask_BS, entering, caches)

    @torch.inference_mode()
    def write(self, begun: Begun) -> list[Written]:
        """Continue the prompts. Raises GuardError where a next token's logits are not finite."""
        caches = copy.deepcopy(begun.caches)
        last = _cache(self.parts[-1])
        answers = [_Answer(self._limit(prompt)) for prompt in begun.prompts]
        mask_BS, entering, places = begun.mask_BS, begun.entering, position_ids(begun.mask_BS)
        while True:
            logits_BV = self._run(self.parts[-1], entering, mask_BS, places, last)
            open_ = torch.tensor([not answer.ended for answer in answers], device=self.device)
            if not bool(torch.isfinite(logits_BV[open_]).all()):
                raise GuardError("the logits of an answer's next token are not finite, so nothing can be written")
            # As stock does: the first of equals, in fp32.
            chosen = logits_BV.float().argmax(-1)
            for answer, token in zip(answers, chosen.tolist(), strict=True):
                self._take(answer, token)
            if all(answer.ended for answer in answers):
                return [self._told(answer) for answer in answers]
            mask_BS = torch.cat([mask_BS, torch.ones_like(mask_BS[:, :1])], dim=1)
            places = mask_BS.sum(1, keepdim=True) - 1
            entering = self._through(chosen[:, None], mask_BS, places, caches)

    def _limit(self, prompt: Sequence[int]) -> int:
        """How many tokens may follow a prompt: the model has no further positions."""
        room = self.rules.max_new_tokens if self.positions is None else self.positions - len(prompt)
        return min(self.rules.max_new_tokens, room)

    def _take(self, answer: _Answer, token: int) -> None:
        """Add a token to an answer that has not ended."""
        if answer.ended:
            return
        if len(answer.ids) >= answer.limit:
            answer.ended = "length"
            return
        answer.ids.append(token)
        if token in self.rules.ends:
            answer.ended = "end"
        elif self._stopped(answer.ids):
            answer.ended = "stop"
        elif len(answer.ids) == answer.limit:
            answer.ended = "length"

    def _stopped(self, ids: Sequence[int]) -> bool:
        if not self.rules.stops:
            return False
        longest = max(len(stop.encode()) for stop in self.rules.stops)
        tail = self._text(ids[-(longest + _TAIL) :])
        return any(stop in tail for stop in self.rules.stops)

    def _told(self, answer: _Answer) -> Written:
        text = self._text(answer.ids[:-1] if answer.ended == "end" else answer.ids)
        for stop in self.rules.stops:
            text = text.partition(stop)[0]
        return Written(text, tuple(answer.ids), answer.ended)

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _through(self, entering: Tensor, mask_BS: Tensor, places: Tensor, caches: Sequence[DynamicCache]) -> Tensor:
        """What leaves the slices below the last: the ids themselves where there are none."""
        for part, cache in zip(self.parts[:-1], caches, strict=True):
            entering = self._run(part, entering, mask_BS, places, cache)
        return entering

    def _run(self, part: Slice, entering: Tensor, mask_BS: Tensor, places: Tensor, cache: DynamicCache) -> Tensor:
        """Hidden states [B, S, D] that leave a slice, or the last position's logits [B, V]."""
        inputs: dict[str, Any] = {"input_ids": entering} if entering.dim() == 2 else {"inputs_embeds": entering}
        if part.has_lm_head and part.model._supports_logits_to_keep():
            inputs["logits_to_keep"] = 1
        output = part.model(
            **inputs, attention_mask=mask_BS, position_ids=places, past_key_values=cache, use_cache=True
        )
        if part.has_lm_head:
            logits_BV: Tensor = output.logits[:, -1]
            return logits_BV
        states: Tensor = output.last_hidden_state
        return states


def _cache(part: Slice) -> DynamicCache:
    """An empty cache of a slice. Raises ModelError where transformers has none for it."""
    cache = DynamicCache(config=part.model.config.get_text_config())
    try:
        cache.get_seq_length()
    except ValueError:
        raise ModelError(
            f"layers {part.start} to {part.stop - 1} of this {part.model_type} model have no attention, and transformers cannot cache "
            "them alone: choose other routing.layers, or an extraction.success.metric that writes nothing (likelihood, verdict)"
        ) from None
    return cache


@dataclass
class _Answer:
    limit: int
    ids: list[int] = field(default_factory=list)
    ended: str = ""
