"""The finetune stage: what a worker opens to train, and what is exported when training ends."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from roma_ray.borders.text import figure
from roma_ray.config.finetune_settings import FinetuneConfig
from roma_ray.engine.cache import ROWS, States, open_states
from roma_ray.engine.collapse import collapsed, describe_collapse, entropy_kept
from roma_ray.engine.devices import device_kind
from roma_ray.engine.distillation import Teacher
from roma_ray.engine.identity import answer_rule, finetune_settings, is_cloze
from roma_ray.engine.model_spec import ModelSpec
from roma_ray.engine.objective import TrainingData, is_idle, is_noise
from roma_ray.engine.progress import Progress
from roma_ray.engine.question_table import (
    TABLE,
    iterate_table,
    matrix,
    read_prompts,
    read_table,
    table_facts,
    write_table,
)
from roma_ray.engine.runners import Runners, Trainer
from roma_ray.engine.setup import Setup
from roma_ray.engine.steps import Facts, Step
from roma_ray.engine.training import Outcome, finetune
from roma_ray.engine.verification import verify_sample
from roma_ray.engine.work import Job
from roma_ray.engine.workers import ALONE, World
from roma_ray.errors import QuestionError
from roma_ray.moe.adapters import save_adapter
from roma_ray.moe.head_chain import Chain
from roma_ray.moe.reach import is_unreached
from roma_ray.moe.slices import Slice
from roma_ray.stages.extraction import EXTRACT
from roma_ray.stages.neighborhoods import NEIGHBORS, answered_rightly, read_neighborhoods, usable_rows
from roma_ray.stages.teaching import TEACHER, is_distilled, taught, teacher_stage
from roma_ray.store.artifacts import Stage, note_device, note_start, write_json, write_text
from roma_ray.store.files import exists, read_json, remove
from roma_ray.store.logs import append_line, whole_lines
from roma_ray.store.scratch import roomy_zeros
from roma_ray.store.tensors import shapes

VERSION = 4
ADAPTER = "adapter"
CHECKPOINT = "checkpoint.safetensors"
EPOCHS = "epochs.jsonl"
STEPS = "steps.parquet"
OUTCOME = "outcome.json"
# Each epoch's record as it came, with its speed. Times differ from run to run, so the file is hidden: not in the manifest.
LIVE = ".epochs-live.jsonl"
_ROWS_AT_ONCE = 16_384
_STEPS = pa.schema(
    [
        ("step", pa.int64()),
        *((n, pa.float64()) for n in ("task_loss", "manifold_loss", "lambda", "learning_rate", "gradient_norm")),
    ]
)


@dataclass(frozen=True)
class TrainJob(Job):
    """One finetuning run; every worker opens the same one."""

    @property
    def model(self) -> ModelSpec:
        """What a worker loads the head of."""
        return self.setup.model

    @property
    def settings(self) -> FinetuneConfig:
        """How it trains."""
        return self.setup.config.finetune

    def load_head(self) -> Slice:
        """The layers from the cut up, with `lm_head`."""
        return self.model.load(self.setup.cut, None, with_lm_head=True)

    def open_states(self) -> States:
        """The head's input: the cache, or without one the frozen layers. Raises CacheError, ModelError."""
        return open_states(self.model, self.stages["extract"].path, self.setup.cut)

    def open_data(self) -> TrainingData:
        """Open cache, prompts and neighborhoods. Raises ArtifactError, CacheError."""
        config, extraction = self.setup.config, self.stages["extract"]
        prompts = read_prompts(self.stages["questions"].path / TABLE, held_out=config.questions.held_out_tasks)
        neighborhoods = read_neighborhoods(self.stages["neighbors"], len(prompts))
        validation = prompts.rows_of("validation", usable_rows(extraction))
        if not validation:
            raise QuestionError(
                "no validation question came through extraction, so no epoch can be judged; see `error` in "
                f"{extraction.path / ROWS}, and give more rows or a larger questions.validation_fraction"
            )
        routing_NLE = read_routing_rows(extraction.path, config.routing.tokens, self.setup.layer_columns)
        return TrainingData(
            prompts=prompts,
            states=self.open_states(),
            train=neighborhoods.queried.nonzero()[:, 0].tolist(),
            validation=validation,
            neighborhoods=neighborhoods,
            routing_NLE=routing_NLE,
            successful_N=answered_rightly(self.setup, self.stages) & neighborhoods.queried,
            base_NLE=routing_NLE,
            tokens=config.routing.tokens,
            rule=answer_rule(config.questions.prompt),
            cloze=is_cloze(config),
            batch_tokens=config.extraction.batch_tokens,
            teacher=Teacher(self.stages[TEACHER.name].path, prompts) if is_distilled(config) else None,
        )

    def run(
        self,
        world: World = ALONE,
        report: Callable[[dict[str, Any]], None] = lambda epoch: None,
        advance: Callable[[int, str], None] = lambda count, note: None,
        head: Slice | Chain | None = None,
    ) -> Outcome:
        """Train as one of the workers of `world`, resuming from the checkpoint where there is one.

        `head` is that of this or another run of the same model and cut, whole or in slices; it is left as it was.
        """
        setup, stages = self.setup, self.stages
        if world.rank == 0 and setup.config.extraction.cache:
            verify_sample(setup.model, stages["extract"].path, stages["questions"].path / TABLE, setup.cut)
        began = time.monotonic()
        head = self.load_head() if head is None else head
        loaded, begun = time.monotonic(), False

        def counted(count: int, note: str) -> None:
            nonlocal begun
            if world.rank == 0 and not begun:
                begun = True
                note_start(self.stage.path, {"model": loaded - began, "first_step": time.monotonic() - loaded})
            advance(count, note)

        outcome = finetune(
            head,
            self.open_data(),
            self.settings,
            layers=setup.layers,
            seed=setup.config.seed,
            world=world,
            checkpoint=self.stage.path / CHECKPOINT,
            report=report,
            advance=counted,
        )
        if world.rank == 0:
            self._export(head, outcome)
        return outcome

    def _export(self, head: Slice | Chain, outcome: Outcome) -> None:
        """Write the adapter, the curves and the outcome's facts; the last of them marks that training is done."""
        folder = self.stage.path
        save_adapter(
            folder / ADAPTER,
            head,
            outcome.gates,
            base=self.model.path,
            revision=self.model.revision,
            fingerprint=self.stage.fingerprint,
        )
        names = _STEPS.names[1:]
        columns = {name: outcome.step_table[:, n].tolist() for n, name in enumerate(names)}
        write_table(folder / STEPS, {"step": range(len(outcome.step_table)), **columns}, _STEPS)
        lines = "".join(json.dumps(epoch) + "\n" for epoch in outcome.epochs)
        write_text(folder / EPOCHS, lines)
        facts = {"probe": outcome.probe, "selected_epoch": outcome.selected_epoch, "steps": len(outcome.step_table)}
        write_json(folder / OUTCOME, facts)


def train_here(job: TrainJob, report: Callable[[dict[str, Any]], None], advance: Callable[[int, str], None]) -> None:
    """Train in this process, alone."""
    note_device(job.folder, device_kind(job.model.device))
    job.run(ALONE, report, advance)


def finetune_identity(setup: Setup) -> dict[str, Any]:
    """What decides the tuned routers, beside what they are trained on."""
    config = setup.config
    return {
        **setup.numeric_identity(),
        "layers": list(setup.layers),
        "tokens": config.routing.tokens,
        "seed": config.seed,
        **finetune_settings(config.finetune, cloze=is_cloze(config)),
    }


def finetune_routers(job: Job, runners: Runners, progress: Progress) -> Facts:
    """Finetune the routers and export them; the runners' `on_epoch` hears of each epoch once its record is on disk.

    Raises TrainingError, CacheError, StorageError.
    """
    setup, stage = job.setup, job.stage
    taught(setup, job.stages, runners, progress)
    total = job.stages["neighbors"].manifest()["facts"]["training"] * setup.config.finetune.epochs
    guard = setup.config.finetune.guard

    def tell(epoch: dict[str, Any]) -> None:
        progress.say(describe_epoch(epoch))
        if warning := describe_collapse(epoch, guard):
            progress.say(warning)
        # Thresholds of a warning are no part of the stage's identity, so what they say stands here alone.
        said = {} if guard.action == "none" else {"collapse_findings": len(collapsed(epoch, guard))}
        append_line(stage.path / LIVE, json.dumps({**epoch, **said, "time": round(time.time(), 3)}))
        runners.on_epoch(stage)

    if not exists(stage.path / OUTCOME):
        if setup.config.finetune.chain is not None and runners.finetune is None:
            progress.say(
                "note: finetune.chain needs the workers of a cluster; this process holds the whole head. The results are the same"
            )
        with progress.meter("finetune", total, "questions") as meter:
            train: Trainer = runners.finetune or train_here
            train(TrainJob(setup, job.stages, stage), tell, meter.advance)
    facts: Facts = read_json(stage.path / OUTCOME)
    # Where a sweep finds this run again, though the extraction may have been removed to free its space.
    facts["extraction"] = {"cuts": list(setup.cuts), "tokens": list(setup.token_rules)}
    facts["trained_parameters"] = sum(
        map(math.prod, shapes(stage.path / ADAPTER / "adapter_model.safetensors").values())
    )
    remove(stage.path / CHECKPOINT)
    _tell_ratio(facts["probe"], setup.config.finetune, progress)
    return facts


def describe_epoch(epoch: dict[str, Any]) -> str:
    """The line that each epoch prints."""
    likelihood = f" ({epoch['validation_logp']:.4f} nats a token)" if "validation_logp" in epoch else ""
    return (
        f"epoch {epoch['epoch'] + 1}: task loss {epoch['task_loss']:.4f}, manifold {epoch['manifold_loss']:.5f}, lambda "
        f"{epoch['lambda']:.3g}, gate gradient {epoch['gradient_norm']:.3g}, entropy {epoch['routing_entropy']:.3f}, "
        f"validation {figure(epoch, 'validation')} %{likelihood}{entropy_kept(epoch)}"
    )


def _tell_ratio(probe: dict[str, float], config: FinetuneConfig, progress: Progress) -> None:
    if config.regularizer.kind == "none":
        return
    if is_unreached(probe):
        progress.say(
            "note: the task loss does not reach these routers (they give one expert the weight 1 whatever their logits are): its "
            f"gradient on the gates is rounding noise, {probe['task_gradient']:.1g} against the regularizer's "
            f"{probe['regularizer_gradient']:.2g}. So the task term was left out: the regularizer alone moved them."
        )
        return
    progress.say(
        f"gradient norms on the gates (probe): task {probe['task_gradient']:.3g}, regularizer {probe['regularizer_gradient']:.3g}, "
        f"lambda {probe['weight']:.3g}: ratio {probe['gradient_ratio']:.2%} at the start, {probe['final_gradient_ratio']:.2%} at the end"
    )
    if is_noise(probe, config.regularizer):
        progress.say(
            "note: at the start the regularizer's gradient is rounding noise (every question has the routing that it is pulled to, or "
            "its target, or the routers are too certain for the distance): the task term began alone."
        )
    if is_idle(probe, config.regularizer):
        progress.say(
            "warning: the regularizer is idle (its gradient is under 1 % of the task term's). Raise finetune.regularizer.weight, "
            "or set it to `auto`."
        )


def read_routing_rows(extraction: str | Path, tokens: str, columns: Sequence[int] | None = None) -> torch.Tensor:
    """The extracted routing rows r [N, L, E] of every question in all MoE layers or those at `columns`, fp32.

    Rows of failed questions are zero. Many lie in scratch (`roomy_zeros`); some thousand rows are held. Raises StorageError.
    """
    path, column = Path(extraction) / ROWS, f"routing_{tokens}"
    table = read_table(path, ["row"])
    layers, experts = (table_facts(table, "layers", "experts")[name] for name in ("layers", "experts"))
    chosen = list(range(layers)) if columns is None else list(columns)
    routing_NLE = roomy_zeros(len(table), len(chosen), experts)
    for part in iterate_table(path, ["row", column], _ROWS_AT_ONCE):
        present = part.filter(part.column(column).is_valid())
        values = matrix(present, column, layers * experts).reshape(-1, layers, experts)
        routing_NLE[torch.from_numpy(present.column("row").to_numpy().copy())] = torch.from_numpy(values[:, chosen])
    return routing_NLE


def epochs_of(stage: Stage) -> list[dict[str, Any]]:
    """The epoch records of a finished finetuning."""
    return [json.loads(line) for line in whole_lines(stage.path / EPOCHS)[0]]


def live_epochs(stage: Stage) -> list[dict[str, Any]]:
    """The epoch records so far, with `questions_per_second` and `time` (s since 1970), of a finetuning in any state.

    Half-written lines are left out.
    """
    records = []
    for line in whole_lines(stage.path / LIVE)[0]:
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


FINETUNE = Step(
    "finetune",
    VERSION,
    (EXTRACT, NEIGHBORS),
    finetune_identity,
    finetune_routers,
    others=teacher_stage,
    reads_states=True,
    shown=((ADAPTER, "adapter"), (EPOCHS, None), (STEPS, None)),
)
