"""One question as generated, its place (pretraining, train or test) by a hash of its content, and its renderings."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

INSTRUCTION = "Answer with the letter of the right choice."
LETTERS = "ABCDEFGH"
# Percent of all facts whose question is in the pretraining text, and in the training file; the rest are test questions.
SHARES = (44, 40)


@dataclass(frozen=True)
class Item:
    """One generated question. `key` names its content: the place is a function of family and key alone."""

    task: str
    key: tuple[str, ...]
    question: str
    choices: tuple[str, ...]
    answer: int


def digest(*parts: str) -> int:
    """A stable 64-bit number of some texts (Python's own hash differs from run to run)."""
    return int.from_bytes(hashlib.sha256("\x1f".join(parts).encode()).digest()[:8], "big")


def place(task: str, *key: str) -> str:
    """`pretrain`, `train` or `test`."""
    bucket = digest("place", task, *key) % 100
    if bucket < SHARES[0]:
        return "pretrain"
    return "train" if bucket < sum(SHARES) else "test"


def shuffled(rng: random.Random, right: str, wrong: Sequence[str]) -> tuple[tuple[str, ...], int]:
    """Choices in random order, and the index of the right one."""
    choices = [right, *wrong]
    assert len(set(choices)) == len(choices)
    rng.shuffle(choices)
    return tuple(choices), choices.index(right)


def letter_prompt(item: Item) -> str:
    """The question with its lettered choices, up to and with `Answer:`; the instruction is not part of it."""
    lines = [item.question, *(f"{LETTERS[i]}. {choice}" for i, choice in enumerate(item.choices))]
    return "\n".join([*lines, "Answer:"])


def cloze_prompt(item: Item) -> str:
    """The question without its choices, up to and with `Answer:`."""
    return f"Question: {item.question}\nAnswer:"
