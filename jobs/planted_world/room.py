"""Room: what the suite's accuracy would be under better routing, measured by forcing it, without any method.

A question is answered by the likelihood of its choices, each of which is one token. Forced routing replaces the rows of the
routers in `roma_ray.moe.overriding`, so that the model's own choice of experts does the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3MoeForCausalLM

from roma_ray.moe.overriding import override_routing
from roma_ray.moe.routers import find_routers

from .corpus import Item, prompt
from .facts import ATTRIBUTES, PHRASINGS, TASKS

PUBLIC = 0
"""The public expert's number; the domains' follow in the order of TASKS."""


@dataclass(frozen=True)
class Asked:
    """The suite as right-padded token rows [N, S] with what is known about each question."""

    ids_NS: Tensor
    last_N: Tensor
    read_N: Tensor
    """The first position at which no phrasing of another attribute could stand."""
    choices_NC: Tensor
    answer_N: Tensor
    expert_N: Tensor


def asked(tokenizer: PreTrainedTokenizerFast, items: Sequence[Item]) -> Asked:
    """Tokenise the suite."""
    rows = tokenizer([prompt(item.question) for item in items])["input_ids"]
    ids_NS = torch.full((len(rows), max(map(len, rows))), 1)
    for n, row in enumerate(rows):
        ids_NS[n, : len(row)] = torch.tensor(row)
    choices = [[tokenizer.encode(f" {choice}") for choice in item.choices] for item in items]
    assert all(len(ids) == 1 for row in choices for ids in row)
    reading = {(task, p): read_at(tokenizer, task, p) for task in TASKS for p in range(PHRASINGS)}
    return Asked(
        ids_NS,
        torch.tensor([len(row) - 1 for row in rows]),
        torch.tensor([reading[item.task, item.phrasing] for item in items]),
        torch.tensor([[ids[0] for ids in row] for row in choices]),
        torch.tensor([item.answer for item in items]),
        torch.tensor([1 + TASKS.index(item.task) for item in items]),
    )


def read_at(tokenizer: PreTrainedTokenizerFast, task: str, phrasing: int) -> int:
    """The first token of a phrasing after which only this attribute's phrasings are possible."""

    def ids(name: str, number: int) -> list[int]:
        # Any one name, which is one token.
        return tokenizer.encode(prompt(ATTRIBUTES[name].questions[number].replace("{}", "X")))

    own = ids(task, phrasing)
    others = [ids(name, number) for name in TASKS if name != task for number in range(PHRASINGS)]
    return next(n for n in range(len(own)) if all(other[: n + 1] != own[: n + 1] for other in others))


@torch.inference_mode()
def right_answers(
    model: Qwen3MoeForCausalLM, questions: Asked, forced_NS: Tensor | None = None, size: int = 256
) -> Tensor:
    """Which questions are answered rightly [N], with the expert `forced_NS` at each token (-1: the router's own choice)."""
    routers = find_routers(model)
    right = []
    for start in range(0, len(questions.ids_NS), size):
        part = slice(start, start + size)
        ids_BS, last_B = questions.ids_NS[part], questions.last_N[part]
        inputs = {"input_ids": ids_BS, "attention_mask": (ids_BS != 1).long(), "use_cache": False}
        if forced_NS is None:
            states_BSH = model.model(**inputs).last_hidden_state
        else:
            forced_BS = forced_NS[part]
            rows_BSE = torch.nn.functional.one_hot(forced_BS.clamp_min(0), model.config.num_experts).float()
            rows_BSLE = rows_BSE[:, :, None].expand(-1, -1, len(routers), -1)
            places_BS = torch.arange(ids_BS.shape[1]).expand_as(ids_BS).masked_fill(forced_BS < 0, -1)
            with override_routing(model, routers, rows_BSLE, places_BS):
                states_BSH = model.model(**inputs).last_hidden_state
        logits_BV = model.lm_head(states_BSH[torch.arange(len(last_B)), last_B])
        picked_B = logits_BV.gather(1, questions.choices_NC[part]).argmax(1)
        right.append(picked_B == questions.answer_N[part])
    return torch.cat(right)


def forcings(questions: Asked) -> dict[str, Tensor]:
    """The forced experts [N, S] of each measurement."""
    place_1S = torch.arange(questions.ids_NS.shape[1])[None]
    last_NS, expert_NS = place_1S == questions.last_N[:, None], questions.expert_N[:, None].expand_as(questions.ids_NS)
    own, before_NS = torch.full_like(questions.ids_NS, -1), place_1S < questions.last_N[:, None]
    after_NS = (place_1S >= questions.read_N[:, None]) & (before_NS | last_NS)
    public_NS = own.masked_fill(before_NS, PUBLIC)
    return {
        "domain expert at the last token": torch.where(last_NS, expert_NS, own),
        "domain expert at all tokens from where the attribute was read": torch.where(after_NS, expert_NS, own),
        "public expert at the tokens before the last": public_NS,
        "public expert before the last token, domain expert at it": torch.where(last_NS, expert_NS, public_NS),
    }


def measure(model: Qwen3MoeForCausalLM, questions: Asked) -> dict[str, dict[str, float]]:
    """Accuracy (percent) of the model's own routing and of each forced one, with paired differences and standard errors."""
    base_N = right_answers(model, questions).double()
    out = {"own routing": {"accuracy": _percent(base_N.mean()), "standard_error": _percent(_error(base_N))}}
    for name, forced_NS in forcings(questions).items():
        right_N = right_answers(model, questions, forced_NS).double()
        gain_N = right_N - base_N
        out[name] = {
            "accuracy": _percent(right_N.mean()),
            "room": _percent(gain_N.mean()),
            "standard_error": _percent(_error(gain_N)),
        }
    return out


def _error(values_N: Tensor) -> Tensor:
    return values_N.std() / len(values_N) ** 0.5


def _percent(value: Tensor) -> float:
    return round(100 * value.item(), 2)
