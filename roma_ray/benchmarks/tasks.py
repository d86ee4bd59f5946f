"""lm-eval tasks: stock ones by name, on local files where asked, the user's own task files, and question files as tasks.

Import this file only where lm-eval is needed.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import jinja2
import lm_eval.tasks
import lm_eval.utils
from datasets import Dataset, DatasetDict
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory

from roma_ray.benchmarks.local_data import find_files, read_splits
from roma_ray.benchmarks.own_texts import METRICS, ROWS, TEXT, is_text, read_documents
from roma_ray.benchmarks.task_files import LimitedEnvironment, check_task_file, sandboxed
from roma_ray.borders.text import name_fault, printable, reserved
from roma_ray.config.schema import PromptConfig, QuestionSource
from roma_ray.errors import ConfigError, QuestionError
from roma_ray.questions.prompts import PromptBuilder
from roma_ray.questions.readers import read_questions
from roma_ray.questions.records import LETTERS, Question
from roma_ray.store.files import local_place

VERSION = 1
"""Of the tasks made of question files; raise it when their prompts or targets change."""
QUESTIONS = (".jsonl", ".jsonl.gz", ".json.gz", ".parquet")
TASK_FILES = (".yaml", ".yml")
_STOCK = lm_eval.utils.env


def load_tasks(
    names: Sequence[str], *, data_dir: str | None, builder: Callable[[], PromptBuilder], allow_code: bool
) -> list[Task | Group]:
    """Tasks and groups by lm-eval's names, `.yaml` task files and question files, whose prompts `builder` makes.

    Raises ConfigError (unknown names, task files with code), QuestionError (files, data sets that cannot be had).
    """
    names = [str(local_place(name)) if "://" in name else name for name in names]
    folder = None if data_dir is None else local_place(data_dir).absolute()
    if folder is not None and not folder.is_dir():
        raise QuestionError(f"--data-dir {data_dir}: there is no such folder")
    folders = {_folder_of(name) for name in names if not name.endswith((*QUESTIONS, *TASK_FILES, TEXT))}
    manager = _manager(tuple(sorted(folders)))
    for name in names:
        if name.endswith(TASK_FILES):
            check_task_file(Path(name), allow_code=allow_code)
        elif not name.endswith((*QUESTIONS, TEXT)) and name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            raise ConfigError(
                f"lm-eval has no task {name!r}"
                + (f"; near it: {', '.join(near)}" if near else "")
                + ". Question files end in "
                f"{', '.join(QUESTIONS)}, texts in {TEXT}, your own task files in .yaml"
            )
    # Templates can reach Python through attributes; the sandbox renders stock ones just the same. Those of strangers can also loop.
    strangers = [name for name in names if name.endswith(TASK_FILES)]
    if allow_code:
        lm_eval.utils.env = _STOCK
    elif strangers:
        lm_eval.utils.env = LimitedEnvironment(f"a template of {', '.join(strangers)}")
    else:
        lm_eval.utils.env = sandboxed(_STOCK)
    loaded: list[Task | Group] = []
    for name in names:
        if is_text(name):
            loaded.append(text_task(name))
        elif name.endswith(QUESTIONS):
            loaded += question_tasks(QuestionSource(path=name), builder())
        else:
            loaded += _named(manager, name, folder)
    return loaded


# Where lm-eval keeps the tasks that are asked for most: it takes ten seconds to read all of its thousands of files.
_FOLDERS = {"arc_challenge": "arc", "arc_easy": "arc", "boolq": "super_glue"}
_FOLDERS |= {name: name for name in ("gsm8k", "hellaswag", "mmlu", "piqa", "winogrande")}
_ALL = ""


def _folder_of(name: str) -> str:
    return _FOLDERS.get("mmlu" if name.startswith("mmlu_") else name, _ALL)


@cache
def _manager(folders: tuple[str, ...]) -> TaskManager:
    """lm-eval's index of the tasks in some of its own folders, or of all of them."""
    if _ALL in folders:
        return TaskManager()
    root = Path(lm_eval.tasks.__file__).parent
    return TaskManager(include_defaults=False, include_path=[str(root / folder) for folder in folders])


def _named(manager: TaskManager, name: str, folder: Path | None) -> list[Task | Group]:
    manager._factory = TaskFactory() if folder is None else _LocalFactory(folder)
    try:
        built = manager.load([name])
    except (QuestionError, ConfigError):
        raise
    except (KeyError, TypeError, ValueError, jinja2.TemplateError) as error:
        if not name.endswith(TASK_FILES):
            raise
        raise ConfigError(f"the task file {name} cannot be used: {type(error).__name__}: {error}") from None
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise QuestionError(
            f"the data of {name} cannot be had: {str(error).splitlines()[0]}. Without the hub, give the files with --data-dir"
        ) from None
    # A tag has tasks, a group also itself; of nested groups only the outermost is handed on, for it holds the others.
    groups: dict[str, Group] = built.get("groups", {})
    inner = {child for group in groups.values() for child in group.child_names}
    return [g for key, g in groups.items() if key not in inner] or list(built["tasks"].values())


def leaves(tasks: Sequence[Task | Group]) -> dict[str, Task]:
    """The single tasks by name. Raises ConfigError when one is named twice, or as nothing can be shown."""
    found: dict[str, Task] = {}
    for item in tasks:
        for task in item.get_all_tasks() if isinstance(item, Group) else [item]:
            fault = name_fault(task.task_name)
            if fault or reserved(task.task_name):
                reason = fault or "is kept for the tables' own lines"
                raise ConfigError(f"the task name {printable(task.task_name)!r} {reason}: name the task otherwise")
            if task.task_name in found:
                raise ConfigError(f"the task {task.task_name} is asked for twice")
            found[task.task_name] = task
    return found


class _LocalFactory(TaskFactory):
    """Gives every task definition, otherwise as it stands, the rows of its files."""

    def __init__(self, folder: Path) -> None:
        super().__init__(meta=None)
        self.folder = folder

    def _load_full_config(self, entry: Any, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
        config: dict[str, Any] = super()._load_full_config(entry, overrides)
        own = config.get("custom_dataset") or (config.get("dataset_kwargs") or {}).get("data_files")
        if isinstance(config.get("task"), str) and "class" not in config and not own:
            wanted = ("training_split", "validation_split", "test_split", "fewshot_split")
            place = {
                "folder": str(self.folder),
                "task": config["task"],
                "part": config.get("dataset_name"),
                "splits": [config[key] for key in wanted if config.get(key)],
                "judged": config.get("test_split") or config.get("validation_split"),
            }
            config |= {"custom_dataset": local_dataset, "dataset_kwargs": {"local": place}}
        return config


def local_dataset(local: dict[str, Any], **_: Any) -> DatasetDict:
    """The data set of a task from its files. Raises QuestionError naming the file that is wanted."""
    folder, task, judged = Path(local["folder"]), local["task"], local["judged"]
    files = find_files(folder, task, local["part"], local["splits"])
    rows = read_splits(files, task, local["part"], judged, local["splits"])
    if not rows.get(judged):
        raise QuestionError(
            f"{folder} has no rows of {task}'s {judged} split: put them into {folder / task / judged}.jsonl (or .parquet), in the "
            "columns of the hub's data set or, for the eight named benchmarks, as question records"
        )
    made = {split: Dataset.from_list(found) for split, found in rows.items()}
    # Splits that only few-shot examples need may be missing; asking for examples from one is refused later.
    empty: dict[str, list[Any]] = {name: [] for name in made[judged].column_names}
    for split in local["splits"]:
        if split not in made:
            made[split] = Dataset.from_dict(empty, features=made[judged].features)
    return DatasetDict(made)


def question_tasks(source: QuestionSource, builder: PromptBuilder) -> list[Task]:
    """One lm-eval task for each task of a question file, in the configured prompt format. Raises QuestionError, ConfigError."""
    questions, rejected = read_questions([source])
    if rejected:
        raise QuestionError(
            f"{source.path}: {len(rejected)} row(s) cannot be asked, the first on line {rejected[0].line}: {rejected[0].reason}. A "
            "benchmark is whole or refused: mend or remove them"
        )
    names = sorted({q.task for q in questions})
    return [question_task(name, [q for q in questions if q.task == name], builder) for name in names]


def question_task(name: str, questions: Sequence[Question], builder: PromptBuilder) -> Task:
    """An lm-eval task of some questions: lm-eval's own acc, and for `cloze` its acc_norm."""
    config = builder.config
    metrics = ["acc", "acc_norm"] if config.format == "cloze" else ["acc"]
    return ConfigurableTask(
        config={
            "task": name,
            "custom_dataset": question_dataset,
            "dataset_kwargs": {"rows": [question_row(q, builder) for q in questions]},
            "output_type": "multiple_choice",
            "test_split": "test",
            # Names of columns, not templates: a question's text is never read as one.
            "doc_to_text": "query",
            "doc_to_choice": "options",
            "doc_to_target": "gold",
            "target_delimiter": "" if config.chat_template else " ",
            "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in metrics],
            "num_fewshot": 0,
            "metadata": {"version": VERSION, "prompt": config.model_dump(mode="json")},
        }
    )


def question_row(question: Question, builder: PromptBuilder) -> dict[str, Any]:
    """A question as a row of its task: the rendered prompt and what continues it."""
    config: PromptConfig = builder.config
    options = list(question.choices)
    return {
        "id": question.id,
        "question": question.question,
        "choices": options,
        "query": builder.render(question, question.context if config.context else None),
        "options": list(LETTERS[: len(options)]) if config.format == "letter" else options,
        "gold": question.answer,
    }


def text_task(name: str) -> Task:
    """An lm-eval task of a file of texts: their perplexity, by rolling log-likelihoods. Raises QuestionError."""
    path = Path(name).expanduser()
    task = next((path.name.removesuffix(end) for end in (TEXT, *ROWS) if path.name.endswith(end)), "") or path.name
    return ConfigurableTask(
        config={
            "task": task,
            "custom_dataset": question_dataset,
            "dataset_kwargs": {"rows": [{"text": text} for text in read_documents(path)]},
            "output_type": "loglikelihood_rolling",
            "test_split": "test",
            "doc_to_text": "",
            # A column's name, not a template: a text is never read as one.
            "doc_to_target": "text",
            "metric_list": [{"metric": metric} for metric in METRICS],
            "num_fewshot": 0,
            "metadata": {"version": VERSION},
        }
    )


def question_dataset(rows: list[dict[str, Any]], **_: Any) -> DatasetDict:
    """The rows as the test split of a data set."""
    return DatasetDict({"test": Dataset.from_list(rows)})


def has_examples(task: Task) -> bool:
    """Whether a task has examples to draw few-shot prompts from."""
    docs = task.fewshot_docs()
    return docs is not None and len(list(docs)) > 0
