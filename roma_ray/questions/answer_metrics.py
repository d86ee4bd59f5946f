"""Metrics of a written answer against the accepted ones: plain functions of texts.

exact_match   equal after SQuAD's normalisation (lower case, no punctuation, no a, an, the, single blanks)
f1            SQuAD's: of the normalised words that both have
contains      the normalised answer stands in the normalised text, as whole words
numeric       equal numbers: what follows `####` where that stands (GSM8K), else the last number of the text
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal

MARK = "####"
_NUMBER = re.compile(r"(?<!\d)-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """SQuAD's normalisation (Rajpurkar et al. 2016, its evaluation script)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def number_of(text: str) -> Decimal | None:
    """The number that a text answers with; None where there is none."""
    _, mark, after = text.rpartition(MARK)
    found = _NUMBER.findall(after if mark else text)
    if not found:
        return None
    return Decimal((found[0] if mark else found[-1]).replace(",", "").replace("$", ""))


def exact_match(text: str, accepted: Sequence[str]) -> bool:
    """Whether the text is one of the accepted answers."""
    return normalised(text) in {normalised(answer) for answer in accepted}


def f1(text: str, accepted: Sequence[str]) -> float:
    """The best F1 of the words against an accepted answer."""
    return max(_f1(normalised(text).split(), normalised(answer).split()) for answer in accepted)


def _f1(words: list[str], gold: list[str]) -> float:
    if not words or not gold:
        return float(words == gold)
    common = sum((Counter(words) & Counter(gold)).values())
    return 2 * common / (len(words) + len(gold))


def contains(text: str, accepted: Sequence[str]) -> bool:
    """Whether an accepted answer stands in the text. One of which normalisation leaves nothing stands in an empty text alone."""
    words = f" {normalised(text)} "
    golds = [normalised(answer) for answer in accepted]
    return any(f" {gold} " in words if gold else not words.strip() for gold in golds)


def numeric(text: str, accepted: Sequence[str]) -> bool:
    """Whether the text's number is that of an accepted answer."""
    number = number_of(text)
    return number is not None and any(number_of(answer) == number for answer in accepted)


WRITTEN: Mapping[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": exact_match,
    "contains": contains,
    "numeric": numeric,
    "f1": f1,
}
"""Metrics of a written text by name."""
