"""One question as generated, its place (pretraining, train or test) by a hash of its content, and its renderings."""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

INSTRUCTION = "Answer with the letter of the right choice."
LETTERS = "ABCDEFGH"


@dataclass(frozen=True)
class Item:
    """One generated question.

    `key` names the content (its entities, in no particular order): the place is a function of task and key alone, so
    that no rewording or reordering of a suite question can be in the pretraining text. `sentence` says the same as a
    plain sentence.
    """

    task: str
    key: tuple[str, ...]
    question: str
    choices: tuple[str, ...]
    answer: int
    sentence: str
    context: str | None = None


Maker = Callable[[random.Random, bool], Item]


def digest(*parts: str) -> int:
    """A stable 64-bit number of some texts (Python's own hash differs from run to run)."""
    return int.from_bytes(hashlib.sha256("\x1f".join(parts).encode()).digest()[:8], "big")


def place(item: Item, shares: tuple[int, int]) -> str:
    """`pretrain`, `train` or `test`; shares are the first two places' percentages."""
    bucket = digest(item.task, *item.key) % 100
    if bucket < shares[0]:
        return "pretrain"
    return "train" if bucket < shares[0] + shares[1] else "test"


def wording(rng: random.Random, suite: bool, template: str, *slots: Sequence[str]) -> str:
    """Fill the template's slots with synonyms. One third of the combinations are kept for the suite alone.

    A combination belongs to the suite when its indices sum to 2 modulo 3; with at least three synonyms in a slot
    each synonym of the others still occurs in the pretraining text, only not in this combination.
    """
    assert any(len(slot) >= 3 for slot in slots)
    while True:
        picks = [rng.randrange(len(slot)) for slot in slots]
        if (sum(picks) % 3 == 2) == suite:
            return template.format(*(slot[pick] for slot, pick in zip(slots, picks, strict=True)))


def shuffled(rng: random.Random, right: str, wrong: Sequence[str]) -> tuple[tuple[str, ...], int]:
    """Choices in random order, and the index of the right one."""
    choices = [right, *wrong]
    assert len(set(choices)) == len(choices)
    rng.shuffle(choices)
    return tuple(choices), choices.index(right)


def letter_prompt(item: Item) -> str:
    """The question with its lettered choices, up to and with `Answer:`; the instruction is not part of it."""
    lines = [item.context] if item.context else []
    lines.append(item.question)
    lines += [f"{LETTERS[i]}. {choice}" for i, choice in enumerate(item.choices)]
    return "\n".join([*lines, "Answer:"])


def cloze_prompt(item: Item) -> str:
    """The question without its choices, up to and with `Answer:`."""
    head = f"{item.context}\n" if item.context else ""
    return f"{head}Question: {item.question}\nAnswer:"
