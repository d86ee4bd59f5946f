"""The comparison's figures on answers that were made up, so that every number is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from roma_ray.config.schema import PromptConfig
from roma_ray.engine.answers import ANSWERS, Answers, write_answers
from roma_ray.errors import GuardError
from roma_ray.evaluation.method_table import (
    Entry,
    compare_methods,
    cost_rows,
    describe_oracle,
    measure_differences,
    measure_header,
    result_header,
    result_rows,
)
from roma_ray.questions.prompts import Prompt
from roma_ray.store.artifacts import Stage, Store

BUDGET = {"learning_rates": [0.1], "epochs": 1, "batch_size": 2, "training_questions": 5, "validation_questions": 2}
# Ten questions of two choices, the first of which is right.
PROMPTS = [Prompt(f"q{n}", "ab"[n % 2], "test", (1,), ((2, 4), (3,)), (5, 5 + n), 0, False) for n in range(10)]


def answered(root: Path, name: str, chosen: str, aims: str | None = None, rows: int = 10) -> Stage:
    """A finished stage that chose these choices."""
    stage = Store(str(root)).stage("baselines", {"name": name}, {}, 1)
    scores = [[0.0, 1.0] if c == "1" else [1.0, 0.0] for c in chosen[:rows]]
    answers = Answers(list(range(rows)), scores, None if aims is None else [int(a) for a in aims])
    write_answers(stage.path / ANSWERS, answers, PROMPTS, "raw")
    facts: dict[str, Any] = {"trained_parameters": 3, "train_seconds": 2.0, "questions_per_second": 5.0}
    stage.finish(facts={**facts, "flops_per_question": 2e6, "learning_rate": None}, seconds=1)
    return stage


def entry(name: str, *stages: Stage, failure: str = "", sees_labels: bool = False) -> Entry:
    return Entry(name, f"what {name} is", sees_labels, stages, failure)


@pytest.fixture
def summary(tmp_path: Path) -> dict[str, Any]:
    return compare_methods(
        [
            entry("base", answered(tmp_path, "base", "0000011111")),
            entry("two", answered(tmp_path, "two-0", "0000001111"), answered(tmp_path, "two-1", "1000000001")),
            entry("broken", failure="TrainingError: not finite"),
            entry("oracle", answered(tmp_path, "oracle", "0000000011", "0000000000"), sees_labels=True),
            entry("oracle_control", answered(tmp_path, "control", "0111111111", "1" * 10), sees_labels=True),
        ],
        BUDGET,
        PROMPTS,
        PromptConfig(format="cloze", cloze_score="normalized"),
    )


def test_accuracies_are_paired_and_averaged_over_seeds(summary: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in summary["methods"]}
    assert rows["base"]["accuracy"] == 0.5
    assert rows["base"]["difference"] == 0
    two = rows["two"]
    assert two["accuracy"] == pytest.approx((0.6 + 0.8) / 2)
    assert two["difference"] == pytest.approx(0.2)
    assert two["seed_deviation"] == pytest.approx(2**0.5 * 0.1)
    assert two["first_seed"] == {"lost": 0, "won": 1, "mcnemar_p": 1.0}
    # Mean over seeds of each question's verdict: .5, then 1 four times, ...
    values = [0.5, 1, 1, 1, 1, 1, 0.5, 0.5, 0.5, 0]
    mean = sum(values) / 10
    deviation = (sum((v - mean) ** 2 for v in values) / 9) ** 0.5
    assert two["stderr"] == pytest.approx(deviation / 10**0.5)
    assert two["tasks"] == {"a": pytest.approx(0.7), "b": pytest.approx(0.7)}


def test_every_measure_of_a_method_is_paired_with_the_base(summary: dict[str, Any]) -> None:
    assert (summary["configured"], summary["coincide"]) == ("acc_norm", False)
    rows = {row["name"]: row for row in summary["methods"]}
    found = rows["two"]["measures"]
    assert list(found) == ["acc", "acc_norm", "gold_logp", "choice_logp"]
    assert found["acc_norm"]["micro"]["tuned"] == pytest.approx(rows["two"]["accuracy"])
    assert found["acc_norm"]["micro"]["difference_stderr"] == pytest.approx(rows["two"]["difference_stderr"])
    # Scores are 1 for the chosen one of two: the right one's mean over two tokens is half of how often it is chosen.
    assert found["gold_logp"]["micro"]["tuned"] == pytest.approx(0.7 / 2)
    assert found["gold_logp"]["micro"]["difference"] == pytest.approx(0.2 / 2)
    assert [found["acc"]["tasks"][task]["n"] for task in "ab"] == [5, 5]
    header, table = measure_header(summary), measure_differences(summary)
    assert header == ("method", "acc", "acc_norm*", "gold_logp", "choice_logp")
    cells = dict(zip(header, table[1], strict=True))
    assert cells["method"] == "two"
    assert cells["gold_logp"].startswith("+0.1000 ±")
    assert [row[0] for row in table] == ["base", "two", "oracle †", "oracle_control †"]


def test_a_failed_method_keeps_its_place_and_no_figure(summary: dict[str, Any]) -> None:
    assert [row["name"] for row in summary["methods"]] == ["base", "two", "broken", "oracle", "oracle_control"]
    assert set(summary["methods"][2]) == {"name", "title", "failure"}
    summary |= {"seed": 4, "seeds": 2}
    assert result_rows(summary)[2][:2] == ("broken", "failed")
    # With several seeds the table says whose p it is.
    assert result_header(summary)[3] == "p (seed 4)"
    assert result_header(summary | {"seeds": 1})[3] == "p"
    assert len(cost_rows(summary)) == 4


def test_the_oracle_is_read_against_its_control(summary: dict[str, Any]) -> None:
    found = summary["oracle"]
    assert found["oracle_gain"] == pytest.approx(0.3)
    # The control gives its wrong aim nine times; the base model gives that choice five times anyway.
    assert found["control_reached"] == pytest.approx(0.9)
    assert found["base_at_aim"] == pytest.approx(0.5)
    assert found["difference"] == pytest.approx(0.3 - 0.4)
    text = describe_oracle(found)
    assert "30.0" in text
    assert "Difference: -10.0" in text


def test_other_questions_are_refused(tmp_path: Path) -> None:
    base = answered(tmp_path, "base", "0000011111")
    fewer = answered(tmp_path, "fewer", "0000011111", rows=9)
    with pytest.raises(GuardError, match="fewer answered other questions"):
        compare_methods([entry("base", base), entry("fewer", fewer)], BUDGET, PROMPTS, PromptConfig())
    with pytest.raises(GuardError, match="without it there is nothing"):
        compare_methods([entry("base", failure="ModelError: gone")], BUDGET, PROMPTS, PromptConfig())
