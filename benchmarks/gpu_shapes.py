"""What `gpu.py` measures: published shapes with random weights made on the device, their arithmetic, and their head's data.

T tokens, N kept tokens, L layers, E experts, Q questions.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import common  # noqa: F401 - puts the repository's root on the path
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from roma_ray.engine.cache import ROWS, ActivationCache
from roma_ray.engine.forward import own_tokens
from roma_ray.engine.objective import TrainingData
from roma_ray.engine.question_table import write_table
from roma_ray.manifold.neighbors import Neighborhoods
from roma_ray.moe.backbones import model_class_of
from roma_ray.moe.fitting import skeleton_of
from roma_ray.moe.packing import ATTENTION
from roma_ray.moe.slice_config import slice_config
from roma_ray.moe.slices import Slice

TUNED = 5
# Memory that is left for what passes over 32,768 tokens hold beside the weights.
_WORKING_BYTES = 12e9


@dataclass(frozen=True)
class Shape:
    """A model's published shape, and the tokens a second that its extraction must reach without sharing on one H100."""

    name: str
    model_type: str
    values: dict[str, Any]
    floor: float

    def config(self, layers: int | None = None) -> Any:
        """Its transformers configuration, of some of its layers where that is asked for."""
        changed = {} if layers is None else {"num_hidden_layers": layers}
        return CONFIG_MAPPING[self.model_type](**{**self.values, **changed})

    @property
    def layers(self) -> int:
        """Layers of the whole model."""
        return int(self.values["num_hidden_layers"])

    def tiny(self) -> Shape:
        """The same family at a shape that a CPU computes in seconds."""
        small: dict[str, Any] = {
            **{"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4},
            **{"intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2},
        }
        small |= {name: 16 for name in ("moe_intermediate_size", "head_dim") if name in self.values}
        small["num_key_value_heads"] = 2 if self.model_type == "qwen3_moe" else 4
        return replace(self, name=f"{self.name}, tiny", values={**self.values, **small})


SHAPES = {
    "olmoe": Shape(
        "OLMoE-1B-7B",
        "olmoe",
        {
            **{"vocab_size": 50_304, "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16},
            **{"num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8},
            **{"max_position_embeddings": 4096, "norm_topk_prob": False, "eos_token_id": None},
        },
        106_000,
    ),
    "qwen3": Shape(
        "Qwen3-30B-A3B",
        "qwen3_moe",
        {
            **{"vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768},
            **{"num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128},
            **{"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True},
            **{"max_position_embeddings": 40_960, "eos_token_id": None},
        },
        42_000,
    ),
}


def fitting_layers(shape: Shape, room: float | None, dtype: torch.dtype) -> int:
    """How many of a shape's layers fit `room` bytes beside what passes need; all where `room` is None. At least `TUNED` + 1."""
    if room is None:
        return shape.layers
    config = shape.config(layers=1)
    skeleton = skeleton_of(model_class_of(config, with_lm_head=True), config)
    layer = sum(p.numel() for p in skeleton.base_model.layers[0].parameters()) * dtype.itemsize
    ends = skeleton.num_parameters() * dtype.itemsize - layer
    return max(TUNED + 1, min(shape.layers, int((room - _WORKING_BYTES - ends) // layer)))


def build(shape: Shape, layers: int, device: str, dtype: torch.dtype) -> Slice:
    """A shape with random weights, made on the device: nothing is read, copied or written. Gates as `save_model` has them."""
    config = shape.config(layers)
    config.use_cache = False
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION["sdpa"])
    part = Slice(model.requires_grad_(False).eval(), 0, layers, layers, shape.name, None)
    with torch.no_grad():
        for router in part.routers:
            router.gate.weight.mul_(3)
    return part


def head_of(whole: Slice, cut: int) -> Slice:
    """The head of a whole model, made of its own layers: no second copy of any weight."""
    model, base = whole.model, whole.model.base_model
    head = skeleton_of(type(model), slice_config(copy.deepcopy(model.config), cut, whole.stop))
    head.set_attn_implementation(ATTENTION["sdpa"])
    head.base_model.layers = nn.ModuleList(list(base.layers)[cut:])
    for name in ("embed_tokens", "norm", "rotary_emb"):
        setattr(head.base_model, name, getattr(base, name))
    head.lm_head = model.lm_head
    return Slice(head.requires_grad_(False).eval(), cut, whole.stop, whole.num_layers, whole.path, None)


def matmul_flops(config: Any, tokens: int, kept: int) -> float:
    """FLOPs of the matmuls of a pass that reads `kept` tokens: projections, gates, chosen experts, `lm_head`; not the scores
    of attention, which are a hundredth at these lengths."""
    width, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or width // heads
    keys = 2 * width * 2 * config.num_key_value_heads * head
    queries = 2 * width * 2 * heads * head
    expert = getattr(config, "moe_intermediate_size", config.intermediate_size)
    experts = 2 * width * config.num_experts + config.num_experts_per_tok * 3 * 2 * width * expert
    full = (config.num_hidden_layers - 1) * (keys + queries + experts)
    # The last layer makes keys and values of all tokens, and the rest of the kept ones alone.
    return tokens * (full + keys) + kept * (queries + experts + 2 * width * config.vocab_size)


def write_rows(folder: Path, prompts: Sequence[Any], plan: Sequence[Sequence[int]], prefix: int) -> None:
    """The table that says where each question's cached states lie, as an extraction leaves it."""
    import pyarrow as pa

    names = ("row", "batch", "offset", "tokens", "shard_tokens")
    found: list[tuple[int, ...]] = []
    for number, rows in enumerate(plan):
        lengths = [own_tokens(prompts[row], prefix) for row in rows]
        starts = [prefix + sum(lengths[:n]) for n in range(len(rows))]
        total = prefix + sum(lengths)
        found += [
            (row, number, *place, total) for row, place in zip(rows, zip(starts, lengths, strict=True), strict=True)
        ]
    columns = {name: list(values) for name, values in zip(names, zip(*sorted(found), strict=True), strict=True)}
    write_table(folder / ROWS, columns, pa.schema([(name, pa.int64()) for name in names]), {"prefix": prefix})


def training_data(
    folder: Path, cut: int, prompts: Sequence[Any], routing_QLE: torch.Tensor, train: int, batch_tokens: int
) -> TrainingData:
    """What the loop reads: the first `train` questions, three random neighbors each, and the rest for validation."""
    count = len(prompts)
    generator = torch.Generator().manual_seed(0)
    queried = torch.arange(count) < train
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), (3 * queried.long()).cumsum(0)])
    indices = torch.randint(train, (3 * train,), generator=generator)
    ones = torch.ones(3 * train, dtype=torch.float64)
    tuned_QLE = routing_QLE[:, cut:].contiguous()
    return TrainingData(
        prompts=prompts,
        states=ActivationCache(folder, cut),
        train=list(range(train)),
        validation=list(range(train, count)),
        neighborhoods=Neighborhoods(offsets, indices, ones, ones / 3, queried),
        routing_NLE=tuned_QLE,
        successful_N=queried,
        base_NLE=tuned_QLE,
        tokens="Last1",
        rule="raw",
        cloze=False,
        batch_tokens=batch_tokens,
    )
