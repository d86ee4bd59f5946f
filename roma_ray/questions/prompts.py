"""From questions to token ids, in the two formats that are scored.

letter  lettered choices; the next token is a letter:       {instruction}
                                                            (empty line)
                                                            {context}
                                                            {question}
                                                            A. {choice}
                                                            B. {choice}
                                                            Answer:
cloze   scored by each choice's log-likelihood, as          {context}
        lm-evaluation-harness does:                         Question: {question}
                                                            Answer: {choice}

`prompt_ids` never holds a token of the continuation: its last token is the last one that the model reads before it
answers. A prompt over the limit is shortened by cutting the context from its start; instruction, question, choices and
the end always stay. With a chat template the prompt is the user's message, the choices follow without a space, and the
template alone decides about special tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from jinja2 import TemplateError

from roma_ray.borders.templates import chat_text
from roma_ray.borders.text import printable
from roma_ray.config.schema import PromptConfig
from roma_ray.errors import ConfigError, QuestionError
from roma_ray.questions.records import LETTERS, Question, Rejected

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 256
WORD_SEARCH = 40
"""A cut moves on to the next blank if there is one within so many characters, so that no half word is left."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question as token ids: `choice_ids[i]` continue `prompt_ids`; choice i has `choice_chars[i]` characters."""

    id: str
    task: str
    split: str
    prompt_ids: tuple[int, ...]
    choice_ids: tuple[tuple[int, ...], ...]
    choice_chars: tuple[int, ...]
    answer: int
    truncated: bool


Encoded = tuple[list[int], list[tuple[int, ...]]]
"""The ids of a prompt, and of each continuation."""
_PROBE = Question("probe", "probe", "Which?", ("one", "two"), 0)


class PromptTooLong(QuestionError):
    """A question whose prompt is over the length limit even without its context."""


def embedding_text(question: Question, include_context: bool) -> str:
    """What is embedded of a question: its text and choices, after its context if wanted; never the instruction, nor the answer to
    a question without choices.
    """
    context = [question.context] if include_context and question.context else []
    choices = question.choices if question.form == "choices" else ()
    return "\n".join([*context, question.question, *choices])


def build_prompts(questions: Iterable[Question], builder: PromptBuilder) -> tuple[list[Prompt], list[Rejected]]:
    """The prompts of all questions that have one within the limit, in order, and the others with the reason.

    Raises:
        QuestionError: there were questions, but none has a usable prompt.
    """
    prompts: list[Prompt] = []
    rejected: list[Rejected] = []
    for _, result in encode(questions, builder):
        if isinstance(result, Prompt):
            prompts.append(result)
        else:
            rejected.append(result)
    if rejected and not prompts:
        raise none_usable(len(rejected), rejected[0].reason)
    return prompts, rejected


def encode(questions: Iterable[Question], builder: PromptBuilder) -> Iterator[tuple[Question, Prompt | Rejected]]:
    """Each question with its prompt, or with why it has none within the limit."""
    stream = iter(questions)
    while batch := list(islice(stream, BATCH)):
        for question, result in zip(batch, builder.build_batch(batch), strict=True):
            if isinstance(result, Prompt):
                yield question, result
            else:
                yield question, Rejected(question.file, question.line, printable(question.id), str(result))


def none_usable(count: int, reason: str) -> QuestionError:
    """The error for questions of which none has a prompt; `reason` is the first's."""
    return QuestionError(f"none of the {count} questions has a usable prompt. The first: {reason}")


class PromptBuilder:
    """Builds prompts with one tokenizer and one configuration.

    Raises (at construction):
        ConfigError: no chat template where one is asked for; or, for `letter`, A and B are not one token each.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: PromptConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.name = printable(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
        if config.chat_template and not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                f"prompt.chat_template is on, but the tokenizer of {self.name} has no chat template: turn it "
                "off, or use an instruction-tuned model"
            )
        if config.chat_template:
            self._check_template()
        # lm-evaluation-harness joins prompt and choice by a blank, and by nothing after a chat template.
        self._delimiter = "" if config.chat_template else " "
        # What every prompt starts with: BOS, for some tokenizers.
        self.prefix_ids: list[int] = [] if config.chat_template else self._leading_special_ids()
        self._letter_ids: dict[int, tuple[int, ...]] = {}
        if config.format == "letter":
            self._letters(2)

    def _check_template(self) -> None:
        """Raise ConfigError where the chat template takes no question."""
        self.render(_PROBE, None)

    def build(self, question: Question) -> Prompt:
        """The prompt of one question.

        Raises:
            PromptTooLong: it is over `max_tokens` even without its context.
            QuestionError: a choice adds no token of its own.
            ConfigError: `letter` format, and a letter that the question needs is not one token.
        """
        result = self.build_batch([question])[0]
        if isinstance(result, QuestionError):
            raise result
        return result

    def build_batch(self, questions: Sequence[Question]) -> list[Prompt | QuestionError]:
        """As `build`, for many questions at once; what it would raise for a question stands in its place."""
        contexts = [question.context if self.config.context else None for question in questions]
        encoded = self._encode_prompts(list(zip(questions, contexts, strict=True)))
        results: list[Prompt | QuestionError] = []
        for question, context, ids in zip(questions, contexts, encoded, strict=True):
            try:
                prompt_ids, choice_ids = _unless_error(ids)
                truncated = self._length(prompt_ids, choice_ids) > self.config.max_tokens
                if truncated:
                    prompt_ids, choice_ids = self._shortened(question, context, prompt_ids, choice_ids)
                results.append(self._prompt(question, prompt_ids, choice_ids, truncated))
            except QuestionError as error:
                results.append(error)
        return results

    def render(self, question: Question, context: str | None) -> str:
        """The prompt's text, before it is tokenised."""
        passage = f"{context}\n" if context else ""
        if self.config.format == "cloze":
            text = f"{passage}Question: {question.question}\nAnswer:"
        else:
            instruction = f"{self.config.instruction}\n\n" if self.config.instruction else ""
            lines = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=False))
            text = f"{instruction}{passage}{question.question}\n{lines}\nAnswer:"
        if not self.config.chat_template:
            return text
        messages = [{"role": "user", "content": text}]
        try:
            return chat_text(self.tokenizer, messages, add_generation_prompt=True)
        except TemplateError as error:
            raise ConfigError(
                f"the chat template of {self.name} takes no single user message (question {printable(question.id)!r}): {error}"
            ) from None

    # -- tokens ----------------------------------------------------------------------------------------------------

    def _prompt(
        self, question: Question, prompt_ids: list[int], choice_ids: list[tuple[int, ...]], truncated: bool
    ) -> Prompt:
        empty = next((i for i, ids in enumerate(choice_ids) if not ids), None)
        if empty is not None:
            raise QuestionError(
                f"choice {LETTERS[empty]} adds no token to the prompt with the tokenizer of {self.name}"
            )
        return Prompt(
            id=question.id,
            task=question.task,
            split=question.split,
            prompt_ids=tuple(prompt_ids),
            choice_ids=tuple(choice_ids),
            choice_chars=tuple(len(choice) for choice in question.choices),
            answer=question.answer,
            truncated=truncated,
        )

    def _encode_prompts(self, items: Sequence[tuple[Question, str | None]]) -> list[Encoded | QuestionError]:
        """(prompt ids, each choice's ids) for each question with its context, in one call of the tokenizer; or why it has none."""
        parts = [self._parts(self.render(question, context)) for question, context in items]
        if self.config.format == "letter":
            prompts = self._encode([prompt for prompt, _ in parts])
            return [
                (ids, self._letters(len(question.choices))) for ids, (question, _) in zip(prompts, items, strict=True)
            ]
        texts: list[str] = []
        for (prompt, joint), (question, _) in zip(parts, items, strict=True):
            texts += [prompt, *(f"{prompt}{joint}{choice}" for choice in question.choices)]
        encoded = iter(self._encode(texts))
        result: list[Encoded | QuestionError] = []
        for question, _ in items:
            prompt_ids = next(encoded)
            # Tokenised together and cut at the prompt's length, so that the boundary is as the model saw it in text.
            result.append((prompt_ids, [tuple(next(encoded)[len(prompt_ids) :]) for _ in question.choices]))
        return result

    def _parts(self, rendered: str) -> tuple[str, str]:
        """The prompt without its trailing blanks, and what joins it to a continuation: those blanks and the delimiter.

        For `cloze` these are all blanks, as in lm-evaluation-harness. For `letter` the line end of a chat template's
        last line stays in the prompt: with it a letter would be two tokens.
        """
        prompt = rendered.rstrip() if self.config.format == "cloze" else rendered.rstrip(" ")
        return prompt, rendered[len(prompt) :] + self._delimiter

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        ids = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [self.prefix_ids + list(row) for row in ids]

    def _leading_special_ids(self) -> list[int]:
        """What the tokenizer by default puts before a text (BOS, for some); what it puts after has no place here."""
        text = self.render(_PROBE, None)
        plain = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        full = list(self.tokenizer(text)["input_ids"])
        for start in range(len(full) - len(plain) + 1 if plain else 0):
            if full[start : start + len(plain)] == plain:
                return full[:start]
        raise ConfigError(
            f"the tokenizer of {self.name} makes other tokens of a text when it adds special ones, or none"
        )

    def _letters(self, count: int) -> list[tuple[int, ...]]:
        """The one token of each of the first `count` letters, as it follows the end of a prompt."""
        if len(self._letter_ids) < count:
            prompt, joint = self._parts(self.render(_PROBE, None))
            prompt_ids, *whole = self._encode([prompt, *(f"{prompt}{joint}{letter}" for letter in LETTERS[:count])])
            unknown = getattr(self.tokenizer, "unk_token_id", None)
            tails = [tuple(ids[len(prompt_ids) :]) for ids in whole]
            for i, (ids, tail) in enumerate(zip(whole, tails, strict=True)):
                if ids[: len(prompt_ids)] != prompt_ids or len(tail) != 1 or tail[0] == unknown or tail in tails[:i]:
                    raise ConfigError(
                        f"the tokenizer of {self.name} does not make the answer '{LETTERS[i]}' one token of its own: "
                        "use prompt.format=cloze"
                    )
            self._letter_ids = dict(enumerate(tails))
        return [self._letter_ids[i] for i in range(count)]

    # -- shortening ------------------------------------------------------------------------------------------------

    def _length(self, prompt_ids: Sequence[int], choice_ids: Sequence[Sequence[int]]) -> int:
        return len(prompt_ids) + max(len(ids) for ids in choice_ids)

    def _shortened(
        self, question: Question, context: str | None, prompt_ids: list[int], choice_ids: list[tuple[int, ...]]
    ) -> Encoded:
        """The same prompt with as much of the end of its context as fits."""
        limit = self.config.max_tokens
        over = self._length(prompt_ids, choice_ids) - limit
        if context:
            for kept in self._tails(context, over):
                ids, choices = _unless_error(self._encode_prompts([(question, kept)])[0])
                if self._length(ids, choices) <= limit:
                    return ids, choices
        ids, choices = _unless_error(self._encode_prompts([(question, None)])[0])
        length = self._length(ids, choices)
        if length <= limit:
            return ids, choices
        without = " even without its context" if context else ""
        raise PromptTooLong(f"its prompt has {length} tokens{without}: the limit (prompt.max_tokens) is {limit}")

    def _tails(self, context: str, over: int) -> Iterator[str]:
        """Ever shorter ends of the context; the first is about `over` tokens shorter than the whole."""
        starts = self._token_starts(context)
        # The cut can change the tokens beside it, so the first guess may be over by one or two: each try drops more.
        drop, step = over, 1
        while drop < len(starts):
            start = starts[drop]
            blank = next(
                (i for i in range(start, min(start + WORD_SEARCH, len(context))) if context[i].isspace()), None
            )
            within_word = start > 0 and not context[start - 1].isspace() and not context[start].isspace()
            tail = context[blank if within_word and blank is not None else start :].strip()
            if tail:
                yield tail
            drop, step = drop + step, step * 2

    def _token_starts(self, context: str) -> list[int]:
        """Where each token of the context starts, in characters; without offsets, as if all were equally long."""
        if getattr(self.tokenizer, "is_fast", False):
            encoded = self.tokenizer(context, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            return [start for start, _ in encoded["offset_mapping"]]
        count = len(self.tokenizer(context, add_special_tokens=False, verbose=False)["input_ids"])
        return [i * len(context) // count for i in range(count)]


def _unless_error(found: Encoded | QuestionError) -> Encoded:
    if isinstance(found, QuestionError):
        raise found
    return found


def rule_scores(scores: Sequence[float], chars: Sequence[int], rule: str) -> np.ndarray:
    """What an answer rule compares, fp64: log-likelihoods, `normalized` by the choices' characters. The first highest is chosen."""
    values = np.asarray(scores, dtype=np.float64)
    return values / np.maximum(np.asarray(chars), 1) if rule == "normalized" else values
