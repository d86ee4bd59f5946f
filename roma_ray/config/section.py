"""What every group of settings has in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator

from roma_ray.borders.text import name_fault, reserved


def _name(value: str) -> str:
    fault = name_fault(value)
    if fault:
        raise ValueError(f"this name {fault}: choose another")
    return value


def _task(value: str) -> str:
    if reserved(_name(value)):
        raise ValueError("this name is kept for the tables' own lines: choose another")
    return value


Name = Annotated[str, AfterValidator(_name)]
"""A text that tables, file lists and trackers can show."""
TaskName = Annotated[str, AfterValidator(_task)]
"""A name that no line of our own in a table of tasks has."""


class Section(BaseModel):
    """A frozen group of settings; unknown keys are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, data: Any) -> Any:
        """YAML's yes, no, on and off are booleans; taken as 1 and 0 they would hide a mistake."""
        if isinstance(data, Mapping):
            for name, value in data.items():
                field = cls.model_fields.get(str(name))
                truth = isinstance(value, bool) or (
                    isinstance(value, list | tuple) and any(isinstance(v, bool) for v in value)
                )
                if truth and field is not None and field.annotation is not bool:
                    raise ValueError(f"`{name}` is not a yes-or-no setting")
        return data
