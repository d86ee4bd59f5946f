"""The tokenizer: byte-level BPE over the world's texts, so that any UTF-8 text has tokens and common words have one."""

from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .corpus import Corpus
from .facts import ATTRIBUTES, TASKS

PAD, EOS = "<|padding|>", "<|endoftext|>"
# The answer's cue is one piece, so that the last prompt token is always the same; a word carries its leading space.
PIECES = r"\nAnswer:| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\n+|\s+"


def train_tokenizer(corpus: Corpus, size: int) -> PreTrainedTokenizerFast:
    """Train on all texts of the world, its questions and a list of its words. A name or value is one token with its space."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [d.lead + d.value for d in (*corpus.public, *(d for task in TASKS for d in corpus.domain(task)))]
    words = [*corpus.world.names, *(value for attribute in ATTRIBUTES.values() for value in attribute.values)]
    # Both with a space and at a text's start.
    texts += [" " + " ".join(words)] * 20 + words * 5
    texts += [question for attribute in ATTRIBUTES.values() for question in attribute.questions] * 20
    tokenizer.train_from_iterator(texts, trainer)
    out = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, model_max_length=512, padding_side="left"
    )
    _check(out, words)
    return out


def _check(tokenizer: PreTrainedTokenizerFast, words: Sequence[str]) -> None:
    long = [w for w, ids in zip(words, tokenizer([f" {w}" for w in words])["input_ids"], strict=True) if len(ids) > 1]
    if long:
        raise ValueError(
            f"{len(long)} names or values have several tokens ({long[0]} first): raise the vocabulary's size"
        )
