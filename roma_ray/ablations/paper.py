"""The paper's ablation results (arXiv 2511.07419), average accuracy over its eight benchmarks in percent.

Under the names that configs/ablations.yaml gives factors and levels. `olmoe`: Figures 6 to 10, of which only what section 5.3
states as numbers; `deepseek`: Tables 3 to 7. They were measured on other questions than a sweep of this project's.
"""

from __future__ import annotations

from collections.abc import Mapping

BASE = {"olmoe": 67.6, "deepseek": 66.6}
MODELS = {"olmoe": "OLMoE-7B-A1B", "deepseek": "DeepSeekMoE-16B-A3B"}
SOURCES = {
    "olmoe": {"layers": "Figure 6", "tokens": "Figure 7", "neighbors": "Figure 8", "training set": "Figure 9", "regularizer": "Figure 10"},
    "deepseek": {"layers": "Table 3", "tokens": "Table 4", "neighbors": "Table 5", "training set": "Table 6", "regularizer": "Table 7"},
}  # fmt: skip

_OLMOE = {
    "layers": {"L5": 76.2, "All": 75.1},
    "tokens": {"First1": 71.4, "Middle1": 69.2, "Last1": 76.2, "Last3": 74.5},
    "neighbors": {"random": 67.8, "ε = 0.3": 68.9, "ε = 0.5": 74.1, "k = 3": 76.2},
    "training set": {"10 %": 68.5, "30 %": 70.8, "50 %": 73.6, "70 %": 75.0, "100 %": 76.2},
    "regularizer": {"l1": 68.2, "l2": 71.5, "entropy": 70.7, "manifold": 76.2},
}
_DEEPSEEK = {
    "layers": {
        "F1": 68.0, "M1": 67.4, "L1": 68.6, "F1M1": 69.0, "F1L1": 70.2, "M1L1": 69.6, "F2": 69.4, "M2": 68.8, "L2": 70.6,
        "F2M3": 70.8, "F2L3": 71.3, "M2L3": 71.0, "F5": 72.4, "M5": 71.6, "L5": 74.7, "All": 73.7,
    },
    "tokens": {"First1": 70.2, "Middle1": 68.1, "Last1": 74.7, "First3": 69.0, "Middle3": 67.6, "Last3": 73.1},
    "neighbors": {
        "random": 66.8, "ε = 0.3": 68.0, "ε = 0.5": 72.8, "ε = 0.7": 71.2, "k = 1": 71.0, "k = 3": 74.7, "k = 5": 73.4,
    },
    "training set": {"10 %": 67.5, "30 %": 69.8, "50 %": 72.2, "70 %": 73.6, "100 %": 74.7},
    "regularizer": {"l1": 67.2, "l2": 70.3, "entropy": 69.8, "manifold": 74.7},
}  # fmt: skip
RESULTS: Mapping[str, Mapping[str, Mapping[str, float]]] = {"olmoe": _OLMOE, "deepseek": _DEEPSEEK}


def model_of(path: str) -> str | None:
    """The model of the paper that a folder or hub id names; None for another."""
    name = path.rstrip("/").rpartition("/")[2].lower().replace("-", "").replace("_", "")
    known = {"olmoe": "olmoe", "deepseekmoe16b": "deepseek"}
    return next((model for start, model in known.items() if name.startswith(start)), None)


def result(model: str | None, factor: str, level: str) -> float | None:
    """The paper's accuracy at a level, in percent; None where it gives no number."""
    return RESULTS[model].get(factor, {}).get(level) if model else None
