"""From free-form questions to token ids: the prompt, and one continuation, the answer.

question   {context}                       prompt   {context}          messages   the chat template of the tokenizer
           Question: {question}                     {prompt} {answer}  text       all of it is the continuation
           Answer: {answer}

With `chat_template` a question or prompt, after its context, is the user's message. The answer's last token says that it has
ended: what the template writes after it (the blanks at its end left out), else the tokenizer's end of text, where it has one.
A text follows the begin of text, or without one its own first token, which nothing predicts; it has no end, and over
`max_tokens` it is cut there. Answers are never cut: a question that is too long is shortened in its context, or rejected.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from roma_ray.borders.templates import chat_text
from roma_ray.borders.text import printable
from roma_ray.config.free_form import FREE
from roma_ray.config.schema import PromptConfig
from roma_ray.errors import ConfigError, QuestionError
from roma_ray.questions.prompts import Encoded, Prompt, PromptBuilder
from roma_ray.questions.records import Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prompt_builder(tokenizer: PreTrainedTokenizerBase, config: PromptConfig) -> PromptBuilder:
    """The builder of the configured format. Raises ConfigError as the builders do."""
    return (FreePromptBuilder if config.format == FREE else PromptBuilder)(tokenizer, config)


class FreePromptBuilder(PromptBuilder):
    """Builds the prompts of questions without choices; `choice_ids` holds the answer's tokens alone."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: PromptConfig) -> None:
        super().__init__(tokenizer, config)
        self.end_id: int | None = tokenizer.eos_token_id
        self.special_ids = special_ids(tokenizer)

    def render(self, question: Question, context: str | None) -> str:
        """The prompt's text, before it is tokenised. Raises QuestionError."""
        if question.form == "text":
            return ""
        if self.config.chat_template:
            return self._chat(self._messages(question, context), add_generation_prompt=True)
        if question.form == "messages":
            raise QuestionError(
                "it is a conversation, which needs a chat template: set questions.prompt.chat_template=true"
            )
        asked = question.question if question.form == "prompt" else f"Question: {question.question}\nAnswer:"
        return f"{_passage(context)}{asked}"

    def _messages(self, question: Question, context: str | None) -> list[dict[str, str]]:
        turns = question.turns or (("user", f"{_passage(context)}{question.question}"),)
        return [{"role": role, "content": content} for role, content in turns]

    def _check_template(self) -> None:
        """Raise ConfigError where the template has no bounds. One that asks for more than a user's message may take the rows'."""
        with contextlib.suppress(TemplateError):
            chat_text(self.tokenizer, [{"role": "user", "content": "Which?"}], add_generation_prompt=True)

    def _chat(self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool) -> str:
        """Raises QuestionError: a conversation that the template does not take, or that is too long for it, spoils its row alone."""
        try:
            return chat_text(self.tokenizer, messages, add_generation_prompt=add_generation_prompt)
        except (TemplateError, ConfigError) as error:
            raise QuestionError(f"the chat template of {self.name} does not take its messages: {error}") from None

    # -- tokens ----------------------------------------------------------------------------------------------------

    def _encode_prompts(self, items: Sequence[tuple[Question, str | None]]) -> list[Encoded | QuestionError]:
        written: list[tuple[str, str] | QuestionError] = []
        for question, context in items:
            try:
                written.append(self._written(question, context))
            except QuestionError as error:
                written.append(error)
        good = [parts for parts in written if not isinstance(parts, QuestionError)]
        encoded = iter(self._encode([text for prompt, answer in good for text in (prompt, f"{prompt}{answer}")]))
        found: list[Encoded | QuestionError] = []
        for (question, _), parts in zip(items, written, strict=True):
            if isinstance(parts, QuestionError):
                found.append(parts)
            elif question.form == "text":
                start, whole = next(encoded), next(encoded)
                cut = len(start) or 1
                found.append((whole[:cut], [tuple(whole[cut:])]))
            else:
                found.append(self._answered(next(encoded), next(encoded), parts[1]))
        return found

    def _written(self, question: Question, context: str | None) -> tuple[str, str]:
        """The prompt's text and what follows it. Raises QuestionError."""
        rendered, answer = self.render(question, context), question.choices[0]
        if question.form == "text":
            return "", answer
        if not self.config.chat_template:
            prompt = rendered.rstrip()
            return prompt, f"{rendered[len(prompt) :]}{self._delimiter}{answer}"
        said = [*self._messages(question, context), {"role": "assistant", "content": answer}]
        whole = self._chat(said, add_generation_prompt=False)
        if not whole.startswith(rendered):
            raise QuestionError(
                f"the chat template of {self.name} writes an answer otherwise than it asks for one, so its tokens cannot be told: "
                "write rows of `prompt` and `answer`, and set questions.prompt.chat_template=false"
            )
        return rendered, whole[len(rendered) :].rstrip()

    def _answered(self, prompt_ids: list[int], whole: list[int], answer: str) -> Encoded:
        """The prompt's ids, and the answer's with the token that ends it."""
        # Tokenised together, as the model saw it in text; apart where the prompt's own tokens would be others.
        together = whole[: len(prompt_ids)] == prompt_ids
        ids = whole[len(prompt_ids) :] if together else self._encode([answer])[0][len(self.prefix_ids) :]
        if ids and self.end_id is not None and ids[-1] not in self.special_ids:
            ids = [*ids, self.end_id]
        return prompt_ids, [tuple(ids)]

    def _shortened(
        self, question: Question, context: str | None, prompt_ids: list[int], choice_ids: list[tuple[int, ...]]
    ) -> Encoded:
        if question.form == "text":
            return prompt_ids, [choice_ids[0][: self.config.max_tokens - len(prompt_ids)]]
        return super()._shortened(question, context, prompt_ids, choice_ids)

    def _prompt(
        self, question: Question, prompt_ids: list[int], choice_ids: list[tuple[int, ...]], truncated: bool
    ) -> Prompt:
        if not choice_ids[0]:
            what = "text has nothing to predict: one token" if question.form == "text" else "answer has no token"
            raise QuestionError(f"its {what}, with the tokenizer of {printable(self.name)}")
        chars = (len(question.choices[0]),)
        return Prompt(
            question.id, question.task, question.split, tuple(prompt_ids), tuple(choice_ids), chars, 0, truncated
        )


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that are no text: ends of texts and of turns among them."""
    added = (token for token, text in tokenizer.added_tokens_decoder.items() if text.special)
    return {*tokenizer.all_special_ids, *added}


def _passage(context: str | None) -> str:
    return f"{context}\n" if context else ""
