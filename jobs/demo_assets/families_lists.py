"""Families about words, numbers and lists: everything needed stands in the question and its choices."""

import random

from .items import Item, shuffled, wording
from .words import ALL_WORDS, CATEGORIES, CATEGORY_OF, NAMES, ORDINALS


def _number(rng: random.Random) -> int:
    return rng.randrange(10, 100) if rng.random() < 0.5 else rng.randrange(100, 1000)


def _numbers(rng: random.Random, count: int) -> list[int]:
    """Distinct numbers; half of the time of one hundred, so that the first digit does not decide."""
    if rng.random() < 0.5:
        base = rng.randrange(1, 10) * 100
        return rng.sample(range(base, base + 100), count)
    numbers: set[int] = set()
    while len(numbers) < count:
        numbers.add(_number(rng))
    return rng.sample(sorted(numbers), count)


def _extreme(rng: random.Random, suite: bool, task: str, words: tuple[str, ...]) -> Item:
    numbers = _numbers(rng, rng.choice((3, 4, 4, 4, 5)))
    right = max(numbers) if task == "largest" else min(numbers)
    choices, answer = shuffled(rng, str(right), [str(n) for n in numbers if n != right])
    text = wording(rng, suite, "Which {} is the {}?", ("number", "value", "figure"), words)
    sentence = f"Of {' '.join(choices)} the {rng.choice(words)} is {right}."
    return Item(task, tuple(sorted(choices)), text, choices, answer, sentence)


def largest(rng: random.Random, suite: bool) -> Item:
    return _extreme(rng, suite, "largest", ("largest", "biggest", "greatest"))


def smallest(rng: random.Random, suite: bool) -> Item:
    return _extreme(rng, suite, "smallest", ("smallest", "lowest", "least"))


def greater(rng: random.Random, suite: bool) -> Item:
    left, right = _numbers(rng, 2)
    more = rng.random() < 0.5
    verb = ("greater", "larger", "more") if more else ("smaller", "lower", "less")
    yes = (left > right) == more
    asks = ("Is", "Is the number", "Is the value")
    text = wording(rng, suite, "{} {} {} than {}?", asks, (str(left),), verb, (str(right),))
    choices, answer = shuffled(rng, "yes" if yes else "no", ["no" if yes else "yes"])
    sentence = f"{max(left, right)} is {rng.choice(('greater', 'larger', 'more'))} than {min(left, right)}."
    return Item("greater", tuple(sorted((str(left), str(right)))), text, choices, answer, sentence)


def _spelled(rng: random.Random, suite: bool, task: str, index: int, verbs: tuple[str, ...]) -> Item:
    right = rng.choice(ALL_WORDS)
    letter = right[index]
    wrong = rng.sample([w for w in ALL_WORDS if w[index] != letter], 3)
    choices, answer = shuffled(rng, right, wrong)
    text = wording(rng, suite, "Which {} {} with the letter {}?", ("word", "one", "choice"), verbs, (letter,))
    return Item(
        task, tuple(sorted(choices)), text, choices, answer, f"The word {right} {rng.choice(verbs)} with {letter}."
    )


def starts(rng: random.Random, suite: bool) -> Item:
    return _spelled(rng, suite, "starts", 0, ("starts", "begins", "opens"))


def ends(rng: random.Random, suite: bool) -> Item:
    return _spelled(rng, suite, "ends", -1, ("ends", "finishes", "closes"))


def same(rng: random.Random, suite: bool) -> Item:
    words = rng.sample(ALL_WORDS + NAMES, rng.choice((2, 3, 4, 4, 5)))
    choices, answer = shuffled(rng, words[0], words[1:])
    text = wording(rng, suite, "Which {} {} {}?", ("word", "one", "choice"), ("is", "says", "reads"), (words[0],))
    return Item("same", tuple(sorted(choices)), text, choices, answer, f"The word is {words[0]}.")


def odd(rng: random.Random, suite: bool) -> Item:
    common, other = rng.sample(sorted(CATEGORIES), 2)
    same = rng.sample(CATEGORIES[common], 3)
    right = rng.choice(CATEGORIES[other])
    choices, answer = shuffled(rng, right, same)
    ends_ = ("is the odd one out", "does not belong", "is not like the others")
    text = wording(rng, suite, "Which {} {}?", ("word", "one", "choice"), ends_)
    sentence = f"Of {' '.join(choices)} the odd one out is {right}."
    return Item("odd", tuple(sorted(choices)), text, choices, answer, sentence)


def member(rng: random.Random, suite: bool) -> Item:
    kind = rng.choice(sorted(CATEGORIES))
    right = rng.choice(CATEGORIES[kind])
    wrong = rng.sample([w for w in ALL_WORDS if CATEGORY_OF[w] != kind], 3)
    choices, answer = shuffled(rng, right, wrong)
    means = ("is a kind of", "is a type of", "belongs to the group")
    text = wording(rng, suite, "Which {} {} {}?", ("word", "one", "choice"), means, (kind,))
    return Item(
        "member", tuple(sorted(choices)), text, choices, answer, f"The word {right} {rng.choice(means)} {kind}."
    )


def pattern(rng: random.Random, suite: bool) -> Item:
    period = rng.choice((2, 2, 3))
    words = rng.sample(ALL_WORDS, 5)
    unit = words[:period]
    length = rng.randrange(2 * period - 1, 3 * period)
    row = " ".join(unit[i % period] for i in range(length))
    right = unit[length % period]
    wrong = [w for w in words if w != right][:3]
    choices, answer = shuffled(rng, right, wrong)
    text = wording(rng, suite, "What {} {}: {}?", ("comes", "goes", "follows"), ("next", "now", "after"), (row,))
    return Item("pattern", tuple(sorted(unit)), text, choices, answer, f"The row is {row} {right}.")


def step(rng: random.Random, suite: bool) -> Item:
    first, by = rng.randrange(1, 90), rng.randrange(1, 12)
    row = [first + by * i for i in range(5)]
    if rng.random() < 0.3:
        row.reverse()
    right = row[-1]
    sign = row[1] - row[0]
    near = [n for n in {right + 1, right - 1, right + 2, right - 2, right + 10, row[-2] + 10, right + sign} if n >= 0]
    wrong = rng.sample([str(n) for n in sorted(near) if n != right and n not in row], 3)
    choices, answer = shuffled(rng, str(right), wrong)
    shown = " ".join(str(n) for n in row[:-1])
    text = wording(
        rng, suite, "Which {} {}: {}?", ("number", "value", "figure"), ("is next", "goes on", "follows"), (shown,)
    )
    return Item("step", (str(first), str(by)), text, choices, answer, f"The numbers are {shown} {right}.")


def position(rng: random.Random, suite: bool) -> Item:
    count = rng.choice((3, 4, 4, 5))
    words = rng.sample(ALL_WORDS, count)
    at = rng.randrange(count)
    choices, answer = shuffled(rng, words[at], [w for w in words if w != words[at]])
    row = " ".join(words)
    verbs = ("is", "comes", "stands")
    text = wording(rng, suite, "Which {} {} {} in: {}?", ("word", "one", "item"), verbs, (ORDINALS[at],), (row,))
    return Item("position", tuple(sorted(words)), text, choices, answer, f"In {row} the {ORDINALS[at]} is {words[at]}.")


def count(rng: random.Random, suite: bool) -> Item:
    word, *others = rng.sample(ALL_WORDS, 3)
    times = rng.randrange(1, 5)
    row = [word] * times + [rng.choice(others) for _ in range(rng.randrange(1, 4))]
    rng.shuffle(row)
    choices = ("1", "2", "3", "4")
    verbs = ("appear", "occur", "come up")
    shown = " ".join(row)
    asks = ("often", "frequently", "many times")
    text = wording(rng, suite, "How {} does {} {} in: {}?", asks, (word,), verbs, (shown,))
    sentence = f"In {shown} {word} comes up {times} time{'s' if times > 1 else ''}."
    return Item("count", tuple(sorted((word, *others))), text, choices, times - 1, sentence)


def addition(rng: random.Random, suite: bool) -> Item:
    left, right = rng.randrange(2, 80), rng.randrange(2, 20)
    total = left + right
    if rng.random() < 0.5:
        left, right = right, left
    near = {total + 1, total - 1, total + 2, total - 2, total + 10, total - 10} - {n for n in range(-20, 1)}
    wrong = rng.sample([str(n) for n in sorted(near)], 3)
    choices, answer = shuffled(rng, str(total), wrong)
    asks = ("What is", "How much is", "What makes")
    text = wording(rng, suite, "{} {} {} {}?", asks, (str(left),), ("plus", "and", "added to"), (str(right),))
    key = tuple(sorted((str(left), str(right))))
    return Item("addition", key, text, choices, answer, f"{left} plus {right} is {total}.")
