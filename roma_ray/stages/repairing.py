"""What a repair did: teacher, student before and student after on the same test texts, token by token.

`repair.json`: texts, tokens; `teacher`, `before`, `after`: nll (mean nats a token of the text), perplexity, and of the student
agreement (part of the places where its likeliest token is the teacher's) and divergence (mean KL from the teacher, as trained);
`change`: of nll, agreement and divergence, after less before, with standard errors over texts. `answers`, where questions were
asked: see `compare_answers`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from roma_ray.engine.batches import plan_batches
from roma_ray.engine.cache import States, open_states
from roma_ray.engine.distillation import Teacher, answer_rows, divergences
from roma_ray.engine.forward import choice_scores, lay_out, own_tokens, predict, shared_prefix
from roma_ray.engine.identity import answer_rule
from roma_ray.engine.progress import Progress
from roma_ray.engine.question_table import TABLE, read_prompts
from roma_ray.engine.runners import Runners
from roma_ray.engine.setup import Setup
from roma_ray.engine.steps import Facts, Step
from roma_ray.engine.tokenizer import load_tokenizer
from roma_ray.engine.work import Job
from roma_ray.errors import QuestionError
from roma_ray.evaluation.statistics import pair
from roma_ray.moe.adapters import load_adapter
from roma_ray.moe.head_chain import Chain, as_chain
from roma_ray.moe.links import PassPlan
from roma_ray.moe.passes import run_packed
from roma_ray.moe.slices import Slice
from roma_ray.questions.prompts import Prompt, PromptBuilder, build_prompts
from roma_ray.stages.finetuning import ADAPTER, FINETUNE
from roma_ray.stages.neighborhoods import usable_rows
from roma_ray.stages.preparation import questions_settings, read_sources
from roma_ray.stages.teaching import TEACHER, teacher_of, teacher_stage
from roma_ray.store.artifacts import Stage, write_json

VERSION = 1
SUMMARY = "repair.json"


@dataclass(frozen=True)
class TextSums:
    """Sums over the tokens of each text, [texts] fp64."""

    tokens: np.ndarray
    nll: np.ndarray
    agreed: np.ndarray
    divergence: np.ndarray

    def means(self) -> dict[str, float]:
        """The figures a token."""
        total = float(self.tokens.sum())
        nll = float(self.nll.sum()) / total
        return {
            "nll": nll,
            "perplexity": math.exp(nll),
            "agreement": float(self.agreed.sum()) / total,
            "divergence": float(self.divergence.sum()) / total,
        }


@torch.inference_mode()
def text_sums(
    head: Slice | Chain,
    states: States,
    prompts: Sequence[Prompt],
    rows: Sequence[int],
    teacher: Teacher,
    batch_tokens: int,
) -> TextSums:
    """What the head says of some texts, beside the teacher, in the order of `rows`. Raises CacheError."""
    chain = as_chain(head)
    found: dict[int, tuple[float, ...]] = {}
    lengths = [own_tokens(prompts[row], states.prefix) for row in rows]
    for batch in plan_batches(lengths, batch_tokens):
        chosen = [rows[n] for n in batch]
        layout = lay_out([prompts[row] for row in chosen], prefix=states.prefix, gold_only=True)
        keep = layout.keep()
        plan = PassPlan(layout.packing, positions_1P=torch.empty(1, 0, dtype=torch.long), layers=())
        out = chain.finish(chain.begin(plan, states.packed(chosen, layout), graph=False), keep=keep)
        places, counts = answer_rows(keep, layout)
        logits_GV, targets = out.states[places].float(), teacher.targets(chosen).to(out.states.device)
        gold_G = torch.tensor([t for p in layout.prompts for t in p.choice_ids[p.answer]], device=logits_GV.device)
        nll_G = torch.nn.functional.cross_entropy(logits_GV, gold_G, reduction="none")
        agreed_G = (logits_GV.argmax(-1) == targets.ids_Gn[:, 0]).float()
        values_3G = torch.stack([nll_G, agreed_G, divergences(logits_GV, targets)]).double().cpu()
        for row, part in zip(chosen, values_3G.split(counts, dim=1), strict=True):
            found[row] = (part.shape[1], *part.sum(1).tolist())
    return TextSums(*np.array([found[row] for row in rows]).T)


def change_a_token(before: np.ndarray, after: np.ndarray, tokens: np.ndarray) -> dict[str, float]:
    """A mean a token, after less before, with its standard error over texts (of a ratio of sums)."""
    difference = (after - before).sum() / tokens.sum()
    left = after - before - difference * tokens
    n = len(tokens)
    error = math.sqrt(n / max(1, n - 1) * float((left**2).sum())) / float(tokens.sum())
    return {"difference": float(difference), "stderr": error}


def measure(asked: Setup | None, job: Job, runners: Runners, progress: Progress) -> Facts:
    """Measure teacher, student and repaired student on the test texts. Raises QuestionError, CacheError, CheckpointError."""
    setup, stages = job.setup, job.stages
    prompts = read_prompts(stages["questions"].path / TABLE)
    rows = prompts.rows_of("test", usable_rows(stages["extract"]))
    if not rows:
        raise QuestionError("no test text came through extraction, so nothing can be measured: give more texts")
    teacher = Teacher(stages[TEACHER.name].path, prompts)
    states = open_states(setup.model, stages["extract"].path, setup.cut)
    adapter = stages["finetune"].path / ADAPTER
    with runners.heads.lend(setup.model, setup.cut) as head:
        sums = partial(text_sums, head, states, prompts, rows, teacher, setup.config.extraction.batch_tokens)
        before = sums()
        load_adapter(adapter, head)
        after = sums()
    nll = -float(teacher.answer_logp(rows).double().mean())
    result: dict[str, Any] = {
        "texts": len(rows),
        "tokens": int(before.tokens.sum()),
        "teacher": {"nll": nll, "perplexity": math.exp(nll)},
        "before": before.means(),
        "after": after.means(),
        "change": {
            "nll": change_a_token(before.nll, after.nll, before.tokens),
            "agreement": change_a_token(before.agreed, after.agreed, before.tokens),
            "divergence": change_a_token(before.divergence, after.divergence, before.tokens),
        },
        "answers": None if asked is None else compare_answers(asked, setup, stages, progress),
    }
    write_json(job.stage.path / SUMMARY, result)
    return {"texts": len(rows), "tokens": result["tokens"]}


def compare_answers(asked: Setup, setup: Setup, stages: Mapping[str, Stage], progress: Progress) -> dict[str, Any]:
    """Answers to questions with choices: questions, and of `accuracy` the teacher's part right, of it and of `agreement` (with the
    teacher's answers) the student's paired figures, before as base and after as tuned. Raises ModelError, CheckpointError.
    """
    prompts, rejected = asked_prompts(asked)
    rule, limit = _rule(asked), setup.config.extraction.batch_tokens
    left = f", {rejected:,} rows are left out" if rejected else ""
    progress.say(f"answers: {len(prompts):,} questions are asked of teacher and student{left}")
    theirs = answers_of(teacher_of(setup)[0].load(0, None, with_lm_head=True), prompts, rule, limit)
    student = setup.model.load(0, None, with_lm_head=True)
    first = answers_of(student, prompts, rule, limit)
    load_adapter(stages["finetune"].path / ADAPTER, student)
    second = answers_of(student, prompts, rule, limit)
    gold = np.array([prompt.answer for prompt in prompts])
    return {
        "questions": len(prompts),
        "teacher_accuracy": float((theirs == gold).mean()),
        "accuracy": pair(first == gold, second == gold).plain(),
        "agreement": pair(first == theirs, second == theirs).plain(),
    }


def asked_prompts(asked: Setup) -> tuple[list[Prompt], int]:
    """The questions whose answers are compared, and how many rows are none. Raises QuestionError."""
    config = asked.config.questions
    read = read_sources(config, 0)
    tokenizer = load_tokenizer(asked.model.path, asked.model.revision)
    prompts, more = build_prompts(read.questions(), PromptBuilder(tokenizer, config.prompt))
    if not prompts:
        raise QuestionError(f"no question of {config.sources[0].path} can be asked: there is none")
    return prompts, len(read.faults) + len(more)


def _rule(asked: Setup) -> str:
    return answer_rule(asked.config.questions.prompt)


@torch.inference_mode()
def answers_of(whole: Slice, prompts: Sequence[Prompt], rule: str, batch_tokens: int) -> np.ndarray:
    """The choice that a whole model answers each question with."""
    found = np.zeros(len(prompts), dtype=int)
    for batch in plan_batches([own_tokens(prompt, 0) for prompt in prompts], batch_tokens):
        chosen = [prompts[n] for n in batch]
        layout = lay_out(chosen, prefix=shared_prefix(chosen))
        keep = layout.keep()
        scores = choice_scores(run_packed(whole, layout.packing, keep=keep).states, keep, layout)
        found[batch] = [predict(own, prompt, rule) for own, prompt in zip(scores, chosen, strict=True)]
    return found


def repair_step(asked: Setup | None) -> Step:
    """The measurement of a repair; `asked` is the set-up of the questions whose answers are compared."""

    def beside(setup: Setup, stages: Mapping[str, Stage]) -> dict[str, Stage]:
        return teacher_stage(setup, stages)

    def settings(_: Setup) -> dict[str, Any]:
        if asked is None:
            return {}
        known = questions_settings(asked)
        return {"asked": {**{name: known[name] for name in ("sources", "prompt")}, "rule": _rule(asked)}}

    return Step(
        "repair",
        VERSION,
        (FINETUNE,),
        settings,
        partial(measure, asked),
        others=beside,
        device="model",
        reads_states=True,
        shown=((SUMMARY, None),),
    )
