"""An evaluation's answers by any number of workers: the same bytes, gone on with after a kill, every failure named."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from roma_ray.cluster.ray_runners import answers_by_chain
from roma_ray.engine.cache import ROWS, prefix_of
from roma_ray.engine.heads import Heads, KeptHeads
from roma_ray.engine.model_spec import ModelSpec
from roma_ray.engine.progress import Silence
from roma_ray.engine.question_table import TABLE, read_prompts, read_table
from roma_ray.engine.runners import Runners
from roma_ray.engine.scoring import plan_scoring
from roma_ray.engine.setup import Setup, resolve
from roma_ray.engine.work import Executor, Report, Work, serial
from roma_ray.errors import ArtifactError, IdenticalError, WorkerError
from roma_ray.moe.head_chain import Chain, HereLinks
from roma_ray.moe.links import HeldSlice
from roma_ray.runs.pipeline import Run, run
from roma_ray.stages import answer_work, answering
from roma_ray.stages.answer_work import Answerer, AnswerWork, number, plan_scores, section_of
from roma_ray.stages.base_scores import PARTS, base_stage
from roma_ray.stages.extraction import EXTRACT
from roma_ray.stages.paired_evaluation import EVALUATE
from roma_ray.stages.preparation import QUESTIONS
from roma_ray.store.artifacts import Stage
from tests.free_world import free_world, squad
from tests.making import made
from tests.progress import Told
from tests.world import make_world


@pytest.fixture(scope="module")
def choices_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Several parts a section."""
    return run(resolve(make_world(tmp_path_factory.mktemp("choices"), extraction={"batch_tokens": 128})), Silence())


@pytest.fixture(scope="module")
def written_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Questions without choices, whose answers are written."""
    root = tmp_path_factory.mktemp("written")
    success = {"metric": "exact_match", "max_new_tokens": 4, "generation_batch": 2, "stop": ["zzz"]}
    extraction = {"batch_tokens": 64, "success": success}
    rows = squad(40)
    setup = resolve(free_world(root / "first", rows, extraction=extraction))
    made(QUESTIONS, setup)
    # A random model writes nothing right, so the training rows' answers are what it writes.
    for row, text in zip(rows, read_table(made(EXTRACT, setup).path / ROWS).column("text").to_pylist(), strict=True):
        row["answers"]["text"] = [row["answers"]["text"][0], *([text] if text else [])]
    return run(resolve(free_world(root / "second", rows, extraction=extraction)), Silence())


def dealt(workers: int) -> Executor:
    """Every batch by one of several workers that each opened the work for itself, the last batch first."""

    def execute(work: Work, batches: Sequence[int]) -> Iterator[Report]:
        opened = [pickle.loads(pickle.dumps(work)).open() for _ in range(workers)]
        for n, batch in enumerate(reversed(batches)):
            yield opened[n % workers](batch)

    return execute


def again(finished: Run, folder: Path) -> Setup:
    """The finished run's set-up over a copy of its storage, without the evaluation and the base's scores."""
    shutil.copytree(finished.setup.store.root, folder)
    for name in ("evaluate", "base"):
        shutil.rmtree(folder / name)
    return resolve(finished.setup.config.model_copy(update={"storage": str(folder)}))


def base_of(setup: Setup, finished: Run) -> Stage:
    return base_stage(setup, finished.stages["extract"])


def same(stage: Stage, setup: Setup, finished: Run) -> None:
    """The evaluation's and the base's files to the bit, and nothing left beside them."""
    for got, known in (
        (stage, finished.stages["evaluate"]),
        (base_of(setup, finished), base_of(finished.setup, finished)),
    ):
        files = {name: fact["sha256"] for name, fact in got.manifest()["files"].items()}
        assert files == {
            name: fact["sha256"] for name, fact in known.manifest()["files"].items() if name != "config.yaml"
        }
        assert not (got.path / PARTS).exists()
    assert stage.manifest()["devices"] == finished.stages["evaluate"].manifest()["devices"]


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("kind", ["choices", "written"])
def test_any_number_of_workers_gives_the_same_files(
    kind: str, workers: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    finished: Run = request.getfixturevalue(f"{kind}_run")
    setup = again(finished, tmp_path / "storage")
    given: dict[str, int] = {}

    def counting(work: Work, batches: Sequence[int]) -> Iterator[Report]:
        for batch in batches:
            given[section_of(batch)[0]] = given.get(section_of(batch)[0], 0) + 1
        yield from dealt(workers)(work, batches)

    same(made(EVALUATE, setup, Runners(evaluate=counting)), setup, finished)
    assert list(given) == [*("base", "tuned", "trained"), *(["texts"] if kind == "written" else [])]
    assert all(count > 2 for count in given.values())


@pytest.mark.parametrize("kind", ["choices", "written"])
def test_every_moment_of_a_kill_is_gone_on_from(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """What was answered stays; each attempt does two more parts and is killed, until all are there."""
    finished: Run = request.getfixturevalue(f"{kind}_run")
    setup = again(finished, tmp_path / "storage")
    done: list[int] = []

    def dying(work: Work, batches: Sequence[int]) -> Iterator[Report]:
        for report in serial(work, batches[:2]):
            done.append(report.batch)
            yield report
        if batches[2:]:
            raise KeyboardInterrupt

    told = Told()
    for _ in range(100):
        try:
            stage = made(EVALUATE, setup, Runners(evaluate=dying), told)
            break
        except KeyboardInterrupt:
            assert any((setup.store.root / name).rglob(f"{PARTS}/*/*.parquet") for name in ("evaluate", "base"))
    assert len(done) == len(set(done)) > 8
    same(stage, setup, finished)


class Divided(Heads):
    """Lends heads of two slices; counts them."""

    def __init__(self) -> None:
        self.lent = 0

    @contextmanager
    def lend(self, model: ModelSpec, cut: int) -> Iterator[Chain]:
        self.lent += 1
        below = HeldSlice(model.load(cut, cut + 1, with_lm_head=False), first=True, keep=True)
        yield Chain(model.load(cut + 1, None, with_lm_head=True), HereLinks([below]))


def test_a_head_in_slices_answers_and_is_gone_on_from(choices_run: Run, tmp_path: Path) -> None:
    """Base and tuned gates in turn, in both slices; what was answered before a kill is not answered again."""
    setup, heads = again(choices_run, tmp_path / "storage"), Divided()
    assert len(setup.layers) == 2
    whole, done = answers_by_chain(heads, lambda name, function, *given: function(*given)), list[int]()

    def dying(work: Work, batches: Sequence[int]) -> Iterator[Report]:
        # Some of the base's, and then some that have both kinds of gates.
        for report in whole(work, batches[:5]):
            done.append(report.batch)
            yield report
        if batches[5:]:
            raise KeyboardInterrupt

    for attempt in range(1, 50):
        try:
            stage = made(EVALUATE, setup, Runners(evaluate=dying))
            break
        except KeyboardInterrupt:
            assert heads.lent == attempt
    assert len(done) == len(set(done)) > 8
    same(stage, setup, choices_run)


def test_the_base_is_scored_aside_while_another_scores_it(choices_run: Run, tmp_path: Path) -> None:
    setup = again(choices_run, tmp_path / "storage")
    base = base_of(setup, choices_run)
    with base.exclusive():
        stage = made(EVALUATE, setup, Runners(evaluate=dealt(2)))
        assert not base.complete
        assert not (base.path / PARTS).exists()
    known = choices_run.stages["evaluate"].manifest()["files"]
    assert {name: fact for name, fact in known.items() if name != "config.yaml"} == stage.manifest()["files"]


def test_a_worker_loads_the_head_once_and_what_is_there_is_not_answered_again(
    choices_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[tuple[int, int | None]] = []
    load: Callable[..., object] = ModelSpec.load

    def counting(self: ModelSpec, start: int, stop: int | None, **more: bool) -> object:
        loaded.append((start, stop))
        return load(self, start, stop, **more)

    monkeypatch.setattr(ModelSpec, "load", counting)
    setup = again(choices_run, tmp_path / "storage")
    stage = made(EVALUATE, setup, Runners(evaluate=dealt(2)))
    assert loaded == [(setup.cut, None)] * 2
    shutil.rmtree(stage.path)
    given: list[int] = []

    def noting(work: Work, batches: Sequence[int]) -> Iterator[Report]:
        given.extend(batches)
        yield from serial(work, batches)

    same(made(EVALUATE, setup, Runners(evaluate=noting)), setup, choices_run)
    assert {section_of(batch)[0] for batch in given} == {"tuned", "trained"}


def test_one_process_works_on_the_head_that_it_keeps(choices_run: Run, tmp_path: Path) -> None:
    heads = KeptHeads()
    setup = again(choices_run, tmp_path / "storage")
    for _ in range(2):
        stage = made(EVALUATE, setup, Runners(heads=heads))
        same(stage, setup, choices_run)
        shutil.rmtree(stage.path)
        shutil.rmtree(base_of(setup, choices_run).path)
    assert heads.loaded == 1


def work_of(finished: Run, folder: Path) -> AnswerWork:
    """The work of a finished run's evaluation, in an empty folder, with its base's section planned."""
    work = AnswerWork(finished.setup, finished.stages, Stage(folder, "evaluate", {}), str(folder))
    prompts = read_prompts(finished.stages["questions"].path / TABLE)
    rows = [row for row, prompt in enumerate(prompts) if prompt.split != "train"]
    work.planned("base", plan_scores(prompts, rows, prefix_of(finished.stages["extract"].path), 128))
    return work


def test_a_question_that_kills_its_worker_is_named(choices_run: Run, tmp_path: Path) -> None:
    """As the workers' pool finds it (`cluster/batch_actors.py`): its rows are tried alone, and the guilty one given as excluded."""
    work = work_of(choices_run, tmp_path)
    answer = work.open()
    assert isinstance(answer, Answerer)
    rows = answer.rows(number("base", 1))
    answer.probe(rows[0])
    with pytest.raises(WorkerError, match=f"{answer.prompts[rows[0]].id!r} kills the worker.*ray.evaluate_workers"):
        answer(number("base", 1), frozenset(rows[:1]))
    assert work.missing("base", work.planned("base", [])) == list(range(len(work.planned("base", []))))
    answer(number("base", 1))
    assert work.missing("base", work.planned("base", []))[:2] == [0, 2]


def test_damaged_parts_are_refused_by_name(choices_run: Run, tmp_path: Path) -> None:
    work = work_of(choices_run, tmp_path)
    parts = work.planned("base", [])
    list(serial(work, [number("base", part) for part in range(len(parts))]))
    rows = [row for part in parts for row in part.rows]
    assert work.scores("base", sorted(rows), len(parts)).rows == sorted(rows)
    with pytest.raises(ArtifactError, match=r"tuned|base.*does not hold each question once"):
        work.scores("base", rows[1:], len(parts))
    file = work.file("base", 1)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ArtifactError, match=r"000001.parquet cannot be read"):
        work.scores("base", rows, len(parts))
    plan = work.place("base") / "plan.json"
    plan.write_text('[[1, "x"]]')
    with pytest.raises(ArtifactError, match=r"plan.json cannot be read"):
        work.planned("base", [])


def test_equal_models_are_refused_before_anything_is_written(
    written_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def alike(base: object, tuned: object) -> None:
        raise IdenticalError("equal on every question")

    monkeypatch.setattr(answering, "check_not_identical", alike)
    setup = again(written_run, tmp_path / "storage")
    answered: list[str] = []

    def noting(work: Work, batches: Sequence[int]) -> Iterator[Report]:
        for report in serial(work, batches):
            answered.append(section_of(report.batch)[0])
            yield report

    with pytest.raises(IdenticalError, match="equal on every question"):
        made(EVALUATE, setup, Runners(evaluate=noting))
    assert set(answered) == {"base", "tuned"}


def test_parts_are_the_planned_batches_in_their_order(choices_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = read_prompts(choices_run.stages["questions"].path / TABLE)
    rows = list(range(len(prompts)))
    planned = plan_scoring(prompts, rows, 0, 64)
    for least, most, size in ((32, 8, len(planned) // 32), (4, 3, 3), (1000, 8, 1)):
        monkeypatch.setattr(answer_work, "_PARTS", least)
        monkeypatch.setattr(answer_work, "_BATCHES", most)
        parts = plan_scores(prompts, rows, 0, 64)
        assert [(batch, None) for part in parts for batch in part.batches] == [(batch, None) for batch, _ in planned]
        assert sum(part.size for part in parts) == sum(tokens for _, tokens in planned)
        assert max(len(part.batches) for part in parts) == max(1, size)
    assert section_of(number("texts", 7)) == ("texts", 7)
    assert replace(parts[0], batches=[[3], [1, 2]]).rows == [3, 1, 2]
