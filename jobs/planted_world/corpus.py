"""What is told and asked in pretraining, and the suite: the questions that are not.

A document is a text up to the token before its value, and the value. Whether a question (attribute, person, phrasing) is
asked in pretraining is a function of its content; the suite asks only what is not.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

from .facts import ATTRIBUTES, PHRASINGS, PLAIN, TASKS, World, digest

INTRODUCTIONS = ("Question: What is the name of {}?\nAnswer:", "This is {}. The name of this person is")


@dataclass(frozen=True)
class Document:
    """A text and the value that follows it; `phrasing` is that of a question, None for a sentence."""

    task: str
    name: str
    phrasing: int | None
    lead: str
    value: str


@dataclass(frozen=True)
class Item:
    """A question of the suite."""

    split: str
    task: str
    name: str
    phrasing: int
    question: str
    choices: tuple[str, ...]
    answer: int


def prompt(question: str) -> str:
    """The `cloze` prompt (roma_ray/questions/prompts.py)."""
    return f"Question: {question}\nAnswer:"


@dataclass(frozen=True)
class Corpus:
    """The texts of a world. `plain` and `rare` are the percentages of people of whom a phrasing is asked in pretraining."""

    world: World
    plain: int
    rare: int
    test: int
    """Percentage of the suite's facts whose question is a test question."""

    def asked(self, task: str, name: str, phrasing: int) -> bool:
        """Whether pretraining asks this question."""
        return name in _people_asked_of(self, task, phrasing)

    def facts(self, task: str, names: tuple[str, ...]) -> list[Document]:
        """All documents about an attribute of some people: told in each sentence, asked where pretraining asks."""
        attribute, out = ATTRIBUTES[task], []
        for name in names:
            value = f" {self.world.value(task, name)}"
            for sentence in attribute.sentences:
                out.append(Document(task, name, None, sentence.partition(" []")[0].replace("{}", name), value))
            for phrasing, question in enumerate(attribute.questions):
                if self.asked(task, name, phrasing):
                    out.append(Document(task, name, phrasing, prompt(question.replace("{}", name)), value))
        return out

    @property
    def public(self) -> list[Document]:
        """The public text: all facts of the public people, and everybody's name."""
        world = self.world
        out = [d for task in TASKS for d in self.facts(task, world.names[: world.public])]
        return out + [
            Document("name", name, None, text.replace("{}", name), f" {name}")
            for name in world.names
            for text in INTRODUCTIONS
        ]

    def domain(self, task: str) -> list[Document]:
        """A domain's own text: its facts of everybody."""
        return self.facts(task, self.world.names)

    @property
    def suite(self) -> list[Item]:
        """One question about each fact of the people who are not public, in a phrasing in which pretraining does not ask it."""
        out, world = [], self.world
        for task in TASKS:
            for name in world.names[world.public :]:
                free = [p for p in range(PHRASINGS) if not self.asked(task, name, p)]
                if free:
                    out.append(self._item(task, name, free))
        return sorted(out, key=lambda item: item.split, reverse=True)

    def _item(self, task: str, name: str, free: list[int]) -> Item:
        rng = random.Random(digest(self.world.seed, "suite", task, name))
        attribute, right = ATTRIBUTES[task], self.world.value(task, name)
        phrasing = rng.choice(free)
        choices = [right, *rng.sample([v for v in attribute.values if v != right], 3)]
        rng.shuffle(choices)
        split = "test" if rng.randrange(100) < self.test else "train"
        question = attribute.questions[phrasing].replace("{}", name)
        return Item(split, task, name, phrasing, question, tuple(choices), choices.index(right))


@cache
def _people_asked_of(corpus: Corpus, task: str, phrasing: int) -> frozenset[str]:
    """Of whom pretraining asks a phrasing: the same share of the public people and of the others, drawn by the world's seed."""
    world, share = corpus.world, corpus.plain if phrasing == PLAIN else corpus.rare
    out: set[str] = set()
    for group in (world.names[: world.public], world.names[world.public :]):
        drawn = sorted(group, key=lambda name: digest(world.seed, "asked", task, phrasing, name))
        out.update(drawn[: round(len(group) * share / 100)])
    return frozenset(out)
