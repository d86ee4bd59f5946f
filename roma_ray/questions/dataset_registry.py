"""The registry of Hugging Face data sets: the paper's eight training sets and how many questions it takes of each.

`dataset: NAME` in a configuration loads one from the hub (`pip install 'roma-ray[hub]'`), converts it and draws a
sample by seed. What the paper does not say is decided here, once: the tasks of BIG-bench and SuperGLUE share a sample
evenly (a small task gives all it has, the large ones the same number each); of MultiRC's several right answers one is
kept. KnowRef is not on the hub: `convert_knowref` turns its authors' file into one for `path:`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from roma_ray.borders.text import printable
from roma_ray.config.schema import ColumnsConfig
from roma_ray.errors import ConfigError, QuestionError
from roma_ray.questions import hub_schemas as hub
from roma_ray.questions.records import BadRow, Question, Rejected, make_question, seeded_key
from roma_ray.questions.shapes import questions_of

Loader = Callable[[str, str | None, str], Iterable[Mapping[str, Any]]]
"""(hub id, configuration or None, split) -> rows."""

KNOWREF_SOURCE = "https://github.com/aemami1/KnowRef60k (Overlap_Analysis/Test_sets/benchmarks/knowref/data/val.json)"


@dataclass(frozen=True, slots=True)
class HubPart:
    """One configuration and split of a hub data set; its rows become questions of `task`."""

    path: str
    config: str | None
    task: str
    convert: hub.Converter
    split: str = "train"


@dataclass(frozen=True, slots=True)
class HubDataset:
    """A registered data set: `count` is the paper's number of training questions."""

    name: str
    count: int
    parts: tuple[HubPart, ...]


# BIG-bench's multiple-choice tasks on the hub, without those that draw pictures in text, are another registered data
# set's own questions, or are about suicide or abuse. Which ones the paper used is not known.
_BIGBENCH = """
abstract_narrative_understanding anachronisms analytic_entailment arithmetic bbq_lite_json causal_judgment
cause_and_effect checkmate_in_one code_line_description color common_morpheme conceptual_combinations
contextual_parametric_knowledge_conflicts crash_blossom crass_ai cryobiology_spanish cs_algorithms date_understanding
disambiguation_qa discourse_marker_prediction elementary_math_qa emoji_movie empirical_judgments english_proverbs
english_russian_proverbs entailed_polarity entailed_polarity_hindi epistemic_reasoning
evaluating_information_essentiality fact_checker fantasy_reasoning figure_of_speech_detection
formal_fallacies_syllogisms_negation general_knowledge geometric_shapes goal_step_wikihow gre_reading_comprehension
hhh_alignment hindu_knowledge human_organs_senses hyperbaton identify_math_theorems identify_odd_metaphor implicatures
intent_recognition international_phonetic_alphabet_nli irony_identification kannada key_value_maps known_unknowns
logic_grid_puzzle logical_args logical_deduction logical_fallacy_detection logical_sequence mathematical_induction
metaphor_boolean metaphor_understanding misconceptions moral_permissibility movie_dialog_same_or_different
movie_recommendation navigate nonsense_words_grammar novel_concepts odd_one_out parsinlu_qa penguins_in_a_table
persian_idioms phrase_relatedness physical_intuition physics play_dialog_same_or_different presuppositions_as_nli
question_selection real_or_fake_text reasoning_about_colored_objects riddle_sense ruin_names
salient_translation_error_detection sentence_ambiguity similarities_abstraction simple_ethical_questions snarks
social_support sports_understanding strange_stories strategyqa swahili_english_proverbs swedish_to_german_proverbs
symbol_interpretation temporal_sequences timedial tracking_shuffled_objects understanding_fables undo_permutation
unit_interpretation vitaminc_fact_verification what_is_the_tao which_wiki_edit winowhy
"""
BIGBENCH_TASKS = tuple(_BIGBENCH.split())

_SUPERGLUE = {
    "boolq": hub.boolq,
    "cb": hub.cb,
    "copa": hub.copa,
    "rte": hub.rte,
    "wic": hub.wic,
    "wsc.fixed": hub.wsc,
}

REGISTRY: dict[str, HubDataset] = {
    dataset.name: dataset
    for dataset in (
        HubDataset(
            "bigbench",
            10_000,
            tuple(HubPart("tasksource/bigbench", t, f"bigbench/{t}", hub.each(hub.bigbench)) for t in BIGBENCH_TASKS),
        ),
        HubDataset(
            "superglue",
            10_000,
            tuple(
                HubPart("aps/super_glue", config, f"superglue/{config.partition('.')[0]}", hub.each(convert))
                for config, convert in _SUPERGLUE.items()
            ),
        ),
        HubDataset(
            "commonsense_qa",
            8_000,
            (HubPart("tau/commonsense_qa", None, "commonsense_qa", hub.each(hub.answer_key)),),
        ),
        # allenai/social_i_qa itself is a loading script, which the `datasets` library no longer runs.
        HubDataset("social_iqa", 8_000, (HubPart("lighteval/siqa", None, "social_iqa", hub.each(hub.social_iqa)),)),
        HubDataset(
            "openbookqa", 3_000, (HubPart("allenai/openbookqa", "main", "openbookqa", hub.each(hub.answer_key)),)
        ),
        HubDataset("sciq", 3_000, (HubPart("allenai/sciq", None, "sciq", hub.each(hub.sciq)),)),
        HubDataset("knowref", 3_000, ()),
        HubDataset("multirc", 4_000, (HubPart("aps/super_glue", "multirc", "multirc", hub.multirc),)),
    )
}


def load_dataset(
    name: str,
    *,
    task: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    loader: Loader | None = None,
    subset: str | None = None,
    part: str = "train",
    columns: ColumnsConfig | None = None,
    free: bool = False,
) -> Iterator[Question | Rejected]:
    """The rows that were set aside, then a seeded sample of a data set, in its own order.

    The sample has `limit` questions, or the paper's count, or all there are if fewer. `task` and `split` override. `subset`,
    `part`, `columns` and `free` are of a hub id (`owner/name`), which is none of the registry's.

    Raises:
        ConfigError: an unknown name, KnowRef (which needs a file), or the `datasets` library is not installed.
        QuestionError: the hub cannot be reached or does not have the data set.
    """
    if "/" in name:
        yield from _any_dataset(name, subset, part, columns, task, split, limit, seed, loader or _hub_rows, free)
        return
    dataset = REGISTRY.get(name)
    if dataset is None:
        raise ConfigError(
            f"unknown dataset '{printable(name)}': the registry has {', '.join(sorted(REGISTRY))}; any other of the hub is "
            "written `owner/name`"
        )
    if not dataset.parts:
        raise ConfigError(
            f"{name} is not on the Hugging Face hub. Get {KNOWREF_SOURCE}, turn it into a question file with\n"
            '  python -c "from roma_ray.questions.dataset_registry import convert_knowref; '
            "convert_knowref('val.json', 'knowref.jsonl')\"\n"
            "and use `path: knowref.jsonl` in place of `dataset: knowref`"
        )
    rows = loader or _hub_rows
    good: list[list[Question]] = []
    for piece in dataset.parts:
        questions: list[Question] = []
        for item in _converted(piece, rows(piece.path, piece.config, piece.split), task, split):
            if isinstance(item, Question):
                questions.append(item)
            else:
                yield item
        good.append(questions)
    quotas = share([len(questions) for questions in good], limit or dataset.count)
    for questions, quota in zip(good, quotas, strict=True):
        yield from _sample(questions, quota, seed)


def _any_dataset(
    name: str,
    subset: str | None,
    part: str,
    columns: ColumnsConfig | None,
    task: str | None,
    split: str | None,
    limit: int | None,
    seed: int,
    rows: Loader,
    free: bool,
) -> Iterator[Question | Rejected]:
    """The rows of any hub data set that were set aside, then a seeded sample of the others."""
    shown = f"{name}/{subset}" if subset else name
    questions: list[Question] = []
    for item in questions_of(
        (partial(dict, row) for row in rows(name, subset, part)),
        name=shown,
        ids=f"{shown}-{part}-",
        task=task,
        default_task=shown.partition("/")[2],
        split=split or "train",
        columns=columns,
        free=free,
        hint="" if columns else " (`columns` says where a data set keeps them)",
    ):
        if isinstance(item, Question):
            questions.append(item)
        else:
            yield item
    yield from _sample(questions, len(questions) if limit is None else limit, seed)


def _sample(questions: list[Question], count: int, seed: int) -> Iterator[Question]:
    """So many of the questions, drawn by seed, in their own order."""
    order = sorted(questions, key=lambda question: (seeded_key(seed, "sample", question.id), question.id))
    kept = {question.id for question in order[:count]}
    yield from (question for question in questions if question.id in kept)


def share(sizes: list[int], total: int) -> list[int]:
    """How many to take of each so that they add up to `total`, as evenly as the sizes allow, the first first."""
    quotas = [0] * len(sizes)
    left = min(total, sum(sizes))
    while left:
        open_ = [i for i, size in enumerate(sizes) if quotas[i] < size]
        step = max(1, left // len(open_))
        for i in open_:
            taken = min(step, sizes[i] - quotas[i], left)
            quotas[i] += taken
            left -= taken
    return quotas


def convert_knowref(source: str | Path, target: str | Path) -> int:
    """Write the KnowRef authors' JSON file as a question file, without unusable rows; the number of questions.

    Raises:
        QuestionError: the file cannot be read, is not the authors', or holds no usable row.
    """
    try:
        rows = json.loads(Path(source).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise QuestionError(f"KnowRef file '{source}' cannot be read: {printable(str(error))}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise QuestionError(f"'{source}' is not KnowRef's JSON file: it must hold a list of objects")
    part = HubPart("knowref", None, "knowref", hub.each(hub.knowref))
    questions = [item for item in _converted(part, rows, None, None) if isinstance(item, Question)]
    if not questions:
        raise QuestionError(f"'{source}' holds no usable KnowRef row (of {len(rows)})")
    with Path(target).open("w", encoding="utf-8") as stream:
        for q in questions:
            record = {"id": q.id, "task": q.task, "question": q.question, "choices": q.choices, "answer": q.answer}
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
    return len(questions)


def _converted(
    part: HubPart, rows: Iterable[Mapping[str, Any]], task: str | None, split: str | None
) -> Iterator[Question | Rejected]:
    file = f"{part.path}/{part.config}" if part.config else part.path
    for number, parts in part.convert(rows):
        # Hub data sets without ids of their own are fixed tables: the row number is as stable as an id.
        id = f"{part.task}-{part.split}-{number}"
        try:
            if isinstance(parts, BadRow):
                raise parts
            if parts.key is not None:
                id = f"{part.task}-{parts.key}"
            yield make_question(
                id=id,
                task=task or part.task,
                question=parts.question,
                choices=parts.choices,
                answer=parts.answer,
                context=parts.context,
                split=split or "train",
                file=file,
                line=number,
            )
        except BadRow as error:
            yield Rejected(file, number, printable(id), str(error))


def _hub_rows(path: str, config: str | None, split: str) -> Iterable[Mapping[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"reading {path} from the hub needs the `datasets` library: pip install 'roma-ray[hub]'"
        ) from error
    try:
        rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(path, config, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        named = f"{path} ({config})" if config else path
        raise QuestionError(
            f"data set {named} cannot be loaded from the Hugging Face hub: {printable(str(error), 300)}\n"
            "Check the network and HF_HUB_OFFLINE, or give the questions as a file with `path:`"
        ) from error
    return rows
