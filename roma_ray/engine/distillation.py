"""Distillation as the task loss: the student's next-token distribution is drawn to a teacher's at the answers' tokens.

Of the teacher only its n likeliest tokens are kept at each place, with the probability of all others together. The loss is the
KL divergence between teacher and student over these n + 1 outcomes: the exact KL where n is the whole vocabulary, and never more
than it below (merging outcomes can only lose). Renormalising over the n alone would leave the student free to move mass to the
tokens that were not kept.

G answer tokens of some questions, n kept tokens, N kept flat tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from roma_ray.engine.forward import Layout
from roma_ray.errors import CacheError
from roma_ray.questions.prompts import Prompt
from roma_ray.store.files import fetch_ahead, read_json
from roma_ray.store.tensors import DAMAGED, mapped

PLAN = "plan.json"


@dataclass(frozen=True)
class Targets:
    """What a teacher says at some answer tokens."""

    ids_Gn: Tensor
    """Its likeliest tokens, the likeliest first."""
    logp_Gn: Tensor
    """Their log-probabilities, fp32."""
    rest_G: Tensor
    """The log-probability of all other tokens; minus infinity where there are none."""

    def to(self, device: torch.device) -> Targets:
        """The same on a device."""
        return Targets(self.ids_Gn.to(device), self.logp_Gn.to(device), self.rest_G.to(device))


def likeliest(logits_GV: Tensor, count: int) -> Targets:
    """The `count` likeliest tokens of each place, or all where there are fewer."""
    logp_GV = torch.log_softmax(logits_GV.float(), dim=-1)
    logp_Gn, ids_Gn = logp_GV.topk(min(count, logp_GV.shape[1]), dim=-1)
    return Targets(ids_Gn, logp_Gn, _rest(logp_GV, ids_Gn))


def divergences(logits_GV: Tensor, targets: Targets) -> Tensor:
    """KL(teacher || student) at each place over the teacher's kept tokens and the rest: [G], fp32, nats, with gradient."""
    logq_GV = torch.log_softmax(logits_GV.float(), dim=-1)
    kept_G = (targets.logp_Gn.exp() * (targets.logp_Gn - logq_GV.gather(1, targets.ids_Gn.long()))).sum(-1)
    if targets.ids_Gn.shape[1] == logq_GV.shape[1]:
        return kept_G
    share_G = targets.rest_G.exp()
    # Where the teacher leaves nothing to the rest, its logarithm is no number to compute with.
    left_G = share_G * (targets.rest_G.clamp_min(torch.finfo(torch.float32).min) - _rest(logq_GV, targets.ids_Gn))
    return kept_G + torch.where(share_G > 0, left_G, 0.0)


def distillation_losses(logits_NV: Tensor, keep: Sequence[int], layout: Layout, targets: Targets) -> Tensor:
    """Sum over the questions of the mean divergence over the answer's tokens, in fp32."""
    rows, counts = answer_rows(keep, layout)
    found_G = divergences(logits_NV[rows], targets.to(logits_NV.device))
    return torch.stack([part.mean() for part in found_G.split(counts)]).sum()


def answer_rows(keep: Sequence[int], layout: Layout) -> tuple[list[int], list[int]]:
    """Of a layout of the right answers alone: where the kept tokens that predict them lie, and how many each question has."""
    assert layout.gold_only
    place = {token: n for n, token in enumerate(keep)}
    return [place[t] for (tokens,) in layout.score_tokens for t in tokens], [len(t) for (t,) in layout.score_tokens]


def _rest(logp_GV: Tensor, ids_Gn: Tensor) -> Tensor:
    """The log-probability of all tokens but some."""
    return logp_GV.scatter(1, ids_Gn.long(), -torch.inf).logsumexp(-1)


def teacher_file(folder: str | Path, batch: int) -> Path:
    """What the teacher says of a planned batch; its presence marks the batch as done."""
    return Path(folder) / "batches" / f"{batch:06d}.safetensors"


class Teacher:
    """A finished teacher stage, read question by question."""

    def __init__(self, folder: str | Path, prompts: Sequence[Prompt]) -> None:
        """Raises CacheError."""
        self.folder = Path(folder)
        self._files: dict[tuple[int, str], object] = {}
        self._places: dict[int, tuple[int, int, int]] = {}
        try:
            batches = read_json(self.folder / PLAN)["batches"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CacheError(
                f"{self.folder / PLAN} cannot be read ({error}); remove the folder and run again"
            ) from None
        fetch_ahead([teacher_file(self.folder, batch) for batch in range(len(batches))])
        for batch, rows in enumerate(batches):
            start = 0
            for row in rows:
                count = len(prompts[row].choice_ids[prompts[row].answer])
                self._places[row] = (batch, start, count)
                start += count

    def targets(self, rows: Sequence[int]) -> Targets:
        """What it says at the answer tokens of some questions, one after another. Raises CacheError."""
        ids_Gn, logp_Gn, rest_G = (self._read(rows, name) for name in ("ids", "logp", "rest"))
        return Targets(ids_Gn, logp_Gn, rest_G)

    def answer_logp(self, rows: Sequence[int]) -> Tensor:
        """Its log-probability of each answer token itself, [G]. Raises CacheError."""
        return self._read(rows, "answer")

    def _read(self, rows: Sequence[int], name: str) -> Tensor:
        parts = []
        for row in rows:
            batch, start, count = self._places[row]
            path = teacher_file(self.folder, batch)
            try:
                if (batch, name) not in self._files:
                    self._files[batch, name] = mapped(path, name)
                part: Tensor = self._files[batch, name][start : start + count]  # type: ignore[index]
            except DAMAGED as error:
                raise CacheError(f"{path} cannot be read ({error}); remove the folder and run again") from None
            if len(part) != count:
                raise CacheError(f"{path} is of other questions; remove the folder and run again")
            parts.append(part)
        return torch.cat(parts)
