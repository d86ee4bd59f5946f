"""Metrics of written answers against lm-evaluation-harness's own: its filters for GSM8K and its exact match."""

from __future__ import annotations

import pytest
from lm_eval.api.metrics import exact_match_fn
from lm_eval.filters.extraction import RegexFilter

from roma_ray.questions.answer_metrics import exact_match, numeric

SAID = (
    "She has 16 - 3 - 4 = 9 eggs and makes 9 * 2 = $18.\n#### 18",
    "So the answer is 18.",
    "So the answer is 1,018 dollars",
    "#### 17",
    "She makes $18 a day, no more than 20",
    "nothing",
)
GOLD = "She makes 9 * 2 = $<<9*2=18>>18 every day.\n#### 18"


@pytest.mark.parametrize("text", SAID)
def test_numbers_are_those_of_lm_evals_gsm8k(text: str) -> None:
    """Its `flexible-extract`: the last number of the text, compared after its own cleaning."""
    chosen = RegexFilter(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1)
    ((found,),) = chosen.apply([[text]], [{}])
    cleaning = [",", r"\$", "(?s).*#### ", r"\.$"]
    judged = exact_match_fn(
        predictions=[found], references=[GOLD], ignore_case=True, ignore_punctuation=False, regexes_to_ignore=cleaning
    )
    assert numeric(text, [GOLD]) == bool(judged["exact_match"])


@pytest.mark.parametrize("text", ["Honey.", "the honey", "honeys", "HONEY!", "bees"])
def test_exact_match_is_lm_evals_with_squads_cleaning(text: str) -> None:
    judged = exact_match_fn(
        predictions=[text],
        references=["honey"],
        ignore_case=True,
        ignore_punctuation=True,
        regexes_to_ignore=[r"\b(?:a|an|the)\b\s*"],
    )
    assert exact_match(text, ["honey"]) == bool(judged["exact_match"])
