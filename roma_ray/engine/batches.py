"""Planned batches: lists of rows fixed by their lengths and a token budget, the same on any number of workers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from roma_ray.questions.prompts import Prompt


def plan_batches(tokens: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group rows of like length into batches of at most `batch_tokens` tokens (a longer row is alone).

    tokens: what each row adds to a packing. Longest first, ties by row number, so that the batch most likely to run out
    of memory runs first and a batch's attention pads little.
    """
    order = np.lexsort((np.arange(len(tokens)), -np.asarray(tokens)))
    batches: list[list[int]] = []
    total = 0
    for row in order.tolist():
        if batches and total + tokens[row] <= batch_tokens:
            batches[-1].append(row)
            total += tokens[row]
        else:
            batches.append([row])
            total = tokens[row]
    return batches


def is_letter(prompt: Prompt) -> bool:
    """Whether every choice is one token, so that all are scored at the prompt's last position.

    True of the `letter` format always, and of a `cloze` question whose choices are single tokens.
    """
    return all(len(ids) == 1 for ids in prompt.choice_ids)


def epoch_order(rows: Sequence[int], seed: int, epoch: int) -> list[int]:
    """The sample order of an epoch: a function of (seed, epoch) over global row numbers, and of nothing else."""
    generator = np.random.default_rng((seed, epoch))
    return [int(row) for row in np.asarray(sorted(rows))[generator.permutation(len(rows))]]


def chunks(rows: Sequence[int], size: int) -> list[list[int]]:
    """Consecutive groups of at most `size` rows."""
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]
