"""Extraction against the plain forward pass of the whole stock model, one question at a time."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from roma_ray.engine.batches import PlannedBatches, read_plan, write_plan
from roma_ray.engine.cache import ROWS, ActivationCache
from roma_ray.engine.extractor import PLAN, Extractor, ExtractWork, batch_table
from roma_ray.engine.forward import own_tokens
from roma_ray.engine.question_table import TABLE, read_prompts, read_table
from roma_ray.engine.runners import Runners
from roma_ray.engine.setup import resolve
from roma_ray.engine.steps import locate
from roma_ray.engine.work import serial
from roma_ray.runs.pipeline import Run
from roma_ray.stages.extraction import EXTRACT, gather
from roma_ray.stages.finetuning import read_routing_rows
from roma_ray.stages.preparation import QUESTIONS
from roma_ray.store import row_order
from roma_ray.store.artifacts import Stage
from tests.bucket import Proxy
from tests.making import made
from tests.progress import Told
from tests.world import make_world


def whole_model(run: Run) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        run.setup.model.path, dtype=torch.float32, experts_implementation="eager"
    ).eval()


@torch.inference_mode()
def literal(model: Any, prompt: Any) -> tuple[torch.Tensor, list[float], list[torch.Tensor]]:
    """Softmax of every layer's router logits at the last prompt token, choice scores, states after each attention."""
    middle: list[torch.Tensor] = []
    hooks = [
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _, inputs: middle.append(inputs[0][0]))
        for layer in model.model.layers
    ]
    output = model(torch.tensor([prompt.prompt_ids]), output_router_logits=True, use_cache=False)
    for hook in hooks:
        hook.remove()
    routing = torch.stack(
        [torch.softmax(layer.float()[len(prompt.prompt_ids) - 1], -1) for layer in output.router_logits]
    )
    scores = []
    for ids in prompt.choice_ids:
        logp = torch.log_softmax(
            model(torch.tensor([[*prompt.prompt_ids, *ids]]), use_cache=False).logits[0].float(), -1
        )
        start = len(prompt.prompt_ids) - 1
        scores.append(sum(logp[start + n, token].item() for n, token in enumerate(ids)))
    return routing, scores, middle


@pytest.mark.parametrize("name", ["letter_run", "cloze_run"])
def test_routing_scores_answers_and_activations_equal_the_plain_forward(
    name: str, request: pytest.FixtureRequest
) -> None:
    run: Run = request.getfixturevalue(name)
    model = whole_model(run)
    prompts = read_prompts(run.stages["questions"].path / TABLE)
    rows = read_table(run.stages["extract"].path / ROWS).to_pylist()
    routing = read_routing_rows(run.stages["extract"].path, "Last1")
    cache = ActivationCache(run.stages["extract"].path, run.setup.cut)
    assert cache.prefix > 3
    rule = run.setup.config.questions.prompt.cloze_score if name == "cloze_run" else "raw"
    for number in range(0, len(prompts), 7):
        prompt = prompts[number]
        expected, scores, middle = literal(model, prompt)
        torch.testing.assert_close(routing[number], expected, rtol=1e-5, atol=1e-6)
        assert rows[number]["scores"] == pytest.approx(scores, abs=1e-4)
        values = [s / c if rule == "normalized" else s for s, c in zip(scores, prompt.choice_chars, strict=True)]
        assert rows[number]["prediction"] == values.index(max(values))
        assert rows[number]["is_correct"] == (rows[number]["prediction"] == prompt.answer)
        own = cache.states(number)[: len(prompt.prompt_ids) - cache.prefix]
        torch.testing.assert_close(own, middle[run.setup.cut][cache.prefix :], rtol=1e-4, atol=1e-5)


def test_batch_composition_changes_nothing(letter_run: Run, tmp_path: Path) -> None:
    """The same questions in batches of one and in one large batch."""
    results = []
    for budget in (16, 100_000):
        config = letter_run.setup.config
        extraction = config.extraction.model_copy(update={"batch_tokens": budget})
        setup = resolve(config.model_copy(update={"extraction": extraction, "storage": str(tmp_path / str(budget))}))
        made(QUESTIONS, setup)
        stage = made(EXTRACT, setup)
        results.append((stage.manifest()["facts"]["batches"], read_routing_rows(stage.path, "Last1")))
    assert results[0][0] > results[1][0] == 1
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-6)


@pytest.fixture
def fresh(tmp_path: Path) -> tuple[Any, Stage]:
    setup = resolve(make_world(tmp_path, count=20))
    return setup, made(QUESTIONS, setup)


def test_a_row_that_fails_alone_is_set_aside_and_the_others_are_whole(
    fresh: tuple[Any, Stage], monkeypatch: Any
) -> None:
    setup, _ = fresh
    original = Extractor._forward

    def faulty(self: Extractor, rows: Any) -> Any:
        if 3 in rows:
            raise RuntimeError("broken row\nwith details")
        return original(self, rows)

    monkeypatch.setattr(Extractor, "_forward", faulty)
    stage = made(EXTRACT, setup)
    table = read_table(stage.path / ROWS).to_pylist()
    assert stage.manifest()["facts"]["errors"] == 1
    assert table[3]["error"] == "RuntimeError: broken row"
    assert table[3]["is_correct"] is False
    assert all(row["error"] is None and row["scores"] for row in table if row["row"] != 3)


def test_rows_beyond_the_vocabulary_and_excluded_rows_are_set_aside(fresh: tuple[Any, Stage]) -> None:
    setup, _ = fresh
    job = EXTRACT.job(setup, locate(EXTRACT, setup))
    stage = job.stage
    stage.path.mkdir(parents=True)
    write_plan(stage.path / PLAN, PlannedBatches.of([[0, 1, 2]]))
    extractor = Extractor(ExtractWork(job.setup, job.stages, stage))
    extractor.vocabulary = max(max(p.prompt_ids) for p in extractor.batches.prompts[:1])
    report = extractor(0, frozenset({2}))
    rows = read_table(batch_table(stage.path, 0)).to_pylist()
    assert "beyond the model's vocabulary" in rows[0]["error"]
    assert rows[2]["error"] == "killed its worker"
    assert report.errors >= 2


def test_a_resume_does_only_the_batches_that_lack(fresh: tuple[Any, Stage]) -> None:
    setup, _ = fresh
    done: list[int] = []

    def stopping(work: Any, batches: Any) -> Any:
        for report in serial(work, batches[:2]):
            done.append(report.batch)
            yield report
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(EXTRACT, setup, Runners(extract=stopping))

    def counting(work: Any, batches: Any) -> Any:
        done.extend(batches)
        return serial(work, batches)

    stage = made(EXTRACT, setup, Runners(extract=counting))
    assert sorted(done) == list(range(stage.manifest()["facts"]["batches"]))
    assert len(done) == len(set(done))


def test_gather_refuses_rows_that_lack(letter_run: Run) -> None:
    stage = letter_run.stages["extract"]
    questions = letter_run.stages["questions"].path / TABLE
    with pytest.raises(Exception, match="does not hold each question once"):
        gather(stage, stage.manifest()["facts"]["batches"] - 1, questions, 0)


@pytest.mark.parametrize("block", [5, 16])
def test_rows_are_gathered_block_by_block(
    letter_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(row_order, "BLOCK_ROWS", block)
    whole, facts = letter_run.stages["extract"], letter_run.stages["extract"].manifest()["facts"]
    shutil.copytree(whole.path / "batches", tmp_path / "batches")
    found = gather(Stage(tmp_path, "extract", {}), facts["batches"], letter_run.stages["questions"].path / TABLE, 3)
    table, expected = read_table(tmp_path / ROWS), read_table(whole.path / ROWS)
    assert table.equals(expected.replace_schema_metadata(table.schema.metadata))
    assert found == {name: facts[name] for name in found} | {"prefix": 3}
    assert {path.name for path in tmp_path.iterdir()} == {"batches", ROWS}


def test_progress_counts_tokens_for_the_longest_batches_run_first(fresh: tuple[Any, Stage]) -> None:
    """What a resumed extraction has done counts too: with nothing left to count, all of it is done."""
    setup, questions = fresh
    extraction = setup.config.extraction.model_copy(update={"batch_tokens": 100})
    setup = dataclasses.replace(setup, config=setup.config.model_copy(update={"extraction": extraction}))

    def stopping(work: Any, batches: Any) -> Any:
        yield from serial(work, batches[:2])
        raise KeyboardInterrupt

    first, second = Told(), Told()
    with pytest.raises(KeyboardInterrupt):
        made(EXTRACT, setup, Runners(extract=stopping), first)
    stage = made(EXTRACT, setup, progress=second)
    prompts = read_prompts(questions.path / TABLE)
    prefix, plan = read_plan(stage.path / PLAN)
    tokens = [prefix + sum(own_tokens(prompts[row], prefix) for row in batch) for batch in plan]
    assert len({len(batch) for batch in plan}) > 1
    assert first.meters["extract"] == (sum(tokens), "tokens", 0)
    assert first.counted == tokens[:2]
    assert second.meters["extract"] == (sum(tokens), "tokens", sum(tokens[:2]))
    assert second.counted == tokens[2:]


def test_the_caches_size_is_told_with_the_room_that_is_left(tmp_path: Path, bucket: Proxy) -> None:
    """Of a folder in GB; a bucket has no bound, and none is told."""
    config, lines = make_world(tmp_path, count=12), []
    for storage in (config.storage, bucket.address("room")):
        setup, told = resolve(config.model_copy(update={"storage": storage})), Told()
        made(QUESTIONS, setup)
        made(EXTRACT, setup, progress=told)
        lines += [line for line in told.lines if line.startswith("activation cache: ")]
    local, far = lines
    free = float(re.search(r": 0\.00 GB \((\d+) GB free\)$", local)[1])  # type: ignore[index]
    assert free == pytest.approx(shutil.disk_usage(tmp_path).free / 1e9, abs=2)
    assert far == re.sub(r"\(\d+ GB free\)$", "(in a bucket)", local)
