"""Names that strangers write, for every test of something that shows one."""

from __future__ import annotations

import unicodedata

MARKUP = ("[/red]", "math[easy]", "[bold]x", "[link=file:///x]y[/link]", ":skull:", "[@click=quit]q", "a[/", "\\[x]")
"""What rich would take for its own markup; as names they are in order."""
COMMANDS = (
    "\x1b[2Jgone",
    "\x1b]0;title\x07",
    "\x1b]8;;http://x\x1b\\link",
    "\x9b31mred",
    "\x9d0;t\x9c",
    "back\x08\x08",
    "over\rwritten",
    "two\nlines",
    "nul\x00",
    "del\x7f",
)
"""What a terminal would obey."""
DISGUISES = (
    "\u202egnp.exe",
    "\u2066x\u2069",
    "a\u200bll",
    "x\u061c",
    "x\u200e",
    "\ufeffx",
    "soft\xadhyphen",
    "line\u2028end",
    "tag\U000e0041",
    "\u2060x",
)
"""What is read otherwise than it is written, or not at all."""
SURROGATES = ("\ud800", "x\udfff", "\udc80y")
"""What no encoding has."""
UNUSABLE = COMMANDS + DISGUISES + SURROGATES
"""What no name may hold."""
CLAIMS = (
    "all",
    " all",
    "all ",
    "\tall",
    "ALL",
    "All",
    "ａｌｌ",
    "a\u200cll",
    "all\u3000tasks",
    "\u00a0all",
    "Macro average",
)
"""Task names that would pass for our own lines."""
MARKDOWN = (
    "a|b",
    "<script>alert(1)</script>",
    "`code`",
    "[x](http://y)",
    "*bold*",
    "_under_",
    "a\\|b",
    "&lt;",
    "~~x~~",
    "#1",
    "![i](x)",
)
"""What Markdown and HTML would take for their own."""
FORMULAS = ("=1+1", "+1+cmd", "-2+3", "@SUM(A1)", '=HYPERLINK("http://x")', "\uff1d1+1")
"""What a spreadsheet would compute."""


def obeyed(text: str) -> list[str]:
    """The characters of a text on a screen that a terminal would obey, or that no one would see."""
    bad = {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
    return sorted(bad - {"\n", "\t", "\u200c", "\u200d"})
