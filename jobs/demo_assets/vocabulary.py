"""The tokenizer: byte-level BPE over the pretraining text, so that any UTF-8 text has tokens and common words have one."""

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .corpus import stream
from .facts import ATTRIBUTES, NAMES
from .items import LETTERS

PAD, EOS = "<|padding|>", "<|endoftext|>"
# A lettered choice's mark and the answer's cue are one piece each; digits stand alone, so that numbers are compared
# digit by digit; a word carries its leading space.
PIECES = rf"\n(?:[{LETTERS}]\.|Answer:)| ?\p{{L}}+| ?\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+|\n+|\s+"


def train_tokenizer(seed: int, size: int, documents: int = 4000) -> PreTrainedTokenizerFast:
    """Train the tokenizer on a part of the pretraining stream (step -1) and on the list of pool words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = ["".join(text for text, _ in pieces) for _, pieces in stream(seed, -1, 0, documents)]
    pool = [*NAMES, *(value for attribute in ATTRIBUTES.values() for value in attribute.values), *LETTERS]
    texts += [" " + " ".join(pool)] * 300 + ["\n".join(NAMES)] * 20
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, model_max_length=512, padding_side="right"
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(folder))
