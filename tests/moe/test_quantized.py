"""Quantized checkpoints as published: dequantized to the bit as by hand, a slice at a time; exports keep the packed experts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from roma_ray.benchmarks.judged_model import resolve_subject
from roma_ray.config.loading import parse_config
from roma_ray.engine.setup import resolve
from roma_ray.errors import ModelError
from roma_ray.moe import quantized
from roma_ray.moe.exporting import export_routers
from roma_ray.moe.inspection import describe
from roma_ray.moe.selfcheck import check_slice
from roma_ray.moe.slices import load_slice, model_facts
from roma_ray.runs.pipeline import run
from tests.moe.test_adapters import tuned_adapter
from tests.moe.test_fitting import configure, edit
from tests.progress import Told
from tests.quantizing import MXFP4, by_hand_mxfp4, fp8, quantize_fp8, quantize_mxfp4
from tests.tiny import save_tiny, tiny_moe
from tests.world import make_world

TYPES = (torch.float32, torch.bfloat16)
GPT_OSS = {"hidden_size": 64, "intermediate_size": 32, "num_local_experts": 4, "num_hidden_layers": 4}
BLOCK = (16, 16)


def gpt_oss(folder: Path) -> tuple[str, dict[str, Tensor]]:
    layers = {"layer_types": ["sliding_attention", "full_attention"] * 2}
    path = save_tiny(tiny_moe("gpt_oss", dtype=torch.bfloat16, **GPT_OSS, **layers), folder)
    return path, quantize_mxfp4(path)


def deepseek_v3(folder: Path, **scales: Any) -> tuple[str, dict[str, Tensor]]:
    path = save_tiny(tiny_moe("deepseek_v3", dtype=torch.bfloat16), folder)
    return path, quantize_fp8(path, BLOCK, **scales)


def loaded(path: str, dtype: torch.dtype, start: int = 0) -> dict[str, Tensor]:
    """A slice's tensors under the checkpoint's keys: whole-model layers, experts one by one as they are stored."""
    model = load_slice(path, start=start, dtype=dtype, with_lm_head=True).model
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            name = f"model.layers.{int(layer) + start}.{rest}"
        if "deepseek" not in model.config.model_type or ".experts." not in name:
            found[name] = tensor
            continue
        head, _, which = name.rpartition(".")
        for number, expert in enumerate(tensor):
            parts = zip(("gate_proj", "up_proj"), expert.chunk(2), strict=True) if "up" in which else [(which, expert)]
            found |= {f"{head}.{number}.{part}.weight": matrix for part, matrix in parts}
    return found


def check(found: dict[str, Tensor], wanted: dict[str, Tensor], dtype: torch.dtype, start: int) -> None:
    keys = {k for k in wanted if not k.startswith("model.layers.") or int(k.split(".")[2]) >= start}
    if start:
        keys -= {"model.embed_tokens.weight"}
    assert keys <= found.keys()
    for key in keys:
        # Selection biases stay fp32, and from transformers 5.24 on DeepSeek-V3's gates.
        kind = found[key].dtype if "correction" in key or key.endswith("mlp.gate.weight") else dtype
        assert found[key].dtype is kind
        assert torch.equal(found[key], wanted[key].to(kind)), key


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("make", [gpt_oss, deepseek_v3])
def test_every_tensor_is_that_of_a_dequantization_by_hand(make, dtype: torch.dtype, start: int, tmp_path: Path) -> None:
    path, wanted = make(tmp_path)
    check(loaded(path, dtype, start), wanted, dtype, start)


def test_scales_in_bfloat16_and_in_powers_of_two(tmp_path: Path) -> None:
    path, wanted = deepseek_v3(tmp_path / "qwen", scale_dtype=torch.bfloat16)
    check(loaded(path, torch.bfloat16), wanted, torch.bfloat16, 0)
    path, wanted = deepseek_v3(tmp_path / "powers", scale_dtype=torch.float8_e8m0fnu)
    check(loaded(path, torch.bfloat16), wanted, torch.bfloat16, 0)


def test_every_byte_under_every_exponent_is_as_by_hand_and_as_in_transformers() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    # The last exponent stands for no number.
    blocks = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 255, 16, 16)
    scales = torch.arange(255, dtype=torch.uint8).reshape(1, 255, 1).expand(1, 255, 16)
    wanted = by_hand_mxfp4(blocks, scales)
    for dtype in (*TYPES, torch.float16):
        found = quantized.unpack_mxfp4(blocks[0], scales[0], dtype)
        assert torch.equal(found, wanted[0].to(dtype))
        assert torch.equal(found.signbit(), wanted[0].signbit())
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    assert torch.equal(theirs[0], quantized.unpack_mxfp4(blocks[0], scales[0], torch.bfloat16))


@pytest.mark.parametrize("dtype", TYPES)
def test_fp8_is_as_in_transformers(dtype: torch.dtype) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    generator = torch.Generator().manual_seed(0)
    numbers = (torch.randn(48, 64, generator=generator) * 100).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 4, generator=generator)
    theirs = Fp8Dequantize(None)._dequantize_one(numbers, scales, output_dtype=dtype)
    assert torch.equal(quantized.unpack_fp8(numbers, scales, BLOCK, dtype), theirs)


def test_experts_that_are_stored_merged_have_a_scale_for_each_block_of_each(tmp_path: Path) -> None:
    """A matrix at a time: a whole layer's experts are never held in fp32."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(3, 20, 40, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 2, 3, generator=generator)

    class File:
        def __init__(self, tensor: Tensor, kind: str) -> None:
            self.tensor, self.kind, self.key, self.shape = tensor, kind, "experts.up", tuple(tensor.shape)

        def __getitem__(self, index: Any) -> Tensor:
            return self.tensor[index]

    rule = quantized.Scheme("FP8", BLOCK)
    found = rule.unpacked([File(numbers, "F8_E4M3"), File(scales, "F32")], torch.bfloat16)[...]
    for expert in range(3):
        assert torch.equal(found[expert], quantized.unpack_fp8(numbers[expert], scales[expert], BLOCK, torch.bfloat16))


def test_a_slice_dequantizes_its_own_layers_alone_one_expert_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = gpt_oss(tmp_path)
    seen: list[tuple[str, Any]] = []
    inner = quantized.Unpacked._matrix
    monkeypatch.setattr(
        quantized.Unpacked, "_matrix", lambda self, place: seen.append((self.numbers.key, place)) or inner(self, place)
    )
    model_facts(path)
    assert seen == []
    load_slice(path, start=1, stop=2, dtype=torch.bfloat16, with_lm_head=False)
    experts = "model.layers.1.mlp.experts"
    assert sorted(seen) == [(f"{experts}.{k}_proj_blocks", n) for k in ("down", "gate_up") for n in range(4)]


@pytest.mark.parametrize("make", [gpt_oss, deepseek_v3])
def test_facts_memory_and_self_check_are_of_the_dequantized_model(make, tmp_path: Path) -> None:
    path, _ = make(tmp_path)
    facts = model_facts(path)
    assert facts["dtype"] == "bfloat16"
    assert facts["quantization"] == ("MXFP4" if make is gpt_oss else "FP8")
    assert f"quantization: {facts['quantization']}" in describe(path)
    part = load_slice(path, dtype=torch.float32, with_lm_head=True)
    assert facts["parameters"] == part.model.num_parameters()
    found = check_slice(part)
    assert found is not None
    assert max(found.packed, found.resumed, found.trimmed, found.routing) < 1e-5


@pytest.mark.parametrize("memory_gb", [None, 2e-4])
def test_a_quantized_model_is_extracted_as_its_dequantized_copy_and_told_before(
    tmp_path: Path, memory_gb: float | None
) -> None:
    world = make_world(tmp_path, "deepseek_v3", dtype=torch.bfloat16, count=18, extraction={"memory_gb": memory_gb})
    folder = Path(world.model.path)
    copied = Path(shutil.copytree(folder, tmp_path / "plain"))
    plain = {key: tensor.bfloat16() for key, tensor in quantize_fp8(folder, BLOCK).items()}
    save_file(plain, copied / "model.safetensors", metadata={"format": "pt"})
    results = []
    for place in (folder, copied):
        told = Told()
        setup = resolve(world.model_copy(update={"model": world.model.model_copy(update={"path": str(place)})}))
        stage = run(setup, told, until="extract").stages["extract"]
        results.append(load_file(sorted((stage.path / "batches").glob("*.safetensors"))[0]))
        size = f"{setup.model.weight_bytes() / 1e9:.1f} GB of weights in bfloat16"
        note = f"{folder} is stored in FP8 and dequantized as it is loaded: {size}"
        assert [line for line in told.lines if "is stored in" in line] == ([note] if place is folder else [])
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


@pytest.mark.parametrize("make", [gpt_oss, deepseek_v3])
def test_a_merged_export_keeps_the_packed_experts_and_changes_only_the_gates(make, tmp_path: Path) -> None:
    path, _ = make(tmp_path / "base")
    _, checkpoint = tuned_adapter(path, tmp_path / "adapter", torch.bfloat16, 2)
    export_routers(tmp_path / "adapter", tmp_path / "merged", form="merged")
    with (
        safe_open(Path(path) / "model.safetensors", framework="pt") as before,
        safe_open(tmp_path / "merged" / "model.safetensors", framework="pt") as after,
    ):
        assert set(before.keys()) == set(after.keys())
        assert any(after.get_slice(key).get_dtype() in ("U8", "F8_E4M3") for key in after.keys())  # noqa: SIM118
        for key in before.keys():  # noqa: SIM118 - not a dict
            one, two = before.get_tensor(key), after.get_tensor(key)
            same = one.dtype is two.dtype and torch.equal(one.view(torch.uint8), two.view(torch.uint8))
            assert same is (key not in checkpoint.tensors), key
    stated = json.loads((Path(path) / "config.json").read_text())
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert written == {**stated, "dtype": "bfloat16"}
    again = load_slice(str(tmp_path / "merged"), start=2, dtype=torch.bfloat16, with_lm_head=True)
    tuned = {router.whole_name: router.gate.weight for router in again.routers}
    for name, weight in tuned.items():
        assert torch.equal(weight, checkpoint.tensors[f"{name}.weight"])


def whole_blocks(folder: Path) -> tuple[str, dict[str, Tensor]]:
    """transformers itself does not read blocks that are cut short, as DeepSeek-V3's `kv_a_proj_with_mqa` has."""
    path = save_tiny(tiny_moe("deepseek_v3", dtype=torch.bfloat16), folder)
    return path, quantize_fp8(path, (8, 8))


@pytest.mark.parametrize("make", [gpt_oss, whole_blocks])
def test_stock_transformers_loads_the_merged_export(make, tmp_path: Path) -> None:
    path, _ = make(tmp_path / "base")
    tuned_adapter(path, tmp_path / "adapter", torch.bfloat16, 2)
    export_routers(tmp_path / "adapter", tmp_path / "merged", form="merged")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    ours = load_slice(str(tmp_path / "merged"), dtype=torch.bfloat16, attention="eager", with_lm_head=True).model
    for name, tensor in ours.state_dict().items():
        assert torch.equal(stock.state_dict()[name], tensor), name


def test_a_dense_quantized_model_is_judged_dequantized(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).save_pretrained(tmp_path)
    wanted = quantize_fp8(tmp_path, BLOCK)
    data = {"storage": str(tmp_path / "s"), "device": "cpu", "model": {"path": str(tmp_path)}}
    config = parse_config({**data, "questions": {"sources": [{"path": "none.jsonl"}]}})
    subject = resolve_subject(config, adapter=None)
    assert not subject.sliced
    assert "is stored in FP8" in str(subject.model.storage_note())
    model = subject.load_whole()
    assert model.dtype is torch.bfloat16
    check(dict(model.state_dict()), wanted, torch.bfloat16, 0)


@pytest.mark.parametrize(
    ("stated", "name", "instead"),
    [
        ({"quant_method": "awq", "bits": 4}, "AWQ", "the bfloat16 model that it was made from"),
        ({"quant_method": "gptq", "bits": 4}, "GPTQ", "the bfloat16 model that it was made from"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes", "packed from a bfloat16 model"),
        ({"load_in_4bit": True}, "bitsandbytes", "packed from a bfloat16 model"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors", "block-wise FP8 version"),
        ({"quant_method": "hqq"}, "'hqq'", "the bfloat16 model that it was made from"),
        ({}, "'unnamed'", "the bfloat16 model that it was made from"),
        (MXFP4, "MXFP4 of another layout", "the bfloat16 model"),
        ({**fp8(BLOCK), "weight_block_size": None}, "FP8 that is not block-wise", "the bfloat16 model"),
        ({**fp8(BLOCK), "activation_scheme": "static"}, "FP8 that is not block-wise", "the bfloat16 model"),
    ],
)
def test_other_quantizations_are_refused_by_name(stated: Any, name: str, instead: str, tmp_path: Path) -> None:
    path = save_tiny(tiny_moe("olmoe"), tmp_path)
    configure(path, quantization_config=stated)
    for attempt in (model_facts, lambda p: load_slice(p, dtype=torch.float32, with_lm_head=True)):
        with pytest.raises(ModelError, match=f"quantized checkpoint .*{name}.*{instead}"):
            attempt(path)


def test_the_old_place_and_a_wrapper_s_are_seen(tmp_path: Path) -> None:
    path = save_tiny(tiny_moe("olmoe"), tmp_path)
    configure(path, compression_config={"quant_method": "compressed-tensors"})
    with pytest.raises(ModelError, match="compressed-tensors"):
        model_facts(path)
    configure(path, compression_config="int4")
    with pytest.raises(ModelError, match="'int4', which is not read"):
        model_facts(path)
    configure(path, compression_config=None, text_config={"quantization_config": {"quant_method": "awq"}})
    with pytest.raises(ModelError, match="AWQ"):
        model_facts(path)


EXPERTS = "model.layers.2.mlp.experts.gate_up_proj"
MATRIX = "model.layers.3.mlp.experts.1.up_proj.weight"


@pytest.mark.parametrize(
    ("make", "change", "named"),
    [
        (gpt_oss, lambda t: t.pop(f"{EXPERTS}_scales"), f"{EXPERTS}_blocks is stored as U8 without scales"),
        (
            gpt_oss,
            lambda t: t.update({f"{EXPERTS}_scales": t[f"{EXPERTS}_scales"][:, 1:].clone()}),
            "its scales .* are not those",
        ),
        (deepseek_v3, lambda t: t.pop(f"{MATRIX}_scale_inv"), f"{MATRIX} is stored as F8_E4M3 without scales"),
        (
            deepseek_v3,
            lambda t: t.update({f"{MATRIX}_scale_inv": torch.ones(2, 2)}),
            "its scales .* are not those of FP8",
        ),
        (deepseek_v3, lambda t: t.update({MATRIX: t[MATRIX].view(torch.uint8)}), f"{MATRIX} .U8 .* are not those"),
        (deepseek_v3, lambda t: t.pop(MATRIX), f"{MATRIX}_scale_inv|{MATRIX} is missing"),
    ],
)
def test_numbers_without_their_scales_are_named(make, change: Any, named: str, tmp_path: Path) -> None:
    path, _ = make(tmp_path)
    edit(path, lambda tensors: change(tensors))
    with pytest.raises(ModelError, match=named):
        load_slice(path, start=1, dtype=torch.bfloat16, with_lm_head=True)
