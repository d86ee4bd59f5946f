"""The teacher stage: what another model says at the answers' tokens, extracted once for every student and every training on it.

Each planned batch writes `batches/NNNNNN.safetensors`: the teacher's likeliest tokens at each answer token (`ids`, `logp`), the
probability of all others (`rest`), and that of the answer token itself (`answer`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from roma_ray.config.schema import Config
from roma_ray.engine.batches import plan_batches
from roma_ray.engine.devices import device_kind
from roma_ray.engine.distillation import PLAN, answer_rows, likeliest, teacher_file
from roma_ray.engine.forward import lay_out
from roma_ray.engine.model_spec import ModelSpec, model_facts_of, set_threads
from roma_ray.engine.progress import Progress
from roma_ray.engine.question_table import TABLE, read_prompts
from roma_ray.engine.runners import Runners
from roma_ray.engine.setup import Setup, resolve_model
from roma_ray.engine.steps import Facts, Step, complete
from roma_ray.engine.tokenizer import load_tokenizer
from roma_ray.engine.work import Job, Report
from roma_ray.errors import BusyError, ConfigError, ModelError
from roma_ray.moe.passes import run_packed
from roma_ray.questions.prompts import Prompt
from roma_ray.stages.preparation import QUESTIONS
from roma_ray.store.artifacts import Stage, note_device, write_json
from roma_ray.store.files import exists, present, read_json
from roma_ray.store.tensors import write_tensors

VERSION = 1
# Between two looks at a stage that another process is making.
_WAIT_SECONDS = 5.0


def is_distilled(config: Config) -> bool:
    """Whether the task loss is the distance to a teacher."""
    return config.finetune.task_loss == "distill"


def teacher_of(setup: Setup) -> tuple[ModelSpec, str]:
    """The teacher as every worker loads it, and its identity: another checkpoint, or the student's in another type.

    Raises ModelError, ConfigError.
    """
    config, distill = setup.config, setup.config.finetune.distill
    given = {"path": distill.teacher, "revision": distill.revision} if distill.teacher else {}
    model = config.model.model_copy(update={**given, "dtype": distill.dtype})
    return _resolved(config.model_copy(update={"model": model}).model_dump_json(), setup.model.device)


@lru_cache(maxsize=8)
def _resolved(config: str, device: str) -> tuple[ModelSpec, str]:
    return resolve_model(Config.model_validate_json(config), device=device)


def teacher_identity(setup: Setup) -> dict[str, Any]:
    """What decides what the teacher says."""
    spec, identity = teacher_of(setup)
    return {
        "teacher": identity,
        **spec.numeric_identity(),
        "vocabulary": model_facts_of(setup.model.path, setup.model.revision)["vocab_size"],
        "top_n": setup.config.finetune.distill.top_n,
        "batch_tokens": setup.config.extraction.batch_tokens,
    }


@dataclass(frozen=True)
class TeacherWork(Job):
    """The teacher's pass as planned batches."""

    @property
    def name(self) -> str:
        """It is placed, and its workers are counted, as those of the extraction."""
        return "extract"

    @property
    def model(self) -> ModelSpec:
        """What a worker loads."""
        return teacher_of(self.setup)[0]

    def open(self) -> Callable[[int], Report]:
        """Load the teacher; returns the function that does one planned batch."""
        set_threads(self.model.threads)
        note_device(self.folder, device_kind(self.model.device))
        prompts = read_prompts(self.stages["questions"].path / TABLE)
        plan: list[list[int]] = read_json(self.stage.path / PLAN)["batches"]
        identity = self.stage.identity["settings"]
        whole = self.model.load(0, None, with_lm_head=True)
        return lambda batch: self._do(whole, batch, [prompts[row] for row in plan[batch]], identity)

    @torch.inference_mode()
    def _do(self, whole: Any, batch: int, prompts: list[Prompt], identity: Mapping[str, Any]) -> Report:
        started = time.monotonic()
        layout = lay_out(prompts, gold_only=True)
        keep = layout.keep()
        out = run_packed(whole, layout.packing, keep=keep)
        rows, _ = answer_rows(keep, layout)
        # Checkpoints of one tokenizer may have tables of other sizes, padded at their ends.
        logits_GV = out.states[rows][:, : identity["vocabulary"]].float()
        if not bool(torch.isfinite(logits_GV).all()):
            raise ModelError(
                f"the teacher's scores are not finite, in a batch with the question {prompts[0].id!r}: set its dtype"
            )
        found = likeliest(logits_GV, identity["top_n"])
        gold_G = torch.tensor([t for p in prompts for t in p.choice_ids[p.answer]], device=logits_GV.device)
        answer_G = logits_GV.log_softmax(-1).gather(1, gold_G[:, None])[:, 0]
        tensors = {"ids": found.ids_Gn.int(), "logp": found.logp_Gn, "rest": found.rest_G, "answer": answer_G}
        write_tensors(teacher_file(self.folder, batch), {n: t.cpu().contiguous() for n, t in tensors.items()})
        return Report(batch, len(prompts), len(layout.packing), 0, time.monotonic() - started)


def teach(job: Job, runners: Runners, progress: Progress) -> Facts:
    """Run the teacher on the batches that are not done yet. Raises ModelError, ConfigError, StorageError."""
    setup, stage = job.setup, job.stage
    spec, identity = teacher_of(setup)
    if (identity, spec.dtype) == (setup.model_identity, setup.model.dtype):
        raise ConfigError(
            f"the teacher is the student itself, {spec.path} in {spec.dtype}: set finetune.distill.teacher to the checkpoint that it was "
            "made of, or finetune.distill.dtype to another type"
        )
    check_tokenizers(setup.model, spec)
    prompts = read_prompts(job.stages["questions"].path / TABLE)
    limit = min(stage.identity["settings"]["vocabulary"], model_facts_of(spec.path, spec.revision)["vocab_size"])
    for prompt in prompts:
        if max((*prompt.prompt_ids, *prompt.choice_ids[prompt.answer])) >= limit:
            raise ModelError(
                f"question {prompt.id!r} has a token beyond the vocabulary of {limit:,} that teacher and student share"
            )
    if not exists(stage.path / PLAN):
        lengths = prompts.prompt_tokens + prompts.gold_tokens - 1
        write_json(stage.path / PLAN, {"batches": list(plan_batches(lengths, setup.config.extraction.batch_tokens))})
    plan: list[list[int]] = read_json(stage.path / PLAN)["batches"]
    done = present([teacher_file(stage.path, n) for n in range(len(plan))])
    pending = [n for n, there in enumerate(done) if not there]
    progress.say(
        f"teacher: {spec.path} in {spec.dtype}, its {stage.identity['settings']['top_n']} likeliest tokens a place"
    )
    with progress.meter("teacher", len(plan), "batches", len(plan) - len(pending)) as meter:
        for _ in runners.extract(TeacherWork(setup, job.stages, stage), pending):
            meter.advance(1, "")
    return {"questions": len(prompts), "tokens": int(prompts.gold_tokens.sum())}


def check_tokenizers(student: ModelSpec, teacher: ModelSpec) -> None:
    """Raise ConfigError where teacher and student do not read texts as the same tokens."""
    if student.path == teacher.path and student.revision == teacher.revision:
        return
    mine, other = (load_tokenizer(spec.path, spec.revision) for spec in (student, teacher))
    words, others = mine.get_vocab(), other.get_vocab()
    different = sorted(token for token in words.keys() | others.keys() if words.get(token) != others.get(token))
    told = f"the teacher {teacher.path} has another tokenizer than {student.path}"
    if different:
        token = different[0]
        raise ConfigError(
            f"{told}: {len(different):,} tokens differ, {token!r} first ({words.get(token)} here, {others.get(token)} there). "
            "Distillation compares next tokens one by one: take the checkpoint that the student was made of"
        )
    probe = "The 12 quick-brown foxes, naïve & «daft»:\n\tprint(x_1 != 3.14)  # ünïcode 中文"
    if mine.encode(probe) != other.encode(probe):
        raise ConfigError(
            f"{told}: the same tokens, but it cuts texts otherwise. Take the checkpoint that the student was made of"
        )


TEACHER = Step("teacher", VERSION, (QUESTIONS,), teacher_identity, teach)


def teacher_stage(setup: Setup, stages: Mapping[str, Stage]) -> dict[str, Stage]:
    """The teacher's stage among those that a training is made of; nothing where there is no teacher."""
    return {TEACHER.name: TEACHER.at(setup, stages)} if is_distilled(setup.config) else {}


def taught(setup: Setup, stages: Mapping[str, Stage], runners: Runners, progress: Progress) -> None:
    """Complete the teacher's stage, where there is one; of several trainings that need it one makes it. Raises as `teach`."""
    if not is_distilled(setup.config):
        return
    job = TEACHER.job(setup, {QUESTIONS.name: stages[QUESTIONS.name]})
    waited = False
    while True:
        try:
            complete(TEACHER, job, runners, progress)
            return
        except BusyError:
            if not waited:
                progress.say("teacher: another process is asking it; waiting")
            waited = True
            time.sleep(_WAIT_SECONDS)
