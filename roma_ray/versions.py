"""Versions of libraries: what is installed, and which of them decide the bits of a stage.

They are no part of an identity: an upgrade must not silently throw away a cache of many gigabytes, and most upgrades change
no bit. So a stage keeps which versions worked on it, and whoever uses it again hears of others (`artifacts.Stage`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from importlib import metadata

LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "sentence-transformers",
    "peft",
    "lm-eval",
    "faiss-cpu",
    "faiss-gpu",
    "ray",
    "mlflow",
    "numpy",
    "pyarrow",
)
_MODEL = ("torch", "transformers")
# Of a stage that is not named here: those of the model.
_DECISIVE: dict[str, tuple[str, ...]] = {
    "questions": ("transformers", "tokenizers"),
    "embed": (*_MODEL, "tokenizers", "sentence-transformers"),
    "neighbors": ("torch", "faiss-cpu", "faiss-gpu"),
    "finetune": (*_MODEL, "numpy"),
    "evaluate": (*_MODEL, "lm-eval"),
    "baselines": (*_MODEL, "tokenizers", "peft", "numpy"),
    "requests": (*_MODEL, "tokenizers", "lm-eval"),
    "benchmarks": ("lm-eval",),
    # Made of stages that are here already.
    "report": (),
    "sweep": (),
    "comparison": (),
}


def library_versions() -> dict[str, str]:
    """Versions of the libraries that a result depends on, of those installed."""
    return _installed(LIBRARIES)


def decisive_versions(stage: str) -> dict[str, str]:
    """Versions of the libraries that decide the bits of a stage of this name, of those installed."""
    return _installed(_DECISIVE.get(stage, _MODEL))


def decisive_among(stage: str, versions: Mapping[str, str]) -> dict[str, str]:
    """Those of some versions that decide the bits of a stage of this name."""
    return {name: versions[name] for name in _DECISIVE.get(stage, _MODEL) if name in versions}


def differences(made: Iterable[Mapping[str, str]], here: Mapping[str, str]) -> str:
    """The versions that are not those here, and what is here instead; empty where all are the same."""
    others = [sorted(name for name in {*versions, *here} if versions.get(name) != here.get(name)) for versions in made]
    told = [_listed(versions, names) for versions, names in zip(made, others, strict=True) if names]
    if not told:
        return ""
    return f"{' and '.join(told)} (here: {_listed(here, sorted({name for names in others for name in names}))})"


def _listed(versions: Mapping[str, str], names: Iterable[str]) -> str:
    return ", ".join(f"{name} {versions[name]}" if name in versions else f"no {name}" for name in names)


def _installed(names: Iterable[str]) -> dict[str, str]:
    versions = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions
