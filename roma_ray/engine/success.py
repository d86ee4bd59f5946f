"""Which free-form questions the base model answers rightly (S of eq. 2), by the declared metric."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from roma_ray.config.free_form import SuccessConfig
from roma_ray.engine.question_table import read_table
from roma_ray.errors import QuestionError
from roma_ray.questions.answer_metrics import WRITTEN
from roma_ray.questions.prompts import Prompt


class Success:
    """Judges the base model's answers to the questions of a table."""

    def __init__(self, config: SuccessConfig, questions: Path) -> None:
        """Raises QuestionError where no row holds the verdict that is to be taken."""
        self.config = config
        self.verdicts: list[bool | None] = []
        self.accepted: list[list[str]] = []
        if config.writes:
            self.accepted = accepted_answers(questions)
        elif config.metric == "verdict":
            self.verdicts = read_table(questions, ["verdict"]).column("verdict").to_pylist()
            if not any(verdict is not None for verdict in self.verdicts):
                raise QuestionError(
                    "extraction.success.metric is verdict, and no row has the field `correct`: write true or false into the rows, or "
                    "choose another metric"
                )

    def right(self, row: int, prompt: Prompt, scores: Sequence[float], text: str | None) -> bool:
        """Whether question `row` is answered rightly; `scores` holds the answer's log-likelihood, `text` what was written.

        A row without verdict, or of which nothing was written, is not.
        """
        if self.config.writes:
            return text is not None and bool(WRITTEN[self.config.metric](text, self.accepted[row]))
        if self.config.metric == "verdict":
            return bool(self.verdicts[row])
        return likely(scores[0], prompt, self.config.threshold)


def accepted_answers(questions: Path) -> list[list[str]]:
    """The texts that are right, of every question of a table."""
    found: list[list[str]] = read_table(questions, ["choices"]).column("choices").to_pylist()
    return found


def likely(score: float, prompt: Prompt, threshold: float) -> bool:
    """Whether the answer's mean log-likelihood a token is at least `threshold`."""
    return score / len(prompt.choice_ids[prompt.answer]) >= threshold
