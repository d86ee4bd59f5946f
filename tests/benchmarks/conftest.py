"""One tiny world with an exported adapter, shared by the tests of benchmarks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from roma_ray.config.schema import Config
from roma_ray.engine.progress import Silence
from roma_ray.engine.setup import resolve
from roma_ray.runs.pipeline import run
from roma_ray.stages.finetuning import ADAPTER
from tests.world import WORDS, make_world

ROLLING = {
    "task": "own_rolling",
    "output_type": "loglikelihood_rolling",
    "test_split": "test",
    "doc_to_text": "",
    "doc_to_target": "text",
    "metric_list": [{"metric": "byte_perplexity"}],
}
GENERATION = {
    "task": "own_generation",
    "output_type": "generate_until",
    "test_split": "test",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "generation_kwargs": {"until": ["\n", "red"], "max_gen_toks": 8, "do_sample": False},
}


@dataclass(frozen=True)
class JudgeWorld:
    """A configuration, its finetuned adapter, a folder of benchmark files and task files of each request type."""

    config: Config
    adapter: str
    data: Path
    tasks: tuple[str, ...]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def judge_world(tmp_path_factory: pytest.TempPathFactory) -> JudgeWorld:
    root = tmp_path_factory.mktemp("judged")
    config = make_world(
        root,
        count=36,
        questions={"sources": [{"path": str(root / "questions.jsonl")}], "prompt": {"format": "cloze"}},
        finetune={"epochs": 1, "learning_rate": 0.05},
    )
    finished = run(resolve(config), Silence(), until="finetune")
    records = [json.loads(line) for line in (root / "questions.jsonl").read_text().splitlines()]
    data = root / "data"
    pairs = [
        {**r, "question": f"{r['question']} _ is it", "choices": r["choices"][:2], "answer": n % 2}
        for n, r in enumerate(records)
    ]
    write_rows(data / "piqa" / "validation.jsonl", [{**r, "split": None} for r in pairs[:12]])
    write_rows(data / "winogrande.jsonl", [{**r, "split": "validation"} for r in pairs[12:20]])
    write_rows(data / "own_rolling" / "test.jsonl", [{"text": " ".join(r["choices"]) * 12} for r in records[:4]])
    write_rows(
        data / "own_generation" / "test.jsonl", [{"question": r["question"], "answer": "red"} for r in records[:6]]
    )
    for task in (ROLLING, GENERATION):
        (root / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    questions = root / "benchmark.jsonl"
    # The first one is longer than the model's longest input.
    records[0]["context"] = " ".join(WORDS * 20)
    write_rows(questions, [{**r, "split": "test"} for r in records[:20]])
    tasks = (str(questions), "piqa", "winogrande", str(root / "own_rolling.yaml"), str(root / "own_generation.yaml"))
    return JudgeWorld(config, str(finished.stages["finetune"].path / ADAPTER), data, tasks)
