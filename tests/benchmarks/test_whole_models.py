"""A model that stock transformers loads whole is refused where stock would make up a part of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from roma_ray.benchmarks.judged_model import Subject, resolve_subject
from roma_ray.config.loading import parse_config
from roma_ray.errors import ModelError
from tests.moe.test_fitting import configure, edit

SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def dense(folder: Path, **settings: object) -> Subject:
    LlamaForCausalLM(LlamaConfig(**SIZES, **settings)).save_pretrained(folder)
    config = parse_config(
        {
            "storage": str(folder / "storage"),
            "device": "cpu",
            "model": {"path": str(folder)},
            "questions": {"sources": [{"path": "none.jsonl"}]},
        }
    )
    subject = resolve_subject(config, adapter=None)
    assert not subject.sliced
    return subject


@pytest.mark.parametrize(
    "key", ["model.norm.weight", "lm_head.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"]
)
def test_a_missing_tensor_is_named(tmp_path: Path, key: str, capfd: pytest.CaptureFixture[str]) -> None:
    subject = dense(tmp_path)
    edit(tmp_path, lambda tensors: tensors.pop(key))
    capfd.readouterr()
    with pytest.raises(ModelError, match=f": {key} is missing"):
        subject.load_whole()
    assert capfd.readouterr().err == "", "the one error message is all that a user should see"


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    subject = dense(tmp_path)
    configure(tmp_path, intermediate_size=32)
    with pytest.raises(ModelError, match=r"model.layers.0.mlp.down_proj.weight does not fit"):
        subject.load_whole()


def test_what_a_whole_model_may_lack_or_have_beside(tmp_path: Path) -> None:
    """A tied head is not stored, and old files hold buffers that nothing reads."""
    subject = dense(tmp_path, tie_word_embeddings=True)
    edit(tmp_path, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    model = subject.load_whole()
    assert model.lm_head.weight is model.model.embed_tokens.weight
