"""A slice equals its part of the whole: logits, losses, gate gradients, any cut, either padding side."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from roma_ray.errors import ModelError
from roma_ray.moe.packing import Segment, pack
from roma_ray.moe.passes import run_packed
from roma_ray.moe.routers import find_routers
from roma_ray.moe.slices import load_slice, model_facts, position_ids
from tests.padded import slice_hidden, slice_logits
from tests.tiny import DELTA_RULE, FAMILIES, MORE_FAMILIES, VOCABULARY, padded_batch, save_tiny, tiny_config, tiny_moe


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory):
    """Each family's tiny model and its sharded checkpoint, made once."""
    made: dict[str, tuple] = {}

    def get(family: str):
        if family not in made:
            model = tiny_moe(family, seed=1)
            made[family] = model, save_tiny(model, tmp_path_factory.mktemp(family), max_shard_size="100KB")
        return made[family]

    return get


def whole_logits(model, ids, mask, positions_BP):
    # Left padding needs the positions that generation uses; the stock model does not derive them from the mask.
    logits = model(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False).logits
    return torch.stack([logits[row, positions] for row, positions in enumerate(positions_BP)])


def gate_gradients(routers, loss) -> dict[str, torch.Tensor]:
    names = [(r.whole_name, r.gate.weight) for r in routers]
    grads = torch.autograd.grad(loss, [weight for _, weight in names])
    return {name: grad for (name, _), grad in zip(names, grads, strict=True)}


@pytest.mark.parametrize("family", FAMILIES + MORE_FAMILIES)
def test_trunk_and_head_equal_the_whole(saved, family: str) -> None:
    model, path = saved(family)
    # On some processors the two round differently; on most they agree to the bit.
    loose = 100 if family in DELTA_RULE else 1
    for cut, side in ((3, "left"), (2, "right"), (5, "left")):
        ids, mask, last = padded_batch(side=side)
        positions = torch.stack([last, last - 1], dim=1)
        trunk = load_slice(path, stop=cut, dtype=torch.float32, with_lm_head=False)
        head = load_slice(path, start=cut, dtype=torch.float32, with_lm_head=True)
        with torch.no_grad():
            hidden = slice_hidden(trunk, ids, mask)
        for part in (model, head.model):
            for router in find_routers(part):
                router.gate.weight.requires_grad_(True)
        whole = whole_logits(model, ids, mask, positions)
        parts = slice_logits(head, hidden, mask, positions)
        torch.testing.assert_close(parts, whole, rtol=1e-5 * loose, atol=1e-6 * loose)
        targets = torch.tensor([5, 6, 7])
        losses = [torch.nn.functional.cross_entropy(logits[:, 0], targets) for logits in (whole, parts)]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5 * loose, atol=0)
        if not head.routers:
            continue
        want = gate_gradients([r for r in find_routers(model) if r.layer >= cut], losses[0])
        got = gate_gradients(head.routers, losses[1])
        assert want.keys() == got.keys()
        for name, gradient in want.items():
            assert float(gradient.abs().sum()) > 0, name
            assert float((got[name] - gradient).norm() / gradient.norm()) < 1e-5 * loose, name


@pytest.mark.parametrize("family", FAMILIES + MORE_FAMILIES)
def test_a_chain_of_slices_equals_the_whole(saved, family: str) -> None:
    """Padded, and packed as a streamed extraction runs it."""
    model, path = saved(family)
    ids, mask, last = padded_batch((5, 8), side="left")
    hidden, states = ids, None
    packing = pack([Segment(tuple(ids[0, 3:].tolist())), Segment(tuple(ids[1].tolist()))])
    with torch.no_grad():
        for start, stop in ((0, 1), (1, 2), (2, 4), (4, 5)):
            part = load_slice(path, start=start, stop=stop, dtype=torch.float32, with_lm_head=False)
            assert part.model.config.num_hidden_layers == stop - start
            hidden = slice_hidden(part, hidden, mask)
            states = run_packed(part, packing, states).states
        head = load_slice(path, start=5, dtype=torch.float32, with_lm_head=True)
        got = slice_logits(head, hidden, mask, last[:, None])
        packed = run_packed(head, packing, states, keep=[4, 12]).states
        want = whole_logits(model, ids, mask, last[:, None])
    loose = 100 if family in DELTA_RULE else 1
    torch.testing.assert_close(got, want, rtol=1e-5 * loose, atol=1e-6 * loose)
    # transformers' own recurrent layers carry padding's rounding on; packed passes have no padding.
    limits = {"rtol": 1e-2, "atol": 5e-3} if family in DELTA_RULE else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(packed, want[:, 0], **limits)


@pytest.mark.parametrize("family", FAMILIES + MORE_FAMILIES)
def test_padding_side_and_batch_do_not_matter(saved, family: str) -> None:
    _, path = saved(family)
    whole = load_slice(path, dtype=torch.float32, with_lm_head=True)
    results = []
    with torch.no_grad():
        for side in ("left", "right"):
            ids, mask, last = padded_batch((6, 3, 9), side=side)
            results.append(slice_logits(whole, ids, mask, last[:, None]))
        alone = ids[1:2, :3]
        results.append(slice_logits(whole, alone, torch.ones_like(alone), torch.tensor([[2]])))
    # transformers' own recurrent layers carry padding's rounding on; packed passes have no padding.
    limits = {"rtol": 1e-2, "atol": 2e-3} if family in DELTA_RULE else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(results[0], results[1], **limits)
    torch.testing.assert_close(results[0][1:2], results[2], **limits)


def test_routers_keep_the_whole_models_indices(saved) -> None:
    _, path = saved("qwen2_moe")
    head = load_slice(path, start=2, dtype=torch.float32, with_lm_head=True)
    assert [(r.layer, r.name, r.whole_name) for r in head.routers] == [
        (3, "model.layers.1.mlp.gate", "model.layers.3.mlp.gate"),
        (5, "model.layers.3.mlp.gate", "model.layers.5.mlp.gate"),
    ]
    trunk = load_slice(path, stop=2, dtype=torch.float32, with_lm_head=False)
    assert [(r.layer, r.name, r.whole_name) for r in trunk.routers] == [
        (1, "layers.1.mlp.gate", "model.layers.1.mlp.gate")
    ]


def test_a_slice_reads_and_holds_only_its_layers(saved, tmp_path: Path) -> None:
    model, path = saved("olmoe")
    copy = tmp_path / "part"
    shutil.copytree(path, copy)
    index = json.loads((copy / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {f for k, f in index.items() if k.startswith(("model.layers.5.", "lm_head", "model.norm"))}
    for name in set(index.values()) - needed:
        (copy / name).unlink()
    head = load_slice(str(copy), start=5, dtype=torch.float32, with_lm_head=True)
    assert head.model.get_input_embeddings().weight.shape[0] == 1
    per_layer = sum(p.numel() for p in model.model.layers[5].parameters())
    held = sum(p.numel() for p in head.model.parameters())
    assert held <= per_layer + VOCABULARY * 32 + 2 * 32
    with pytest.raises(ModelError, match="no file"):
        load_slice(str(copy), start=0, dtype=torch.float32, with_lm_head=True)


def test_a_final_slice_without_lm_head_ends_in_the_final_norm(saved) -> None:
    model, path = saved("granitemoe")
    ids, mask, _ = padded_batch()
    part = load_slice(path, dtype=torch.float32, with_lm_head=False)
    with torch.no_grad():
        want = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        got = slice_hidden(part, ids, mask)
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()])


def test_padded_positions_give_zero_rows_and_dtype_is_as_asked(saved) -> None:
    _, path = saved("mixtral")
    part = load_slice(path, dtype=torch.bfloat16, with_lm_head=True)
    ids, mask, last = padded_batch()
    with torch.no_grad():
        logits = slice_logits(part, ids, mask, torch.stack([last, torch.tensor([-1, 2, -1])], dim=1))
    assert logits.dtype is torch.bfloat16
    assert bool((logits[[0, 2], 1] == 0).all())
    assert bool((logits[1, 1] != 0).any())
    assert part.dtype is torch.bfloat16
    assert not any(p.requires_grad for p in part.model.parameters())
    assert not part.model.training


def test_threads_load_one_after_another(saved, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers swaps `tie_weights` for nothing while it loads: two at once can leave it so for the whole process."""
    _, path = saved("olmoe")
    own, load, loading = PreTrainedModel.tie_weights, PreTrainedModel.from_pretrained.__func__, threading.Event()
    met: list[bool] = []

    def watched(cls: type, *args: object, **kwargs: object) -> object:
        met.append(loading.is_set())
        loading.set()
        # Time for the other thread to come in, if it may.
        threading.Event().wait(0.2)
        try:
            return load(cls, *args, **kwargs)
        finally:
            loading.clear()

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(watched))
    threads = [
        threading.Thread(target=load_slice, args=(path,), kwargs={"dtype": torch.float32, "with_lm_head": True})
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert met == [False, False]
    assert PreTrainedModel.tie_weights is own


def test_single_file_checkpoint_and_facts(tmp_path: Path) -> None:
    path = save_tiny(tiny_moe("deepseek_v3", dtype=torch.bfloat16), tmp_path)
    facts = model_facts(path)
    assert facts["moe_layers"] == [2, 3, 4, 5]
    assert (facts["num_layers"], facts["num_experts"], facts["top_k"], facts["scoring"]) == (6, 8, 3, "sigmoid")
    assert (facts["dtype"], facts["revision"]) == ("bfloat16", None)
    assert json.loads(json.dumps(facts)) == facts
    part = load_slice(path, start=1, stop=4, dtype=torch.float32, with_lm_head=False)
    # The selection bias is kept in fp32 and read, not re-initialised.
    with safe_open(str(tmp_path / "model.safetensors"), framework="pt") as handle:
        want = handle.get_tensor("model.layers.3.mlp.gate.e_score_correction_bias")
    assert torch.equal(part.model.layers[2].mlp.gate.e_score_correction_bias, want.float())


def test_refusals(saved, tmp_path: Path) -> None:
    _, path = saved("olmoe")
    arguments = {"dtype": torch.float32, "with_lm_head": True}
    with pytest.raises(ModelError, match="does not exist"):
        load_slice(str(tmp_path / "nowhere"), **arguments)
    with pytest.raises(ModelError, match="has no config"):
        load_slice(str(tmp_path), **arguments)
    with pytest.raises(ModelError, match="only a slice that ends with the last layer"):
        load_slice(path, stop=3, **arguments)
    with pytest.raises(ModelError, match="not a part"):
        load_slice(path, start=6, **arguments)
    with pytest.raises(ModelError, match="cannot get config"):
        load_slice("nobody/no-such-model", **arguments)


def test_damaged_and_absent_weights(tmp_path: Path) -> None:
    arguments = {"dtype": torch.float32, "with_lm_head": True}
    path = Path(save_tiny(tiny_moe("olmoe"), tmp_path / "model"))
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ModelError, match="damaged"):
        load_slice(str(path), **arguments)
    weights.unlink()
    with pytest.raises(ModelError, match="Only safetensors"):
        load_slice(str(path), **arguments)


@pytest.mark.parametrize("model_type", ["llama", "llama4_text", "phimoe"])
def test_models_that_cannot_be_tuned_are_refused_by_name(model_type: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "num_hidden_layers": 2}))
    with pytest.raises(ModelError, match=rf"'{model_type}' model cannot be tuned: .*Families that can"):
        model_facts(str(tmp_path))


def test_an_unknown_layer_rule_is_refused(tmp_path: Path) -> None:
    config = tiny_config("olmoe")
    config.special_layer_interval = 2
    from roma_ray.moe.slice_config import slice_config

    with pytest.raises(ModelError, match="special_layer_interval"):
        slice_config(config, 0, 3)


def test_ernie_periodic_layers_cut_only_where_they_can() -> None:
    from roma_ray.moe.slice_config import slice_config

    config = tiny_config("ernie4_5_moe", moe_layer_interval=2, moe_layer_start_index=1, moe_layer_end_index=5)
    assert slice_config(config, 2, 6).moe_layer_end_index == 3
    with pytest.raises(ModelError, match="multiple of 2"):
        slice_config(config, 3, 6)
