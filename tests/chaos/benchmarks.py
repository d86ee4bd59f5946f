"""Faults while `roma-ray evaluate --tasks` answers requests on actors."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from roma_ray.benchmarks.judge import Wanted, judge
from roma_ray.benchmarks.judged_model import resolve_subject
from roma_ray.benchmarks.requests import ANSWERS, PLAN, REQUESTS
from roma_ray.engine.progress import Silence
from roma_ray.engine.question_table import read_table
from roma_ray.engine.work import serial
from roma_ray.evaluation.benchmark_results import METRICS, RESPONSES
from roma_ray.stages.finetuning import ADAPTER
from roma_ray.store.artifacts import MANIFEST, Stage, Store
from tests.chaos.scene import Scene
from tests.chaos.simulated import Driver

# Small batches, so that there is a middle.
TOKENS = 64
RESULTS = (METRICS, RESPONSES, "lm_eval_base.json", "lm_eval_tuned.json")


def _asked(scene: Scene) -> tuple[Path, str]:
    """The run's questions as a benchmark, and the run's adapter."""
    source = Path(scene.config.questions.sources[0].path or "")
    benchmark = scene.folder / "benchmark.jsonl"
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    benchmark.write_text("".join(json.dumps({**row, "split": "test"}) + "\n" for row in rows))
    return benchmark, str(scene.reference.stages["finetune"].path / ADAPTER)


def _undisturbed(scene: Scene, storage: Path) -> Stage:
    """The same evaluation by one process, without Ray."""
    benchmark, adapter = _asked(scene)
    evaluation = scene.config.evaluation.model_copy(update={"batch_tokens": TOKENS})
    config = scene.config.model_copy(update={"evaluation": evaluation})
    subject = resolve_subject(config, adapter=adapter, device="cpu")
    table = read_table(scene.reference.stages["questions"].path / "questions.parquet").to_pylist()
    training = [(row["question"], row["choices"]) for row in table if row["split"] == "train"]
    return judge(config, subject, Wanted((str(benchmark),)), Store(storage), serial, Silence(), training)


def in_benchmarks(what: str, scene: Scene) -> None:
    """A worker, its node or the driver goes while requests are answered: every answer once, and to the bit."""
    calm = scene.folder / "benchmarks"
    expected = _undisturbed(scene, calm)
    storage = scene.storage("evaluate")
    benchmark, adapter = _asked(scene)

    def start() -> Driver:
        words = ["--tasks", str(benchmark), "--adapter", adapter, "--set", f"evaluation.batch_tokens={TOKENS}"]
        return scene.start(storage, "evaluate", *words, "--set", "ray.evaluate_workers=3")

    driver = start()
    driver.wait_until(_begun(storage))
    node, worker = driver.wait_until(lambda: scene.nodes.processes("BatchWorker"))[0]
    if what == "driver killed":
        driver.kill()
    elif what == "node removed":
        scene.nodes.remove(node)
        scene.nodes.add()
    else:
        os.kill(worker, 9)
    (asked,) = (storage / "requests").iterdir()
    left = len(json.loads((asked / PLAN).read_text())) - len(list(asked.glob("batches/*.parquet")))
    assert left > 0, "all was answered before the fault"
    if what == "driver killed":
        driver = start()
    driver.end()

    (known,) = (calm / "requests").iterdir()
    assert asked.name == known.name
    answers, requests = read_table(asked / ANSWERS), read_table(asked / REQUESTS)
    assert Counter(answers.column("request").to_pylist()) == Counter(range(requests.num_rows))
    assert (asked / ANSWERS).read_bytes() == (known / ANSWERS).read_bytes()
    got = storage / "benchmarks" / expected.fingerprint
    assert [path.parent for path in (storage / "benchmarks").glob(f"*/{MANIFEST}")] == [got]
    for name in RESULTS:
        assert (got / name).read_bytes() == (expected.path / name).read_bytes(), name


def _begun(storage: Path) -> Callable[[], bool]:
    """Whether requests are being answered."""

    def ready() -> bool:
        assert not any((storage / "requests").glob(f"*/{MANIFEST}")), "all was answered before the fault"
        return any((storage / "requests").glob("*/batches/*.parquet"))

    return ready
