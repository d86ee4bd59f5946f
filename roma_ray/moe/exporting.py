"""Reads tuned routers from an adapter or a router_ft.pt and writes them as an adapter, a whole model or a router_ft.pt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from roma_ray.errors import CheckpointError
from roma_ray.moe.adapters import PEFT_CONFIG, RouterCheckpoint, read_adapter, write_adapter
from roma_ray.moe.folders import MANIFEST, refuse_special_file
from roma_ray.moe.merged import save_merged
from roma_ray.moe.reference import export_reference, import_reference, read_reference
from roma_ray.store.files import local_place

FORMATS = ("adapter", "merged", "reference")


def read_routers(path: str | Path, *, base: str | None = None, revision: str | None = None) -> RouterCheckpoint:
    """Read an adapter folder, or a router_ft.pt as routers of the model `base` (default: the one that the file names).

    Raises CheckpointError, ModelError.
    """
    path = local_place(str(path))
    if not path.is_dir():
        refuse_special_file(path)
    if not path.is_file():
        return read_adapter(path)
    if base is None:
        base = read_reference(path).model_name
        if base is None:
            raise CheckpointError(f"{path} does not name its base model: name it with --base")
    return import_reference(path, base=base, revision=revision)


def export_routers(
    source: Path, out: Path, *, form: str, base: str | None = None, revision: str | None = None
) -> list[str]:
    """Write routers (an adapter folder or router_ft.pt) as `form`, one of FORMATS; returns what whoever loads them must know.

    `base` overrides the base model that the source names. Raises CheckpointError, ModelError, StorageError.
    """
    if form not in FORMATS:
        raise CheckpointError(f"there is no export format {form!r}; use {', '.join(FORMATS)}")
    _refuse_place(source, out, form)
    checkpoint = read_routers(source, base=base, revision=revision)
    if base is not None:
        checkpoint = replace(checkpoint, base_model=base, revision=revision)
    if form == "merged":
        stated = save_merged(checkpoint, out)
        return _notes_of_merged(checkpoint, stated)
    if form == "adapter":
        write_adapter(out, checkpoint)
    else:
        export_reference(checkpoint, out)
    return [
        f"the routers are in {checkpoint.dtype}: load the base model with dtype=torch.{checkpoint.dtype}, or it is another model"
    ]


def _refuse_place(source: Path, out: Path, form: str) -> None:
    if out.resolve() == source.resolve():
        raise CheckpointError(f"{out} is the source itself, which the export would replace: choose another place")
    if form == "reference" and out.is_dir():
        raise CheckpointError(f"{out} is a folder: name the file to write, for example {out / 'router_ft.pt'}")
    if form == "merged" and (out / PEFT_CONFIG).exists():
        raise CheckpointError(f"{out} holds an adapter, which the export would replace: choose another place")
    if form == "adapter" and (out / MANIFEST).exists() and not (out / PEFT_CONFIG).exists():
        raise CheckpointError(f"{out} holds a whole model, which the export would replace: choose another place")


def _notes_of_merged(checkpoint: RouterCheckpoint, stated: str) -> list[str]:
    if stated == checkpoint.dtype:
        return []
    return [
        f"its config.json names {checkpoint.dtype}, the type of the routers and of their figures, where the base's names {stated}: "
        f"transformers loads it so. The base's own tensors are copied as they are stored. Other tools choose for themselves: "
        f"give them dtype={checkpoint.dtype}"
    ]
