"""How each task's questions are divided into training, validation and test questions."""

from __future__ import annotations

from pydantic import Field, model_validator

from roma_ray.config.section import Section


class SplitsConfig(Section):
    """The three parts of every task's questions, drawn by seed; they sum to 1."""

    train: float = Field(gt=0, lt=1)
    """Trained on, and where neighbors come from."""
    validation: float = Field(gt=0, lt=1)
    """Settings are chosen on it."""
    test: float = Field(gt=0, lt=1)
    """Judged."""

    @model_validator(mode="after")
    def _whole(self) -> SplitsConfig:
        total = self.train + self.validation + self.test
        # Thirds are written with a few digits.
        if abs(total - 1) > 1e-3:
            raise ValueError(
                f"train {self.train:g} + validation {self.validation:g} + test {self.test:g} = {total:g}: the parts of a task's "
                "questions must sum to 1"
            )
        return self
