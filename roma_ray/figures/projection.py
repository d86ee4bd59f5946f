"""Figure 3 of the paper: task embedding and routing rows, before and after, laid out in the plane and coloured by task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure

from roma_ray.figures.style import OTHER, colours, new_figure, shorten, styled

MOST_QUESTIONS = 2000
MOST_TASKS = 12
_NEIGHBORS = 15
# Below this, neighborhoods say nothing that the principal components do not.
_FEWEST_FOR_TSNE = 12
# Half of scikit-learn's default: maps of 2,000 questions no longer change to the eye.
_ITERATIONS = 500


@dataclass(frozen=True)
class PlaneLayout:
    """Points in the plane [N, 2] and how they were made: `t-SNE` or `PCA`."""

    points: np.ndarray
    method: str


def draw_rows(count: int, generator: torch.Generator, most: int = MOST_QUESTIONS) -> list[int]:
    """At most `most` of `count` row numbers, drawn by `generator`, in rising order."""
    rows: list[int] = torch.randperm(count, generator=generator)[:most].sort().values.tolist()
    return rows


def lay_out(features_NC: np.ndarray, seed: int) -> PlaneLayout:
    """Lay rows out in the plane with t-SNE (Euclidean, one thread, fixed seed); by principal components where they are too few.

    UMAP would do as well, but compiles itself for a minute in every process.
    """
    points = np.asarray(features_NC, dtype=np.float64)
    if len(points) < _FEWEST_FOR_TSNE:
        return PlaneLayout(_principal(points), "PCA")
    # scikit-learn costs seconds to import, which reports of few questions do not need.
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    tsne = TSNE(
        perplexity=min(_NEIGHBORS, (len(points) - 1) // 3),
        max_iter=_ITERATIONS,
        # Principal components start all maps alike.
        init=_spread(_principal(points), seed),
        random_state=seed,
        n_jobs=1,
    )
    # Sums of several threads have no order.
    with threadpool_limits(1):
        return PlaneLayout(np.asarray(tsne.fit_transform(points.astype(np.float32))), "t-SNE")


def _principal(points: np.ndarray) -> np.ndarray:
    """The first two principal components [N, 2]; missing ones are 0. Signs are fixed, so equal data give equal maps."""
    centred = points - points.mean(0)
    left, scale, right = np.linalg.svd(centred, full_matrices=False)
    kept = min(2, len(scale))
    signs = np.sign(right[np.arange(kept), np.abs(right[:kept]).argmax(1)])
    result = np.zeros((len(points), 2))
    result[:, :kept] = left[:, :kept] * scale[:kept] * np.where(signs == 0, 1, signs)
    return result


def _spread(start: np.ndarray, seed: int) -> np.ndarray:
    """Starting points in t-SNE's usual range, equal ones moved apart a little."""
    noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).numpy()
    return (1e-4 * (start / max(float(start.std(0).max()), 1e-12) + 1e-2 * noise)).astype(np.float32)


@styled
def task_maps(maps: Mapping[str, PlaneLayout], tasks: Sequence[str], silhouettes: Mapping[str, float | None]) -> Figure:
    """One panel a space, in the order given, the same questions in each, coloured by task.

    `silhouettes` are printed with the panels: they, not the eye, say whether tasks are apart.
    """
    figure, axes = new_figure(3.6 * len(maps), 4.6, columns=len(maps))
    largest = [name for name, _ in Counter(sorted(tasks)).most_common(MOST_TASKS)]
    shown = sorted(largest)
    look = colours(shown)
    labels = np.asarray(tasks)
    for axis, (title, layout) in zip(axes, maps.items(), strict=True):
        rest = ~np.isin(labels, shown)
        size = float(np.clip(24000 / max(1, len(labels)), 14, 44))
        groups = [(name, labels == name, *look[name]) for name in shown]
        if rest.any():
            groups.insert(0, (f"{len(set(tasks)) - len(shown)} other tasks", rest, OTHER, "."))
        handles = [
            axis.scatter(
                layout.points[mask, 0],
                layout.points[mask, 1],
                s=size,
                c=colour,
                marker=marker,
                alpha=0.85,
                # Shapes that overlap stay shapes.
                edgecolors="white",
                linewidths=0.35,
                rasterized=True,
            )
            for _, mask, colour, marker in groups
        ]
        score = silhouettes.get(title)
        axis.set_title(title if score is None else f"{title}\ntask silhouette {score:+.3f}")
        axis.set(xticks=[], yticks=[], xlabel=f"{layout.method} 1", ylabel=f"{layout.method} 2")
    names = [shorten(name, 28) for name, *_ in groups]
    figure.legend(handles, names, loc="outside lower center", ncols=min(6, len(names)), markerscale=(50 / size) ** 0.5)
    return figure
