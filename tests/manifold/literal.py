"""The formulas once more, as plain Python loops over single numbers: slow, and easy to hold against the paper."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Table:
    """A small question table to search."""

    embeddings: Tensor
    successful: Tensor
    training: Tensor
    ids: list[str]
    texts: list[str]

    @property
    def columns(self) -> dict[str, object]:
        return {"training_N": self.training, "ids": self.ids, "text_keys": self.texts, "tasks": self.tasks}

    @property
    def tasks(self) -> list[str]:
        """Three tasks, by id: the order of the rows does not say which."""
        return [f"task {int(id[1:]) % 3}" for id in self.ids]


def make_table(
    rows: int = 60, width: int = 8, seed: int = 0, distinct: int | None = None, equal_texts: bool = True
) -> Table:
    """Random rows; with `distinct`, rows repeat that many vectors (exact ties), and some of them repeat texts too."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(distinct or rows, width, generator=generator)
    which = torch.randint(len(pool), (rows,), generator=generator) if distinct else torch.arange(rows)
    training = torch.rand(rows, generator=generator) < 0.8
    training[:2] = True
    successful = training & (torch.rand(rows, generator=generator) < 0.6)
    successful[0] = True
    numbers = torch.randperm(rows, generator=generator).tolist()
    copies = torch.rand(rows, generator=generator) < 0.5
    texts = [
        f"text of vector {which[row]}" if equal_texts and distinct and copies[row] else f"text {row}"
        for row in range(rows)
    ]
    # Ids whose order as strings is neither that of the rows nor that of the numbers.
    return Table(pool[which], successful, training, [f"q{number}" for number in numbers], texts)


def similarity(a: Sequence[float], b: Sequence[float], kind: str, sigma: float) -> float:
    """Eq. 5, or the cosine, of two vectors after scaling to length 1."""
    norm_a, norm_b = math.sqrt(sum(x * x for x in a)), math.sqrt(sum(x * x for x in b))
    if kind == "cosine":
        return sum(x * y for x, y in zip(a, b, strict=True)) / (norm_a * norm_b)
    square = sum((x / norm_a - y / norm_b) ** 2 for x, y in zip(a, b, strict=True))
    return math.exp(-square / (2 * sigma**2))


def neighbors(table: Table, row: int, kind: str, sigma: float, k: int | None, epsilon: float | None) -> list[int]:
    """Eq. 3 or eq. 4 for one question. Similarities are rounded so that equal vectors tie in spite of rounding."""
    vectors = table.embeddings.double().tolist()
    scored = []
    for other in range(len(vectors)):
        if table.successful[other] and table.texts[other] != table.texts[row] and other != row:
            value = similarity(vectors[row], vectors[other], kind, sigma)
            if epsilon is None or value >= epsilon:
                scored.append((-round(value, 12), table.ids[other], other))
    return [other for _, _, other in sorted(scored)[:k]]


def manifold_kl(routing: Tensor, stored: Tensor, pairs: Sequence[Sequence[tuple[int, float]]]) -> Tensor:
    """KL(m_i || r_i) summed over questions and layers, one number at a time; 0 log 0 is 0, no neighbor gives nothing."""
    total = routing.new_zeros(())
    for i, own in enumerate(pairs):
        for layer in range(routing.shape[1]):
            for expert in range(routing.shape[2]):
                mean = sum(weight * float(stored[j, layer, expert]) for j, weight in own)
                if mean > 0:
                    total = total + mean * (math.log(mean) - routing[i, layer, expert].log())
    return total


def weights(values: Sequence[float]) -> list[float]:
    """Eq. 6."""
    return [value / sum(values) for value in values]


def manifold(routing: Tensor, stored: Tensor, pairs: Sequence[Sequence[tuple[int, float]]]) -> Tensor:
    """Eq. 7 summed over questions, one number at a time; `pairs[i]` lists (j, W_ij)."""
    total = routing.new_zeros(())
    for i, own in enumerate(pairs):
        for j, weight in own:
            for layer in range(routing.shape[1]):
                for expert in range(routing.shape[2]):
                    total = total + weight * (routing[i, layer, expert] - stored[j, layer, expert]) ** 2
    return total
