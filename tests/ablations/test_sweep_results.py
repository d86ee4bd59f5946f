"""What a sweep's finished trials say together: figures, sentences, tables."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from roma_ray.ablations import sweep_tables
from roma_ray.ablations.space import Space
from roma_ray.ablations.sweep_report import draw
from roma_ray.ablations.sweep_results import Findings, FinishedTrial, find
from roma_ray.ablations.sweep_words import headline, notes
from roma_ray.evaluation.statistics import hierarchical_interval, mcnemar, pair
from tests.ablations.made import CHOICES, finished, scores_of, space_of, sweep_of

QUESTIONS = 400


@pytest.fixture
def space(tmp_path: Path) -> Space:
    return space_of(tmp_path, grid={"finetune.learning_rate": [1e-5, 1e-3], "neighbors.k": [1, 5]}, seeds=[0, 1, 2])


class Made:
    """Trials of a space on the same made-up questions."""

    def __init__(self, space: Space, tasks: list[str] | None = None) -> None:
        rng = np.random.default_rng(0)
        self.space, self.tasks = space, tasks
        self.gold = rng.integers(0, CHOICES, QUESTIONS)
        self.right = rng.random(QUESTIONS) < 0.5
        self.base = scores_of(self.right, self.gold)

    def trial(
        self, name: str, right: np.ndarray | None = None, scores: np.ndarray | None = None, **more: float
    ) -> FinishedTrial:
        found = next(trial for trial in self.space.trials if trial.name == name)
        answers = scores_of(self.right if right is None else right, self.gold, seed=1) if scores is None else scores
        return finished(found, answers, base=self.base, gold=self.gold, tasks=self.tasks, **more)

    def with_(self, won: int, lost: int = 0) -> np.ndarray:
        """The base's verdicts with some questions won and some lost."""
        right = self.right.copy()
        right[np.flatnonzero(~self.right)[:won]] = True
        right[np.flatnonzero(self.right)[:lost]] = False
        return right


def test_one_seed_is_the_paired_comparison_by_every_measure(space: Space) -> None:
    made = Made(space)
    centre, other = made.trial("centre", made.with_(3)), made.trial("learning_rate=0.001, k=5", made.with_(40))
    found = find([[centre], [other]]).of("grid", "learning_rate=0.001, k=5")
    assert found is not None
    assert found.to_centre is not None
    assert list(found.to_centre.measures) == ["acc", "acc_norm", "gold_logp", "choice_logp"]
    for name, by in found.to_centre.measures.items():
        assert by.micro == pair(centre.tuned[name], other.tuned[name])
    assert found.to_centre.p == mcnemar(made.with_(3), made.with_(40))
    assert found.to_centre.seeds is None
    assert found.gain.judged.micro.difference == pytest.approx(40 / QUESTIONS)


def test_several_seeds_average_each_question_first_and_have_an_error_of_their_own(space: Space) -> None:
    """The questions are drawn once: seeds of the same question are no further questions."""
    made = Made(space)
    names = ("centre", "centre, seed 1", "centre, seed 2")
    won = (30, 50, 70)
    centre = [made.trial(name) for name in names]
    other = [
        made.trial(name.replace("centre", "learning_rate=0.001, k=5"), made.with_(n))
        for name, n in zip(names, won, strict=True)
    ]
    found = find([centre, other]).of("grid", "learning_rate=0.001, k=5")
    assert found is not None
    assert found.to_centre is not None
    per_seed = [made.with_(n).astype(float) - made.right for n in won]
    means = np.mean(per_seed, axis=0)
    micro = found.to_centre.judged.micro
    assert micro.difference == pytest.approx(50 / QUESTIONS)
    assert micro.difference_stderr == pytest.approx(means.std(ddof=1) / math.sqrt(QUESTIONS))
    assert found.to_centre.p == pytest.approx(ttest_1samp(means, 0).pvalue)
    assert found.to_centre.seeds == pytest.approx(np.std(np.array(won) / QUESTIONS, ddof=1) / math.sqrt(3))
    assert found.accuracy.seeds == pytest.approx(found.to_centre.seeds)
    assert found.accuracy.questions < found.finished[0].base["acc"].std(ddof=1) / math.sqrt(QUESTIONS)
    table = sweep_tables.ranking(sweep_of(space), find([centre, other]))
    row = dict(zip(table.header, table.rows[1], strict=True))
    assert table.header.count("± seeds") == 3
    assert row["test %"] == f"{100 * found.accuracy.mean:.2f} ± {100 * found.accuracy.questions:.2f}"
    assert any(
        "over seeds" in line and "over questions" in line for line in notes(sweep_of(space), find([centre, other]))
    )


def told(made: Made, *others: FinishedTrial, centre: bool = True) -> str:
    return headline(find([*([[made.trial("centre")]] if centre else []), *([f] for f in others)]))


def test_seeds_alone_are_one_setting_with_both_sources_of_error(tmp_path: Path) -> None:
    made = Made(space_of(tmp_path, seeds=[0, 1, 2]))
    gains = (40, 20, 60)
    found = find(
        [
            [
                made.trial(name, made.with_(won))
                for name, won in zip(("centre", "centre, seed 1", "centre, seed 2"), gains, strict=True)
            ]
        ]
    )
    (only,) = found.results
    wanted = [(made.with_(won).astype(float) - made.right) for won in gains]
    assert only.gain.interval == hierarchical_interval(np.array(wanted), seed=0)
    low, high = only.gain.interval
    over_questions = pair(made.right, np.mean([made.with_(won) for won in gains], axis=0)).difference_stderr
    assert high - low > 2 * 1.96 * over_questions, "the seeds' part is in it"
    table = sweep_tables.ranking(sweep_of(made.space), found)
    assert table.rows[0][0] == "centre"
    assert len(table.header) == len(table.rows[0])
    assert "difference to centre" not in table.header
    assert "95 %, both" in table.header
    assert f"Over 3 seeds the tuned routers differ from the base model by {sweep_tables.points(only.gain)}" in headline(
        found
    )
    sweep_tables.write_csv_files(tmp_path / "tables", sweep_of(made.space), found)
    (row,) = csv.DictReader((tmp_path / "tables" / "ranking.csv").open())
    assert (float(row["gain_low"]), float(row["gain_high"])) == only.gain.interval
    assert float(row["gain_stderr_seeds"]) == only.gain.seeds == only.gain.plain()["stderr_seeds"]
    for _, shares in sweep_tables.share_tables(sweep_of(made.space), found):
        assert {len(row) for row in shares.rows} == {len(shares.header)}


def test_the_headline_names_the_setting_and_says_no_more_than_was_found(space: Space) -> None:
    """Equals of the centre are not called worse, and a centre that is not finished is not called the best."""
    made = Made(space)
    name = "learning_rate=0.001, k=5"
    equal = made.trial(name, made.with_(4, 2))
    assert told(made, equal).startswith(
        "No setting is better on validation questions than the centre (57.00 ± 3.50 % of 200 validation questions). On 400 test "
        "questions it gains +0.00 ± 0.00 points on the base model. On the test questions none of 1 settings is clearly better or worse"
    )
    best = made.trial(name, made.with_(4, 2), validation=0.58)
    assert told(made, best, centre=False) == (
        f"Best on validation questions: {name} (58.00 ± 3.50 % of 200 validation questions); the centre is not finished. On 400 test "
        "questions it gains +0.50 ± 0.61 points on the base model."
    )
    assert f"{name} (58.00 ± 3.50 % of 200 validation questions; the centre 57.00 ± 3.50 %)" in told(made, best)
    assert "which is no clear difference" in told(made, best)
    assert "as 1 other" in told(made, best, made.trial("learning_rate=1e-05, k=5", validation=0.58))


def test_the_headline_tells_of_settings_that_are_worse(space: Space) -> None:
    made = Made(space)
    better = made.trial("learning_rate=0.001, k=5", made.with_(40), validation=0.6)
    worse = made.trial("learning_rate=1e-05, k=1", made.with_(0, 40), validation=0.6)
    even = made.trial("learning_rate=1e-05, k=5", made.with_(3, 3))
    assert (
        "Of 3 settings, 1 better (learning_rate=0.001, k=5) and 1 worse (learning_rate=1e-05, k=1) than the centre on the test "
        "questions (Holm's correction, 5%)." in told(made, better, worse, even)
    )
    assert "Of 2 settings, 0 better and 1 worse (learning_rate=1e-05, k=1) than" in told(made, worse, even)


def test_log_likelihoods_tell_what_accuracy_does_not(space: Space) -> None:
    made = Made(space)
    centre = made.trial("centre")
    scores = np.array(centre.judged.scores["tuned"])
    scores[np.arange(QUESTIONS), made.gold] += np.random.default_rng(3).normal(0.02, 0.01, QUESTIONS)
    found = find([[centre], [made.trial("learning_rate=0.001, k=5", scores=scores)]])
    lines = notes(sweep_of(space), found)
    assert "by gold_logp, 1 of 1 settings are better and 0 worse than the centre after Holm's correction" in lines
    assert not any(line.startswith("by acc_norm") for line in lines)
    heading, table = next(sweep_tables.measure_tables(sweep_of(space), found))
    assert heading == "difference to the centre"
    assert table.header[:2] == ("learning_rate", "k")
    # The rule that answers are chosen by is marked.
    assert [name for name in table.header if "*" in name] == ["acc*, points"]
    row = dict(zip(table.header, table.rows[0], strict=True))
    assert row["gold_logp, nats a token"].startswith("+0.01")
    assert (row["learning_rate"], row["k"]) == ("0.001", "5")


def test_a_difference_that_is_only_a_preference_for_an_answer_is_marked(space: Space) -> None:
    """A third of a task's right answers are A; a setting that has come to say A wins without knowing more."""
    made = Made(space, tasks=["easy"] * 100 + ["yes or no"] * 300)
    rng = np.random.default_rng(5)
    made.gold[100:] = np.where(rng.random(300) < 0.7, 0, made.gold[100:])
    scores = rng.normal(-3, 0.3, (QUESTIONS, CHOICES))
    prefers = scores + np.array([1.5, 0, 0, 0]) * (np.arange(QUESTIONS) >= 100)[:, None]
    centre = made.trial("centre", scores=scores)
    found = find([[centre], [made.trial("learning_rate=0.001, k=5", scores=prefers)]])
    lines = "\n".join(notes(sweep_of(space), found))
    assert "learning_rate=0.001, k=5 against the centre: yes or no: the difference of +" in lines
    assert "of the answers of the centre" in lines
    _, table = next(sweep_tables.task_tables(sweep_of(space), found))
    assert table.header == ("learning_rate", "k", "all questions", "mean of tasks", "easy", "yes or no")
    row = dict(zip(table.header, table.rows[0], strict=True))
    assert row["yes or no"].endswith(sweep_tables.SHIFTED)
    assert not row["easy"].endswith(sweep_tables.SHIFTED)
    # Three quarters of the questions are one task's: the two averages differ, and both stand there.
    assert float(row["all questions"].split(" ")[0]) > 1.3 * float(row["mean of tasks"].split(" ")[0]) > 0
    shares = dict(sweep_tables.share_tables(sweep_of(space), found))["yes or no"]
    assert shares.header[2:] == ("A", "B", "C", "D")
    right, _, of_centre, preferring = shares.rows
    assert right[0] == "right answers"
    assert float(right[2]) > 70
    assert float(preferring[2]) > float(of_centre[2]) + 10
    assert preferring[-1].endswith(sweep_tables.SHIFTED)


def test_csv_files_hold_every_figure_unrounded(space: Space, tmp_path: Path) -> None:
    made = Made(space, tasks=["a"] * 100 + ["b"] * 300)
    found = find([[made.trial("centre")], [made.trial("learning_rate=0.001, k=5", made.with_(40))]])
    sweep_tables.write_csv_files(tmp_path, sweep_of(space), found)

    def read(name: str) -> list[dict[str, str]]:
        with open(tmp_path / name) as stream:
            return list(csv.DictReader(stream))

    ranking = {row["setting"]: row for row in read("ranking.csv")}
    other = ranking["learning_rate=0.001, k=5"]
    assert (other["learning_rate"], other["k"]) == ("0.001", "5")
    assert float(other["to_centre"]) == 0.1
    assert float(other["validation_stderr"]) == 0.035
    assert other["validation_stderr_seeds"] == ranking["centre"]["to_centre"] == ""
    measured = [row for row in read("measures.csv") if row["to"] == "centre" and row["measure"] == "gold_logp"]
    assert [row["task"] for row in measured] == ["all", "macro average", "a", "b"]
    assert float(measured[0]["p_holm"]) < 1e-6
    assert {row["answer"] for row in read("answer_shares.csv")} == set("ABCD")
    assert read("trials.csv") == []


def test_settings_of_other_questions_are_not_paired(space: Space) -> None:
    made, other = Made(space), Made(space)
    foreign = other.trial("learning_rate=0.001, k=5")
    object.__setattr__(foreign.judged, "ids", tuple(f"x{n}" for n in range(QUESTIONS)))
    findings: Findings = find([[made.trial("centre")], [foreign]])
    result = findings.of("grid", "learning_rate=0.001, k=5")
    assert result is not None
    assert result.to_centre is None
    assert "not paired" in sweep_tables.ranking(sweep_of(space), findings).rows[1]


def test_a_grid_of_two_is_a_map_of_one_a_line_and_names_are_dots(tmp_path: Path) -> None:
    """Which figure a grid gets, and that each is drawn from its own settings alone."""
    two, one, kinds = (
        {"finetune.learning_rate": [1e-5, 1e-3], "neighbors.k": [1, 5]},
        {"finetune.learning_rate": [1e-5, 1e-3], "finetune.epochs": [3]},
        {"finetune.regularizer.kind": ["l1", "l2"]},
    )
    space = space_of(tmp_path, grid=[two, one, kinds])
    made = Made(space)
    found = find(
        [[finished(trial, made.base[:, [1, 0, 2, 3]], base=made.base, gold=made.gold)] for trial in space.trials]
    )
    pictures = list(draw(sweep_of(space), found, tmp_path / "figures"))
    assert [(picture.name, picture.title) for picture in pictures] == [
        ("grid_1", "Grid: learning_rate and k"),
        ("grid_2", "Grid: learning_rate"),
        ("grid_3", "Grid: kind"),
    ]
    assert (tmp_path / "figures" / "grid_1.png").stat().st_size > 5000
