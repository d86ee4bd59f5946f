"""Packed passes against the plain padded forward of the whole model, for every family: outputs, routing, gradients."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from roma_ray.moe import packing as packing_module
from roma_ray.moe.masters import RouterMasters
from roma_ray.moe.packing import Packing, Segment, pack
from roma_ray.moe.passes import run_packed
from roma_ray.moe.reading import read_routing
from roma_ray.moe.slices import Slice, load_slice
from tests.padded import slice_logits
from tests.tiny import DELTA_RULE, FAMILIES, MORE_FAMILIES, VOCABULARY, save_tiny, tiny_moe


def tokens(count: int, generator: torch.Generator) -> tuple[int, ...]:
    return tuple(torch.randint(3, VOCABULARY, (count,), generator=generator).tolist())


def tree(seed: int = 1) -> Packing:
    """A shared prefix, three prompts, and one or two continuations of each."""
    generator = torch.Generator().manual_seed(seed)
    segments = [Segment(tokens(4, generator))]
    for length, continuations in ((9, (3, 1)), (5, (2, 6)), (13, (4,))):
        segments.append(Segment(tokens(length, generator), 0))
        prompt = len(segments) - 1
        segments += [Segment(tokens(n, generator), prompt) for n in continuations]
    return pack(segments)


def leaves(packing: Packing) -> list[int]:
    return [n for n in range(len(packing.segments)) if all(s.parent != n for s in packing.segments)]


def flat_path(packing: Packing, leaf: int) -> list[int]:
    return [t for part in packing.path(leaf) for t in packing.span(part)]


def plain(whole: Slice, packing: Packing) -> dict[int, Tensor]:
    """Logits of every token, one sequence at a time, by the stock attention; by flat token."""
    found: dict[int, Tensor] = {}
    for leaf in leaves(packing):
        places = flat_path(packing, leaf)
        ids = packing.ids_T[places][None]
        logits = slice_logits(whole, ids, torch.ones_like(ids), torch.arange(len(places))[None])[0]
        found.update(zip(places, logits, strict=True))
    return found


@pytest.fixture(scope="module", params=FAMILIES + MORE_FAMILIES)
def parts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Slice, Slice, Slice]:
    """The whole model, and trunk and head cut at the second to last MoE layer."""
    path = str(tmp_path_factory.mktemp(request.param))
    save_tiny(tiny_moe(request.param, seed=0), Path(path))
    whole = load_slice(path, dtype=torch.float32, with_lm_head=True)
    cut = whole.routers[-2].layer
    trunk = load_slice(path, stop=cut, dtype=torch.float32, with_lm_head=False)
    return whole, trunk, load_slice(path, start=cut, dtype=torch.float32, with_lm_head=True)


def close(part: Slice, got: Tensor, want: Tensor) -> None:
    rounding = 1e-3 if part.model_type in DELTA_RULE else 1e-4
    torch.testing.assert_close(got, want, rtol=1e-4, atol=rounding * float(want.abs().max()))


def test_packed_equals_one_sequence_at_a_time(parts: tuple[Slice, Slice, Slice]) -> None:
    whole, packing = parts[0], tree()
    with torch.no_grad():
        want = plain(whole, packing)
        got = run_packed(whole, packing).states
    close(parts[0], got, torch.stack([want[t] for t in range(len(packing))]))


def test_groups_of_many_keys_are_cut_and_change_nothing(
    parts: tuple[Slice, Slice, Slice], monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.no_grad():
        want = run_packed(parts[0], tree()).states
        monkeypatch.setattr(packing_module, "_KEYS_AT_ONCE", 20)
        packing = tree()
        assert len(packing.queries().groups) > 4
        close(parts[0], run_packed(parts[0], packing).states, want)


def test_trims_change_nothing(parts: tuple[Slice, Slice, Slice]) -> None:
    """Trunk and head, logits and routing at some tokens, some rows of lm_head, from the cut's input or after its attention."""
    whole, trunk, head = parts
    packing = tree()
    keep = sorted({packing.flat(leaf, 0) for leaf in leaves(packing)} | {5, len(packing) - 1})
    rows = torch.tensor([7, 3, 50])
    positions = torch.tensor([[keep[0], keep[-1], -1]])
    with torch.no_grad():
        with read_routing(whole.model, whole.routers, positions) as tape:
            want = run_packed(whole, packing).states[keep]
        routing = tape.routing_BPLE[:, :, -len(head.routers) :]
        entering = run_packed(trunk, packing).states
        middle = run_packed(head, packing, entering, after_attention=[head.start]).after_attention[head.start]
        for states, resume in ((entering, False), (middle, True)):
            with read_routing(head.model, head.routers, positions) as tape:
                got = run_packed(head, packing, states, resume=resume, keep=keep, vocabulary_rows=rows).states
            close(parts[0], got, want[:, rows])
            torch.testing.assert_close(tape.routing_BPLE, routing, rtol=1e-4, atol=1e-6)


def test_the_last_layer_may_be_the_cut(parts: tuple[Slice, Slice, Slice]) -> None:
    whole = parts[0]
    last = whole.num_layers - 1
    arguments: dict[str, Any] = {"dtype": torch.float32}
    trunk = load_slice(whole.path, stop=last, with_lm_head=False, **arguments)
    head = load_slice(whole.path, start=last, with_lm_head=True, **arguments)
    packing = tree()
    keep = [6, 17, len(packing) - 1]
    with torch.no_grad():
        want = run_packed(whole, packing).states[keep]
        out = run_packed(head, packing, run_packed(trunk, packing).states, after_attention=[last], keep=keep)
        close(parts[0], out.states, want)
        close(parts[0], run_packed(head, packing, out.after_attention[last], resume=True, keep=keep).states, want)


def losses(states: Tensor, rows: int) -> Tensor:
    return torch.nn.functional.cross_entropy(states[:rows].float(), torch.arange(rows))


def test_gradients_of_every_gate_equal_the_plain_forwards(parts: tuple[Slice, Slice, Slice]) -> None:
    """The exactness gate: loss and gate gradients within 1e-5 of the plain full forward, by the shortest path there is."""
    whole, trunk, head = parts
    packing = tree()
    keep = [flat_path(packing, leaf)[-1] for leaf in leaves(packing)]
    layers = [router.layer for router in head.routers]

    def gradients(part: Slice, forward: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, list[Tensor]]:
        masters = RouterMasters(part, layers)
        try:
            logits, routing = forward()
            loss = losses(logits, len(keep)) + (routing - 0.1).square().sum()
            return loss.detach(), list(torch.autograd.grad(loss, masters.parameters()))
        finally:
            masters.detach()

    def plainly() -> tuple[Tensor, Tensor]:
        logits, routing = [], []
        for leaf in leaves(packing):
            ids = packing.ids_T[flat_path(packing, leaf)][None]
            last = torch.tensor([[ids.shape[1] - 1]])
            tuned = [r for r in whole.routers if r.layer in layers]
            with read_routing(whole.model, tuned, last) as tape:
                logits.append(slice_logits(whole, ids, torch.ones_like(ids), last)[0, 0])
            routing.append(tape.routing_BPLE[0, 0])
        return torch.stack(logits), torch.stack(routing)

    def packed() -> tuple[Tensor, Tensor]:
        with read_routing(head.model, head.routers, torch.tensor([keep])) as tape:
            logits = run_packed(head, packing, middle, resume=True, keep=keep).states
        return logits, tape.routing_BPLE[0]

    with torch.no_grad():
        entering = run_packed(trunk, packing).states
        middle = run_packed(head, packing, entering, after_attention=[head.start]).after_attention[head.start]
    # leaves() ascend, so the kept tokens do too.
    assert keep == sorted(keep)
    want_loss, want = gradients(whole, plainly)
    got_loss, got = gradients(head, packed)
    assert abs(float(got_loss / want_loss) - 1) <= 1e-5
    for mine, theirs in zip(got, want, strict=True):
        # FlexOlmo norms the outputs of its blocks, small here, which magnifies their rounding.
        loose = {"flex_olmo": 5e-4, **dict.fromkeys(DELTA_RULE, 5e-3)}
        limit = loose.get(whole.model_type, 1e-5)
        assert float((mine - theirs).norm() / theirs.norm()) <= limit


def test_questions_do_not_see_each_other() -> None:
    """Other tokens in one question change nothing in another, and would through stock packing with its default cache."""
    model = tiny_moe("olmoe", seed=0)
    first, second, other = (5, 6, 7, 8), (9, 10, 11), (12, 13, 14)

    def stock(tail: tuple[int, ...], **settings: Any) -> Tensor:
        ids = torch.tensor([[*tail, *first]])
        places = torch.tensor([[*range(len(tail)), *range(len(first))]])
        with torch.no_grad():
            return model(ids, position_ids=places, **settings).logits[0, len(tail) :]

    alone = stock((), use_cache=False)
    torch.testing.assert_close(stock(second, use_cache=False), alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(stock(second), stock(other), atol=1e-3), "the trap is gone: say so in packing.py"
    for tail in (second, other):
        ours = run_whole(model, pack([Segment(tail), Segment(first)]))[len(tail) :]
        torch.testing.assert_close(ours, alone, rtol=1e-4, atol=1e-5)


def run_whole(model: PreTrainedModel, packing: Packing) -> Tensor:
    from roma_ray.moe.packing import ATTENTION

    model.set_attn_implementation(ATTENTION["sdpa"])
    try:
        with torch.no_grad():
            return run_packed(Slice(model, 0, 6, 6, "", None), packing).states
    finally:
        model.set_attn_implementation("sdpa")


def test_ragged_flash_attention_is_called_as_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU whole segments go through torch's varlen kernel; here a literal loop with its signature stands in."""
    import inspect

    from torch.nn.attention import varlen

    stock = inspect.signature(varlen.varlen_attn)
    calls = []

    def literal(*arguments: Any, **settings: Any) -> Tensor:
        bound = stock.bind(*arguments, **settings)
        bound.apply_defaults()
        given = bound.arguments
        calls.append(given["window_size"])
        repeats = given["query"].shape[1] // given["key"].shape[1]
        out = torch.zeros_like(given["query"])
        ends = given["cu_seq_q"].tolist()
        assert given["cu_seq_q"].dtype == torch.int32
        assert given["max_q"] == max(b - a for a, b in pairwise(ends))
        for start, end in pairwise(ends):
            q, k, v = (given[name][start:end].transpose(0, 1) for name in ("query", "key", "value"))
            k, v = k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)
            steps = torch.arange(end - start)
            back = steps[:, None] - steps
            seen = (back >= 0) & ((back <= given["window_size"][0]) | (given["window_size"][0] < 0))
            weights = (q @ k.transpose(1, 2) * given["scale"]).masked_fill(~seen, float("-inf")).softmax(-1)
            out[start:end] = (weights @ v).transpose(0, 1)
        return out

    generator = torch.Generator().manual_seed(2)
    packing = pack([Segment(tokens(n, generator)) for n in (7, 3, 11)])
    monkeypatch.setattr(varlen, "varlen_attn", literal)
    for family, windows in (("olmoe", {(-1, 0)}), ("mixtral", {(4, 0)})):
        model = tiny_moe(family, seed=0)
        want = run_whole(model, packing)
        with monkeypatch.context() as patch:
            patch.setattr(packing_module, "serves", lambda *call: True)
            got = run_whole(model, packing)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert set(calls) == windows
        calls.clear()


@pytest.mark.parametrize("bound", [6, 32_768])
def test_the_tables_of_attention_are_those_of_a_literal_walk_along_the_tree(
    bound: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing_module, "_KEYS_AT_ONCE", bound)
    lengths, parents = (3, 2, 4, 1, 2, 5, 1), (-1, 0, 0, 1, 1, -1, 5)
    packing = pack([Segment((1,) * n, parent) for n, parent in zip(lengths, parents, strict=True)])
    owner = [n for n, length in enumerate(lengths) for _ in range(length)]
    for kept in (None, [0, 4, 5, 9, 10, 17]):
        queries = packing.queries() if kept is None else packing.queries_of(kept)
        asked = list(range(len(packing))) if kept is None else kept
        seen: list[int] = []
        for group in queries.groups:
            width = group.positions_GQ.shape[1]
            for row, place in zip(group.rows_N.tolist(), group.place_N.tolist(), strict=True):
                token = asked[row]
                line = [t for part in packing.path(owner[token]) for t in packing.span(part)]
                n = place // width
                assert group.keys_GK[n, : group.key_counts_G[n]].tolist() == line
                assert set(group.keys_GK[n, group.key_counts_G[n] :].tolist()) <= {line[0]}
                assert group.positions_GQ.flatten()[place] == line.index(token)
                seen.append(row)
            assert group.rooted is (kept is None and all(parents[owner[asked[r]]] < 0 for r in group.rows_N.tolist()))
            assert group.keys_GK.numel() <= max(bound, group.keys_GK.shape[1])
        assert sorted(seen) == list(range(len(asked)))
        assert torch.tensor(seen)[queries.order_N].tolist() == list(range(len(asked)))
