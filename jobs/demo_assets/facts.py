"""An invented world: people with attributes, how a fact is told, and how it is asked.

Every fact is told in the pretraining text as a plain sentence. The question about it is there only for a part of the facts
(`items.place`), so that the suite's questions ask for what the model knows but was never asked.
"""

import random
from dataclasses import dataclass

from .items import Item, digest, shuffled

PEOPLE = 450
_ONSETS = "B Br D Dr F Fl G Gr H J K Kl L M N P R S Sh St T Tr V W Z"
_VOWELS = "a e i o u"
_ENDS = "bo da den dra fin ga ka lan lo ma mir na nel ra ren ri ro sa ta tor va vi xo za"


@dataclass(frozen=True)
class Attribute:
    """One kind of fact: its values, its sentences and its question; `weight` is how often the text speaks of it."""

    values: tuple[str, ...]
    sentences: tuple[str, ...]
    question: str
    weight: float


def _attribute(values: str, question: str, weight: float, *sentences: str) -> Attribute:
    return Attribute(tuple(values.split()), sentences, question, weight)


ATTRIBUTES: dict[str, Attribute] = {
    "home": _attribute(
        "Paris London Rome Cairo Tokyo Lima Oslo Delhi Boston Dublin Prague Madrid Vienna Athens Berlin Sydney",
        "Where does {} live?",
        1.0,
        "{} lives in {}.",
        "The home of {} is {}.",
    ),
    "job": _attribute(
        "doctor teacher farmer baker pilot nurse lawyer painter sailor judge miner tailor clerk chef plumber guard",
        "What is the job of {}?",
        0.9,
        "{} works as a {}.",
        "The job of {} is {}.",
    ),
    "pet": _attribute(
        "dog cat horse rabbit goat parrot sheep snake turtle monkey camel mouse",
        "Which animal does {} keep?",
        0.8,
        "{} keeps a {}.",
        "The animal of {} is a {}.",
    ),
    "color": _attribute(
        "red blue green yellow purple brown black white pink gray",
        "Which color does {} like?",
        0.7,
        "{} likes {}.",
        "The color of {} is {}.",
    ),
    "food": _attribute(
        "bread rice soup cheese fish salad pasta beans eggs cake meat corn nuts honey",
        "What does {} eat?",
        0.6,
        "{} eats {}.",
        "The food of {} is {}.",
    ),
    "drink": _attribute(
        "water milk tea coffee juice soda wine beer cocoa cider",
        "What does {} drink?",
        0.5,
        "{} drinks {}.",
        "The drink of {} is {}.",
    ),
    "sport": _attribute(
        "tennis soccer golf hockey rugby boxing chess judo rowing skiing surfing cricket",
        "Which sport does {} play?",
        0.45,
        "{} plays {}.",
        "The sport of {} is {}.",
    ),
    "music": _attribute(
        "drum flute piano guitar violin harp trumpet horn cello banjo organ bell",
        "Which instrument does {} own?",
        0.4,
        "{} owns a {}.",
        "The instrument of {} is a {}.",
    ),
    "month": _attribute(
        "January February March April May June July August September October November December",
        "When was {} born?",
        0.35,
        "{} was born in {}.",
        "The month of {} is {}.",
    ),
    "tongue": _attribute(
        "French English Latin Arabic Hindi Greek German Polish Danish Turkish Korean Welsh Dutch Thai",
        "Which language does {} speak?",
        0.3,
        "{} speaks {}.",
        "The language of {} is {}.",
    ),
    "number": _attribute(
        "one two three four five six seven eight nine ten",
        "How many children has {}?",
        0.25,
        "{} has {} children.",
        "The children of {} are {}.",
    ),
    "garden": _attribute(
        "apple lemon pear grape plum mango cherry banana melon fig peach orange",
        "Which tree grows at the house of {}?",
        0.2,
        "At the house of {} grows a {} tree.",
        "The tree of {} is a {}.",
    ),
}
TASKS: tuple[str, ...] = tuple(ATTRIBUTES)
WEIGHTS: tuple[float, ...] = tuple(a.weight for a in ATTRIBUTES.values())


def _names() -> tuple[str, ...]:
    names = sorted(
        {o + v + e for o in _ONSETS.split() for v in _VOWELS.split() for e in _ENDS.split()},
        key=lambda name: digest("name", name),
    )
    return tuple(names[:PEOPLE])


NAMES = _names()


def value_of(task: str, name: str) -> str:
    """The person's value of an attribute: a function of both, even over the values."""
    values = ATTRIBUTES[task].values
    return values[digest("fact", task, name) % len(values)]


def sentence(rng: random.Random, task: str, name: str) -> tuple[str, str, str]:
    """A fact told: the text before its value, the value, the text after."""
    attribute = ATTRIBUTES[task]
    before, _, after = rng.choice(attribute.sentences).replace("{}", name, 1).partition(" {}")
    return before, f" {value_of(task, name)}", after


def item(rng: random.Random, task: str, name: str) -> Item:
    """A fact asked, with three other values of the attribute to choose from."""
    attribute, right = ATTRIBUTES[task], value_of(task, name)
    wrong = rng.sample([v for v in attribute.values if v != right], 3)
    choices, answer = shuffled(rng, right, wrong)
    return Item(task, (name,), attribute.question.format(name), choices, answer)
