"""The self-check on load: right families pass at rounding, and what a wrong one does is seen, by layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from roma_ray.errors import ModelError
from roma_ray.moe import parts, passes
from roma_ray.moe.families import supported_families
from roma_ray.moe.reach import UNREACHED
from roma_ray.moe.selfcheck import check_slice
from roma_ray.moe.slices import Slice, load_slice
from tests.families import row as row_of
from tests.tiny import DELTA_RULE, FAMILIES, MORE_FAMILIES, save_tiny, tiny_moe


def loaded(folder: Path, family: str, *, start: int = 0, dtype: torch.dtype = torch.float32, **layout: Any) -> Slice:
    path = save_tiny(tiny_moe(family, seed=1, dtype=dtype, **layout), folder)
    return load_slice(path, start=start, dtype=dtype, with_lm_head=True)


@pytest.mark.parametrize("family", FAMILIES + MORE_FAMILIES)
def test_every_listed_family_passes_at_rounding(tmp_path: Path, family: str) -> None:
    for start in (0, 3):
        found = check_slice(loaded(tmp_path / str(start), family, start=start))
        assert found is not None
        # Processors round otherwise; families that are wrong differ by 0.1.
        rounding = 1e-3 if family in DELTA_RULE else 1e-4
        assert max(found.packed, found.resumed, found.trimmed, found.routing) < rounding
        assert found.gradient is not None
        assert found.gradient < (1e-2 if family in DELTA_RULE else 1e-3)
        assert found.reach is not None
        assert found.reach > UNREACHED


@pytest.mark.parametrize("family", ["olmoe", "granitemoehybrid"])
def test_bf16_passes_and_leaves_the_slice_as_it_was(tmp_path: Path, family: str) -> None:
    part = loaded(tmp_path, family, dtype=torch.bfloat16)
    before = {name: p.clone() for name, p in part.model.named_parameters()}
    check_slice(part)
    assert all(torch.equal(p, before[name]) and not p.requires_grad for name, p in part.model.named_parameters())


def test_a_feed_forward_part_that_goes_on_running_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = loaded(tmp_path, "granitemoeshared")
    monkeypatch.setattr(parts, "_FEED_FORWARD", ("mlp", "block_sparse_moe", "feed_forward", "experts"))
    with pytest.raises(ModelError, match=r"read after its attention, layer 0 differs from transformers' own"):
        check_slice(part)


def test_a_recurrent_layer_that_mixes_questions_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = loaded(tmp_path, "qwen3_next")
    monkeypatch.setattr(passes, "along_the_tree", lambda mixer, *tables: mixer.forward)
    with pytest.raises(ModelError, match=r"packed, layer 0 differs"):
        check_slice(part)


def test_a_second_multiplication_of_the_states_is_seen(tmp_path: Path) -> None:
    part = loaded(tmp_path, "granitemoe", start=3)
    part.model.base_model.embedding_multiplier = 3.0
    with pytest.raises(ModelError, match="cannot be cut at layer 3"):
        check_slice(part)


def test_a_wrong_gradient_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = loaded(tmp_path, "olmoe")
    real = passes.without_mixer

    @contextmanager
    def cut(block: torch.nn.Module) -> Iterator[None]:
        with real(block), torch.no_grad():
            yield

    monkeypatch.setattr(passes, "without_mixer", cut)
    with pytest.raises((ModelError, RuntimeError), match=r"differentiated by its gates|does not require grad"):
        check_slice(part)


@pytest.mark.parametrize(
    ("family", "layout", "reached"),
    [
        ("olmoe", {"num_experts_per_tok": 1, "norm_topk_prob": True}, False),
        ("olmoe", {"num_experts_per_tok": 1, "norm_topk_prob": False}, True),
        ("mixtral", {"num_experts_per_tok": 1}, False),
        ("gpt_oss", {"num_experts_per_tok": 1}, False),
        ("mixtral", {}, True),
    ],
)
def test_routers_that_the_task_loss_cannot_reach_are_measured(
    tmp_path: Path, family: str, layout: dict[str, Any], reached: bool
) -> None:
    found = check_slice(loaded(tmp_path, family, **layout))
    assert found is not None
    assert found.reach is not None
    assert (found.reach > UNREACHED) is reached


def test_weights_that_are_no_numbers_are_told_elsewhere(tmp_path: Path) -> None:
    part = loaded(tmp_path, "olmoe")
    with torch.no_grad():
        part.model.base_model.layers[2].self_attn.o_proj.weight[0, 0] = float("nan")
    assert check_slice(part) is None


def test_the_documents_figures_are_of_every_family() -> None:
    """Not to the digit, which differs from machine to machine."""
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    _, _, after = text.partition("| `model_type` | packed |")
    rows = [line.strip("| ").split(" | ") for line in after.splitlines() if line.startswith("| `")]
    assert [row[0].strip("`") for row in rows[: len(supported_families())]] == list(supported_families())
    measured = row_of("olmoe").strip("| ").split(" | ")
    (written,) = [row for row in rows if row[0] == "`olmoe`"]
    assert measured[-1] == written[-1]
    assert all(float(a) < 20 * float(b) for a, b in zip(measured[1:-1], written[1:-1], strict=True))
