"""A whole tiny world for engine tests: tokenizer, MoE model, sentence-embedding model, questions, configuration."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from roma_ray.config.loading import parse_config
from roma_ray.config.schema import Config
from tests.tiny import save_tiny, tiny_moe

WORDS = "red green blue cat dog fish one two three four five six apple pear plum north south east west".split()  # noqa: SIM905


def make_questions(path: Path, count: int = 60, seed: int = 0, test_every: int = 3) -> None:
    """Write questions of two tasks; every third row is a test question."""
    rng = random.Random(seed)
    with open(path, "w") as stream:
        for number in range(count):
            choices = rng.sample(WORDS, 4 if number % 2 else 3)
            answer = rng.randrange(len(choices))
            row = {
                "id": f"q{number}",
                "task": "copy" if number % 2 else "pick",
                "question": f"Which word is {choices[answer]} {' '.join(rng.sample(WORDS, rng.randrange(1, 5)))} number {number}?",
                "choices": choices,
                "answer": "ABCD"[answer],
                "split": "test" if number % test_every == 0 else "train",
            }
            stream.write(json.dumps(row) + "\n")


def make_tokenizer(folder: Path) -> int:
    """Write a small byte-level tokenizer into `folder`; returns its vocabulary's size."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = [
        "Answer with the letter of the right choice. Question: Answer: A B C D E A. B. C. D. " + " ".join(WORDS)
    ] * 20
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<pad>", "<eos>"]
    )
    tokenizer.train_from_iterator(text, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    return tokenizer.get_vocab_size()


def make_encoder(folder: Path, tokenizer: Path) -> None:
    """Write a tiny sentence-transformers model (mean of random word vectors) into `folder`."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import StaticEmbedding

    words = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    generator = torch.Generator().manual_seed(7)
    weights = torch.randn(words.get_vocab_size(), 24, generator=generator)
    SentenceTransformer(modules=[StaticEmbedding(words, embedding_weights=weights.numpy())], device="cpu").save(
        str(folder)
    )


def make_world(
    root: Path, family: str = "olmoe", *, dtype: torch.dtype = torch.float32, count: int = 60, **sections: Any
) -> Config:
    """Write everything under `root` and return a configuration that uses it; `sections` are merged into it."""
    folder = root / "model"
    folder.mkdir(parents=True)
    vocabulary = make_tokenizer(folder)
    save_tiny(tiny_moe(family, seed=3, dtype=dtype, vocab_size=vocabulary), folder)
    make_encoder(root / "encoder", folder)
    make_questions(root / "questions.jsonl", count)
    data: dict[str, Any] = {
        "storage": str(root / "storage"),
        "device": "cpu",
        "model": {"path": str(folder)},
        "questions": {"sources": [{"path": str(root / "questions.jsonl")}]},
        "routing": {"layers": "L2"},
        "extraction": {"batch_tokens": 512},
        "embedding": {"model": str(root / "encoder")},
        "finetune": {"epochs": 2, "batch_size": 8, "micro_batch_size": 4, "learning_rate": 0.01, "checkpoint_steps": 2},
    }
    for name, values in sections.items():
        data[name] = {**data[name], **values} if isinstance(data.get(name), dict) else values
    return parse_config(data)
