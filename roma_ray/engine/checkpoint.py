"""The training loop's checkpoint: one safetensors file, written whole, that holds all a resume needs and no pickle."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from roma_ray.engine.scoring import Scores
from roma_ray.errors import CheckpointError
from roma_ray.moe.masters import RouterMasters
from roma_ray.store.tensors import DAMAGED, read_metadata, read_tensors, write_tensors

_MOMENTS = ("exp_avg", "exp_avg_sq")


def layer_norm(layer: int) -> str:
    """The name of a layer's gradient norm among a step's facts."""
    return f"norm of layer {layer}"


@dataclass
class LoopState:
    """Where the loop is, besides gates and optimizer."""

    probe: dict[str, float]
    epoch_start: dict[str, Tensor]
    """Gates at the start of the current epoch (r_j are refreshed from them)."""
    step: int = 0
    steps: list[list[float]] = field(default_factory=list)
    """A row a step: task loss, manifold loss, lambda, learning rate, gradient norm."""
    sums: dict[str, float] = field(default_factory=dict)
    """Sums over the current epoch's questions so far."""
    epochs: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = -1
    best_gates: dict[str, Tensor] = field(default_factory=dict)
    lambda_factor: float = 1.0
    """What the guard has left of lambda."""
    stopped: bool = False
    """Whether the guard has ended the training; then the epoch before is the last good one."""

    def record(self, facts: dict[str, float], strength: float, rate: float, count: int) -> None:
        """Note one finished step over `count` questions."""
        self.step += 1
        self.steps.append([facts["task"], facts["manifold"], strength, rate, facts["norm"]])
        for key, value in facts.items():
            self.sums[key] = self.sums.get(key, 0.0) + value * count
        # An epoch that an earlier version began has measured its layers in a part of its steps alone.
        for name in ("count", "layers_count"):
            self.sums[name] = self.sums.get(name, 0.0) + count

    def close_epoch(
        self, epoch: int, validation: Scores, routing: dict[str, Any] | None, answer_logp: float | None = None
    ) -> dict[str, Any]:
        """Turn the epoch's sums into its record; `routing` are the figures by layer (`engine/collapse.py`), without the gradients',
        `answer_logp` the answers' log-likelihood a token where questions have no choices.
        """
        count = self.sums["count"]
        record: dict[str, Any] = {
            "epoch": epoch,
            "step": self.step,
            "task_loss": self.sums["task"] / count,
            "manifold_loss": self.sums["manifold"] / count,
            "lambda": self.steps[-1][2],
            "learning_rate": self.steps[-1][3],
            "gradient_norm": self.sums["norm"] / count,
            "routing_entropy": self.sums["entropy"] / count,
            "validation_accuracy": validation.accuracy,
            "validation_stderr": validation.stderr,
        }
        if answer_logp is not None:
            record["validation_logp"] = answer_logp
        if routing:
            norms = [self.sums[layer_norm(layer)] / self.sums["layers_count"] for layer in routing["layers"]]
            known = (e["routing"]["first_gradient_norm"] for e in self.epochs if "routing" in e)
            record["routing"] = {**routing, "gradient_norm": norms, "first_gradient_norm": next(known, norms)}
        self.epochs.append(record)
        self.sums = {}
        return record

    def keep_best(self, gates: dict[str, Tensor]) -> None:
        """Keep the gates of the epoch that just ended if they are the best on validation so far, and no collapsed ones."""
        last = self.epochs[-1]
        # Of questions without choices hardly one answer is written token for token.
        measure = "validation_logp" if "validation_logp" in last else "validation_accuracy"
        # The first of equals: later epochs must earn their place.
        if not self.stopped and (self.best_epoch < 0 or last[measure] > self.epochs[self.best_epoch][measure]):
            self.best_epoch, self.best_gates = last["epoch"], gates

    def table(self) -> Tensor:
        """The steps as [steps, 5], fp64."""
        return torch.tensor(self.steps, dtype=torch.float64).reshape(len(self.steps), 5)


def save_checkpoint(path: Path, masters: RouterMasters, optimizer: torch.optim.Optimizer, state: LoopState) -> None:
    """Write gates, optimizer moments and loop state to one file, whole or not at all. Raises StorageError."""
    tensors = {f"gate.{key}": value for key, value in masters.state().items()}
    tensors |= {f"best.{key}": value for key, value in state.best_gates.items()}
    tensors |= {f"epoch_start.{key}": value for key, value in state.epoch_start.items()}
    tensors["steps"] = state.table()
    for number, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": moments[name] for name in (*_MOMENTS, "step")}
    plain = {k: v for k, v in asdict(state).items() if k not in {"epoch_start", "best_gates", "steps"}}
    whole = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    write_tensors(path, whole, {"state": json.dumps(plain)})


def load_checkpoint(path: Path, masters: RouterMasters, optimizer: torch.optim.Optimizer) -> LoopState:
    """Restore gates and optimizer in place and return the loop state. Raises CheckpointError when the file is damaged."""
    try:
        tensors, metadata = read_tensors(path)
        plain = json.loads(metadata["state"])
        masters.load(_part(tensors, "gate."))
        state = optimizer.state_dict()
        numbers = sorted({int(key.split(".")[1]) for key in tensors if key.startswith("optimizer.")})
        state["state"] = {n: {name: tensors[f"optimizer.{n}.{name}"] for name in (*_MOMENTS, "step")} for n in numbers}
        optimizer.load_state_dict(state)
        return LoopState(
            **plain,
            epoch_start=_part(tensors, "epoch_start."),
            best_gates=_part(tensors, "best."),
            steps=tensors["steps"].tolist(),
        )
    except (*DAMAGED, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"the checkpoint {path} cannot be read ({error}); remove it to train from the start"
        ) from None


def checkpoint_step(path: Path) -> int:
    """Steps that a checkpoint has behind it; 0 without one, and for a damaged one: the loop will say what is wrong with it."""
    try:
        return int(json.loads(read_metadata(path)["state"])["step"])
    except (*DAMAGED, KeyError, ValueError, TypeError):
        return 0


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
