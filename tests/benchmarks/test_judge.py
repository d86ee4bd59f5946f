"""The judge is lm-evaluation-harness: every answer and verdict equals stock's, however the requests are sharded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.evaluator import evaluate as stock_evaluate
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from roma_ray.benchmarks import tasks
from roma_ray.benchmarks.judge import Wanted, configure, judge
from roma_ray.benchmarks.judged_model import Subject, resolve_subject
from roma_ray.benchmarks.requests import batch_file
from roma_ray.benchmarks.scorers import load_scorer
from roma_ray.benchmarks.tasks import leaves, load_tasks
from roma_ray.cli.judging import training_texts
from roma_ray.engine.progress import Silence
from roma_ray.engine.question_table import read_table
from roma_ray.engine.tokenizer import load_tokenizer
from roma_ray.engine.work import Report, Work, serial
from roma_ray.errors import ArtifactError, ConfigError, GuardError, QuestionError
from roma_ray.evaluation.benchmark_results import METRICS, RESPONSES, read_benchmarks
from roma_ray.moe.adapters import read_adapter, write_adapter
from roma_ray.moe.exporting import export_routers
from roma_ray.questions.prompts import PromptBuilder
from roma_ray.store.artifacts import Stage, Store
from tests.benchmarks.conftest import JudgeWorld


def wanted_of(world: JudgeWorld, *tasks: str) -> Wanted:
    return Wanted(tasks or world.tasks, data_dir=str(world.data))


@pytest.fixture(scope="module")
def subject(judge_world: JudgeWorld) -> Subject:
    return replace(
        resolve_subject(judge_world.config, adapter=judge_world.adapter), batch_tokens=300, generation_batch=4
    )


@pytest.fixture(scope="module")
def judged(judge_world: JudgeWorld, subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    store = Store(tmp_path_factory.mktemp("judged-store"))
    return judge(judge_world.config, subject, wanted_of(judge_world), store, serial, Silence())


def stock_samples(
    world: JudgeWorld, model: str, adapter: str | None, wanted: Wanted, dtype: str = "float32"
) -> dict[str, Any]:
    """What stock lm-eval answers with its own Hugging Face model."""
    builder = PromptBuilder(load_tokenizer(model, None), world.config.questions.prompt)
    single = leaves(load_tasks(wanted.tasks, data_dir=wanted.data_dir, builder=lambda: builder, allow_code=False))
    configure(single, wanted)
    lm = HFLM(pretrained=model, peft=adapter, device="cpu", dtype=dtype, softmax_dtype="float32", batch_size=4)
    found = stock_evaluate(lm, {"tasks": single, "groups": {}}, bootstrap_iters=0)
    samples: dict[str, Any] = found["samples"]
    return samples


def assert_equal_answers(folder: Path, which: str, stock: dict[str, Any]) -> int:
    """Every response and every metric of a model; returns how many responses there were."""
    mine = {(r["task"], r["doc"]): r[which] for r in read_table(folder / RESPONSES).to_pylist()}
    metrics = {
        (r["task"], r["doc"], r["filter"], r["metric"]): r[which] for r in read_table(folder / METRICS).to_pylist()
    }
    count = 0
    for task, samples in stock.items():
        for sample in samples:
            answers = [one for repeats in sample["resps"] for one in repeats]
            own = mine[task, sample["doc_id"]]
            assert len(own) == len(answers)
            for text, answer in zip(own, answers, strict=True):
                count += 1
                if isinstance(answer, str):
                    assert text == answer
                else:
                    value = answer[0] if isinstance(answer, tuple) else answer
                    assert float(text) == pytest.approx(value, abs=1e-4, rel=1e-7)
            for metric in sample["metrics"]:
                key = (task, sample["doc_id"], sample["filter"], metric)
                if key in metrics:
                    assert metrics[key] == float(sample[metric])
    return count


@pytest.mark.parametrize("which", ["base", "tuned"])
def test_every_answer_equals_stock(judge_world: JudgeWorld, judged: Stage, which: str) -> None:
    """All three request types; the tuned model is stock's base with the exported adapter, loaded by peft."""
    adapter = judge_world.adapter if which == "tuned" else None
    stock = stock_samples(judge_world, judge_world.config.model.path, adapter, wanted_of(judge_world))
    assert set(stock) == {"copy", "pick", "piqa", "winogrande", "own_rolling", "own_generation"}
    assert assert_equal_answers(judged.path, which, stock) >= 120


def test_the_right_choice_s_log_likelihood_is_stock_s_over_its_tokens(judge_world: JudgeWorld, judged: Stage) -> None:
    """Also where the prompts differ and the continuation does not (winogrande)."""
    stock = stock_samples(judge_world, judge_world.config.model.path, judge_world.adapter, wanted_of(judge_world))
    tokenizer = load_tokenizer(judge_world.config.model.path, None)
    rows = {(r["task"], r["doc"], r["metric"]): r["tuned"] for r in read_table(judged.path / METRICS).to_pylist()}
    of_doc = {
        "piqa": lambda doc: doc["label"],
        "winogrande": lambda doc: int(doc["answer"]) - 1,
        "copy": lambda doc: doc["gold"],
    }
    for task, gold_of in of_doc.items():
        for sample in stock[task]:
            lls, gold = np.array([repeats[0][0] for repeats in sample["resps"]]), gold_of(sample["doc"])
            assert sample["acc"] == float(lls.argmax() == gold)
            context, continuation = sample["arguments"][gold]
            whole, start = (tokenizer(text)["input_ids"] for text in (context + continuation, context))
            per_token = lls[gold] / (len(whole) - len(start))
            assert rows[task, sample["doc_id"], "gold_logp"] == pytest.approx(per_token, abs=1e-3)
            among = lls[gold] - np.log(np.exp(lls).sum())
            assert rows[task, sample["doc_id"], "choice_logp"] == pytest.approx(among, abs=1e-3)


def test_what_is_written(judge_world: JudgeWorld, judged: Stage) -> None:
    found = read_benchmarks(judged.path)
    own = json.loads((judged.path / "lm_eval_tuned.json").read_text())
    assert {"results", "versions", "n-shot", "configs"} <= own.keys()
    assert own["results"]["piqa"]["acc_stderr,none"] > 0
    for task, figures in found["tasks"].items():
        for metric, f in figures["metrics"].items():
            if metric not in ("gold_logp,none", "choice_logp,none"):
                assert f["tuned"] == pytest.approx(own["results"][task][metric]), (task, metric)
    assert set(found["tasks"]["piqa"]["metrics"]) == {
        "acc,none",
        "acc_norm,none",
        "gold_logp,none",
        "choice_logp,none",
    }
    assert set(found["tasks"]["winogrande"]["metrics"]) == {"acc,none", "gold_logp,none", "choice_logp,none"}
    guards = found["guards"]
    assert (guards["truncated"], guards["too_many_truncated"], guards["training_known"]) == (3, True, False)
    cost = found["cost"]
    assert set(cost["questions_per_second"]) == {"base", "tuned"}
    counted = cost["counted"]
    assert counted["tuned"] == counted["base"] > 0
    layers = cost["flops_per_token"]["layers"] * counted["tokens"]
    # Counted: attention's products on top, the last layer's experts and lm_head only where something is read.
    assert 0.6 * layers < counted["trunk"] + counted["base"] < 2 * layers
    again = judge(
        judge_world.config,
        resolve_subject(judge_world.config, adapter=judge_world.adapter),
        wanted_of(judge_world, "piqa"),
        Store(judged.path.parents[1]),
        serial,
        Silence(),
        [("Which word is it?", ["red"]), *[(q["goal"], [q["sol1"], q["sol2"]]) for q in piqa_rows(judge_world)[:3]]],
    )
    seen = read_benchmarks(again.path)["guards"]["seen_in_training"]
    assert seen == {"piqa": {"exact": 3, "normalised": 3, "questions": [0, 1, 2]}}


def piqa_rows(world: JudgeWorld) -> list[dict[str, Any]]:
    from roma_ray.benchmarks.local_data import find_files, read_splits

    files = find_files(world.data, "piqa", None, ["validation"])
    return read_splits(files, "piqa", None, "validation", ["validation"])["validation"]


class Counting:
    """An executor that notes which batches it was given, and stops after some."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.given: list[int] = []
        self.stop_after = stop_after

    def __call__(self, work: Work, batches: Sequence[int]) -> Iterator[Report]:
        self.given += batches
        for n, report in enumerate(serial(work, batches)):
            if n == self.stop_after:
                raise KeyboardInterrupt
            yield report


def test_budget_changes_no_verdict_and_a_resume_does_only_what_is_missing(
    judge_world: JudgeWorld, subject: Subject, judged: Stage, tmp_path: Path
) -> None:
    config, wanted = judge_world.config, wanted_of(judge_world, *judge_world.tasks[:3])
    small = replace(subject, batch_tokens=60)
    with pytest.raises(KeyboardInterrupt):
        judge(config, small, wanted, Store(tmp_path), Counting(stop_after=2), Silence())
    (folder,) = (tmp_path / "requests").iterdir()
    done = len(list((folder / "batches").iterdir()))
    assert done == 3
    rest = Counting()
    other = judge(config, small, wanted, Store(tmp_path), rest, Silence())
    assert len(rest.given) > 4
    assert set(rest.given).isdisjoint(range(done))
    again = Counting()
    assert judge(config, small, wanted, Store(tmp_path), again, Silence()).path == other.path
    assert again.given == []
    chosen = {"copy", "pick", "piqa", "winogrande"}
    first = [r for r in read_table(judged.path / METRICS).to_pylist() if r["task"] in chosen]
    second = read_table(other.path / METRICS).to_pylist()
    assert [r for r in second if "logp" not in r["metric"]] == [r for r in first if "logp" not in r["metric"]]
    for one, two in zip(first, second, strict=True):
        assert [one[which] for which in ("base", "tuned")] == pytest.approx(
            [two[which] for which in ("base", "tuned")], abs=1e-4
        )
    assert batch_file(folder, 0).exists()
    # What is there already is believed only as it was written.
    kept = other.path / "lm_eval_tuned.json"
    kept.write_text(kept.read_text().replace("0", "1", 1))
    with pytest.raises(ArtifactError, match=r"lm_eval_tuned\.json is not what was written"):
        judge(config, small, wanted, Store(tmp_path), again, Silence())


def test_kept_states_serve_the_next_adapter(
    judge_world: JudgeWorld, subject: Subject, judged: Stage, tmp_path: Path
) -> None:
    """A second adapter of the same layers runs the head alone, to the answers that it gets without kept states."""
    checkpoint = read_adapter(judge_world.adapter)
    moved = {key: tensor * 1.5 for key, tensor in checkpoint.tensors.items()}
    write_adapter(tmp_path / "other", replace(checkpoint, tensors=moved))
    keeping = replace(resolve_subject(judge_world.config, adapter=judge_world.adapter), keep_states=True)
    other = replace(resolve_subject(judge_world.config, adapter=str(tmp_path / "other")), keep_states=True)
    wanted = wanted_of(judge_world, "piqa")

    def run(one: Subject, store: str) -> Stage:
        return judge(judge_world.config, one, wanted, Store(tmp_path / store), serial, Silence())

    run(keeping, "kept")
    assert list((tmp_path / "kept" / "states").glob("*/000000.safetensors"))
    after, fresh = run(other, "kept"), run(replace(other, keep_states=False), "fresh")
    assert read_table(after.path / RESPONSES).to_pylist() == read_table(fresh.path / RESPONSES).to_pylist()
    assert read_benchmarks(after.path)["cost"]["questions_per_second"] == {}
    assert read_benchmarks(fresh.path)["cost"]["questions_per_second"].keys() == {"base", "tuned"}


def test_a_dense_model_is_judged_as_stock_does(judge_world: JudgeWorld, tmp_path: Path) -> None:
    source = Path(judge_world.config.model.path)
    torch.manual_seed(0)
    settings = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = LlamaForCausalLM(
        LlamaConfig(**settings, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
    )
    model.save_pretrained(tmp_path / "dense")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, tmp_path / "dense" / name)
    config = judge_world.config.model_copy(
        update={"model": judge_world.config.model.model_copy(update={"path": str(tmp_path / "dense")})}
    )
    subject = resolve_subject(config, adapter=None)
    assert not subject.sliced
    wanted = wanted_of(judge_world, judge_world.tasks[0], judge_world.tasks[4])
    stage = judge(config, replace(subject, batch_tokens=200), wanted, Store(tmp_path / "s"), serial, Silence())
    stock = stock_samples(judge_world, str(tmp_path / "dense"), None, wanted)
    assert assert_equal_answers(stage.path, "base", stock) > 50
    assert read_benchmarks(stage.path)["model"]["adapter"] is None


def test_a_bf16_model_is_judged_as_well_as_stock_does(judge_world: JudgeWorld, tmp_path: Path) -> None:
    """Stock's likelihoods to bf16's rounding, as near to the fp32 model's as stock's are, and not rounded themselves."""
    source, half = Path(judge_world.config.model.path), tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(half)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, half / name)
    config = judge_world.config.model_copy(
        update={"model": judge_world.config.model.model_copy(update={"path": str(half)})}
    )
    wanted = wanted_of(judge_world, judge_world.tasks[0], "piqa")
    stage = judge(config, resolve_subject(config, adapter=None), wanted, Store(tmp_path / "s"), serial, Silence())

    def stock(dtype: str) -> np.ndarray:
        samples = stock_samples(judge_world, str(half), None, wanted, dtype)
        found = {(task, s["doc_id"]): [a[0] for r in s["resps"] for a in r] for task in samples for s in samples[task]}
        return np.array([value for key in sorted(found) for value in found[key]])

    rows = sorted(read_table(stage.path / RESPONSES).to_pylist(), key=lambda row: (row["task"], row["doc"]))
    mine = np.array([float(value) for row in rows for value in row["base"]])
    theirs, exact = stock("bfloat16"), stock("float32")
    assert len(mine) > 80
    # bf16 keeps 8 bits: a value is rounded by up to 2^-9 of itself, at each of the dozens of operations of a forward pass, and
    # roundings add up like a random walk. Packed and padded kernels round at different places. Means, since a near tie of
    # two experts may exchange one and move a single answer by more.
    assert np.abs(mine - theirs).mean() < 4 * 2**-9 * np.abs(theirs).mean()
    assert np.abs(mine - exact).mean() < 1.5 * np.abs(theirs - exact).mean()
    assert (torch.tensor(mine).bfloat16().double().numpy() != mine).any()


def test_an_adapter_that_tunes_nothing_is_an_error(judge_world: JudgeWorld, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    checkpoint = read_adapter(judge_world.adapter)
    base = load_file(Path(judge_world.config.model.path) / "model.safetensors")
    own = {key: base[key] for key in checkpoint.tensors}
    write_adapter(tmp_path / "adapter", replace(checkpoint, tensors=own))
    subject = resolve_subject(judge_world.config, adapter=str(tmp_path / "adapter"))
    with pytest.raises(GuardError, match="equals the base"):
        judge(judge_world.config, subject, wanted_of(judge_world, "piqa"), Store(tmp_path), serial, Silence())


def test_the_reference_s_file_is_judged_as_the_adapter_is(judge_world: JudgeWorld, tmp_path: Path) -> None:
    file = tmp_path / "router_ft.pt"
    export_routers(Path(judge_world.adapter), file, form="reference")
    one, other = (resolve_subject(judge_world.config, adapter=str(a)) for a in (judge_world.adapter, file))
    assert one.identity() == other.identity()
    assert other.layers
    scorers = [load_scorer(subject) for subject in (one, other)]
    first, second = (scorer.score([(5, 6, 7, 8)], [(9,)]).answers for scorer in scorers)
    assert first == second
    assert first["base"] != first["tuned"]
    assert training_texts(Store(judge_world.config.storage), str(file)) is None


def test_wrong_requests_are_named(
    judge_world: JudgeWorld, subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*names: str, **settings: Any) -> None:
        wanted = replace(wanted_of(judge_world, *names), **settings)
        judge(judge_world.config, subject, wanted, Store(tmp_path), serial, Silence())

    # Like an unknown name, but without reading all of lm-eval's files.
    monkeypatch.setattr(tasks, "_folder_of", lambda name: "piqa")
    with pytest.raises(ConfigError, match=r"no task 'piqaa'; near it: .*piqa"):
        ask("piqaa")
    monkeypatch.undo()
    with pytest.raises(QuestionError, match=r"arc_easy/test.jsonl"):
        ask("arc_easy")
    with pytest.raises(ConfigError, match="its train split has none"):
        ask("piqa", num_fewshot=2)
    with pytest.raises(ConfigError, match="asked for twice"):
        ask("piqa", "piqa")
    with pytest.raises(QuestionError, match="no such folder"):
        ask("piqa", data_dir=str(tmp_path / "none"))
    wrong = judge_world.config.model_copy(
        update={"model": judge_world.config.model.model_copy(update={"dtype": "bfloat16"})}
    )
    with pytest.raises(ConfigError, match="exported in float32"):
        resolve_subject(wrong, adapter=judge_world.adapter)
