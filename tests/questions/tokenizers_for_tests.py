"""Small tokenizers of the kinds that models use, trained here on a few lines: byte-level, Metaspace and WordLevel."""

from __future__ import annotations

import string

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

LETTER_LINES = [f"Answer: {letter}\n{letter}. choice {letter}" for letter in string.ascii_uppercase] * 20
TEXT = [
    "Answer with the letter of the right choice.",
    "Question: Which animal barks at the moon when it is full?\nAnswer: the dog",
    "The passage says that dogs bark, cats purr and horses neigh in the long evenings of the year.",
    *LETTER_LINES,
]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def byte_level(*, bos: bool = False, eos: bool = False, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE as of GPT-2, OLMoE and Qwen; it covers every text. `bos`, `eos`: put by default around a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    _surround(tokenizer, bos, eos)
    return _wrapped(tokenizer, "byte-level", chat_template)


def metaspace(*, bos: bool = True) -> PreTrainedTokenizerFast:
    """BPE over "▁"-joined words as of Llama 2 and Mixtral."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<pad>", "<s>", "</s>", "<unk>"])
    tokenizer.train_from_iterator([*TEXT, string.printable], trainer)
    _surround(tokenizer, bos, False)
    return _wrapped(tokenizer, "metaspace", None)


def without_unknown() -> PreTrainedTokenizerFast:
    """BPE over words that drops characters it does not know."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=400, special_tokens=["<pad>", "<s>", "</s>"]))
    return _wrapped(tokenizer, "without-unknown", None)


def word_level(letters: str = string.ascii_uppercase) -> PreTrainedTokenizerFast:
    """One token a word, for a few words and the given letters; all else is unknown."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "Answer", ":", ".", "Which", "?", "one", "two", "three", *letters]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return _wrapped(tokenizer, "word-level", None)


def _surround(tokenizer: Tokenizer, bos: bool, eos: bool) -> None:
    single = ("<s> " if bos else "") + "$A" + (" </s>" if eos else "")
    tokens = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)


def _wrapped(tokenizer: Tokenizer, name: str, chat_template: str | None) -> PreTrainedTokenizerFast:
    unknown = {"unk_token": "<unk>"} if tokenizer.token_to_id("<unk>") is not None else {}
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", name_or_path=name, **unknown
    )
    wrapped.chat_template = chat_template
    return wrapped
