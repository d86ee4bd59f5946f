"""What a reader of a benchmark table must know: chance level, shortened prompts, questions seen in training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from roma_ray.benchmarks.judged_model import Subject
from roma_ray.evaluation.guards import TRUNCATED_LIMIT, beside_chance, by_chance, check_not_identical, occurring

if TYPE_CHECKING:
    from lm_eval.api.task import Task

_SHOWN = 20
# A short question ("Which of these is true?") says little alone; a longer text is the same question whatever its choices.
_TELLING = 60
# Where benchmarks keep a question's text and its choices; other tasks: their rendered prompt.
_TEXTS = ("goal", "sentence", "query", "question", "premise", "ctx")
_CHOICES = ("choices", "endings", "options")
_PAIRS = (("sol1", "sol2"), ("option1", "option2"), ("choice1", "choice2"))


def findings(
    subject: Subject,
    tasks: Mapping[str, Task],
    results: Mapping[str, Mapping[str, Any]],
    truncated: int,
    training: Sequence[tuple[str, Sequence[str]]] | None,
) -> dict[str, Any]:
    """The guards' findings; empty lists and zeros are good news. Raises GuardError when base and tuned answer the same."""
    if subject.adapter is not None:
        base, tuned = (list(_likelihoods(results[name])) for name in ("base", "tuned"))
        if base:
            check_not_identical(base, tuned)
    samples = results["base"]["samples"]
    requests = sum(len(s["arguments"]) for some in samples.values() for s in _once(some))
    return {
        **by_chance(
            (f"{name}/{task}", _beside_chance(tasks[task], some))
            for name, found in results.items()
            for task, some in found["samples"].items()
        ),
        "truncated": truncated,
        "too_many_truncated": truncated > TRUNCATED_LIMIT * max(requests, 1),
        "training_known": training is not None,
        "seen_in_training": seen_in_training(samples, tasks, training or []),
    }


def _once(samples: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """One sample a question: lm-eval lists a question once for each filter."""
    seen: set[int] = set()
    for sample in samples:
        if sample["doc_id"] not in seen:
            seen.add(sample["doc_id"])
            yield sample


def _likelihoods(result: Mapping[str, Any]) -> Iterator[list[float]]:
    for samples in result["samples"].values():
        for sample in samples:
            values = [one[0] for repeats in sample["resps"] for one in repeats if isinstance(one, tuple)]
            if values:
                yield values


def _beside_chance(task: Task, samples: Sequence[Mapping[str, Any]]) -> str | None:
    if task.get_config("output_type") != "multiple_choice" or not samples or "acc" not in samples[0]:
        return None
    return beside_chance(int(sum(s["acc"] for s in samples)), [len(s["arguments"]) for s in samples])


def seen_in_training(
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
    tasks: Mapping[str, Task],
    training: Sequence[tuple[str, Sequence[str]]],
) -> dict[str, Any]:
    """{task: {exact, normalised, questions}} of benchmark questions that occur in training, first document numbers named.

    A question occurs when its text does, and it is telling (over 60 characters) or two of its choices, or all, agree.
    """
    asked = (
        ((name, sample["doc_id"]), question_of(sample["doc"], tasks[name]))
        for name, some in samples.items()
        for sample in _once(some)
        if training
    )
    hits = occurring(training, asked, _telling)
    found: dict[str, Any] = {}
    for name in dict.fromkeys(task for keys in hits.values() for task, _ in keys):
        exact, normalised = ([doc for task, doc in hits[fold] if task == name] for fold in ("exact", "normalised"))
        found[name] = {
            "exact": len(exact),
            "normalised": len(normalised),
            "questions": (normalised or exact)[:_SHOWN],
        }
    return found


def _telling(text: str, choices: set[str], others: set[str]) -> bool:
    return bool(text) and (len(text) > _TELLING or len(choices & others) >= min(2, len(choices)))


def question_of(doc: Any, task: Task) -> tuple[str, list[str]]:
    """A benchmark question's text and choices, as its data set names them, else the prompt that is asked."""
    if isinstance(doc, Mapping):
        text = next((doc[key] for key in _TEXTS if isinstance(doc.get(key), str)), None)
        # Question files carry the rendered prompt as `query` beside the question itself.
        text = doc["question"] if "query" in doc and isinstance(doc.get("question"), str) else text
        if text is not None:
            return text, _choices_of(doc)
    rendered = task.doc_to_text(doc)
    return (rendered if isinstance(rendered, str) else str(task.doc_to_target(doc))), []


def _choices_of(doc: Mapping[str, Any]) -> list[str]:
    for key in _CHOICES:
        value = doc.get(key)
        if isinstance(value, Mapping):
            value = value.get("text")
        if isinstance(value, list):
            return [str(v) for v in value]
    return next(([str(doc[a]), str(doc[b])] for a, b in _PAIRS if a in doc and b in doc), [])
