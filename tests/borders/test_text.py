"""A stranger's text at the border: what is shown of it, and which names are refused."""

from __future__ import annotations

import io

import pytest

from roma_ray.borders.text import IN_PLAIN, clean, encodable, name_fault, printable, reserved
from tests.hostile import CLAIMS, DISGUISES, FORMULAS, MARKDOWN, MARKUP, SURROGATES, UNUSABLE, obeyed


@pytest.mark.parametrize("text", UNUSABLE)
def test_what_a_terminal_obeys_or_hides_is_marked(text: str) -> None:
    assert obeyed(text) or text == "two\nlines"
    for shown in (clean(text), printable(text)):
        assert not obeyed(shown)
        shown.encode()
    assert "\n" not in printable(text)
    assert len(printable(text)) == len(text)
    fault = name_fault(text)
    assert fault
    assert fault.isascii()


def test_every_control_and_format_character_is_marked_but_the_joiners() -> None:
    import unicodedata

    kept = {c for c in map(chr, range(0x110000)) if unicodedata.category(c) in ("Cc", "Cs") and printable(c) == c}
    assert not kept
    formats = {c for c in map(chr, range(0x110000)) if unicodedata.category(c) == "Cf" and printable(c) == c}
    # Joiners, and signs that are seen: Arabic number signs, Kaithi's, hieroglyphs', shorthand's and music's.
    assert {"\u200c", "\u200d"} <= formats
    assert not formats & {chr(c) for c in (*range(0x2000, 0x200C), *range(0x200E, 0x2070), *range(0xE0000, 0xE0080))}
    assert clean("a\tb\n") == "a\tb\n"


@pytest.mark.parametrize("text", [*MARKUP, *MARKDOWN, *FORMULAS, "Ünïcödé", "数学", "می‌خواهم", "👩‍🔬", "a b"])
def test_what_is_only_unusual_stays(text: str) -> None:
    assert clean(text) == printable(text) == text
    assert name_fault(text) is None


@pytest.mark.parametrize("name", CLAIMS)
def test_a_task_cannot_pass_for_the_totals(name: str) -> None:
    assert reserved(name)


@pytest.mark.parametrize("name", ["allele", "all-tasks", "overall", "", *MARKUP, *DISGUISES[:2], *SURROGATES])
def test_other_names_are_not_reserved(name: str) -> None:
    assert not reserved(name)


def test_names_have_an_end() -> None:
    assert name_fault("x" * 512) is None
    assert name_fault("x" * 513)
    assert name_fault(" ")


def test_a_value_is_shown_with_bounded_work() -> None:
    bomb: list[object] = ["x" * 1000]
    for _ in range(60):
        bomb = [bomb] * 60
    assert len(printable(bomb)) <= 120
    assert len(printable({"a": {"b": {"c": "x" * 10**6}}})) <= 120
    assert printable(10**5000) == "(a huge number)"
    assert printable(7) == "7"


def test_an_encoding_gets_what_it_has() -> None:
    assert encodable("61.96 ± 0.1 → λ ─ 数", "ascii") == "61.96 +/- 0.1 -> lambda - ?"
    assert encodable("1 ± 2 − 3", "latin-1") == "1 ± 2 - 3"
    assert encodable("± ─ 数", "utf-8") == "± ─ 数"
    assert encodable("\ud800", "utf-8") == "?"
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors=IN_PLAIN)
    stream.write("±\udc80")
    stream.flush()
    assert stream.buffer.getvalue() == b"+/-?"  # type: ignore[attr-defined]
