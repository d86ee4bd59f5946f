"""Candidate search by inner product in fp32: torch (any device) and FAISS. Fast and approximate in the last digits.

`ranking.py` re-ranks in fp64 what these return, so that both give the same neighborhoods to the bit. An approximate
index can be added as one more class with these two methods.

Shapes: B queries, M candidates, C embedding width, F candidates returned a query, P (query, candidate) pairs.
"""

from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from roma_ray.errors import ConfigError, NeighborError

BackendName = Literal["auto", "faiss", "torch"]

# Scores of one tile: 2^24 fp32 numbers, 64 MB, whatever the numbers of queries and candidates.
TILE_SCORES = 2**24
# The GPU index of FAISS returns no more than this many candidates a query.
_FAISS_GPU_TOP = 2048


class CandidateSearch(Protocol):
    """What the neighbor search needs of an index over M unit vectors."""

    def top(self, queries_BC: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The `count` best candidates of each query: scores [B, F] fp32, falling, and numbers [B, F], on the CPU."""

    def above(self, queries_BC: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
        """All pairs scoring at least the threshold: query numbers, candidate numbers, scores, each [P], on the CPU."""


class TorchSearch:
    """Exact scan by matrix products in tiles, on any device."""

    def __init__(self, candidates_MC: Tensor, device: torch.device) -> None:
        self.candidates_MC = candidates_MC.to(device, torch.float32)

    def _tiles(self, queries: int) -> list[tuple[int, Tensor]]:
        rows = max(1, TILE_SCORES // max(1, queries))
        return [(start, self.candidates_MC[start : start + rows]) for start in range(0, len(self.candidates_MC), rows)]

    def top(self, queries_BC: Tensor, count: int) -> tuple[Tensor, Tensor]:
        queries_BC = queries_BC.to(self.candidates_MC)
        scores_BF = queries_BC.new_empty(len(queries_BC), 0)
        picks_BF = scores_BF.long()
        for start, tile_MC in self._tiles(len(queries_BC)):
            tile_BF, tile_picks_BF = (queries_BC @ tile_MC.T).topk(min(count, len(tile_MC)), dim=1)
            scores_BF = torch.cat([scores_BF, tile_BF], dim=1)
            picks_BF = torch.cat([picks_BF, tile_picks_BF + start], dim=1)
            scores_BF, order_BF = scores_BF.topk(min(count, scores_BF.shape[1]), dim=1)
            picks_BF = picks_BF.gather(1, order_BF)
        return scores_BF.cpu(), picks_BF.cpu()

    def above(self, queries_BC: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
        queries_BC = queries_BC.to(self.candidates_MC)
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for start, tile_MC in self._tiles(len(queries_BC)):
            scores_BM = queries_BC @ tile_MC.T
            rows_P, picks_P = (scores_BM >= threshold).nonzero(as_tuple=True)
            found.append((rows_P.cpu(), (picks_P + start).cpu(), scores_BM[rows_P, picks_P].cpu()))
        rows, picks, scores = (torch.cat(parts) for parts in zip(*found, strict=True))
        return rows, picks, scores


class FaissSearch:
    """Flat inner-product index of FAISS: on the GPU with faiss-gpu and a CUDA device, else on the CPU."""

    def __init__(self, candidates_MC: Tensor, device: torch.device) -> None:
        faiss = _faiss()
        self.index: Any = faiss.IndexFlatIP(candidates_MC.shape[1])
        self.by_torch: TorchSearch | None = None
        if device.type == "cuda" and faiss_on_gpu():
            self.resources = faiss.StandardGpuResources()
            self.index = faiss.index_cpu_to_gpu(self.resources, device.index or 0, self.index)
            # The GPU index has no range search and a bound on `count`; torch's scan of the same device serves there.
            self.by_torch = TorchSearch(candidates_MC, device)
        self.index.add(candidates_MC.float().contiguous().numpy())

    def top(self, queries_BC: Tensor, count: int) -> tuple[Tensor, Tensor]:
        if self.by_torch is not None and count > _FAISS_GPU_TOP:
            return self.by_torch.top(queries_BC, count)
        scores_BF, picks_BF = self.index.search(queries_BC.float().contiguous().numpy(), count)
        return torch.from_numpy(scores_BF), torch.from_numpy(picks_BF)

    def above(self, queries_BC: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
        if self.by_torch is not None:
            return self.by_torch.above(queries_BC, threshold)
        offsets, scores_P, picks_P = self.index.range_search(queries_BC.float().contiguous().numpy(), threshold)
        sizes_B = torch.from_numpy(offsets.astype("int64")).diff()
        rows_P = torch.arange(len(queries_BC)).repeat_interleave(sizes_B)
        return rows_P, torch.from_numpy(picks_P), torch.from_numpy(scores_P)


def resolve_backend(
    backend: BackendName = "auto", device: str | torch.device | None = None
) -> tuple[str, torch.device]:
    """The backend and device that `auto` and None stand for here: ("faiss" or "torch", device).

    Device: CUDA or ROCm where there is one, else CPU. Backend: FAISS where it is installed for that device, else torch
    (a GPU without faiss-gpu, ROCm among them, is scanned by torch). Raises ConfigError for an unknown name and
    NeighborError where FAISS is asked for by name and not installed.
    """
    if backend not in get_args(BackendName):
        raise ConfigError(f"neighbor backend {backend!r} is not one of: {', '.join(get_args(BackendName))}")
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if backend == "torch":
        return "torch", chosen
    if backend == "faiss":
        _faiss()
        return "faiss", chosen
    fits = faiss_on_gpu() if chosen.type != "cpu" else _faiss_installed()
    return ("faiss" if fits else "torch"), chosen


def open_search(candidates_MC: Tensor, backend: BackendName, device: str | torch.device | None) -> CandidateSearch:
    """An index over the given unit vectors; errors as `resolve_backend`."""
    name, chosen = resolve_backend(backend, device)
    return FaissSearch(candidates_MC, chosen) if name == "faiss" else TorchSearch(candidates_MC, chosen)


def faiss_on_gpu() -> bool:
    """Whether the installed FAISS is a GPU build that sees a device."""
    if not _faiss_installed():
        return False
    faiss = _faiss()
    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


def _faiss_installed() -> bool:
    try:
        import faiss  # noqa: F401
    except ImportError:
        return False
    return True


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise NeighborError(
            "the neighbor backend is `faiss`, which is not installed: install faiss-cpu (or faiss-gpu on CUDA), or set "
            "the backend to `torch`, which gives the same neighbors"
        ) from error
    return faiss
