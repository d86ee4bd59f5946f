"""Saved routers: stock libraries that cannot import roma_ray give the tuned logits bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from roma_ray.errors import CheckpointError, ModelError
from roma_ray.moe.adapters import load_adapter, read_adapter, save_adapter, write_adapter
from roma_ray.moe.exporting import export_routers
from roma_ray.moe.inspection import describe, inspect, read_merged
from roma_ray.moe.masters import RouterMasters
from roma_ray.moe.merged import save_merged
from roma_ray.moe.reference import import_reference, read_reference
from roma_ray.moe.slices import load_slice
from tests.padded import slice_hidden, slice_logits
from tests.tiny import EAGER, FAMILIES, MORE_FAMILIES, WRAPPERS, padded_batch, save_tiny, tiny_moe

_STOCK = """
import json, sys
sys.modules["roma_ray"] = None
try:
    import roma_ray
except ImportError:
    pass
else:
    sys.exit("roma_ray can be imported here")
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

for job in json.load(open(sys.argv[1])):
    dtype = getattr(torch, job["dtype"])
    arguments = {"dtype": dtype, "attn_implementation": job["attention"], "experts_implementation": "eager"}
    loader = AutoModelForImageTextToText if job["wrapper"] else AutoModelForCausalLM
    model = loader.from_pretrained(job["base"], **arguments)
    if job["adapter"]:
        from peft import PeftModel
        model = PeftModel.from_pretrained(model, job["adapter"])
        if job["unload"]:
            model = model.merge_and_unload()
    model.eval()
    inputs = torch.load(job["inputs"], weights_only=True)
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    torch.save(logits, job["out"])
"""


def run_stock(jobs: list[dict], folder: Path) -> None:
    """Run the jobs with transformers and peft alone, in another directory and process, where roma_ray does not exist."""
    script, listed = folder / "stock.py", folder / "jobs.json"
    script.write_text(_STOCK)
    listed.write_text(json.dumps(jobs))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "OMP_NUM_THREADS": str(torch.get_num_threads())
    }
    command = [sys.executable, "-I", str(script), str(listed)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def tuned_adapter(path: str, folder: Path, dtype: torch.dtype, cut: int):
    """Tune the gates of a head slice a little; write the adapter from that slice alone. Returns (slice, checkpoint)."""
    head = load_slice(path, start=cut, dtype=dtype, with_lm_head=True)
    masters = RouterMasters(head, [router.layer for router in head.routers])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in masters.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    checkpoint = save_adapter(folder, head, masters.state(), base=path, revision=None, fingerprint="f00d")
    return head, checkpoint


def whole_inputs(ids, mask) -> dict[str, torch.Tensor]:
    from roma_ray.moe.slices import position_ids

    return {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids(mask)}


def test_stock_peft_and_merged_reproduce_the_tuned_logits(tmp_path: Path) -> None:
    ids, mask, last = padded_batch(side="left")
    torch.save(whole_inputs(ids, mask), tmp_path / "inputs.pt")
    jobs, wanted = [], {}
    # DeepSeekMoE has no class in a process without roma_ray.
    for family in (name for name in FAMILIES + MORE_FAMILIES if name != "deepseek"):
        attention = "eager" if family in EAGER else "sdpa"
        # The type that rounds for all, both for some.
        for dtype in (torch.float32, torch.bfloat16) if family in FAMILIES[:9] else (torch.bfloat16,):
            name = f"{family}-{str(dtype)[6:]}"
            # A sharded and an unsharded base, in the type of the run.
            size = "60KB" if dtype is torch.float32 else "1GB"
            path = save_tiny(tiny_moe(family, dtype=dtype), tmp_path / f"{name}-base", max_shard_size=size)
            adapter = tmp_path / f"{name}-adapter"
            head, checkpoint = tuned_adapter(path, adapter, dtype, 3)
            trunk = load_slice(path, stop=3, dtype=dtype, with_lm_head=False)
            with torch.no_grad():
                # All rows go through `lm_head`, as stock's do: on some CPUs a product's last bits depend on its shape.
                every = torch.arange(ids.shape[1]).expand(len(last), -1)
                live = slice_logits(head, slice_hidden(trunk, ids, mask), mask, every)[range(len(last)), last]
            merged = tmp_path / f"{name}-merged"
            save_merged(checkpoint, merged)
            common = {
                "dtype": str(dtype)[6:],
                "attention": attention,
                "inputs": str(tmp_path / "inputs.pt"),
                "unload": False,
                "wrapper": family in WRAPPERS,
            }
            variants = {
                "peft": {"base": path, "adapter": str(adapter)},
                "unloaded": {"base": path, "adapter": str(adapter), "unload": True},
                "merged": {"base": str(merged), "adapter": None},
                "base": {"base": path, "adapter": None},
            }
            for kind, variant in variants.items():
                if kind == "unloaded" and family != "olmoe":
                    continue
                jobs.append({**common, **variant, "out": str(tmp_path / f"{name}-{kind}.pt")})
            wanted[name] = live
    run_stock(jobs, tmp_path)
    for name, live in wanted.items():
        rows = range(len(last))
        got = {
            k: torch.load(f, weights_only=True)[rows, last]
            for k in ("peft", "unloaded", "merged", "base")
            if (f := tmp_path / f"{name}-{k}.pt").exists()
        }
        assert torch.equal(got["peft"], live), name
        assert torch.equal(got["merged"], live), name
        assert not torch.equal(got["base"], live), name
        if "unloaded" in got:
            assert torch.equal(got["unloaded"], live), name


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "ernie4_5_moe", "granitemoe"])
def test_the_adapter_is_what_peft_itself_would_write(family: str, tmp_path: Path) -> None:
    from peft import LNTuningConfig, get_peft_model

    model = tiny_moe(family)
    path = save_tiny(model, tmp_path / "base")
    head = load_slice(path, start=4, dtype=torch.float32, with_lm_head=True)
    masters = RouterMasters(head, [router.layer for router in head.routers])
    save_adapter(tmp_path / "ours", head, masters.state(), base=path, revision=None, fingerprint="x")
    masters.detach()
    names = [router.whole_name for router in head.routers]
    peft_model = get_peft_model(model, LNTuningConfig(target_modules=names, task_type="CAUSAL_LM", inference_mode=True))
    peft_model.save_pretrained(str(tmp_path / "theirs"))
    ours, theirs = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    configs = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
    assert set(configs[0].pop("target_modules")) == set(configs[1].pop("target_modules"))
    assert configs[0].pop("base_model_name_or_path") == path
    configs[1].pop("base_model_name_or_path")
    assert configs[0] == configs[1]


@pytest.fixture
def adapter(tmp_path: Path) -> tuple[str, Path]:
    path = save_tiny(tiny_moe("olmoe"), tmp_path / "base")
    tuned_adapter(path, tmp_path / "adapter", torch.float32, 4)
    return path, tmp_path / "adapter"


def test_load_adapter_into_slices(adapter) -> None:
    path, folder = adapter
    head = load_slice(path, start=3, dtype=torch.float32, with_lm_head=True)
    before = {r.layer: r.module.weight.clone() for r in head.routers}
    checkpoint = load_adapter(folder, head)
    assert (checkpoint.layers, checkpoint.fingerprint, checkpoint.dtype) == ((4, 5), "f00d", "float32")
    assert torch.equal(before[3], head.routers[0].module.weight)
    assert torch.equal(head.routers[1].module.weight, checkpoint.tensors["model.layers.4.mlp.gate.weight"])
    with pytest.raises(CheckpointError, match="no place in layers"):
        load_adapter(folder, load_slice(path, start=5, dtype=torch.float32, with_lm_head=True))


def test_an_adapter_is_refused_by_another_model(adapter, tmp_path: Path) -> None:
    _, folder = adapter
    for family, overrides, match in (("mixtral", {}, "of a olmoe model"), ("olmoe", {"num_experts": 4}, "shape")):
        other = save_tiny(tiny_moe(family, **overrides), tmp_path / f"other-{family}")
        with pytest.raises(CheckpointError, match=match):
            load_adapter(folder, load_slice(other, dtype=torch.float32, with_lm_head=True))
        with pytest.raises(CheckpointError, match=match):
            export_routers(folder, tmp_path / "merged", form="merged", base=other)
        assert not (tmp_path / "merged").exists()


def test_writing_replaces_ours_and_never_anything_else(adapter, tmp_path: Path) -> None:
    _, folder = adapter
    checkpoint = read_adapter(folder)
    first = (folder / "adapter_model.safetensors").read_bytes()
    write_adapter(folder, checkpoint)
    assert (folder / "adapter_model.safetensors").read_bytes() == first
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("do not delete")
    with pytest.raises(CheckpointError, match="not a checkpoint of roma-ray"):
        write_adapter(other, checkpoint)
    assert (other / "thesis.txt").read_text() == "do not delete"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")], "a temporary folder was left behind"


def test_a_write_that_fails_leaves_the_old_checkpoint(adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    from roma_ray.errors import StorageError
    from roma_ray.moe import adapters

    _, folder = adapter
    checkpoint = read_adapter(folder)

    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapters, "save_file", full)
    with pytest.raises(StorageError, match="No space left"):
        write_adapter(folder, checkpoint)
    assert read_adapter(folder).tensors.keys() == checkpoint.tensors.keys()


def _corrupt(folder: Path, how: str) -> None:
    weights, manifest = folder / "adapter_model.safetensors", folder / "roma.json"
    tensors = load_file(weights)
    key = next(key for key in tensors if key.endswith("weight"))
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "nan":
        save_file({**tensors, key: tensors[key] * float("nan")}, weights)
    elif how == "altered":
        save_file({**tensors, key: tensors[key] + 1}, weights)
    elif how == "missing":
        save_file({k: t for k, t in tensors.items() if k != key}, weights)
    elif how == "foreign keys":
        save_file({**tensors, "base_model.model.lm_head.lora_A.weight": torch.zeros(2)}, weights)
    elif how == "no manifest":
        manifest.unlink()
    elif how == "not json":
        manifest.write_text("{")
    elif how == "newer":
        manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 2'))
    elif how == "other format":
        manifest.write_text('{"format": "something"}')
    elif how == "lora":
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    elif how == "pickled":
        (folder / "adapter_model.bin").write_bytes(b"x")


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ("truncated", "truncated or not a safetensors"),
        ("nan", "NaN"),
        ("altered", "changed or damaged"),
        ("missing", "lacks"),
        ("foreign keys", "no tensor of a router"),
        ("no manifest", "roma-ray did not write"),
        ("not json", "cannot be read as JSON"),
        ("newer", "format version 2"),
        ("other format", "not of the format"),
        ("lora", "LORA adapter"),
        ("pickled", "pickled weights"),
    ],
)
def test_damaged_and_foreign_adapters_are_refused(adapter, how: str, match: str) -> None:
    _, folder = adapter
    _corrupt(folder, how)
    for read in (read_adapter, inspect):
        with pytest.raises(CheckpointError, match=match):
            read(folder)


def test_merged_keeps_every_other_tensor_and_reads_back(tmp_path: Path) -> None:
    model = tiny_moe("mixtral")
    path = save_tiny(model, tmp_path / "base", max_shard_size="60KB")
    _, checkpoint = tuned_adapter(path, tmp_path / "adapter", torch.float32, 4)
    export_routers(tmp_path / "adapter", tmp_path / "merged", form="merged")
    base, merged = ({}, {})
    for where, found in ((Path(path), base), (tmp_path / "merged", merged)):
        for file in where.glob("*.safetensors"):
            found.update(load_file(file))
    changed = {key for key in base if not torch.equal(base[key], merged[key])}
    assert base.keys() == merged.keys()
    assert changed == {f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in (4, 5)}
    assert {key: t.tolist() for key, t in read_merged(tmp_path / "merged").tensors.items()} == {
        key: t.tolist() for key, t in checkpoint.tensors.items()
    }


def test_a_gate_wider_than_its_base_file_is_not_rounded(tmp_path: Path) -> None:
    path = save_tiny(tiny_moe("olmoe", dtype=torch.bfloat16), tmp_path / "base")
    head, checkpoint = tuned_adapter(path, tmp_path / "adapter", torch.float32, 4)
    save_merged(checkpoint, tmp_path / "merged")
    again = load_slice(str(tmp_path / "merged"), start=4, dtype=torch.float32, with_lm_head=True)
    load_adapter(tmp_path / "adapter", again)
    fresh = load_slice(str(tmp_path / "merged"), start=4, dtype=torch.float32, with_lm_head=True)
    assert all(torch.equal(a.module.weight, b.module.weight) for a, b in zip(again.routers, fresh.routers, strict=True))
    assert len(head.routers) == 2


def test_reference_file_out_and_in(adapter, tmp_path: Path) -> None:
    path, folder = adapter
    file = tmp_path / "router_ft.pt"
    export_routers(folder, file, form="reference")
    content = torch.load(file, weights_only=True)
    assert content["target_layers"] == [4, 5]
    assert list(content["state_dict"]) == ["layers.4.mlp.gate.weight", "layers.5.mlp.gate.weight"]
    assert content["model_name"] == path
    back = import_reference(file, base=path)
    original = read_adapter(folder)
    assert back.tensors.keys() == original.tensors.keys()
    assert all(torch.equal(back.tensors[key], original.tensors[key]) for key in back.tensors)
    write_adapter(tmp_path / "again", back)
    assert read_adapter(tmp_path / "again").layers == (4, 5)
    with pytest.raises(CheckpointError, match="no export format"):
        export_routers(folder, file, form="gguf")


def test_a_multimodal_models_routers_keep_their_whole_names_through_every_form(tmp_path: Path) -> None:
    path = save_tiny(tiny_moe("gemma4"), tmp_path / "base")
    _, checkpoint = tuned_adapter(path, tmp_path / "adapter", torch.float32, 4)
    names = [f"model.language_model.layers.{layer}.router.proj.weight" for layer in (4, 5)]
    assert (checkpoint.model_type, list(checkpoint.tensors)) == ("gemma4", names)
    export_routers(tmp_path / "adapter", tmp_path / "router_ft.pt", form="reference")
    # The reference knows language models alone.
    short = [f"layers.{layer}.router.proj.weight" for layer in (4, 5)]
    assert list(torch.load(tmp_path / "router_ft.pt", weights_only=True)["state_dict"]) == short
    back = import_reference(tmp_path / "router_ft.pt", base=path)
    assert list(back.tensors) == names
    export_routers(tmp_path / "router_ft.pt", tmp_path / "merged", form="merged", base=path)
    assert list(read_merged(tmp_path / "merged").tensors) == names
    text = save_tiny(tiny_moe("gemma4_text"), tmp_path / "text")
    with pytest.raises(CheckpointError, match=r"of a gemma4 model .*, not of a gemma4_text one"):
        load_adapter(tmp_path / "adapter", load_slice(text, start=4, dtype=torch.float32, with_lm_head=True))


class _Bomb:
    def __reduce__(self):
        return os.system, ("touch bombed",)


def _weights(**changes) -> dict:
    state = {"layers.4.mlp.gate.weight": torch.zeros(8, 32), "layers.5.mlp.gate.weight": torch.zeros(8, 32)}
    return {"target_layers": [4, 5], "state_dict": {**state, **changes}, "model_name": "m"}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"target_layers": [4], "state_dict": _Bomb()}, "run its author's code"),
        ([1, 2], "not a router_ft.pt"),
        ({"target_layers": [4], "state_dict": {}}, "empty"),
        ({**_weights(), "target_layers": [4]}, "says it tunes"),
        (_weights(**{"layers.4.mlp.gate.weight": torch.full((8, 32), float("nan"))}), "NaN"),
        (_weights(**{"layers.4.mlp.gate.weight": torch.zeros(8, 32, dtype=torch.int64)}), "floating-point"),
        (_weights(**{"layers.4.mlp.gate.weight": [1.0]}), "floating-point"),
        (_weights(**{"lm_head.weight": torch.zeros(2, 2)}), "no router's weight"),
        (_weights(**{"layers.4.mlp.gate.weight": torch.zeros(8, 31)}), "shape"),
        (_weights(**{"layers.4.mlp.other.weight": torch.zeros(8, 32)}), "no such router"),
    ],
)
def test_bad_reference_files(adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content, match: str) -> None:
    path, _ = adapter
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "router_ft.pt"
    torch.save(content, file)
    with pytest.raises(CheckpointError, match=match):
        import_reference(file, base=path)
    assert not (tmp_path / "bombed").exists()


@pytest.mark.parametrize("damage", ["half", "garbage", "empty", "absent"])
def test_damaged_reference_files(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "router_ft.pt"
    if damage != "absent":
        torch.save(_weights(), file)
        whole = file.read_bytes()
        file.write_bytes({"half": whole[: len(whole) // 2], "garbage": b"garbage" * 50, "empty": b""}[damage])
    with pytest.raises(CheckpointError):
        read_reference(file)


def test_inspect_tells_every_kind(adapter, tmp_path: Path) -> None:
    path, folder = adapter
    found = inspect(folder)
    assert (found["kind"], found["layers"], found["base_model"]) == ("adapter", [4, 5], path)
    assert found["shapes"]["model.layers.4.mlp.gate.weight"] == (8, 32)
    assert found["change"].keys() == {4, 5}
    assert all(0.1 < change < 3 for change in found["change"].values())
    export_routers(folder, tmp_path / "merged", form="merged")
    merged = inspect(tmp_path / "merged")
    assert (merged["kind"], merged["change"]) == ("merged", found["change"])
    export_routers(folder, tmp_path / "router_ft.pt", form="reference")
    reference = inspect(tmp_path / "router_ft.pt", base=path)
    assert (reference["kind"], reference["change"]) == ("reference", found["change"])
    assert inspect(path)["kind"] == "model"
    text = describe(folder)
    assert "layer 4: model.layers.4.mlp.gate.weight 8x32  changed by" in text
    unmeasured = RouterFile(tmp_path)
    assert "give the base model (--base)" in describe(unmeasured.path)
    for bad in (tmp_path / "nothing", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(CheckpointError):
            inspect(bad)
    with pytest.raises(CheckpointError, match="give its folder"):
        inspect(folder / "adapter_model.safetensors")
    with pytest.raises((CheckpointError, ModelError)):
        inspect(folder, base=str(tmp_path / "empty"))


class RouterFile:
    """A reference file whose base model is not at hand."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "elsewhere.pt"
        torch.save({**_weights(), "model_name": "allenai/OLMoE-1B-7B-0125-Instruct"}, self.path)
