"""The pretraining stream and the suite: two sides of one split of all possible questions by their content's hash.

The stream is a function of (seed, step, worker) alone, so that any part of it can be made again, which is how the
tests show that no question of the suite is in it.
"""

import random
from collections.abc import Iterable, Iterator

from . import families_lists as lists
from . import families_stories as stories
from .items import INSTRUCTION, LETTERS, Item, Maker, cloze_prompt, letter_prompt, place

FAMILIES: dict[str, Maker] = {
    "addition": lists.addition,
    "category": stories.category,
    "count": lists.count,
    "ends": lists.ends,
    "greater": lists.greater,
    "largest": lists.largest,
    "member": lists.member,
    "odd": lists.odd,
    "opposite": stories.opposite,
    "pattern": lists.pattern,
    "position": lists.position,
    "pronoun": stories.pronoun,
    "ranking": stories.ranking,
    "reading": stories.reading,
    "same": lists.same,
    "smallest": lists.smallest,
    "starts": lists.starts,
    "step": lists.step,
    "where": stories.where,
}
# Percent of all contents that are (pretraining, training questions); the rest are test questions. The two families
# of facts have few contents (a word, a pair), so that more of them are kept for the suite.
SHARES: dict[str, tuple[int, int]] = {"category": (60, 25), "opposite": (60, 25)}
DEFAULT_SHARES = (80, 12)

# A text and its weight in the loss: answers count most, the (mostly random) words that lead to them least.
Piece = tuple[str, float]
LEAD, SENTENCE, ANSWER = 0.05, 0.2, 1.0
# The part of simplest questions falls from this to none over so many steps.
SIMPLE, SIMPLE_STEPS = 0.6, 800


def make(rng: random.Random, task: str, part: str) -> Item:
    """One question of a family whose content's hash lies in `part` (pretrain, train or test)."""
    while True:
        item = FAMILIES[task](rng, part != "pretrain")
        if place(item, SHARES.get(task, DEFAULT_SHARES)) == part:
            return item


def _letter_document(rng: random.Random, items: list[Item]) -> list[Piece]:
    pieces: list[Piece] = [(f"{INSTRUCTION}\n\n", LEAD)] if rng.random() < 0.9 else []
    for number, item in enumerate(items):
        pieces.append((("\n\n" if number else "") + letter_prompt(item), LEAD))
        pieces.append((f" {LETTERS[item.answer]}", ANSWER))
    return pieces


def _cloze_document(items: list[Item]) -> list[Piece]:
    pieces: list[Piece] = []
    for number, item in enumerate(items):
        pieces.append((("\n\n" if number else "") + cloze_prompt(item), LEAD))
        pieces.append((f" {item.choices[item.answer]}", ANSWER))
    return pieces


def document(rng: random.Random, simple: float) -> tuple[list[Item], list[Piece]]:
    """One pretraining text: its questions, and its pieces.

    Two thirds are lettered questions (one to four after one instruction), one sixth cloze, one sixth plain sentences;
    of all texts the part `simple` are lettered questions of the family `same`, which teach what a letter stands for.
    """
    plain = rng.random() < simple
    kind = 0.0 if plain else rng.random()
    number = rng.choice((1, 1, 1, 1, 2, 3, 4))
    items = [make(rng, "same" if plain else rng.choice(TASKS), "pretrain") for _ in range(number)]
    if kind < 0.68:
        return items, _letter_document(rng, items)
    if kind < 0.84:
        return items, _cloze_document(items)
    sentences = [item.sentence for item in items] + [stories.fact(rng) for _ in range(4)]
    rng.shuffle(sentences)
    return items, [("\n".join(sentences), SENTENCE)]


TASKS: tuple[str, ...] = tuple(FAMILIES)


def stream(seed: int, step: int, worker: int, size: int) -> Iterator[tuple[list[Item], list[Piece]]]:
    """The `size` documents that a worker trains on in a step."""
    rng = random.Random(f"pretraining/{seed}/{step}/{worker}")
    simple = max(0.0, SIMPLE * (1 - step / SIMPLE_STEPS)) if step >= 0 else 0.0
    for _ in range(size):
        yield document(rng, simple)


def suite(seed: int, counts: dict[str, int]) -> list[tuple[str, Item]]:
    """The suite as (split, question): for each split `counts[split]` different questions of every family."""
    out: list[tuple[str, Item]] = []
    for split, wanted in counts.items():
        for task in TASKS:
            rng = random.Random(f"suite/{seed}/{split}/{task}")
            seen: set[tuple[str | None, str, tuple[str, ...]]] = set()
            while len(seen) < wanted:
                item = make(rng, task, split)
                mark = (item.context, item.question, tuple(sorted(item.choices)))
                if mark not in seen:
                    seen.add(mark)
                    out.append((split, item))
    return out


def overlap(seed: int, steps: Iterable[int], workers: int, size: int, questions: list[Item]) -> list[Item]:
    """The suite questions that some pretraining question of these steps repeats; must be empty.

    A repetition is the same question text with the same context, the same question with the same choices in any
    order, or the same content (family and key).
    """
    seen: set[tuple[object, ...]] = set()
    for step in steps:
        for worker in range(workers):
            for made, _ in stream(seed, step, worker, size):
                for item in made:
                    seen.update(_marks(item))
    return [item for item in questions if any(mark in seen for mark in _marks(item))]


def _marks(item: Item) -> list[tuple[object, ...]]:
    return [
        ("text", item.context, item.question),
        ("choices", item.question, tuple(sorted(item.choices))),
        ("content", item.task, item.key),
    ]
