"""Trainings as tests run them: on threads as workers, stopped as by a kill, and a literal torch loop to hold them against."""

from __future__ import annotations

import math
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from roma_ray.config.finetune_settings import RegularizerConfig
from roma_ray.engine.batches import chunks, epoch_order
from roma_ray.engine.forward import lay_out, letter_rows
from roma_ray.engine.objective import Objective
from roma_ray.engine.training import Outcome, finetune
from roma_ray.moe.head_chain import Chain, HereLinks
from roma_ray.moe.links import HeldSlice
from roma_ray.moe.masters import RouterMasters
from roma_ray.moe.passes import run_packed
from roma_ray.moe.routers import find_routers
from roma_ray.runs.pipeline import Run
from roma_ray.stages.finetuning import TrainJob
from tests.making import train_job


def train(job: TrainJob, **arguments: Any) -> Outcome:
    return finetune(
        job.load_head(), job.open_data(), job.settings, layers=job.setup.layers, seed=job.setup.config.seed, **arguments
    )


def in_slices(job: TrainJob, *starts: int, keep: bool = True) -> Chain:
    """The head of a job, cut before these layers too."""
    ends = [job.setup.cut, *starts]
    links = [
        HeldSlice(job.model.load(a, b, with_lm_head=False), first=n == 0, keep=keep)
        for n, (a, b) in enumerate(pairwise(ends))
    ]
    return Chain(job.model.load(ends[-1], None, with_lm_head=True), HereLinks(links))


def trained(job: TrainJob, chain: Chain, **arguments: Any) -> Outcome:
    setup = job.setup
    return finetune(chain, job.open_data(), job.settings, layers=setup.layers, seed=setup.config.seed, **arguments)


def assert_same(a: Outcome, b: Outcome) -> None:
    assert a.gates.keys() == b.gates.keys()
    for key in a.gates:
        assert torch.equal(a.gates[key], b.gates[key]), key
    assert a.epochs == b.epochs
    assert torch.equal(a.step_table, b.step_table)
    assert a.probe == b.probe


def literal_router_tuning(job: TrainJob, *, packed: bool) -> dict[int, torch.Tensor]:
    """Cross-entropy over the letters by torch alone: no manifold, no masters, no cache of anything.

    `packed`: a packing of the micro-batch through the slice; else one question at a time through the whole stock model.
    """
    config = job.settings
    head, data = job.load_head(), job.open_data()
    model = AutoModelForCausalLM.from_pretrained(job.model.path, dtype=torch.float32, experts_implementation="eager")
    whole = model.eval().requires_grad_(False)
    modules = head.routers if packed else find_routers(whole)
    gates = {router.layer: router.module.weight for router in modules if router.layer in job.setup.layers}
    for gate in gates.values():
        gate.requires_grad_(True)
    parameters = list(gates.values())
    zero = config.decay_to == "zero"
    starts = [torch.zeros_like(p) if zero else p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0, foreach=False)
    steps = math.ceil(len(data.train) / config.batch_size) * config.epochs
    step = 0
    for epoch in range(config.epochs):
        for rows in chunks(epoch_order(data.train, job.setup.config.seed, epoch), config.batch_size):
            optimizer.zero_grad()
            for part in chunks(rows, config.micro_batch_size):
                prompts = [data.prompts[row] for row in part]
                if packed:
                    layout = lay_out(prompts, prefix=data.states.prefix)
                    states, letters = data.states.packed(part, layout), letter_rows(prompts)
                    out = run_packed(
                        head, layout.packing, states, resume=True, keep=layout.ends, vocabulary_rows=letters
                    )
                    logits = out.states
                else:
                    ends = [whole(torch.tensor([p.prompt_ids]), use_cache=False).logits[0, -1] for p in prompts]
                    logits, letters = torch.stack(ends), torch.arange(ends[0].shape[0])
                loss = torch.stack(
                    [
                        torch.nn.functional.cross_entropy(
                            row[[letters.tolist().index(c[0]) for c in p.choice_ids]][None], torch.tensor([p.answer])
                        )
                        for row, p in zip(logits, prompts, strict=True)
                    ]
                ).sum()
                loss.backward()
            for parameter in parameters:
                parameter.grad /= len(rows)
            torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
            step += 1
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * min(1.0, step / max(1, round(config.warmup_fraction * steps)))
            if config.weight_decay:
                with torch.no_grad():
                    for parameter, start in zip(parameters, starts, strict=True):
                        parameter -= optimizer.param_groups[0]["lr"] * config.weight_decay * (parameter - start)
            optimizer.step()
    return {layer: gate.detach() for layer, gate in gates.items()}


class Circle:
    """Worker `rank` of several, in threads: hands its parts to all at a barrier."""

    def __init__(self, rank: int, size: int, table: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size, self.table, self.barrier = rank, size, table, barrier

    def gather(self, mine: list[torch.Tensor], total: int) -> list[torch.Tensor]:
        self.table[self.rank] = mine
        self.barrier.wait()
        parts = [self.table[n % self.size][n // self.size] for n in range(total)]
        self.barrier.wait()
        return parts


def train_on(workers: int, job: TrainJob, **arguments: Any) -> list[Any]:
    """The same run on several workers, each in a thread."""
    table: list[Any] = [None] * workers
    barrier = threading.Barrier(workers, timeout=120)
    outcomes: list[Any] = [None] * workers

    def work(rank: int) -> None:
        outcomes[rank] = train(job, world=Circle(rank, workers, table, barrier), **arguments)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


class Stop(Exception):
    """Stands for a kill in the middle of training."""


def gradients_of(run: Run, kind: str, **others: Any) -> tuple[Objective, RouterMasters, Any, Any]:
    job = train_job(run, regularizer=RegularizerConfig(kind=kind, weight=1.0, **others))
    head, data = job.load_head(), job.open_data()
    masters = RouterMasters(head, job.setup.layers)
    return Objective(job.settings, head, data, masters), masters, head, data


def stop_at(step: int, job: TrainJob, checkpoint: Path) -> None:
    """Train until an optimizer step and end there, as a kill would."""
    left = [step]

    def advance(count: int, note: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Stop

    with pytest.raises(Stop):
        train(job, checkpoint=checkpoint, advance=advance)
