"""Reading the files of sweeps and verdicts: a form, checked, its faults told by their place."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from roma_ray.config.loading import MOST_FAULTS, default_name, read_settings
from roma_ray.config.section import Section
from roma_ray.errors import ConfigError

Form = TypeVar("Form", bound=Section)


def read_form(form: type[Form], source: Path, base: str | None = None) -> Form:
    """A file of this form; its name is by default the file's own. `base`, a path as a command has it, takes the place of the file's.

    Raises ConfigError.
    """
    data = read_settings(source)
    if base is not None:
        # The file's own lies beside it, a command's in the folder where it is given.
        data["base"] = base if base.startswith("assets:") else str(Path(base).absolute())
    if "name" not in data:
        data["name"] = default_name(source.stem)
    try:
        return form.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_faults(error, form)}") from None


def _faults(error: ValidationError, form: type[Section]) -> str:
    lines = []
    for fault in error.errors(include_url=False)[:MOST_FAULTS]:
        where = ".".join(str(part) for part in fault["loc"])
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(fault["loc"][-1]), list(form.model_fields), n=1, cutoff=0.4)
            message = "unknown" + (f"; did you mean `{near[0]}`?" if near else "")
        lines.append(f"{where}: {message}" if where else message)
    return "; ".join(lines)
