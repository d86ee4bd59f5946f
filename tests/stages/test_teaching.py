"""The teacher stage and a training on it: what stock models say, resumed, refused where the two are not comparable."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from roma_ray.config.finetune_settings import DistillConfig, RegularizerConfig
from roma_ray.config.schema import Config
from roma_ray.engine.distillation import Teacher, teacher_file
from roma_ray.engine.objective import Objective
from roma_ray.engine.progress import Silence
from roma_ray.engine.question_table import TABLE, read_prompts
from roma_ray.engine.schedules import Moment
from roma_ray.engine.setup import Setup, resolve
from roma_ray.errors import CacheError, ConfigError, ModelError
from roma_ray.moe.masters import RouterMasters
from roma_ray.moe.routers import find_routers
from roma_ray.runs.pipeline import locate, run
from roma_ray.stages.repairing import text_sums
from roma_ray.stages.teaching import TEACHER, check_tokenizers, teacher_of, teacher_stage
from tests.engine.loops import assert_same, in_slices, train, trained
from tests.free_world import free_world
from tests.making import made, train_job, with_settings
from tests.tiny import save_tiny, tiny_moe
from tests.world import WORDS, make_world

TOP_N = 9


def texts(count: int) -> list[dict[str, Any]]:
    return [
        {"id": f"t{n}", "text": f"box {n} holds {' '.join(WORDS[n % 7 : n % 7 + 2 + n % 5])}"} for n in range(count)
    ]


def distilled(root: Path, **tuned: Any) -> Config:
    """A world of texts whose student is distilled from another random model with its tokenizer."""
    finetune = {
        "epochs": 1,
        "batch_size": 8,
        "micro_batch_size": 4,
        "learning_rate": 0.01,
        "task_loss": "distill",
        "distill": {"teacher": str(root / "teacher"), "top_n": TOP_N},
        "regularizer": {"kind": "none"},
        **tuned,
    }
    config = free_world(
        root,
        texts(30),
        routing={"layers": "L2", "tokens": "Answer"},
        extraction={"batch_tokens": 64, "success": {"metric": "likelihood", "threshold": -1e9}},
        finetune=finetune,
    )
    save_teacher(root / "teacher", root / "model", seed=8)
    return config


def save_teacher(folder: Path, student: Path, seed: int) -> None:
    vocabulary = json.loads((student / "config.json").read_text())["vocab_size"]
    save_tiny(tiny_moe("olmoe", seed=seed, vocab_size=vocabulary), folder)
    for file in student.glob("*token*.json"):
        shutil.copyfile(file, folder / file.name)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Setup, Any]:
    setup = resolve(distilled(tmp_path_factory.mktemp("distilled")), device="cpu")
    return setup, run(setup, Silence(), until="finetune")


def literal_logits(path: str, prompt: Any) -> torch.Tensor:
    """Stock logits at the places that predict a text's tokens."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = [*prompt.prompt_ids, *prompt.choice_ids[0]]
    start = len(prompt.prompt_ids) - 1
    logits: torch.Tensor = model(torch.tensor([ids])).logits[0, start:-1]
    return logits


def test_what_is_kept_is_what_a_stock_model_says(world: tuple[Setup, Any]) -> None:
    setup, _ = world
    stages = locate(setup)
    prompts = read_prompts(stages["questions"].path / TABLE)
    stage = teacher_stage(setup, stages)["teacher"]
    teacher = Teacher(stage.path, prompts)
    rows = [4, 0, 17]
    targets, said = teacher.targets(rows), teacher.answer_logp(rows)
    start = 0
    for row in rows:
        ids = torch.tensor(prompts[row].choice_ids[0])
        logp_GV = literal_logits(teacher_of(setup)[0].path, prompts[row]).log_softmax(-1).detach()
        part = slice(start, start + len(ids))
        values_Gn, ids_Gn = logp_GV.topk(TOP_N, dim=-1)
        assert torch.equal(targets.ids_Gn[part].long(), ids_Gn)
        torch.testing.assert_close(targets.logp_Gn[part], values_Gn, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(targets.rest_G[part].exp(), 1 - values_Gn.exp().sum(-1), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(said[part], logp_GV.gather(1, ids[:, None])[:, 0], atol=1e-5, rtol=1e-5)
        start += len(ids)
    assert start == len(said)


def test_the_gates_gradient_is_that_of_a_literal_divergence(world: tuple[Setup, Any]) -> None:
    """Trunk, cache and packing against stock models, text by text, with torch's own derivative of the bucketed KL."""
    setup, finished = world
    job = train_job(finished)
    stages = {**job.stages, **teacher_stage(setup, job.stages)}
    job = dataclasses.replace(job, stages=stages)
    head, data = job.load_head(), job.open_data()
    masters = RouterMasters(head, setup.layers)
    objective = Objective(job.settings, head, data, masters)
    rows = data.train[:5]
    vector = objective.gradients(objective.prepare(rows), Moment(rate=0.0, strength=0.0))

    student = AutoModelForCausalLM.from_pretrained(setup.model.path, dtype=torch.float32)
    gates = [router.gate.weight for router in find_routers(student) if router.layer in setup.layers]
    other = AutoModelForCausalLM.from_pretrained(teacher_of(setup)[0].path, dtype=torch.float32)
    total = torch.zeros(())
    for row in rows:
        prompt = data.prompts[row]
        ids, start = torch.tensor([[*prompt.prompt_ids, *prompt.choice_ids[0]]]), len(prompt.prompt_ids) - 1
        q_GV = student(ids).logits[0, start:-1].softmax(-1)
        p_GV = other(ids).logits[0, start:-1].softmax(-1).detach()
        losses = []
        for p_V, q_V in zip(p_GV, q_GV, strict=True):
            kept = p_V.topk(TOP_N).indices
            left = torch.ones(len(p_V), dtype=torch.bool).index_fill(0, kept, False)
            p = torch.cat([p_V[kept], p_V[left].sum()[None]])
            q = torch.cat([q_V[kept], q_V[left].sum()[None]])
            losses.append((p * (p / q).log()).sum())
        total = total + torch.stack(losses).mean()
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(total, gates)])
    assert float(expected.abs().max()) > 1e-4
    torch.testing.assert_close(vector[:-4], expected, atol=1e-5, rtol=1e-3)
    assert float(vector[-4]) == pytest.approx(float(total.detach()), rel=1e-4)
    masters.detach()


def test_training_draws_the_student_to_its_teacher(world: tuple[Setup, Any]) -> None:
    setup, _ = world
    longer = with_settings(setup, "finetune", epochs=6)
    losses = [epoch["task_loss"] for epoch in epochs(run(longer, Silence(), until="finetune"))]
    assert losses[-1] < losses[0]


def epochs(finished: Any) -> list[dict[str, Any]]:
    file = finished.stages["finetune"].path / "epochs.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_killed_teacher_goes_on_with_the_batches_that_it_has(tmp_path: Path) -> None:
    setup = resolve(distilled(tmp_path), device="cpu")
    run(setup, Silence(), until="questions")
    stage = made(TEACHER, setup)
    whole = {file.name: file.read_bytes() for file in (stage.path / "batches").iterdir()}
    assert len(whole) > 2
    (stage.path / "manifest.json").unlink()
    kept = teacher_file(stage.path, 0)
    stamp = kept.stat().st_mtime_ns
    teacher_file(stage.path, 1).unlink()
    assert made(TEACHER, setup).complete
    assert {file.name: file.read_bytes() for file in (stage.path / "batches").iterdir()} == whole
    assert kept.stat().st_mtime_ns == stamp


def test_what_is_asked_of_the_teacher_is_part_of_the_trainings_identity(world: tuple[Setup, Any]) -> None:
    setup, finished = world
    usual = finished.stages["finetune"].fingerprint
    for changes in ({"top_n": 5}, {"dtype": "bfloat16"}):
        settings = setup.config.finetune.distill.model_copy(update=changes)
        other = with_settings(setup, "finetune", distill=settings)
        assert locate(other)["finetune"].fingerprint != usual
    # Of a training without a teacher it is none.
    alone = with_settings(setup, "finetune", task_loss="choices")
    changed = with_settings(alone, "finetune", distill=DistillConfig(top_n=5))
    assert locate(alone)["finetune"].fingerprint == locate(changed)["finetune"].fingerprint


def test_teachers_that_cannot_be_compared_are_refused(world: tuple[Setup, Any], tmp_path: Path) -> None:
    setup, _ = world
    student = Path(setup.model.path)
    itself = with_settings(setup, "finetune", distill=DistillConfig())
    with pytest.raises(ConfigError, match="is the student itself"):
        made(TEACHER, itself)
    # In another type it is a teacher.
    assert made(TEACHER, with_settings(setup, "finetune", distill=DistillConfig(dtype="bfloat16"))).complete

    other = tmp_path / "other"
    save_teacher(other, student, seed=9)
    values = json.loads((other / "tokenizer.json").read_text())
    vocabulary = values["model"]["vocab"]
    (one, two) = [word for word in vocabulary if len(word) == 1][:2]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(values))
    strange = with_settings(setup, "finetune", distill=DistillConfig(teacher=str(other)))
    with pytest.raises(ConfigError, match="2 tokens differ"):
        made(TEACHER, strange)

    values["model"]["vocab"] = json.loads((student / "tokenizer.json").read_text())["model"]["vocab"]
    values["model"]["merges"] = values["model"]["merges"][:3]
    (other / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="cuts texts otherwise"):
        check_tokenizers(setup.model, dataclasses.replace(setup.model, path=str(other)))

    small = tmp_path / "small"
    save_tiny(tiny_moe("olmoe", seed=9, vocab_size=40), small)
    for file in student.glob("*token*.json"):
        shutil.copyfile(file, small / file.name)
    with pytest.raises(ModelError, match="beyond the vocabulary of 40"):
        made(TEACHER, with_settings(setup, "finetune", distill=DistillConfig(teacher=str(small))))


def test_a_damaged_teacher_is_told_by_its_file(world: tuple[Setup, Any], tmp_path: Path) -> None:
    setup, _ = world
    stages = locate(setup)
    prompts = read_prompts(stages["questions"].path / TABLE)
    folder = tmp_path / "teacher"
    shutil.copytree(teacher_stage(setup, stages)["teacher"].path, folder)
    row = json.loads((folder / "plan.json").read_text())["batches"][0][0]
    teacher_file(folder, 0).write_bytes(b"x" * 20)
    with pytest.raises(CacheError, match=r"000000\.safetensors cannot be read"):
        Teacher(folder, prompts).targets([row])
    (folder / "plan.json").write_text("[")
    with pytest.raises(CacheError, match=r"plan\.json cannot be read"):
        Teacher(folder, prompts)


@pytest.mark.parametrize("form", ["letter", "cloze"])
def test_questions_with_choices_are_distilled_at_the_right_answer(form: str, tmp_path: Path) -> None:
    finetune = {"epochs": 1, "task_loss": "distill", "distill": {"teacher": str(tmp_path / "teacher")}}
    questions = {"sources": [{"path": str(tmp_path / "questions.jsonl")}], "prompt": {"format": form}}
    config = make_world(tmp_path, count=40, finetune=finetune, questions=questions)
    save_teacher(tmp_path / "teacher", tmp_path / "model", seed=8)
    setup = resolve(config, device="cpu")
    finished = run(setup, Silence())
    assert finished.summary


@pytest.mark.parametrize("keep", [True, False])
def test_a_student_in_slices_follows_its_teacher_to_the_same_bits(world: tuple[Setup, Any], keep: bool) -> None:
    setup, finished = world
    job = train_job(finished, regularizer=RegularizerConfig(weight=3.0))
    job = dataclasses.replace(job, stages={**job.stages, **teacher_stage(setup, job.stages)})
    chain = in_slices(job, 5, keep=keep)
    assert_same(train(job), trained(job, chain))
    data = job.open_data()
    assert data.teacher is not None
    asked = (data.states, data.prompts, data.train[:6], data.teacher, 64)
    assert text_sums(job.load_head(), *asked).means() == text_sums(chain, *asked).means()
