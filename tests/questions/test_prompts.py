"""Prompts: the exact texts, what is the prompt and what the continuation, shortening, special tokens, refusals."""

from __future__ import annotations

from typing import Any

import pytest

from roma_ray.config.schema import PromptConfig
from roma_ray.errors import ConfigError, QuestionError
from roma_ray.questions import prompts as prompts_module
from roma_ray.questions.prompts import Prompt, PromptBuilder, PromptTooLong, build_prompts, embedding_text
from roma_ray.questions.records import Question
from tests.questions.tokenizers_for_tests import CHAT_TEMPLATE, byte_level, metaspace, without_unknown, word_level

DOGS = Question("q1", "animals", "Which animal barks?", ("the cat", "the dog", "a horse"), 1, "Dogs bark.", "test")
PLAIN = Question("q2", "animals", "Which?", ("one", "two"), 0)
LONG = " ".join(f"Sentence number {i} says that dog {i} barks in the evening." for i in range(60))


def builder(tokenizer: Any = None, **config: Any) -> PromptBuilder:
    return PromptBuilder(tokenizer or byte_level(), PromptConfig(**config))


def text_of(prompt: Prompt, tokenizer: Any = None) -> str:
    return (tokenizer or byte_level()).decode(prompt.prompt_ids)


def test_the_letter_prompt_to_the_letter() -> None:
    prompt = builder().build(DOGS)
    assert text_of(prompt) == (
        "Answer with the letter of the right choice.\n\n"
        "Dogs bark.\nWhich animal barks?\nA. the cat\nB. the dog\nC. a horse\nAnswer:"
    )
    assert [byte_level().decode(ids) for ids in prompt.choice_ids] == [" A", " B", " C"]
    assert all(len(ids) == 1 for ids in prompt.choice_ids)
    assert prompt.choice_chars == (7, 7, 7)
    assert (prompt.id, prompt.task, prompt.split, prompt.answer) == ("q1", "animals", "test", 1)
    assert not prompt.truncated


@pytest.mark.parametrize("context", [True, False])
@pytest.mark.parametrize("instruction", ["", "Choose."])
def test_instruction_and_context_can_be_left_out(context: bool, instruction: str) -> None:
    prompt = builder(context=context, instruction=instruction).build(DOGS)
    expected = (f"{instruction}\n\n" if instruction else "") + ("Dogs bark.\n" if context else "")
    assert text_of(prompt) == expected + "Which animal barks?\nA. the cat\nB. the dog\nC. a horse\nAnswer:"


def test_the_cloze_prompt_to_the_letter() -> None:
    tokenizer = byte_level()
    prompt = builder(tokenizer, format="cloze").build(DOGS)
    assert text_of(prompt) == "Dogs bark.\nQuestion: Which animal barks?\nAnswer:"
    assert [tokenizer.decode(ids) for ids in prompt.choice_ids] == [" the cat", " the dog", " a horse"]
    assert prompt.choice_chars == (7, 7, 7)
    blank = Question("w", "w", "Ann met Sue so _ smiled.", ("Ann", "Sue"), 0)
    assert text_of(builder(format="cloze").build(blank)) == "Question: Ann met Sue so _ smiled.\nAnswer:"


@pytest.mark.parametrize("make", [byte_level, metaspace, word_level])
@pytest.mark.parametrize("template", [False, True])
def test_cloze_tokens_are_those_of_lm_evaluation_harness(make: Any, template: bool) -> None:
    """Its rule, written out: blanks at the prompt's end join the continuation; both are tokenised together and cut."""
    tokenizer = make()
    if template:
        tokenizer.chat_template = CHAT_TEMPLATE.replace("{{ bos_token }}", "")
    prompt = builder(tokenizer, format="cloze", chat_template=template).build(DOGS)
    context = "Dogs bark.\nQuestion: Which animal barks?\nAnswer:"
    if template:
        context = f"<|user|>\n{context}\n<|assistant|>\n"
    for choice, choice_ids in zip(DOGS.choices, prompt.choice_ids, strict=True):
        continuation = choice if template else f" {choice}"
        spaces = len(context) - len(context.rstrip())
        joined = context[len(context) - spaces :] + continuation
        options = {"add_special_tokens": not template}
        whole = tokenizer.encode(context.rstrip() + joined, **options)
        context_ids = tokenizer.encode(context.rstrip(), **options)
        assert prompt.prompt_ids == tuple(context_ids)
        assert choice_ids == tuple(whole[len(context_ids) :])


@pytest.mark.parametrize("format", ["letter", "cloze"])
@pytest.mark.parametrize("make", [byte_level, metaspace, word_level])
def test_the_last_prompt_token_is_before_the_answer(make: Any, format: str) -> None:
    """The prompt is the same whichever choice is right, and ends where the model is to answer."""
    tokenizer = make()
    prompts = [
        builder(tokenizer, format=format).build(Question("q", "t", "Which?", ("one", "two", "three"), answer))
        for answer in range(3)
    ]
    assert len({prompt.prompt_ids for prompt in prompts}) == 1
    assert tokenizer.decode(prompts[0].prompt_ids[-1:]).endswith(":")


def test_special_tokens_are_the_tokenizers_default_before_the_text_and_none_after() -> None:
    with_both = byte_level(bos=True, eos=True)
    assert with_both.encode("x")[0] == 1
    assert with_both.encode("x")[-1] == 2
    for format in ("letter", "cloze"):
        ids = builder(with_both, format=format).build(DOGS).prompt_ids
        assert ids[0] == 1
        assert 1 not in ids[1:]
        assert 2 not in ids
        assert builder(format=format).build(DOGS).prompt_ids == ids[1:]


def test_a_chat_template_decides_about_the_first_token_itself() -> None:
    tokenizer = byte_level(bos=True, chat_template=CHAT_TEMPLATE)
    prompt = builder(tokenizer, chat_template=True).build(PLAIN)
    assert prompt.prompt_ids.count(1) == 1
    assert tokenizer.decode(prompt.prompt_ids) == (
        "<s><|user|>\nAnswer with the letter of the right choice.\n\nWhich?\nA. one\nB. two\nAnswer:\n<|assistant|>\n"
    )
    assert [tokenizer.decode(ids) for ids in prompt.choice_ids] == ["A", "B"]
    without = byte_level(bos=True, chat_template=CHAT_TEMPLATE.replace("{{ bos_token }}", ""))
    assert 1 not in builder(without, chat_template=True).build(PLAIN).prompt_ids


def test_blanks_at_the_end_of_a_chat_template_go_to_the_letter() -> None:
    template = "{% for m in messages %}{{ m['content'] }} [/INST] {% endfor %}"
    tokenizer = byte_level(chat_template=template)
    prompt = builder(tokenizer, chat_template=True).build(PLAIN)
    assert tokenizer.decode(prompt.prompt_ids).endswith("Answer: [/INST]")
    assert tokenizer.decode(prompt.choice_ids[0]) == " A"


def test_chat_templates_that_cannot_be_used() -> None:
    with pytest.raises(ConfigError, match="byte-level has no chat template"):
        builder(chat_template=True)
    refusing = byte_level(chat_template="{{ raise_exception('a system message is needed') }}")
    with pytest.raises(ConfigError, match="a system message is needed"):
        builder(refusing, chat_template=True)


def test_letters_must_be_one_token_each() -> None:
    with pytest.raises(ConfigError, match=r"word-level does not make the answer 'A' one token.*prompt\.format=cloze"):
        builder(word_level(letters=""))
    few = builder(word_level(letters="AB"))
    assert few.build(PLAIN).choice_ids != ((3,), (3,))
    with pytest.raises(ConfigError, match="the answer 'C' one token"):
        few.build(Question("q", "t", "Which?", ("one", "two", "three"), 0))
    builder(word_level(letters=""), format="cloze")


def test_twenty_six_choices() -> None:
    question = Question("q", "t", "Which?", tuple(f"choice {i}" for i in range(26)), 25)
    prompt = builder().build(question)
    assert len(set(prompt.choice_ids)) == 26
    assert "\nZ. choice 25\nAnswer:" in text_of(prompt)


@pytest.mark.parametrize("format", ["letter", "cloze"])
@pytest.mark.parametrize("make", [byte_level, metaspace])
@pytest.mark.parametrize("limit", [250, 300, 400, 700])
def test_shortening_keeps_all_but_the_start_of_the_context(make: Any, format: str, limit: int) -> None:
    tokenizer = make()
    question = Question("q", "t", "Which animal barks?", ("the cat", "the dog"), 1, LONG)
    prompt = builder(tokenizer, format=format, max_tokens=limit).build(question)
    bare = builder(tokenizer, format=format, context=False).build(question)
    assert prompt.truncated
    length = len(prompt.prompt_ids) + max(len(ids) for ids in prompt.choice_ids)
    # Uses what room there is: at most a word or two are lost to the cut at a blank.
    assert limit - 25 <= length <= limit
    assert prompt.choice_ids == bare.choice_ids
    text, without = (tokenizer.decode(p.prompt_ids, skip_special_tokens=True) for p in (prompt, bare))
    start, end = without.split("Which animal barks?" if format == "letter" else "Question:", 1)
    assert text.startswith(start)
    assert text.endswith(end)
    kept = text[len(start) :].split("\n", 1)[0]
    assert LONG.endswith(kept)
    assert LONG[-len(kept) - 1] == " "


def test_a_prompt_that_fits_is_not_touched() -> None:
    question = Question("q", "t", "Which animal barks?", ("the cat", "the dog"), 1, LONG)
    whole = builder().build(question)
    exact = len(whole.prompt_ids) + 1
    assert builder(max_tokens=exact).build(question) == whole
    assert builder(max_tokens=exact - 1).build(question).truncated


def test_without_offsets_the_cut_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level()
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    question = Question("q", "t", "Which animal barks?", ("the cat", "the dog"), 1, LONG)
    prompt = builder(tokenizer, max_tokens=300).build(question)
    assert prompt.truncated
    assert 200 <= len(prompt.prompt_ids) < 300


def test_a_context_without_blanks_is_cut_between_tokens() -> None:
    question = Question("q", "t", "Which?", ("one", "two"), 1, "猫" * 500)
    prompt = builder(max_tokens=400).build(question)
    assert prompt.truncated
    assert 390 <= len(prompt.prompt_ids) < 400
    assert "猫猫\nWhich?" in text_of(prompt)


def test_a_context_that_does_not_fit_at_all_is_dropped() -> None:
    question = Question("q", "t", "Which?", ("one", "two"), 1, "猫" * 500)
    bare = builder(context=False).build(question)
    prompt = builder(max_tokens=len(bare.prompt_ids) + 1).build(question)
    assert prompt.prompt_ids == bare.prompt_ids
    assert prompt.truncated


def test_a_question_over_the_limit_is_rejected_with_file_and_line() -> None:
    tall = Question("tall", "t", LONG, ("one", "two"), 0, "context", "train", "q.jsonl", 12)
    with pytest.raises(PromptTooLong, match=r"even without its context: the limit \(prompt.max_tokens\) is 100"):
        builder(max_tokens=100).build(tall)
    prompts, rejected = build_prompts([PLAIN, tall, PLAIN], builder(max_tokens=100))
    assert [prompt.id for prompt in prompts] == ["q2", "q2"]
    assert [(row.file, row.line, row.id) for row in rejected] == [("q.jsonl", 12, "tall")]
    with pytest.raises(QuestionError, match="none of the 1 questions has a usable prompt"):
        build_prompts([tall], builder(max_tokens=100))
    assert build_prompts([], builder()) == ([], [])


@pytest.mark.parametrize("format", ["letter", "cloze"])
def test_a_batch_is_the_same_as_one_by_one(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [
        Question(
            f"{i}", "t", f"Which of {i}?", tuple(f"choice {c}" for c in range(2 + i % 4)), 0, LONG[: i * 40] or None
        )
        for i in range(80)
    ]
    monkeypatch.setattr(prompts_module, "BATCH", 32)
    built = builder(format=format, max_tokens=400)
    prompts, rejected = build_prompts(questions, built)
    assert rejected == []
    assert 0 < sum(prompt.truncated for prompt in prompts) < 80
    assert prompts == [built.build(question) for question in questions]


def test_a_choice_that_adds_no_token_is_rejected() -> None:
    """A BPE tokenizer without an unknown token drops what it does not know."""
    question = Question("q", "t", "Which?", ("one", "🦉"), 0)
    result = builder(without_unknown(), format="cloze").build_batch([question])[0]
    assert isinstance(result, QuestionError)
    assert "choice B adds no token" in str(result)


def test_the_embedded_text_has_no_instruction() -> None:
    assert embedding_text(DOGS, False) == "Which animal barks?\nthe cat\nthe dog\na horse"
    assert embedding_text(DOGS, True) == "Dogs bark.\nWhich animal barks?\nthe cat\nthe dog\na horse"
    assert embedding_text(PLAIN, True) == "Which?\none\ntwo"
