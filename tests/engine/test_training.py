"""The training loop: against a literal torch loop, over worker counts, over kills at every step, term by term."""

from __future__ import annotations

import dataclasses
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from roma_ray.config.finetune_settings import FinetuneConfig, LogitsConfig, RegularizerConfig, TaskScheduleConfig
from roma_ray.engine.batches import chunks, epoch_order
from roma_ray.engine.cache import FrozenLayers
from roma_ray.engine.forward import lay_out, letter_rows
from roma_ray.engine.objective import Objective, TrainingData
from roma_ray.engine.schedules import Moment
from roma_ray.engine.training import Outcome, finetune
from roma_ray.errors import CheckpointError, TrainingError, UnmovedError
from roma_ray.manifold.losses import manifold_loss
from roma_ray.moe.layers import token_positions
from roma_ray.moe.masters import RouterMasters
from roma_ray.moe.passes import run_packed
from roma_ray.moe.reading import read_routing
from roma_ray.moe.routers import find_routers
from roma_ray.moe.scaling import scaled_logits
from roma_ray.runs.pipeline import Run
from roma_ray.stages.finetuning import TrainJob
from roma_ray.stages.neighborhoods import answered_rightly
from tests.making import train_job


def train(job: TrainJob, **arguments: Any) -> Outcome:
    return finetune(
        job.load_head(), job.open_data(), job.settings, layers=job.setup.layers, seed=job.setup.config.seed, **arguments
    )


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


@pytest.mark.parametrize("regularizer", [{"kind": "none"}, {"kind": "manifold", "weight": 0.0}])
def test_lambda_zero_equals_a_literal_torch_loop_bit_for_bit(letter_run: Run, regularizer: dict[str, Any]) -> None:
    job = train_job(letter_run, regularizer=RegularizerConfig(**regularizer))
    expected = literal_router_tuning(job, packed=True)
    outcome = train(job)
    assert outcome.epochs[-1]["lambda"] == 0
    for layer, gate in expected.items():
        assert torch.equal(outcome.gates[f"layers.{layer}.weight"], gate)


@pytest.mark.parametrize("decay_to", ["zero", "base"])
def test_weight_decay_is_decoupled_and_goes_where_it_should(letter_run: Run, decay_to: str) -> None:
    term = RegularizerConfig(kind="none")
    job = train_job(letter_run, regularizer=term, weight_decay=5.0, decay_to=decay_to)
    expected, outcome = literal_router_tuning(job, packed=True), train(job)
    free = train(train_job(letter_run, regularizer=term))
    for layer, gate in expected.items():
        torch.testing.assert_close(outcome.gates[f"layers.{layer}.weight"], gate, rtol=1e-5, atol=1e-6)
    start = RouterMasters(job.load_head(), job.setup.layers).state()
    ways = [sum(float((run.gates[key] - start[key]).square().sum()) for key in start) for run in (outcome, free)]
    assert (ways[0] < ways[1]) is (decay_to == "base")


NEUTRAL = [
    {"logits": LogitsConfig(temperature=1.0, dropout=0.0, anneal="cosine")},
    {"decay_to": "base"},
]


@pytest.mark.parametrize("settings", NEUTRAL, ids=str)
def test_neutral_values_change_no_bit(letter_run: Run, settings: dict[str, Any]) -> None:
    assert_same(train(train_job(letter_run)), train(train_job(letter_run, **settings)))


ACTING: dict[str, dict[str, Any]] = {
    "temperature": {"logits": LogitsConfig(temperature=0.5)},
    "dropout": {"logits": LogitsConfig(dropout=0.2)},
    "decay": {"weight_decay": 0.5, "decay_to": "base"},
    "all": {
        "logits": LogitsConfig(temperature=2.0, dropout=0.2, anneal="cosine"),
        "weight_decay": 0.5,
        "decay_to": "base",
        "warmup_steps": 2,
        "anneal": "cosine",
        "anneal_floor": 0.1,
        "task_schedule": TaskScheduleConfig(warmup_fraction=0.5),
        "regularizer": RegularizerConfig(weight=3.0, anneal="linear", anneal_floor=0.3, refresh=True),
    },
}


@pytest.mark.parametrize("name", ACTING)
def test_what_acts_is_the_same_bits_on_any_workers_and_after_a_stop(letter_run: Run, tmp_path: Path, name: str) -> None:
    job = train_job(letter_run, checkpoint_steps=1, **ACTING[name])
    alone = train(job)
    usual = train(train_job(letter_run))
    assert all(not torch.equal(alone.gates[key], usual.gates[key]) for key in usual.gates)
    for workers in (2, 3):
        for outcome in train_on(workers, job):
            assert_same(alone, outcome)
    left = [3]

    def advance(count: int, note: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Stop

    with pytest.raises(Stop):
        train(job, checkpoint=tmp_path / "acting.safetensors", advance=advance)
    for outcome in train_on(2, job, checkpoint=tmp_path / "acting.safetensors"):
        assert_same(alone, outcome)


@pytest.mark.parametrize("run_name", ["letter_run", "cloze_run"])
def test_temperature_and_dropout_are_those_of_the_stock_model_question_by_question(
    request: pytest.FixtureRequest, run_name: str
) -> None:
    """Through a packing with a shared instruction and a trimmed last layer, and through whole sequences: the same losses."""
    run: Run = request.getfixturevalue(run_name)
    objective, _, _, data = gradients_of(run, "manifold")
    rows, now = data.train[:5], Moment(rate=1.0, strength=1.0, temperature=0.7, dropout=0.3, seed=3, step=11)
    task, penalty, _ = objective.losses(objective.prepare(rows), now)
    model = AutoModelForCausalLM.from_pretrained(
        run.setup.model.path, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    routers = [router for router in find_routers(model) if router.layer in run.setup.layers]
    losses, pulls = 0.0, 0.0
    for row in rows:
        prompt = data.prompts[row]
        layout = lay_out([prompt], prefix=data.states.prefix, gold_only=data.cloze)
        factors = now.logit_factors(layout, len(routers), routers[0].num_experts)
        assert factors is not None
        gold = prompt.choice_ids[prompt.answer]
        ids = [*prompt.prompt_ids, *gold[:-1]]
        assert len(ids) == len(factors), "one question alone is a sequence"
        last = len(prompt.prompt_ids) - 1
        with (
            torch.no_grad(),
            scaled_logits(routers, factors),
            read_routing(model, routers, torch.tensor([[last]])) as tape,
        ):
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, last:]
        pulls += float(manifold_loss(tape.routing_BPLE[0], objective.targets.take(torch.tensor([row]))))
        letters = [choice[0] for choice in prompt.choice_ids]
        scored, aims = (logits, gold) if data.cloze else (logits[:, letters], [prompt.answer])
        losses += float(torch.nn.functional.cross_entropy(scored, torch.tensor(aims)))
    assert task.item() == pytest.approx(losses, rel=1e-4)
    assert penalty.item() == pytest.approx(pulls, rel=1e-4)
    plain = objective.losses(objective.prepare(rows))
    assert plain[0].item() != pytest.approx(losses, rel=1e-3)
    assert plain[1].item() != pytest.approx(pulls, rel=1e-3)


def test_lambda_zero_equals_tuning_the_whole_stock_model(letter_run: Run) -> None:
    """Packing, cache, trims and masters together change nothing: the same gates to rounding after every step of a run."""
    job = train_job(letter_run, regularizer=RegularizerConfig(kind="none"))
    expected, outcome = literal_router_tuning(job, packed=False), train(job)
    for layer, gate in expected.items():
        torch.testing.assert_close(outcome.gates[f"layers.{layer}.weight"], gate, rtol=1e-3, atol=1e-4)


def test_without_a_cache_the_frozen_layers_run_again_to_the_same_gates(letter_run: Run) -> None:
    job = train_job(letter_run)
    data, head = job.open_data(), job.load_head()
    trunk = job.model.load(0, job.setup.cut + 1, with_lm_head=False)
    without = dataclasses.replace(data, states=FrozenLayers(trunk, job.setup.cut, data.states.prefix))
    cached = finetune(head, data, job.settings, layers=job.setup.layers, seed=job.setup.config.seed)
    # The same loaded head again: a run leaves it as it was.
    again = finetune(head, without, job.settings, layers=job.setup.layers, seed=job.setup.config.seed)
    for key, gate in cached.gates.items():
        torch.testing.assert_close(again.gates[key], gate, rtol=1e-3, atol=1e-4)
    assert_same(cached, finetune(head, data, job.settings, layers=job.setup.layers, seed=job.setup.config.seed))


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


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_any_number_of_workers_gives_the_same_bits(letter_run: Run, workers: int) -> None:
    job = train_job(letter_run)
    alone = train(job)
    for outcome in train_on(workers, job):
        assert_same(alone, outcome)


class Stop(Exception):
    """Stands for a kill in the middle of training."""


@pytest.mark.parametrize("refresh", [False, True])
def test_a_run_stopped_after_any_step_ends_with_the_same_bits(letter_run: Run, tmp_path: Path, refresh: bool) -> None:
    regularizer = RegularizerConfig(weight=30.0, refresh=refresh)
    job = train_job(letter_run, checkpoint_steps=1, regularizer=regularizer, select="best_validation")
    straight = train(job)
    total = len(straight.step_table)
    assert total >= 6
    for stop in range(1, total + 1, 2):
        checkpoint = tmp_path / f"{stop}.safetensors"
        seen: list[int] = []

        def advance(count: int, note: str, seen: list[int] = seen, stop: int = stop) -> None:
            seen.append(count)
            if len(seen) == stop:
                raise Stop

        with pytest.raises(Stop):
            train(job, checkpoint=checkpoint, advance=advance)
        redone: list[int] = []
        resumed = train(job, checkpoint=checkpoint, advance=lambda count, note, redone=redone: redone.append(count))
        assert_same(straight, resumed)
        # The last step of an epoch is saved with the epoch's end, so at most one step is done again.
        assert len(redone) <= total - stop + 1


def test_a_run_goes_on_with_another_number_of_workers_to_the_same_bits(letter_run: Run, tmp_path: Path) -> None:
    job = train_job(letter_run, checkpoint_steps=1)
    straight = train(job)
    checkpoint = tmp_path / "elastic.safetensors"
    left = [3]

    def advance(count: int, note: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Stop

    with pytest.raises(Stop):
        train(job, checkpoint=checkpoint, advance=advance)
    for outcome in train_on(3, job, checkpoint=checkpoint):
        assert_same(straight, outcome)


def test_a_damaged_checkpoint_is_a_named_error(letter_run: Run, tmp_path: Path) -> None:
    job = train_job(letter_run)
    checkpoint = tmp_path / "checkpoint.safetensors"
    train(job, checkpoint=checkpoint)
    whole = checkpoint.read_bytes()
    for damaged in (b"", whole[:100], whole[: len(whole) // 2]):
        checkpoint.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="remove it"):
            train(job, checkpoint=checkpoint)


def gradients_of(run: Run, kind: str, **others: Any) -> tuple[Objective, RouterMasters, Any, Any]:
    job = train_job(run, regularizer=RegularizerConfig(kind=kind, weight=1.0, **others))
    head, data = job.load_head(), job.open_data()
    masters = RouterMasters(head, job.setup.layers)
    return Objective(job.settings, head, data, masters), masters, head, data


@pytest.mark.parametrize(
    ("kind", "others"),
    [
        ("manifold", {}),
        ("manifold", {"distance": "kl"}),
        ("l1", {}),
        ("l2", {}),
        ("entropy", {}),
        ("entropy", {"entropy_sign": "lower", "entropy_target": 0.1}),
        ("base", {}),
        ("prior", {}),
        ("prior", {"prior": "task"}),
    ],
    ids=str,
)
def test_each_regularizer_reaches_every_tuned_gate_and_nothing_else(
    letter_run: Run, kind: str, others: dict[str, Any]
) -> None:
    objective, masters, head, data = gradients_of(letter_run, kind, **others)
    if kind == "base":
        # It has no slope where training starts.
        with torch.no_grad():
            for gate in masters.parameters():
                gate.mul_(1.5)
    _, penalty, _ = objective.losses(objective.prepare(data.train[:6]))
    penalty.backward()
    for gate in masters.parameters():
        assert gate.grad is not None
        assert gate.grad.abs().sum() > 0
    trained = {id(gate) for gate in masters.parameters()}
    assert all(p.grad is None for p in head.model.parameters() if id(p) not in trained)


def test_the_task_term_reaches_every_tuned_gate(letter_run: Run) -> None:
    objective, masters, _, data = gradients_of(letter_run, "none")
    task, penalty, _ = objective.losses(objective.prepare(data.train[:6]))
    task.backward()
    assert penalty.item() == 0
    assert all(gate.grad is not None and gate.grad.abs().sum() > 0 for gate in masters.parameters())


def test_the_manifold_term_equals_the_double_loop_over_neighbors(letter_run: Run) -> None:
    objective, _, _, data = gradients_of(letter_run, "manifold")
    rows = data.train[:6]
    _, penalty, _ = objective.losses(objective.prepare(rows))
    # Before the first step the live routing is the stored one.
    total = 0.0
    for row in rows:
        others, _, weights = data.neighborhoods.of(row)
        for other, weight in zip(others.tolist(), weights.tolist(), strict=True):
            total += weight * float((data.routing_NLE[row].double() - data.routing_NLE[other].double()).square().sum())
    assert penalty.item() == pytest.approx(total, rel=1e-4)


def test_the_kl_equals_the_loop_over_layers_and_trains(letter_run: Run) -> None:
    objective, _, _, data = gradients_of(letter_run, "manifold", distance="kl")
    rows = data.train[:6]
    _, penalty, _ = objective.losses(objective.prepare(rows))
    total = 0.0
    for row in rows:
        others, _, weights = data.neighborhoods.of(row)
        for layer in range(data.routing_NLE.shape[1]):
            for expert in range(data.routing_NLE.shape[2]):
                mean = sum(
                    weight * float(data.routing_NLE[other, layer, expert])
                    for other, weight in zip(others.tolist(), weights.tolist(), strict=True)
                )
                total += mean * math.log(mean / float(data.routing_NLE[row, layer, expert]))
    assert penalty.item() == pytest.approx(total, rel=1e-4)
    outcome = train(train_job(letter_run, epochs=3, regularizer=RegularizerConfig(weight=30.0, distance="kl")))
    assert outcome.epochs[-1]["manifold_loss"] < outcome.epochs[0]["manifold_loss"]


@pytest.mark.parametrize("term", [{"kind": "base"}, {"kind": "prior"}, {"kind": "prior", "prior": "task"}], ids=str)
def test_a_fixed_pull_equals_the_loop_over_questions_and_trains(letter_run: Run, term: dict[str, Any]) -> None:
    objective, masters, _, data = gradients_of(letter_run, **term)
    correct = answered_rightly(letter_run.stages["extract"])
    rows, total = data.train[:6], 0.0
    with torch.no_grad():
        for gate in masters.parameters():
            gate.mul_(1.5)
    scored = torch.from_numpy(objective._score(rows).routing_NLE[:, objective.columns]).double()
    for live, row in zip(scored, rows, strict=True):
        task = [n for n in data.train if data.prompts[n].task == data.prompts[row].task and correct[n]]
        for layer in range(live.shape[0]):
            for expert in range(live.shape[1]):
                if term["kind"] == "base":
                    q = float(data.routing_NLE[row, layer, expert])
                elif "prior" in term:
                    q = sum(float(data.routing_NLE[n, layer, expert]) for n in task) / len(task)
                else:
                    q = 1 / live.shape[1]
                total += float(live[layer, expert]) * math.log(float(live[layer, expert]) / q)
    assert objective.losses(objective.prepare(rows))[1].item() == pytest.approx(total, rel=1e-4)
    ends = [
        train(train_job(letter_run, epochs=3, regularizer=RegularizerConfig(weight=w, **term))) for w in (0.0, 30.0)
    ]
    assert ends[1].epochs[-1]["manifold_loss"] < ends[0].epochs[-1]["manifold_loss"]


def literal_pull_of_each(job: TrainJob, data: TrainingData, rows: list[int]) -> tuple[float, dict[int, torch.Tensor]]:
    """Each of the last positions pulled to the neighbors' at the same place, one question at a time through the whole stock model."""
    model = AutoModelForCausalLM.from_pretrained(job.model.path, dtype=torch.float32, experts_implementation="eager")
    routers = [router for router in find_routers(model.eval()) if router.layer in job.setup.layers]

    def rows_of(question: int) -> torch.Tensor:
        ids = data.prompts[question].prompt_ids
        places = torch.tensor([token_positions(data.tokens, len(ids))])
        with read_routing(model, routers, places) as tape:
            model(torch.tensor([ids]), use_cache=False)
        return tape.routing_BPLE[0]

    total = torch.zeros(())
    for row in rows:
        own, (others, _, weights) = rows_of(row), data.neighborhoods.of(row)
        for other, weight in zip(others.tolist(), weights.tolist(), strict=True):
            theirs = rows_of(other).detach()
            for place in range(own.shape[0]):
                total = total + weight * (own[place] - theirs[place]).square().sum()
    total.backward()
    return float(total.detach()), {router.layer: router.module.weight.grad for router in routers}


def test_a_pull_at_each_position_is_a_loop_over_positions_of_the_stock_model(letter_run: Run) -> None:
    job = train_job(letter_run, regularizer=RegularizerConfig(positions="sum"))
    data, head = dataclasses.replace(job.open_data(), tokens="Last3"), job.load_head()
    masters = RouterMasters(head, job.setup.layers)
    objective = Objective(job.settings, head, data, masters)
    rows = data.train[:5]
    expected, gradients = literal_pull_of_each(job, data, rows)
    _, penalty, _ = objective.losses(objective.prepare(rows))
    assert penalty.item() == pytest.approx(expected, rel=1e-4)
    penalty.backward()
    for layer, gradient in gradients.items():
        torch.testing.assert_close(masters.parameters_by_layer[layer]["weight"].grad, gradient, rtol=1e-3, atol=1e-5)
    # The mean row's pull is another one.
    usual = Objective(job.settings.model_copy(update={"regularizer": RegularizerConfig()}), head, data, masters)
    assert usual.losses(usual.prepare(rows))[1].item() != pytest.approx(expected, rel=1e-2)


def test_at_one_position_the_pulls_are_one(letter_run: Run) -> None:
    mean, each = (
        train(train_job(letter_run, regularizer=RegularizerConfig(weight=30.0, positions=positions, refresh=True)))
        for positions in ("mean", "sum")
    )
    for key, gate in mean.gates.items():
        torch.testing.assert_close(each.gates[key], gate, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tokens", ["Last3", "All"])
def test_pulls_at_each_position_are_the_same_bits_on_any_workers_and_after_a_stop(
    letter_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: str
) -> None:
    usual = TrainJob.open_data
    monkeypatch.setattr(TrainJob, "open_data", lambda job: dataclasses.replace(usual(job), tokens=tokens))
    term = RegularizerConfig(weight=3.0, positions="sum", distance="kl", refresh=True)
    job = train_job(letter_run, regularizer=term, checkpoint_steps=1)
    alone = train(job)
    assert alone.epochs[-1]["manifold_loss"] < alone.epochs[0]["manifold_loss"]
    for outcome in train_on(2, job):
        assert_same(alone, outcome)
    left = [len(alone.step_table) - 1]

    def advance(count: int, note: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Stop

    with pytest.raises(Stop):
        train(job, checkpoint=tmp_path / "each.safetensors", advance=advance)
    assert_same(alone, train(job, checkpoint=tmp_path / "each.safetensors"))


def test_training_lowers_the_regularizer_when_lambda_is_large(letter_run: Run) -> None:
    strong = train(train_job(letter_run, epochs=4, regularizer=RegularizerConfig(weight=100.0)))
    assert strong.epochs[-1]["manifold_loss"] < strong.epochs[0]["manifold_loss"]
    assert strong.probe["final_regularizer_gradient"] != strong.probe["regularizer_gradient"]


@pytest.mark.parametrize(
    "term",
    [
        *({"kind": kind} for kind in ("manifold", "l1", "l2", "entropy", "prior")),
        {"kind": "entropy", "entropy_sign": "lower"},
        {"kind": "prior", "prior": "task"},
    ],
    ids=str,
)
def test_auto_weight_meets_the_gradient_ratio(letter_run: Run, term: dict[str, Any]) -> None:
    outcome = train(train_job(letter_run, regularizer=RegularizerConfig(weight="auto", gradient_ratio=0.25, **term)))
    assert outcome.probe["gradient_ratio"] == pytest.approx(0.25, rel=1e-6)
    assert outcome.epochs[-1]["lambda"] == pytest.approx(outcome.probe["weight"])


def test_schedules_reach_their_targets_within_the_run(letter_run: Run) -> None:
    job = train_job(letter_run, warmup_fraction=0.5)
    outcome = train(job)
    rates = outcome.step_table[:, 3].tolist()
    assert rates[0] == pytest.approx(job.settings.learning_rate / round(0.5 * len(rates)))
    assert rates[-1] == pytest.approx(job.settings.learning_rate)
    assert outcome.step_table[-1, 2] == pytest.approx(outcome.probe["weight"])


def test_a_warm_up_in_steps_is_that_of_the_fraction_to_the_bit(letter_run: Run) -> None:
    usual = train(train_job(letter_run, warmup_fraction=0.5))
    steps = len(usual.step_table)
    told = train(train_job(letter_run, warmup_fraction=0.1, warmup_steps=round(0.5 * steps)))
    assert_same(usual, told)
    # Neither a floor that nothing falls to nor a task loss that is whole from the first step changes a bit.
    floor = TaskScheduleConfig(warmup_steps=1, anneal_floor=0.5)
    assert_same(usual, train(train_job(letter_run, warmup_fraction=0.5, anneal_floor=0.5, task_schedule=floor)))


def test_what_anneals_ends_at_its_floor(letter_run: Run) -> None:
    term = RegularizerConfig(weight=2.0, anneal="cosine", anneal_floor=0.25)
    outcome = train(train_job(letter_run, anneal="linear", anneal_floor=0.1, regularizer=term))
    assert outcome.step_table[-1, 2].item() == pytest.approx(0.5)
    assert outcome.step_table[-1, 3].item() == pytest.approx(0.1 * 0.01)
    assert outcome.epochs[-1]["lambda"] == outcome.step_table[-1, 2]


def test_a_training_whose_every_step_is_at_a_floor_of_zero_is_refused(letter_run: Run) -> None:
    """Its gates would be those of the base model, and be reported as a result."""
    one_step: dict[str, Any] = {"epochs": 1, "batch_size": 1000, "anneal": "linear"}
    with pytest.raises(UnmovedError, match="anneal_floor"):
        train(train_job(letter_run, **one_step))
    assert train(train_job(letter_run, **one_step, anneal_floor=0.1)).step_table[0, 3] > 0


def test_the_step_s_gradient_is_the_weighed_sum_of_both_terms(letter_run: Run) -> None:
    objective, masters, _, data = gradients_of(letter_run, "manifold")
    micro = objective.prepare(data.train[:4])
    task, penalty, _ = objective.losses(micro)
    parts = [torch.autograd.grad(term, masters.parameters(), retain_graph=True) for term in (task, penalty)]
    found = objective.gradients(micro, Moment(rate=1.0, strength=3.0, task=0.25))
    expected = torch.cat([(0.25 * a + 3.0 * b).reshape(-1) for a, b in zip(*parts, strict=True)])
    torch.testing.assert_close(found[: len(expected)], expected, rtol=1e-4, atol=1e-6)


def test_with_a_warm_up_of_the_task_loss_the_manifold_comes_first(letter_run: Run) -> None:
    term = RegularizerConfig(weight=1.0, warmup_fraction=0.0)
    together, later = (
        train(train_job(letter_run, epochs=1, regularizer=term, task_schedule=TaskScheduleConfig(warmup_fraction=f)))
        for f in (0.0, 1.0)
    )
    assert later.epochs[-1]["manifold_loss"] < together.epochs[-1]["manifold_loss"]
    assert later.epochs[-1]["task_loss"] > together.epochs[-1]["task_loss"]


def test_best_validation_exports_its_epoch(letter_run: Run) -> None:
    outcome = train(train_job(letter_run, epochs=3, select="best_validation"))
    accuracies = [epoch["validation_accuracy"] for epoch in outcome.epochs]
    assert outcome.selected_epoch == accuracies.index(max(accuracies))


def test_a_loss_that_is_not_finite_stops_before_the_gates_move(letter_run: Run) -> None:
    with pytest.raises(TrainingError, match="learning_rate"):
        train(train_job(letter_run, learning_rate=1e30, epochs=3, regularizer=RegularizerConfig(weight=1e30)))


def test_cloze_trains_on_the_gold_continuation(cloze_run: Run) -> None:
    job = train_job(cloze_run, epochs=4)
    assert job.open_data().cloze
    outcome = train(job)
    assert outcome.epochs[-1]["task_loss"] < outcome.epochs[0]["task_loss"]


def test_the_loop_stays_readable() -> None:
    source = Path(finetune.__code__.co_filename).read_text().splitlines()
    assert len(source) < 210
    assert FinetuneConfig().weight_decay == 0
