"""Settings of the methods that RoMA is compared with (`roma-ray baselines`)."""

from __future__ import annotations

from typing import Self

from pydantic import Field, field_validator, model_validator

from roma_ray.config.section import Section


class OracleConfig(Section):
    """The best routing weights of one question, given its label (eq. 1)."""

    steps: int = Field(default=20, ge=1)
    """Adam steps on log r of the last prompt token; the best iterate is kept, the start included."""
    step_size: float = Field(default=0.2, gt=0)
    """Of Adam."""


class C3poConfig(Section):
    """Test-time re-mixing of experts (Li et al. 2025, arXiv 2504.07964), over the tuned layers, at the last prompt token."""

    neighbors: int = Field(default=3, ge=1)
    """Successful training questions that stand in for the label."""
    core_fraction: float = Field(default=20 / 64, gt=0, le=1)
    """Part of a layer's experts, the highest-weighed ones, whose weights move: the paper's 20 of 64."""
    steps: int = Field(default=10, ge=1)
    """Steps of gradient descent and of mean shift."""
    step_size: float = Field(default=0.2, gt=0)
    """Of Adam on log r (gradient descent)."""
    alphas: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Kernel regression: parts of a question's own routing that are tried; the neighbors' loss chooses."""
    mode_alpha: float = Field(default=0.5, ge=0, lt=1)
    """Mode finding: part of the routing that each step keeps."""

    @field_validator("alphas")
    @classmethod
    def _parts(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or not all(0 <= alpha <= 1 for alpha in value):
            raise ValueError("give at least one number between 0 and 1")
        return value


class SteeringConfig(Section):
    """Expert steering by a contrast of right and wrong answers (Fayyaz et al. 2025, arXiv 2509.09660), in the tuned layers."""

    promoted: tuple[float, ...] = (0.0, 0.05)
    """Parts of the tuned layers' experts to promote that are tried, each with each of `demoted`; validation chooses."""
    demoted: tuple[float, ...] = (0.0, 0.05, 0.15, 0.3)
    """Parts to demote that are tried."""
    margin: float = Field(default=0.01, gt=0)
    """By how much a promoted expert's log r passes the token's highest, and a demoted one's stays below its lowest."""

    @field_validator("promoted", "demoted")
    @classmethod
    def _parts(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or not all(0 <= part <= 1 for part in value):
            raise ValueError("give at least one number between 0 and 1")
        return value

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not any((*self.promoted, *self.demoted)):
            raise ValueError(
                "steering.promoted or steering.demoted must hold a number above 0: nothing else would be steered"
            )
        return self


class FragileConfig(Section):
    """The last router's update on fragile answer tokens (Yoon et al. 2026, arXiv 2605.07260)."""

    confidence: float = Field(default=0.9, gt=0, le=1)
    """Answer tokens to which the base model gives a lower probability are fragile."""
    samples: int = Field(default=16, ge=1)
    """Routes that are tried for each: the last router's experts under Gumbel noise."""


class BaselinesConfig(Section):
    """The methods of Table 1 (`roma-ray baselines`). Part of no other stage's fingerprint.

    The budget is the same for every method that trains, RoMA among them: `finetune.epochs` and `finetune.batch_size`, and a
    learning rate chosen on the validation questions from one grid.
    """

    seeds: int = Field(default=3, ge=1)
    """Seeds of each method that depends on one: `seed`, `seed` + 1, ... The learning rate is chosen with the first."""
    learning_rates: tuple[float, ...] = (1e-4, 1e-3, 1e-2)
    """The grid. Of equally good ones the smallest wins."""
    micro_batch_size: int = Field(default=32, ge=1)
    """Questions of one forward pass in training: memory is bounded by it."""
    shots: int = Field(default=4, ge=1)
    """`icl`: demonstrations, the nearest training questions; fewer where the prompt would pass `prompt.max_tokens`."""
    virtual_tokens: int = Field(default=8, ge=1)
    """`prefix_tuning`, `prompt_tuning`: trained positions before the prompt."""
    default_decay: float = Field(default=0.95, ge=0, lt=1)
    """`dense_backprop`: what a default vector keeps of itself at each step (the paper's beta)."""
    oracle: OracleConfig = OracleConfig()
    c3po: C3poConfig = C3poConfig()
    steering: SteeringConfig = SteeringConfig()
    fragile: FragileConfig = FragileConfig()

    @field_validator("learning_rates")
    @classmethod
    def _positive(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or not all(rate > 0 for rate in value) or len(set(value)) != len(value):
            raise ValueError("give at least one positive number, each once")
        return value
