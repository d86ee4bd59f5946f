"""A sweep's tables: one row a setting, one column a factor, then its figures; and the unrounded ones as CSV files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from roma_ray.ablations import paper
from roma_ray.ablations.factors import VariedSetting, columns
from roma_ray.ablations.space import CENTRE
from roma_ray.ablations.sweep import DONE, Sweep
from roma_ray.ablations.sweep_results import Compared, Findings, SeededMean, SettingResult
from roma_ray.borders.text import figure, with_error
from roma_ray.evaluation.measures import MEASURES, ByTask
from roma_ray.evaluation.statistics import Paired, p_value
from roma_ray.figures.report_tables import Table, write_csv

SHIFTED = "†"
"""Marks a difference that is explained by a shift between answers alone."""
_Cell = tuple[str, Callable[[SettingResult], str]]


def percent(value: SeededMean) -> str:
    """A fraction in percent with its error over questions."""
    return with_error(value.mean, value.questions)


def ranking(sweep: Sweep, findings: Findings) -> Table:
    """All settings by validation accuracy, best first, with their paired differences to base and centre."""
    varied = columns(sweep.space)
    shown = [*_figures(findings), ("gradient ratio %", _ratio)]
    rows = [(*_settings(varied, result), *(text(result) for _, text in shown)) for result in findings.results]
    return Table((*(c.name for c in varied), *(name for name, _ in shown)), rows, names=len(varied))


def _settings(varied: Sequence[VariedSetting], result: SettingResult) -> tuple[str, ...]:
    return tuple(column.level(result.trial) for column in varied)


def _figures(findings: Findings) -> list[_Cell]:
    """The columns of a setting's figures. Errors over questions stand behind ±, those over seeds in columns of their own."""
    several = findings.several_seeds
    cells: list[_Cell] = [("seeds", lambda r: str(len(r.seeds)))] if several else []
    cells.append(("validation %", lambda r: percent(r.validation)))
    cells += [("± seeds", lambda r: _error(r.validation.seeds))] if several else []
    cells.append(("test %", lambda r: percent(r.accuracy)))
    cells += [("± seeds", lambda r: _error(r.accuracy.seeds))] if several else []
    cells.append(("gain over base", lambda r: points(r.gain)))
    cells += [("95 %, both", lambda r: interval(r.gain.interval))] if several else []
    if len(findings.results) == 1:
        return cells
    cells.append(("difference to centre", _near))
    cells += [("± seeds", lambda r: _error(r.to_centre.seeds if r.to_centre else None))] if several else []
    cells += [("95 %, both", lambda r: interval(r.to_centre.interval if r.to_centre else None))] if several else []
    cells.append(("p", lambda r: p_value(r.to_centre.p) if r.to_centre else ""))
    cells.append(("p, Holm", lambda r: p_value(r.to_centre.corrected_p) if r.to_centre else ""))
    return cells


def interval(ends: tuple[float, float] | None) -> str:
    """A difference's interval in percentage points; empty for none."""
    return "" if ends is None else f"{100 * ends[0]:+.2f} to {100 * ends[1]:+.2f}"


def _near(result: SettingResult) -> str:
    if result.to_centre:
        return points(result.to_centre)
    return "centre" if result.centre else "not paired"


def _ratio(result: SettingResult) -> str:
    return "" if result.gradient_ratio is None else f"{100 * result.gradient_ratio:.3g}"


def _error(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


def points(compared: Compared) -> str:
    """The judged difference in percentage points with its error over questions."""
    return figure(vars(compared.judged.micro), "difference")


def factor_table(sweep: Sweep, findings: Findings, factor: str, levels: Sequence[str]) -> Table:
    """A factor's levels, the base model above them, the paper's figures beside them."""
    model, first = sweep.space.paper, findings.first
    shown = _figures(findings)
    known = {"validation %": percent(first.base_validation), "test %": percent(findings.base)}
    header: tuple[str, ...] = (factor, *(name for name, _ in shown))
    rows: list[tuple[str, ...]] = [("base model", *(known.get(name, "") for name, _ in shown))]
    if model:
        header = (*header, f"paper, {paper.MODELS[model]}", "its gain")
        rows = [(*rows[0], f"{paper.BASE[model]:.1f}", "")]
    for level in levels:
        found, theirs = findings.of(factor, level), paper.result(model, factor, level)
        missing = ("not finished", *("" for _ in shown[1:]))
        row = (level_text(sweep, factor, level), *((text(found) for _, text in shown) if found else missing))
        if model:
            row = (*row, *(("", "") if theirs is None else (f"{theirs:.1f}", f"{theirs - paper.BASE[model]:+.1f}")))
        rows.append(row)
    return Table(header, rows)


def level_text(sweep: Sweep, factor: str, level: str) -> str:
    """A level as it is told: the centre's with its settings."""
    if level != CENTRE:
        return level
    column = next(column for column in columns(sweep.space) if column.factor == factor)
    return f"centre ({column.level(sweep.space.trials[0])})"


def measure_tables(sweep: Sweep, findings: Findings) -> Iterator[tuple[str, Table]]:
    """(heading, table) of every measure's differences: to the centre, and to the base model. The configured rule has a `*`."""
    for heading, of in _against(findings):
        chosen = [(result, compared) for result in findings.results if (compared := of(result))]
        names = [name for name in MEASURES if any(name in compared.measures for _, compared in chosen)]
        if not chosen:
            continue
        varied = columns(sweep.space)
        header = [column.name for column in varied]
        for name in names:
            mark = "*" if name == findings.first.measure else ""
            header += [f"{name}{mark}, {_unit(name)}", "p, Holm" if chosen[0][1].corrected else "p"]
        rows = []
        for result, compared in chosen:
            cells: list[str] = []
            for name in names:
                found = compared.measures.get(name)
                p = compared.corrected.get(name, found.micro.p if found else None)
                cells += [_difference(name, found.micro) if found else "", "" if p is None else p_value(p)]
            rows.append((*_settings(varied, result), *cells))
        yield heading, Table(tuple(header), rows, names=len(varied))


def _against(findings: Findings) -> list[tuple[str, Callable[[SettingResult], Compared | None]]]:
    to_base: Callable[[SettingResult], Compared | None] = lambda result: result.gain  # noqa: E731 - one of a pair
    to_centre: Callable[[SettingResult], Compared | None] = lambda result: result.to_centre  # noqa: E731
    return [("difference to the centre", to_centre), ("difference to the base model", to_base)]


def _unit(name: str) -> str:
    return "points" if MEASURES[name].unit == "%" else MEASURES[name].unit


def _difference(name: str, figures: Paired) -> str:
    return MEASURES[name].figure(vars(figures), "difference")


def task_tables(sweep: Sweep, findings: Findings) -> Iterator[tuple[str, Table]]:
    """(heading, table) of the judged accuracy by task, all questions together and all tasks with equal weight beside it."""
    varied = columns(sweep.space)
    tasks = sorted(set(findings.first.judged.asked.tasks))
    for heading, of in _against(findings):
        rows = []
        for result in findings.results:
            compared = of(result)
            if compared is not None:
                marked = result.shifted if compared is result.to_centre else {}
                rows.append((*_settings(varied, result), *_task_cells(compared.judged, tasks, marked)))
        if rows:
            header = (*(c.name for c in varied), "all questions", "mean of tasks", *tasks)
            yield heading, Table(header, rows, names=len(varied))


def _task_cells(found: ByTask, tasks: Sequence[str], marked: Mapping[str, str]) -> Iterator[str]:
    for figures in (found.micro, found.macro):
        yield figure(vars(figures), "difference") if figures else ""
    for task in tasks:
        figures = found.tasks.get(task)
        text = figure(vars(figures), "difference") if figures else ""
        yield f"{text} {SHIFTED}" if task in marked else text


def share_tables(sweep: Sweep, findings: Findings) -> Iterator[tuple[str, Table]]:
    """(task, table) of how often each answer is right and is given, in percent: by label where choices recur, else by position."""
    varied = columns(sweep.space)
    blank = [""] * (len(varied) - 1)
    for task, found in findings.first.shares.items():
        labelled = found["labels"] is not None
        names = list(found["labels"] or found["positions"])
        rows: list[tuple[str, ...]] = []
        for who, words in (("gold", "right answers"), ("base", "base model")):
            rows.append((words, *blank, *_share_cells([found], labelled, names, who)))
        for result in findings.results:
            own = [f.shares[task] for f in result.finished if task in f.shares]
            mark = [SHIFTED] if task in result.shifted else []
            cells = list(_share_cells(own, labelled, names, "tuned"))
            rows.append((*_settings(varied, result), *cells[:-1], " ".join([cells[-1], *mark])))
        yield task, Table((*(c.name for c in varied), *names), rows, names=len(varied))


def _share_cells(found: Sequence[Mapping[str, Any]], labelled: bool, names: Sequence[str], who: str) -> Iterator[str]:
    """Shares in percent, averaged over seeds."""
    for name in names:
        own = [((f["labels"] if labelled else f["positions"]) or {}).get(name, {}).get(who, 0.0) for f in found]
        yield f"{100 * sum(own) / len(own):.1f}" if own else ""


def unfinished(sweep: Sweep) -> Table | None:
    """The trials without a result, with the reason."""
    rows = [
        (
            state.trial.name,
            state.state,
            str(state.epoch),
            "" if state.validation_accuracy is None else f"{100 * state.validation_accuracy:.2f}",
            state.error.split("\n")[0],
        )
        for state in sweep.states.values()
        if state.state != DONE
    ]
    return Table(("trial", "state", "epochs", "validation %", "reason"), rows) if rows else None


def write_csv_files(folder: Path, sweep: Sweep, findings: Findings) -> None:
    """The unrounded figures: every setting, by measure and task, its answers, and every trial. Raises StorageError."""
    varied = columns(sweep.space)
    names = ("setting", *(column.name for column in varied))
    named = {r.key: (r.name, *_settings(varied, r)) for r in findings.results}
    write_csv(
        folder / "ranking.csv",
        (
            *names, "centre", "seeds", "validation_accuracy", "validation_stderr", "validation_stderr_seeds", "test_accuracy",
            "test_stderr", "test_stderr_seeds", "gain", "gain_stderr", "gain_stderr_seeds", "gain_low", "gain_high", "gain_p",
            "to_centre", "to_centre_stderr", "to_centre_stderr_seeds", "to_centre_low", "to_centre_high", "to_centre_p",
            "to_centre_p_holm", "gradient_ratio",
        ),
        [(*named[r.key], *_ranking_row(r)) for r in findings.results],
    )  # fmt: skip
    compared = [(r, to, c) for r in findings.results for to, c in (("base", r.gain), ("centre", r.to_centre)) if c]
    write_csv(
        folder / "measures.csv",
        (*names, "to", "measure", "task", *(f.name for f in fields(Paired)), "p_holm"),
        [
            (*named[r.key], to, measure, task, *_plain(figures.plain().values()), c.corrected.get(measure, "") if task == "all" else "")
            for r, to, c in compared
            for measure, by in c.measures.items()
            for task, figures in (("all", by.micro), ("macro average", by.macro), *by.tasks.items())
            if figures
        ],
    )  # fmt: skip
    write_csv(
        folder / "answer_shares.csv",
        (*names, "seed", "task", "by", "answer", "right", "base", "tuned"),
        [
            (*named[r.key], f.trial.seed, task, by, answer, *one.values())
            for r in findings.results
            for f in r.finished
            for task, found in f.shares.items()
            for by, answers in (("position", found["positions"]), ("label", found["labels"] or {}))
            for answer, one in answers.items()
        ],
    )
    states = sweep.states.values()
    write_csv(
        folder / "trials.csv",
        (
            "trial", *names, "state", "seed", "epochs", "validation_accuracy", "test_difference", "finetune", "error",
        ),
        [
            (
                s.trial.id, s.trial.name, *(column.level(s.trial) for column in varied), s.state, s.trial.seed, s.epoch,
                *_plain((s.validation_accuracy, s.test_difference)), s.planned.stages["finetune"].path, s.error.split("\n")[0],
            )
            for s in states
        ],
    )  # fmt: skip


def _ranking_row(r: SettingResult) -> tuple[Any, ...]:
    def of(value: SeededMean) -> tuple[Any, ...]:
        return _plain((value.mean, value.questions, value.seeds))

    def difference(compared: Compared) -> tuple[Any, ...]:
        return _plain(compared.plain().values())

    near = (*difference(r.to_centre), r.to_centre.corrected_p) if r.to_centre else ("",) * 7
    seeds = " ".join(map(str, r.seeds))
    return (
        r.centre, seeds, *of(r.validation), *of(r.accuracy), *difference(r.gain), *near, *_plain((r.gradient_ratio,)),
    )  # fmt: skip


def _plain(values: Any) -> tuple[Any, ...]:
    """Values for a CSV file, nothing for None."""
    return tuple("" if value is None else value for value in values)
