"""The pretraining stream and the suite: two sides of one split of all possible questions by their content's hash.

The stream is a function of (seed, step, worker) alone, so that any part of it can be made again, which is how the
tests show that no question of the suite is in it.
"""

import random
from collections.abc import Iterable, Iterator

from .facts import NAMES, TASKS, WEIGHTS, item, sentence
from .items import Item, cloze_prompt, letter_prompt, place

# A text and its weight in the loss: a fact's value counts most, the words that lead to it least.
Piece = tuple[str, float]
LEAD, ANSWER = 0.05, 1.0
# Of all texts: questions with their answers; the others tell facts.
ASKED = 0.4
FACTS = 6


def document(rng: random.Random) -> tuple[list[Item], list[Piece]]:
    """One pretraining text of a few facts, asked or told: its questions, and its pieces."""
    pieces: list[Piece] = []
    items: list[Item] = []
    asked = rng.random() < ASKED
    number = rng.choice((1, 1, 2, 3, 4)) if asked else FACTS
    while number > 0:
        task, name = rng.choices(TASKS, WEIGHTS)[0], rng.choice(NAMES)
        gap = "\n\n" if asked else " "
        if not asked:
            before, value, after = sentence(rng, task, name)
            pieces += [((gap if pieces else "") + before, LEAD), (value, ANSWER), (after, LEAD)]
        elif place(task, name) == "pretrain":
            items.append(item(rng, task, name))
            made = items[-1]
            pieces += [((gap if pieces else "") + cloze_prompt(made), LEAD), (f" {made.choices[made.answer]}", ANSWER)]
        else:
            continue
        number -= 1
    return items, pieces


def stream(seed: int, step: int, worker: int, size: int) -> Iterator[tuple[list[Item], list[Piece]]]:
    """The `size` documents that a worker trains on in a step."""
    rng = random.Random(f"pretraining/{seed}/{step}/{worker}")
    for _ in range(size):
        yield document(rng)


def suite(seed: int, counts: dict[str, int]) -> list[tuple[str, Item]]:
    """The suite as (split, question): for each split at most `counts[split]` different questions of every family."""
    out: list[tuple[str, Item]] = []
    for split, wanted in counts.items():
        for task in TASKS:
            rng = random.Random(f"suite/{seed}/{split}/{task}")
            names = [name for name in NAMES if place(task, name) == split][:wanted]
            out += [(split, item(rng, task, name)) for name in names]
    return out


def overlap(seed: int, steps: Iterable[int], workers: int, size: int, questions: list[Item]) -> list[Item]:
    """The suite questions that the pretraining text of these steps repeats, by text or by content; must be empty."""
    seen: set[tuple[str, ...]] = set()
    for step in steps:
        for worker in range(workers):
            for made, _ in stream(seed, step, worker, size):
                for found in made:
                    seen.update(_marks(found))
    return [question for question in questions if any(mark in seen for mark in _marks(question))]


def _marks(question: Item) -> list[tuple[str, ...]]:
    return [
        ("cloze", cloze_prompt(question)),
        ("letter", letter_prompt(question)),
        ("content", question.task, *question.key),
    ]
