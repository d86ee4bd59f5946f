"""Free-form questions as token ids: against the `cloze` format, against the chat template's own text, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from roma_ray.config.schema import PromptConfig
from roma_ray.errors import ConfigError, QuestionError
from roma_ray.questions.free_prompts import FreePromptBuilder, prompt_builder
from roma_ray.questions.prompts import PromptBuilder, build_prompts
from roma_ray.questions.records import Question
from tests.questions.tokenizers_for_tests import CHAT_TEMPLATE, byte_level, metaspace

BEES = Question("b", "t", "What do bees make?", ("the dog", "honey"), 0, "Bees bark.", form="question")
PLAIN = Question("p", "t", "dog ->", ("chien",), 0, form="prompt")
TURNS = (("user", "Hi"), ("assistant", "Hello!"), ("user", "Who?"))
CHAT = Question("c", "t", "Hi\nHello!\nWho?", ("the dog",), 0, form="messages", turns=TURNS)
WORDS = "The passage says that nine zebras jog over quartz."
TEXT = Question("x", "t", WORDS, (WORDS,), 0, form="text")
ENDED = CHAT_TEMPLATE.replace("{{ m['content'] }}\n", "{{ m['content'] }}</s>\n")


def builder(tokenizer: Any = None, **config: Any) -> FreePromptBuilder:
    found = prompt_builder(tokenizer or byte_level(), PromptConfig(format="free", **config))
    assert isinstance(found, FreePromptBuilder)
    return found


@pytest.mark.parametrize(
    "tokenizer", [byte_level(), byte_level(bos=True), metaspace()], ids=["bytes", "bos", "metaspace"]
)
def test_a_question_is_a_cloze_question_with_one_continuation_that_ends(tokenizer: Any) -> None:
    cloze = PromptBuilder(tokenizer, PromptConfig(format="cloze"))
    asked = cloze.build(Question("b", "t", BEES.question, ("the dog", "x"), 0, BEES.context))
    free = builder(tokenizer).build(BEES)
    assert free.prompt_ids == asked.prompt_ids
    assert free.choice_ids == ((*asked.choice_ids[0], tokenizer.eos_token_id),)
    assert (free.answer, free.choice_chars) == (0, (7,))


def test_a_prompt_stands_as_it_is_and_a_blank_joins_the_answer() -> None:
    tokenizer = byte_level()
    free = builder(tokenizer).build(PLAIN)
    assert tokenizer.decode(free.prompt_ids) == "dog ->"
    assert tokenizer.decode(free.choice_ids[0]) == " chien</s>"


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, ENDED], ids=["no end", "end"])
def test_a_conversation_is_the_templates_own_text(template: str) -> None:
    """The prompt ends where the model would go on; the answer ends with the template's own end, else the end of text."""
    tokenizer = byte_level(chat_template=template)
    messages = [{"role": role, "content": content} for role, content in TURNS]
    free = builder(tokenizer, chat_template=True).build(CHAT)
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(free.prompt_ids) == rendered
    assert tokenizer.decode(free.choice_ids[0]) == "the dog</s>"
    assert free.choice_ids[0][-1] == tokenizer.eos_token_id


def test_a_question_in_a_conversation_is_the_users_message() -> None:
    tokenizer = byte_level(chat_template=ENDED)
    free = builder(tokenizer, chat_template=True).build(BEES)
    assert tokenizer.decode(free.prompt_ids) == "<s><|user|>\nBees bark.\nWhat do bees make?</s>\n<|assistant|>\n"
    assert tokenizer.decode(free.choice_ids[0]) == "the dog</s>"


@pytest.mark.parametrize("bos", [False, True])
def test_all_tokens_of_a_text_are_predicted_that_something_comes_before(bos: bool) -> None:
    tokenizer = byte_level(bos=bos)
    whole = tokenizer(TEXT.question)["input_ids"]
    free = builder(tokenizer).build(TEXT)
    assert len(free.prompt_ids) == 1
    assert [*free.prompt_ids, *free.choice_ids[0]] == whole
    short = builder(tokenizer, max_tokens=8).build(TEXT)
    assert [*short.prompt_ids, *short.choice_ids[0]] == whole[:8]
    assert (free.truncated, short.truncated) == (False, True)


def test_a_long_question_loses_context_and_never_answer() -> None:
    tokenizer = byte_level()
    long = Question("l", "t", "Which?", ("the dog",), 0, "Dogs bark. " * 40, form="question")
    free = builder(tokenizer, max_tokens=40).build(long)
    assert free.truncated
    assert len(free.prompt_ids) + len(free.choice_ids[0]) <= 40
    assert tokenizer.decode(free.choice_ids[0]) == " the dog</s>"
    endless = Question("e", "t", "Which?", ("dog " * 60,), 0, form="question")
    with pytest.raises(QuestionError, match=r"the limit \(prompt.max_tokens\) is 40"):
        builder(tokenizer, max_tokens=40).build(endless)


def test_what_a_template_does_not_take_spoils_its_row_alone() -> None:
    strict = "{% if messages|length > 2 %}{{ raise_exception('one turn only') }}{% endif %}" + ENDED
    prompts, rejected = build_prompts([BEES, CHAT], builder(byte_level(chat_template=strict), chat_template=True))
    assert [p.id for p in prompts] == ["b"]
    assert "does not take its messages" in rejected[0].reason
    thinking = ENDED.replace("<|assistant|>\n{% endif %}", "<|assistant|>\n<think>{% endif %}")
    with pytest.raises(QuestionError, match="writes an answer otherwise than it asks for one"):
        builder(byte_level(chat_template=thinking), chat_template=True).build(CHAT)


def test_a_template_that_asks_for_a_system_message_or_less_text_spoils_no_other_row() -> None:
    system = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system message') }}{% endif %}" + ENDED
    told = Question("s", "t", "Hi", ("the dog",), 0, form="messages", turns=(("system", "Bark."), ("user", "Hi")))
    long = Question("l", "t", "Hi", ("x " * (1 << 21),), 0, form="messages", turns=told.turns)
    prompts, rejected = build_prompts([long, BEES, told], builder(byte_level(chat_template=system), chat_template=True))
    assert [p.id for p in prompts] == ["s"]
    assert "4194" in rejected[0].reason
    assert "no system message" in rejected[1].reason


def test_conversations_need_a_template() -> None:
    prompts, rejected = build_prompts([BEES, CHAT], builder())
    assert [p.id for p in prompts] == ["b"]
    assert "set questions.prompt.chat_template=true" in rejected[0].reason
    with pytest.raises(ConfigError, match="has no chat template"):
        builder(chat_template=True)


def test_a_text_of_one_token_has_nothing_to_predict() -> None:
    with pytest.raises(QuestionError, match="nothing to predict"):
        builder().build(Question("x", "t", "A", ("A",), 0, form="text"))
