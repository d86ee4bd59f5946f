"""Families about a short context (who has what, who is where) and about facts that plain sentences teach."""

import random

from .items import Item, shuffled, wording
from .words import (
    BOYS,
    CATEGORIES,
    CATEGORY_OF,
    COMPARISONS,
    GIRLS,
    MEETINGS,
    MOODS,
    NAMES,
    OBJECTS,
    PAIRS,
    PLACES,
    article,
)

HAS = ("has", "holds", "keeps")


def reading(rng: random.Random, suite: bool) -> Item:
    size = rng.choice((3, 4, 4))
    names, things = rng.sample(NAMES, size), rng.sample(OBJECTS, size)
    context = " ".join(f"{n} {rng.choice(HAS)} the {t}." for n, t in zip(names, things, strict=True))
    at = rng.randrange(size)
    key = tuple(sorted(names + things))
    if rng.random() < 0.5:
        choices, answer = shuffled(rng, names[at], names[:at] + names[at + 1 :])
        text = wording(rng, suite, "{} {} the {}?", ("Who", "Which person", "Which of them"), HAS, (things[at],))
    else:
        choices, answer = shuffled(rng, things[at], things[:at] + things[at + 1 :])
        text = wording(rng, suite, "{} is it that {} {}?", ("What", "Which thing", "Which object"), (names[at],), HAS)
    sentence = f"{context} So {names[at]} {rng.choice(HAS)} the {things[at]}."
    return Item("reading", key, text, choices, answer, sentence, context)


def ranking(rng: random.Random, suite: bool) -> Item:
    names = rng.sample(NAMES, 3)
    more, most, least = rng.choice(COMPARISONS)
    facts = [f"{names[0]} is {more} than {names[1]}.", f"{names[1]} is {more} than {names[2]}."]
    rng.shuffle(facts)
    context = " ".join(facts)
    which, right = rng.choice(((most, names[0]), (least, names[2])))
    choices, answer = shuffled(rng, right, [n for n in names if n != right])
    asks = ("Who", "Which person", "Which of them")
    text = wording(rng, suite, "{} {} the {}?", asks, ("is", "must be", "has to be"), (which,))
    return Item(
        "ranking",
        tuple(sorted((*names, more))),
        text,
        choices,
        answer,
        f"{context} So {right} is the {which}.",
        context,
    )


def where(rng: random.Random, suite: bool) -> Item:
    names, things, places = rng.sample(NAMES, 2), rng.sample(OBJECTS, 2), rng.sample(PLACES, 4)
    facts = [f"{n} has the {t}." for n, t in zip(names, things, strict=True)]
    facts += [f"{n} is in the {p}." for n, p in zip(names, places, strict=False)]
    rng.shuffle(facts)
    context = " ".join(facts)
    at = rng.randrange(2)
    choices, answer = shuffled(rng, places[at], [places[1 - at], *places[2:]])
    asks = ("Where", "In which place", "At which place")
    text = wording(rng, suite, "{} {} the {}?", asks, ("is", "must be", "can we find"), (things[at],))
    key = tuple(sorted(names + things + places[:2]))
    return Item("where", key, text, choices, answer, f"{context} So the {things[at]} is in the {places[at]}.", context)


def pronoun(rng: random.Random, suite: bool) -> Item:
    pair = [rng.choice(GIRLS), rng.choice(BOYS)]
    mood, verb = rng.choice(MOODS), rng.choice(MEETINGS)
    at = rng.randrange(2)
    right = pair[at]
    said = "She" if at == 0 else "He"
    rng.shuffle(pair)
    context = f"{pair[0]} {verb} {pair[1]}. {said} was {mood}."
    choices, answer = shuffled(rng, right, [n for n in pair if n != right])
    asks = ("Who", "Which person", "Which of them")
    text = wording(rng, suite, "{} {} {}?", asks, ("was", "felt", "seemed"), (mood,))
    return Item(
        "pronoun", tuple(sorted((*pair, mood))), text, choices, answer, f"{context} So {right} was {mood}.", context
    )


def category(rng: random.Random, suite: bool) -> Item:
    word = rng.choice(sorted(CATEGORY_OF))
    kind = CATEGORY_OF[word]
    choices, answer = shuffled(rng, kind, rng.sample([c for c in sorted(CATEGORIES) if c != kind], 3))
    verbs = ("is", "do we call", "would you call")
    text = wording(rng, suite, "What {} of thing {} {}?", ("kind", "type", "sort"), verbs, (word,))
    return Item("category", (word,), text, choices, answer, category_fact(rng, word))


def opposite(rng: random.Random, suite: bool) -> Item:
    pair = rng.choice(PAIRS)
    word, right = pair if rng.random() < 0.5 else pair[::-1]
    wrong = rng.sample([w for p in PAIRS for w in p if w not in pair], 3)
    choices, answer = shuffled(rng, right, wrong)
    asks = ("What is", "Which word is", "Which one is")
    ways = ("the opposite of", "the reverse of", "the contrary of")
    text = wording(rng, suite, "{} {} {}?", asks, ways, (word,))
    return Item("opposite", tuple(sorted(pair)), text, choices, answer, opposite_fact(rng, word, right))


def category_fact(rng: random.Random, word: str) -> str:
    """A plain sentence that says what a word is."""
    kind = CATEGORY_OF[word]
    forms = (
        f"The word {word} is a kind of {kind}.",
        f"The word {word} belongs to the group {kind}.",
        f"{article(word).capitalize()} is a {kind}.",
        f"One type of {kind} is {word}.",
    )
    return rng.choice(forms)


def opposite_fact(rng: random.Random, left: str, right: str) -> str:
    """A plain sentence that says which word is a word's opposite."""
    forms = (
        f"The opposite of {left} is {right}.",
        f"The word {left} is the reverse of {right}.",
        f"Not {left} but {right}.",
        f"The contrary of {left} is {right}.",
    )
    return rng.choice(forms)


def fact(rng: random.Random) -> str:
    """A plain fact about any word, those of the suite's questions included: the text that the suite's answers rest on."""
    if rng.random() < 0.5:
        return category_fact(rng, rng.choice(sorted(CATEGORY_OF)))
    pair = rng.choice(PAIRS)
    return opposite_fact(rng, *(pair if rng.random() < 0.5 else pair[::-1]))
