"""What tuning did to the routing: on the test questions, and whether it pulled questions towards their successful neighbors.

The trained quantity is eq. 7: sum_j W_ij ||r_i - r_j||^2 of a question's live routing r_i and the stored routing r_j of
its neighbors, which stays the base model's. Routing that merely becomes flatter shrinks every distance, so the same is measured
to random members of S, and the two are compared as shares of what they were: only what the neighbors' distance shrinks *more* is
a pull towards them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from roma_ray.engine.identity import data_seed
from roma_ray.engine.scoring import Scores
from roma_ray.engine.setup import Setup
from roma_ray.errors import NeighborError
from roma_ray.evaluation.statistics import pair, relative_change, standard_error, with_error
from roma_ray.manifold import diagnostics
from roma_ray.manifold.neighbors import Neighborhoods
from roma_ray.stages.finetuning import read_routing_rows
from roma_ray.stages.neighborhoods import answered_rightly, search
from roma_ray.store.artifacts import Stage

DIAGNOSED_ROWS = 2000
TRAINED_ROWS = 256
# Which trained questions are measured depends on no setting but the neighborhoods, so that runs are alike.
_SEED = 0


def sampled(mask_N: Tensor) -> list[int]:
    """At most TRAINED_ROWS rows of a mask, drawn by a fixed seed, ascending."""
    rows = mask_N.nonzero()[:, 0]
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(_SEED))[:TRAINED_ROWS]
    chosen: list[int] = rows[drawn.sort().values].tolist()
    return chosen


def routing_change(
    setup: Setup,
    top_k: int,
    tasks: Sequence[str],
    base: Scores,
    tuned: Scores,
    columns: list[int],
    embeddings_NC: Tensor,
) -> dict[str, Any]:
    """How routing changed on the test questions (at most DIAGNOSED_ROWS), and how far it agrees with the embeddings; `top_k` experts are
    chosen in a layer.
    """
    seed = data_seed(setup.config)
    generator = torch.Generator().manual_seed(seed)
    members = torch.randperm(len(tasks), generator=generator)[:DIAGNOSED_ROWS].sort().values.tolist()
    before, after = (torch.from_numpy(s.routing_NLE[members][:, columns]) for s in (base, tuned))
    experts = before.shape[-1]
    chosen = [diagnostics.top_k_selection(r, top_k) for r in (before, after)]
    drawn = [tasks[n] for n in members]
    points = embeddings_NC[[base.rows[n] for n in members]]
    overlap_k = min(10, len(members) - 1)
    result: dict[str, Any] = {
        "layers": list(setup.layers),
        "questions": len(members),
        "routing_kl": diagnostics.routing_kl(after, before).tolist(),
        "selection_overlap": diagnostics.selection_overlap(chosen[1], chosen[0]).tolist(),
        "embedding_silhouette": _silhouette(points, drawn, seed),
    }
    for name, routing, picks in (("base", before, chosen[0]), ("tuned", after, chosen[1])):
        result[name] = {
            "routing_entropy": diagnostics.routing_entropy(routing).tolist(),
            "expert_load": diagnostics.expert_load(picks, experts).tolist(),
            "task_silhouette": _silhouette(routing.flatten(1), drawn, seed),
            "neighbor_overlap": diagnostics.neighbor_overlap(points, routing.flatten(1), overlap_k).__dict__
            if overlap_k > 0
            else None,
        }
    return result


def _silhouette(points: Tensor, tasks: Sequence[str], seed: int) -> float | None:
    return diagnostics.silhouette(points, tasks, torch.Generator().manual_seed(seed))


def manifold_distance(
    setup: Setup,
    questions: Stage,
    extraction: Stage,
    embeddings: Stage,
    near: Neighborhoods,
    tuned: Mapping[str, Scores | None],
    columns: list[int],
) -> dict[str, Any]:
    """{train, test}: the distance of eq. 7 before and after tuning, to the neighbors and to random members of S.

    `tuned` are the tuned routers' answers to (some of) the trained and to the test questions; `near` the trained ones'
    neighborhoods. The test questions' are found by the same rule; null where hardly any has one, and for `self`: the distance
    of a question to its own base routing begins at 0, of which there is no share.
    """
    stored_NLE = read_routing_rows(extraction.path, setup.config.routing.tokens, setup.layer_columns)
    successful_N = answered_rightly(setup, {"questions": questions, "extract": extraction}) & near.queried
    result: dict[str, Any] = {"train": None, "test": None}
    if setup.config.neighbors.method == "self":
        return result
    for split, scores in tuned.items():
        if scores is None:
            continue
        rows = torch.tensor(scores.rows)
        if split == "test":
            asked_N = torch.zeros_like(near.queried)
            asked_N[rows[:DIAGNOSED_ROWS]] = True
            try:
                found = search(setup, questions, embeddings, successful_N, near.queried, asked_N)
            except NeighborError:
                continue
        else:
            found = near
        kept = [n for n, row in enumerate(scores.rows) if found.sizes[row] > 0]
        if kept:
            live_BLE = torch.from_numpy(scores.routing_NLE[kept][:, columns])
            result[split] = distances(live_BLE, [scores.rows[n] for n in kept], stored_NLE, found, successful_N)
    return result


def distances(
    live_BLE: Tensor, rows: Sequence[int], stored_NLE: Tensor, found: Neighborhoods, successful_N: Tensor
) -> dict[str, Any]:
    """{questions, neighbors, random, pull}: paired figures of both distances; relative changes, and their difference as `pull`."""
    control = diagnostics.with_random_members(found, successful_N, torch.Generator().manual_seed(_SEED))
    result: dict[str, Any] = {"questions": len(rows)}
    influences = []
    for name, neighborhoods in (("neighbors", found), ("random", control)):
        base, tuned = (
            diagnostics.neighbor_distances(r, rows, stored_NLE, neighborhoods).numpy()
            for r in (stored_NLE[list(rows)], live_BLE)
        )
        change, influence = relative_change(base, tuned)
        result[name] = {
            **{k: v for k, v in pair(base, tuned).plain().items() if k not in ("lost", "won", "mcnemar_p")},
            "relative": change,
            "relative_stderr": standard_error(influence),
        }
        influences.append(influence)
    pull = result["neighbors"]["relative"] - result["random"]["relative"]
    result["pull"] = {"relative": pull, "relative_stderr": standard_error(np.subtract(*influences))}
    return result


def describe_distance(found: Mapping[str, Any]) -> list[str]:
    """A sentence for each split on whether questions were pulled towards their neighbors, or all distances shrank."""
    names = {"train": "trained questions", "test": "test questions"}
    lines = []
    for split, one in found.items():
        if one is None:
            continue
        near, control, pull = one["neighbors"], one["random"], one["pull"]
        lines.append(
            f"distance of eq. 7 on {one['questions']:,} {names[split]}: {near['base']:.3f} -> {near['tuned']:.3f} to the successful "
            f"neighbors ({100 * near['relative']:+.1f} %), {control['base']:.3f} -> {control['tuned']:.3f} to random successes "
            f"({100 * control['relative']:+.1f} %); pull towards the neighbors, beyond what shrinks anyway: "
            f"{with_error(pull['relative'], pull['relative_stderr'], digits=1, signed=True)} points"
        )
    return lines
