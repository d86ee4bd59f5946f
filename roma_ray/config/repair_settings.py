"""The configuration that `roma-ray repair` makes of its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from roma_ray.config.loading import overridden, parse_config, read_settings
from roma_ray.config.schema import Config


def repair_config(
    student: str, teacher: str | None, texts: Sequence[str], base: str | None, overrides: Sequence[str]
) -> Config:
    """The configuration of a repair: of `base` or the defaults, with what makes it one, then with a user's own overrides.

    All MoE layers are trained, by distillation alone: the manifold term is added by finetune.regularizer. Raises ConfigError.
    """
    own: dict[str, Any] = {
        "name": f"repair of {Path(student).name}",
        "routing": {"layers": "All"},
        "finetune": {"learning_rate": 3e-3, "regularizer": {"kind": "none"}},
        "questions": {"prompt": {"max_tokens": 512}},
    }
    data = read_settings(Path(base)) if base else own
    asked = _section(data, "questions")
    if not {"splits", "validation_fraction", "test_fraction"} & asked.keys():
        asked["splits"] = {"train": 0.8, "validation": 0.1, "test": 0.1}
    asked |= {"sources": [{"path": text} for text in texts], "prompt": {**_section(asked, "prompt"), "format": "free"}}
    tuned = _section(data, "finetune")
    named = {"teacher": teacher} if teacher else {}
    tuned |= {"task_loss": "distill", "distill": {**_section(tuned, "distill"), **named}}
    # Every text is one to learn from: which the student knows already is no question here.
    success = {"metric": "likelihood", "threshold": -1e9}
    fixed = {
        "model": {**_section(data, "model"), "path": student},
        "routing": {**_section(data, "routing"), "tokens": "Answer"},
        "extraction": {**_section(data, "extraction"), "success": success},
        "evaluation": {**_section(data, "evaluation"), "task_loss_alone": False},
    }
    return parse_config(
        overridden({**data, **fixed, "questions": asked, "finetune": tuned}, overrides), base or "a repair"
    )


def _section(data: dict[str, Any], name: str) -> dict[str, Any]:
    """A copy of a part of plain settings, where it is one; what it should not be is told when all is parsed."""
    found = data.get(name)
    return dict(found) if isinstance(found, dict) else {}


def asked_config(config: Config, questions: str, form: str) -> Config:
    """The configuration whose questions stage encodes a file of questions with choices for the same tokenizer. Raises ConfigError."""
    data = config.model_dump(mode="json", include={"model", "storage", "device", "threads", "seed"})
    prompt = {"format": form, "max_tokens": config.questions.prompt.max_tokens}
    # None is trained on: the parts only have to be there.
    return parse_config({**data, "questions": {"sources": [{"path": questions}], "prompt": prompt}})
