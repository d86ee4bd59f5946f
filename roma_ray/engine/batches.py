"""Planned batches: lists of rows fixed by their lengths and a token budget, the same on any number of workers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from roma_ray.questions.prompts import Prompt


def plan_batches(lengths: Sequence[int], counts: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group rows of like length into batches of at most `batch_tokens` padded tokens (a longer row is alone).

    lengths: longest sequence of each row, tokens; counts: sequences of each row. Longest first, ties by row number, so
    that the batch most likely to run out of memory runs first.
    """
    assert len(lengths) == len(counts)
    order = np.lexsort((np.arange(len(lengths)), -np.asarray(lengths)))
    batches: list[list[int]] = []
    sequences = longest = 0
    for row in order.tolist():
        if batches and batches[-1] and longest * (sequences + counts[row]) <= batch_tokens:
            batches[-1].append(row)
            sequences += counts[row]
        else:
            batches.append([row])
            sequences, longest = counts[row], lengths[row]
    return batches


def prompt_shape(prompt: Prompt) -> tuple[int, int]:
    """(longest sequence, number of sequences) that scoring a prompt runs: one for letters, one a choice for cloze."""
    extra = max(len(ids) for ids in prompt.choice_ids) - 1
    return len(prompt.prompt_ids) + extra, (1 if is_letter(prompt) else len(prompt.choice_ids))


def is_letter(prompt: Prompt) -> bool:
    """Whether every choice is one token, so that all are scored at the prompt's last position in one sequence.

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
