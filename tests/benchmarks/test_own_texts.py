"""Drift on texts of one's own, BLEU and ROUGE: lm-eval's own values, as stock gives them, with errors of the paired difference."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from roma_ray.benchmarks.aggregated import bootstrapped
from roma_ray.benchmarks.judge import Wanted, judge
from roma_ray.benchmarks.judged_model import resolve_subject
from roma_ray.benchmarks.own_texts import PASSAGE, is_text, read_documents
from roma_ray.cli.judging import print_benchmarks
from roma_ray.engine.progress import Silence
from roma_ray.engine.question_table import read_table
from roma_ray.engine.work import serial
from roma_ray.errors import ConfigError, QuestionError
from roma_ray.evaluation.benchmark_results import RESPONSES, read_benchmarks
from roma_ray.store.artifacts import Stage, Store
from tests.benchmarks.conftest import JudgeWorld, write_rows
from tests.benchmarks.test_judge import assert_equal_answers, stock_samples
from tests.world import WORDS

BLEU = {
    "task": "own_bleu",
    "output_type": "generate_until",
    "test_split": "test",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": name} for name in ("bleu", "chrf", "ter")],
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12, "do_sample": False},
}
ROUGE = """
task: own_rouge
output_type: generate_until
test_split: test
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{answer}}"
process_results: !function own_rouge.rouge
metric_list:
  - {metric: rouge1, aggregation: mean, higher_is_better: true}
  - {metric: rougeL, aggregation: mean, higher_is_better: true}
generation_kwargs: {until: ["\\n"], max_gen_toks: 12, do_sample: false}
"""
ROUGE_CODE = """
from rouge_score import rouge_scorer

scorer = rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=True)


def rouge(doc, results):
    return {name: found.fmeasure for name, found in scorer.score(doc["answer"], results[0]).items()}
"""


def paragraphs(count: int, seed: int = 0) -> list[str]:
    """Paragraphs of some hundred characters."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, size=60).tolist()) + "." for _ in range(count)]


def judged(world: JudgeWorld, folder: Path, *tasks: str, data: Path | None = None, allow_code: bool = False) -> Stage:
    subject = replace(resolve_subject(world.config, adapter=world.adapter), batch_tokens=300, generation_batch=4)
    wanted = Wanted(tasks, data_dir=None if data is None else str(data), allow_code=allow_code)
    return judge(world.config, subject, wanted, Store(folder / "store"), serial, Silence())


def test_a_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "novel.txt"
    path.write_text("\r\n\r\n".join(paragraphs(40)) + "\n \n\n")
    documents = read_documents(path)
    assert len(documents) > 3
    assert all(len(document) >= PASSAGE for document in documents)
    assert "\n\n".join(documents) == "\n\n".join(paragraphs(40))
    path.write_text("\n\n".join(paragraphs(2)))
    assert read_documents(path) == ["\n\n".join(paragraphs(2))]


def test_rows_with_a_text_are_documents_and_questions_are_not(tmp_path: Path) -> None:
    texts, questions = tmp_path / "texts.jsonl", tmp_path / "questions.jsonl"
    write_rows(texts, [{"text": "One."}, {"text": "Two.\n\nStill two.", "title": "x"}])
    write_rows(questions, [{"text": "passage", "question": "What?", "choices": ["a", "b"], "answer": 0}])
    assert read_documents(texts) == ["One.", "Two.\n\nStill two."]
    assert is_text(str(texts))
    assert not is_text(str(questions))
    assert not is_text(str(tmp_path / "nowhere.jsonl"))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.txt", b" \n\n", "holds no text"),
        ("latin.txt", "r\xe9sum\xe9".encode("latin-1"), "must be UTF-8"),
        ("rows.jsonl", b'{"text": "x"}\n{"text": 5}\n', "row 2: its `text` is 5"),
        ("rows.jsonl", b'{"text": "x"}\n{"txt": "y"}\n', "row 2: its `text` is None"),
    ],
)
def test_a_file_that_holds_no_text_is_named(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(QuestionError, match=reason):
        read_documents(tmp_path / name)


def test_a_text_that_is_not_there_is_told(judge_world: JudgeWorld, tmp_path: Path) -> None:
    with pytest.raises(QuestionError, match=r"nowhere\.txt cannot be read"):
        judged(judge_world, tmp_path, str(tmp_path / "nowhere.txt"))


@pytest.fixture(scope="module")
def drift(judge_world: JudgeWorld, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Stage]:
    folder = tmp_path_factory.mktemp("drift")
    (folder / "my.novel.txt").write_text("\n\n".join(paragraphs(30)))
    write_rows(folder / "letters.jsonl", [{"text": text} for text in paragraphs(5, seed=1)])
    return folder, judged(judge_world, folder, str(folder / "my.novel.txt"), str(folder / "letters.jsonl"))


@pytest.mark.parametrize("which", ["base", "tuned"])
def test_rolling_log_likelihoods_equal_stock(judge_world: JudgeWorld, drift: tuple[Path, Stage], which: str) -> None:
    folder, stage = drift
    adapter = judge_world.adapter if which == "tuned" else None
    wanted = Wanted((str(folder / "my.novel.txt"), str(folder / "letters.jsonl")))
    stock = stock_samples(judge_world, judge_world.config.model.path, adapter, wanted)
    assert set(stock) == {"my.novel", "letters"}
    assert assert_equal_answers(stage.path, which, stock) == len(read_documents(folder / "my.novel.txt")) + 5


def test_perplexities_are_those_of_the_whole_text_and_paired(drift: tuple[Path, Stage], capsys: Any) -> None:
    folder, stage = drift
    found = read_benchmarks(stage.path)["tasks"]
    rows = read_table(stage.path / RESPONSES).to_pylist()
    for task, file in (("my.novel", "my.novel.txt"), ("letters", "letters.jsonl")):
        documents = read_documents(folder / file)
        assert set(found[task]["metrics"]) == {"word_perplexity,none", "byte_perplexity,none", "bits_per_byte,none"}
        for which in ("base", "tuned"):
            total = sum(float(row[which][0]) for row in rows if row["task"] == task)
            words = sum(len(re.split(r"\s+", text)) for text in documents)
            size = sum(len(text.encode()) for text in documents)
            figures = {name.partition(",")[0]: one for name, one in found[task]["metrics"].items()}
            assert figures["word_perplexity"][which] == pytest.approx(math.exp(-total / words))
            assert figures["byte_perplexity"][which] == pytest.approx(math.exp(-total / size))
            assert figures["bits_per_byte"][which] == pytest.approx(-total / size / math.log(2))
        one = figures["bits_per_byte"]
        assert one["difference"] == pytest.approx(one["tuned"] - one["base"])
        assert one["difference"] != 0
        # Paired: what documents have in common is no error of the difference.
        assert 0 < one["difference_stderr"] < one["base_stderr"]
        assert one["n"] == len(documents)
    print_benchmarks(stage.path)
    shown = capsys.readouterr().out
    assert "word_perplexity" in shown
    assert "lower is better" in shown


def test_the_bootstrap_s_errors_are_those_of_a_mean() -> None:
    """Of a metric that is a mean the error is known: s / sqrt(n), and of the difference that of the paired differences."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=400).tolist()
    tuned = (np.array(base) + rng.normal(0.1, 0.2, size=400)).tolist()
    found = bootstrapped(lambda values: float(np.mean(values)), base, tuned, resamples=2000)
    assert found["base_stderr"] == pytest.approx(np.std(base, ddof=1) / 20, rel=0.1)
    gaps = np.subtract(tuned, base)
    assert found["difference"] == pytest.approx(gaps.mean())
    assert found["difference_stderr"] == pytest.approx(gaps.std(ddof=1) / 20, rel=0.1)
    assert set(bootstrapped(np.mean, base, None, resamples=10)) == {"n", "base", "base_stderr"}
    alone = bootstrapped(np.mean, [1.0], [2.0], resamples=10)
    assert (alone["difference"], alone["difference_stderr"], alone["base_stderr"]) == (1.0, None, None)


@pytest.fixture(scope="module")
def pairs(judge_world: JudgeWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generation")
    texts = paragraphs(6, seed=2)
    for task in ("own_bleu", "own_rouge"):
        write_rows(folder / "data" / task / "test.jsonl", [{"question": t[:20], "answer": t[:60]} for t in texts])
    (folder / "own_bleu.yaml").write_text(yaml.safe_dump(BLEU))
    (folder / "own_rouge.yaml").write_text(ROUGE)
    (folder / "own_rouge.py").write_text(ROUGE_CODE)
    return folder


def test_bleu_of_a_task_file_on_local_data(judge_world: JudgeWorld, pairs: Path, tmp_path: Path) -> None:
    import sacrebleu

    stage = judged(judge_world, tmp_path, str(pairs / "own_bleu.yaml"), data=pairs / "data")
    found = read_benchmarks(stage.path)["tasks"]["own_bleu"]["metrics"]
    assert set(found) == {"bleu,none", "chrf,none", "ter,none"}
    rows = read_table(stage.path / RESPONSES).to_pylist()
    own = json.loads((stage.path / "lm_eval_tuned.json").read_text())["results"]["own_bleu"]
    for which in ("base", "tuned"):
        written, targets = [row[which][0] for row in rows], [row["target"] for row in rows]
        assert found["chrf,none"][which] == pytest.approx(sacrebleu.corpus_chrf(written, [targets]).score)
        assert found["bleu,none"][which] == pytest.approx(sacrebleu.corpus_bleu(written, [targets]).score)
    assert own["ter,none"] == pytest.approx(found["ter,none"]["tuned"])


def test_rouge_is_a_task_file_s_own_code_and_is_asked_for(judge_world: JudgeWorld, pairs: Path, tmp_path: Path) -> None:
    from rouge_score import rouge_scorer

    task = str(pairs / "own_rouge.yaml")
    with pytest.raises(ConfigError, match="would run code"):
        judged(judge_world, tmp_path, task, data=pairs / "data")
    stage = judged(judge_world, tmp_path, task, data=pairs / "data", allow_code=True)
    found = read_benchmarks(stage.path)["tasks"]["own_rouge"]["metrics"]
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    rows = read_table(stage.path / RESPONSES).to_pylist()
    for which in ("base", "tuned"):
        scores = [scorer.score(row["target"], row[which][0])["rougeL"].fmeasure for row in rows]
        assert found["rougeL,none"][which] == pytest.approx(np.mean(scores))
