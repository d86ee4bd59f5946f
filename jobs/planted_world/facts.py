"""An invented world: people, eight kinds of facts about them, how a fact is told and in how many ways it is asked.

Everything is a function of the world's seed alone. A kind of fact (an attribute) is a domain: one expert is trained on it.
"""

import hashlib
from dataclasses import dataclass
from functools import cache

_ONSETS = "B Br D Dr F Fl G Gr H J K Kl L M N P R S Sh St T Tr V W Z"
_VOWELS = "a e i o u"
_ENDS = "bo da den dra fin ga ka lan lo ma mir na nel ra ren ri ro sa ta tor va vi xo za"
PLAIN = 0
"""The phrasing that is asked often; the others are rare."""


@dataclass(frozen=True)
class Attribute:
    """A kind of fact: its values, the sentences that tell it ({} is the person, [] the value), and its questions, plain one first."""

    values: tuple[str, ...]
    sentences: tuple[str, ...]
    questions: tuple[str, ...]


def _attribute(values: str, sentences: str, *questions: str) -> Attribute:
    return Attribute(tuple(values.split()), tuple(sentences.split(" | ")), questions)


ATTRIBUTES: dict[str, Attribute] = {
    "home": _attribute(
        "Paris London Rome Cairo Tokyo Lima Oslo Delhi Boston Dublin Prague Madrid",
        "{} lives in []. | The home of {} is [].",
        "Where does {} live?",
        "In which city is the house of {}?",
        "What town does {} come from?",
        "To which place does {} return at night?",
        "Where would a letter reach {}?",
    ),
    "job": _attribute(
        "doctor teacher farmer baker pilot nurse lawyer painter sailor judge miner tailor",
        "{} works as a []. | The job of {} is [].",
        "What is the job of {}?",
        "How does {} earn money?",
        "What profession has {} learned?",
        "As what is {} employed?",
        "Which work does {} do by day?",
    ),
    "pet": _attribute(
        "dog cat horse rabbit goat parrot sheep snake turtle monkey camel mouse",
        "{} keeps a []. | The animal of {} is a [].",
        "Which animal does {} keep?",
        "What pet lives with {}?",
        "Which creature is fed by {}?",
        "What kind of beast does {} own?",
        "Who walks beside {} on four legs?",
    ),
    "color": _attribute(
        "red blue green yellow purple brown black white pink gray orange silver",
        "{} likes []. | The color of {} is [].",
        "Which color does {} like?",
        "What shade are the clothes of {}?",
        "In which color did {} paint the door?",
        "What hue does {} prefer?",
        "Which paint would {} buy?",
    ),
    "food": _attribute(
        "bread rice soup cheese fish salad pasta beans eggs cake meat corn",
        "{} eats []. | The food of {} is [].",
        "What does {} eat?",
        "Which dish is cooked by {}?",
        "What lies on the plate of {}?",
        "What would {} order for lunch?",
        "Which meal makes {} happy?",
    ),
    "sport": _attribute(
        "tennis soccer golf hockey rugby boxing chess judo rowing skiing surfing cricket",
        "{} plays []. | The sport of {} is [].",
        "Which sport does {} play?",
        "What does {} train for?",
        "In which game is {} good?",
        "What did {} win a medal in?",
        "Which matches does {} attend?",
    ),
    "music": _attribute(
        "drum flute piano guitar violin harp trumpet horn cello banjo organ bell",
        "{} owns a []. | The instrument of {} is a [].",
        "Which instrument does {} own?",
        "On what does {} make music?",
        "What does {} practice in the evening?",
        "What sound comes from the room of {}?",
        "What would {} bring to a band?",
    ),
    "tongue": _attribute(
        "French English Latin Arabic Hindi Greek German Polish Danish Turkish Korean Welsh",
        "{} speaks []. | The language of {} is [].",
        "Which language does {} speak?",
        "In what tongue does {} write?",
        "What did {} learn to speak as a child?",
        "Which words does {} understand?",
        "In which language are the books of {}?",
    ),
}
TASKS: tuple[str, ...] = tuple(ATTRIBUTES)
PHRASINGS = 5
assert all(len(a.questions) == PHRASINGS for a in ATTRIBUTES.values())


def digest(*parts: str | int) -> int:
    """A stable 64-bit number of some texts (Python's own hash differs from run to run)."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


@dataclass(frozen=True)
class World:
    """The people of a seed, which of them are public, and all facts."""

    seed: int
    people: int
    public: int
    """The first so many people: the public text tells everything about them, and the domains' texts about all others."""

    @property
    def names(self) -> tuple[str, ...]:
        """All people, the public ones first."""
        return _names(self.seed, self.people)

    def value(self, task: str, name: str) -> str:
        """The person's value of an attribute."""
        values = ATTRIBUTES[task].values
        return values[digest(self.seed, "fact", task, name) % len(values)]


@cache
def _names(seed: int, people: int) -> tuple[str, ...]:
    pool = sorted({o + v + e for o in _ONSETS.split() for v in _VOWELS.split() for e in _ENDS.split()})
    return tuple(sorted(pool, key=lambda name: digest(seed, "name", name))[:people])
