"""A sweep's report: the paper's Figures 6 to 10 and Tables 3 to 7 for this sweep, a ranking, a page, CSV files."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from roma_ray.ablations import paper
from roma_ray.ablations.plan import describe_shared, hours
from roma_ray.ablations.results import Findings, Paired, Result, read_findings
from roma_ray.ablations.space import CENTRE
from roma_ray.ablations.sweep import DONE, FAILED, STOPPED, State, Sweep
from roma_ray.artifacts import library_versions, write_text
from roma_ray.engine.progress import Progress
from roma_ray.errors import ArtifactError
from roma_ray.evaluation.statistics import p_value, significant, with_error
from roma_ray.figures.report import MARKDOWN, PAGE, Picture, environment
from roma_ray.figures.style import save
from roma_ray.figures.sweep import Bar, Point, factor_bars, setting_curves
from roma_ray.figures.tables import Table, write_csv

FIGURES, TABLES = "figures", "tables"
_TEMPLATES = {PAGE: "sweep.html", MARKDOWN: "sweep.md"}
_TITLES = {
    "layers": "Tuned layers",
    "tokens": "Token whose routing is regularized",
    "neighbors": "Choice of neighbors",
    "training set": "Size of the training set",
    "regularizer": "Regularizer",
}


def write_report(sweep: Sweep, progress: Progress) -> Path | None:
    """Write the report of a sweep's finished trials, complete or not; its page's place, None where no trial is finished.

    Raises ArtifactError, StorageError.
    """
    stage = sweep.stage
    if stage.complete:
        return stage.path / PAGE
    findings = read_findings(sweep)
    if findings is None:
        return None
    started = time.monotonic()
    with stage.exclusive():
        with progress.meter("report", len(sweep.space.file.one_at_a_time) + 1, "figures") as meter:
            pictures = []
            for picture in draw(sweep, findings, stage.path / FIGURES):
                pictures.append(picture)
                meter.advance(1)
        tables = make_tables(sweep, findings)
        write_csv_files(stage.path / TABLES, sweep, findings)
        values = {
            "name": sweep.space.file.name,
            "sweep": sweep,
            "findings": findings,
            "headline": headline(findings),
            "notes": notes(sweep, findings),
            "lines": describe_shared(sweep.plan),
            "pictures": pictures,
            "ranking": ranking(findings),
            "tables": tables,
            "unfinished": unfinished(sweep),
            "config": sweep.space.centre,
            "identity": sweep.space.identity,
            "pins": sorted({f.pin for result in findings.results for f in result.finished}),
            "versions": library_versions(),
        }
        for name, template in _TEMPLATES.items():
            write_text(stage.path / name, environment().get_template(template).render(values))
        if len(sweep.having(DONE, STOPPED)) == len(sweep.states) and not sweep.missing_samples:
            facts = {"trials": len(sweep.states), "stopped": len(sweep.having(STOPPED)), "headline": headline(findings)}
            stage.finish(facts=facts, seconds=time.monotonic() - started)
    return stage.path / PAGE


def draw(sweep: Sweep, findings: Findings, folder: Path) -> Iterator[Picture]:
    """Draw every figure into `folder`."""
    model = sweep.space.file.paper
    seeds = max(len(result.seeds) for result in findings.results)
    for number, factor in enumerate(sweep.space.file.one_at_a_time):
        bars = []
        for level in levels(sweep, factor):
            found, theirs = findings.of(factor, level), paper.result(model, factor, level)
            bars.append(
                Bar(
                    level,
                    found.accuracy if found else None,
                    found.stderr if found else 0.0,
                    bool(found and found.centre),
                    theirs / 100 if theirs is not None else None,
                )
            )
        known = model if model and any(bar.paper is not None for bar in bars) else None
        figure = factor_bars(
            bars,
            findings.base_accuracy,
            findings.base_stderr,
            seeds=seeds,
            paper=paper.MODELS[known] if known else None,
            paper_base=paper.BASE[known] / 100 if known else None,
        )
        name = f"factor_{number + 1}"
        width = round(76 * figure.get_figwidth())
        yield Picture(name, title(sweep, factor), _caption(known, factor), save(figure, folder, name), width)
    panels = list(numeric_settings(findings))
    if panels:
        figure = setting_curves(panels, findings.base_validation)
        caption = "Validation accuracy of each trial of the grid or the search, mean over seeds."
        width = round(76 * figure.get_figwidth())
        yield Picture("settings", "Settings that are numbers", caption, save(figure, folder, "settings"), width)


def title(sweep: Sweep, factor: str) -> str:
    """A factor's heading; the paper's figure is named where the factor is one of its ablations."""
    model = sweep.space.file.paper or "olmoe"
    source = paper.SOURCES[model].get(factor)
    text = _TITLES.get(factor, factor)
    return f"{text} (as the paper's {source})" if source else text


def _caption(model: str | None, factor: str) -> str:
    text = (
        "Test accuracy; the scale does not start at zero. The hatched bar is the centre, of which every other bar differs in this "
        "factor alone. Bars are answers to the same questions: judge a difference by the table's paired one."
    )
    if model:
        text += (
            f" Diamonds: what the paper reports for {paper.MODELS[model]} in {paper.SOURCES[model][factor]}, averaged over its "
            "eight benchmarks, which are not this sweep's questions: compare the pattern, not the height."
        )
    return text


def levels(sweep: Sweep, factor: str) -> list[str]:
    """A factor's levels in the file's order, the centre first where the factor does not list it."""
    listed = [level for level, _ in sweep.space.file.one_at_a_time[factor].changes()]
    tagged = {level for state in sweep.states.values() for f, level in state.trial.factors if f == factor}
    return [CENTRE, *listed] if CENTRE in tagged else listed


_HEADER = ("level", "seeds", "validation %", "test %", "gain over base", "difference to centre", "p", "p, Holm")


def make_tables(sweep: Sweep, findings: Findings) -> list[tuple[str, str, Table]]:
    """(figure's name, heading, table) of each factor."""
    model = sweep.space.file.paper
    made = []
    for number, factor in enumerate(sweep.space.file.one_at_a_time):
        header: tuple[str, ...] = _HEADER
        base = _accuracy(findings.base_accuracy, findings.base_stderr)
        rows: list[tuple[str, ...]] = [("base model", "", percent(findings.base_validation), base, "", "", "", "")]
        if model:
            header = (*header, f"paper, {paper.MODELS[model]}", "its gain")
            rows = [(*rows[0], f"{paper.BASE[model]:.1f}", "")]
        for level in levels(sweep, factor):
            found, theirs = findings.of(factor, level), paper.result(model, factor, level)
            row: tuple[str, ...] = (level, *(_cells(found) if found else ("", "not finished", "", "", "", "", "")))
            if model:
                row = (*row, *(("", "") if theirs is None else (f"{theirs:.1f}", f"{theirs - paper.BASE[model]:+.1f}")))
            rows.append(row)
        made.append((f"factor_{number + 1}", title(sweep, factor), Table(header, rows)))
    return made


def ranking(findings: Findings) -> Table:
    """All settings by validation accuracy, best first, with their paired differences to the centre."""
    header = (
        "setting", "seeds", "validation %", "test %", "gain over base", "difference to centre", "p", "p, Holm", "gradient ratio %",
    )  # fmt: skip
    rows = []
    for result in findings.results:
        ratio = "" if result.gradient_ratio is None else f"{100 * result.gradient_ratio:.3g}"
        rows.append((result.name, *_cells(result), ratio))
    return Table(header, rows)


def _cells(result: Result) -> tuple[str, ...]:
    near = result.to_centre
    return (
        str(len(result.seeds)),
        percent(result.validation),
        _accuracy(result.accuracy, result.stderr),
        _points(result.gain),
        "centre" if result.centre else _points(near) if near else "not paired",
        p_value(near.p) if near else "",
        p_value(near.corrected_p) if near else "",
    )


def percent(value: float) -> str:
    """A fraction in percent."""
    return f"{100 * value:.2f}"


def _accuracy(value: float, error: float) -> str:
    return with_error(value, error)


def _points(found: Paired) -> str:
    return with_error(found.difference, found.stderr, signed=True)


def headline(findings: Findings) -> str:
    """The sweep in one sentence, whichever way it goes."""
    best, centre = findings.results[0], findings.centre
    equal = sum(result.validation == best.validation for result in findings.results) - 1
    first = f"Best on validation questions: {best.name} ({percent(best.validation)} %"
    if equal:
        first += f", as {equal} other{'s' if equal > 1 else ''}"
    gains = f"On {findings.questions} test questions it gains {_points(best.gain)} points on the base model."
    if centre is None:
        return f"{first}); the centre is not finished. {gains}"
    if best.centre:
        return f"No setting is better on validation questions than the centre ({percent(best.validation)} %). {gains}"
    near = best.to_centre
    text = f"{first}, the centre {percent(centre.validation)} %)."
    if near is None:
        return text
    sure = (
        "which is no clear difference"
        if not significant(near.corrected_p)
        else f"p = {p_value(near.corrected_p)} after correction"
    )
    return (
        f"{text} On {findings.questions} test questions it differs from the centre by {_points(near)} points, {sure}."
    )


def notes(sweep: Sweep, findings: Findings) -> list[str]:
    """What a reader must know."""
    lines = []
    clear = [r.name for r in findings.results if r.to_centre and significant(r.to_centre.corrected_p)]
    compared = sum(r.to_centre is not None for r in findings.results)
    lines.append(
        f"of {compared} settings, {len(clear)} differ{'s' if len(clear) == 1 else ''} from the centre on the test questions at 5 % "
        f"after Holm's correction" + (f": {'; '.join(clear)}" if clear else "")
    )
    seeds = {len(result.seeds) for result in findings.results}
    if max(seeds) == 1:
        lines.append(
            "one seed a setting: error bars are those of the questions drawn, not of the training's own randomness"
        )
    elif len(seeds) > 1:
        lines.append("not all settings have the same number of seeds: their error bars are not alike")
    pins = {f.pin for result in findings.results for f in result.finished}
    if len(pins) > 1:
        lines.append(f"{len(pins)} evaluation pins: settings of different questions or prompts are not comparable")
    idle = [r.name for r in findings.results if r.idle]
    if idle:
        lines.append(f"the regularizer was idle (its gradient under 1 % of the task's) in: {'; '.join(idle)}")
    for count, what in (
        (len(sweep.having(STOPPED)), "stopped early by the scheduler"),
        (len(sweep.having(FAILED)), "failed"),
    ):
        if count:
            lines.append(f"{count} trial(s) {what}: see below")
    return lines


def unfinished(sweep: Sweep) -> Table | None:
    """The trials without a result, with the reason."""
    rows = [
        (
            state.trial.name,
            state.state,
            str(state.epoch),
            "" if state.validation_accuracy is None else percent(state.validation_accuracy),
            state.error.split("\n")[0],
        )
        for state in sweep.states.values()
        if state.state != DONE
    ]
    return Table(("trial", "state", "epochs", "validation %", "reason"), rows) if rows else None


def numeric_settings(findings: Findings) -> Iterator[tuple[str, Sequence[Point]]]:
    """Each setting that a grid or a search varies as a number, with its points."""
    members = [r for r in findings.results if any(f.startswith(("grid", "sample")) for f, _ in r.factors)]
    keys = sorted({key for r in members for key in r.finished[0].trial.settings if key != "seed"})
    for key in keys:
        points = []
        for result in members:
            settings = {k: v for k, v in result.finished[0].trial.settings.items() if k != "seed"}
            value = settings.pop(key, None)
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                series = ", ".join(f"{k.rpartition('.')[2]} {v}" for k, v in sorted(settings.items()))
                points.append(Point(float(value), result.validation, series))
        if len({point.x for point in points}) > 1:
            yield key, points


def write_csv_files(folder: Path, sweep: Sweep, findings: Findings) -> None:
    """The unrounded figures: every setting, every trial. Raises StorageError."""
    header = (
        "setting", "factors", "centre", "seeds", "validation_accuracy", "test_accuracy", "test_stderr", "gain", "gain_stderr", "gain_p",
        "to_centre", "to_centre_stderr", "to_centre_p", "to_centre_p_holm", "gradient_ratio",
    )  # fmt: skip
    rows: list[tuple[Any, ...]] = []
    for r in findings.results:
        near = (
            (r.to_centre.difference, r.to_centre.stderr, r.to_centre.p, r.to_centre.corrected_p)
            if r.to_centre
            else ("",) * 4
        )
        rows.append(
            (
                r.name, "; ".join(f"{f}={level}" for f, level in r.factors), r.centre, " ".join(map(str, r.seeds)), r.validation,
                r.accuracy, r.stderr, r.gain.difference, r.gain.stderr, r.gain.p, *near,
                "" if r.gradient_ratio is None else r.gradient_ratio,
            )
        )  # fmt: skip
    write_csv(folder / "ranking.csv", header, rows)
    trials = [
        (s.trial.id, s.trial.name, s.state, s.trial.seed, s.epoch, "" if s.validation_accuracy is None else s.validation_accuracy,
         "" if s.test_difference is None else s.test_difference, s.planned.stages["finetune"].path, s.error.split("\n")[0])
        for s in sweep.states.values()
    ]  # fmt: skip
    columns = (
        "trial",
        "name",
        "state",
        "seed",
        "epochs",
        "validation_accuracy",
        "test_difference",
        "finetune",
        "error",
    )
    write_csv(folder / "trials.csv", columns, trials)


def find_sweep_file(place: str | Path) -> Path:
    """The space file that a sweep's name, folder or file means. Raises ArtifactError."""
    path = Path(place).expanduser()
    for candidate in (path, path / "space.yaml"):
        if candidate.is_file():
            return candidate
    raise ArtifactError(
        f"{place} is neither a space file nor a sweep's folder (which holds space.yaml); give what `roma-ray tune --space` was given"
    )


def progress_line(state: State) -> str:
    """One line about a trial, for logs."""
    parts = [f"{state.trial.name}: {state.state}"]
    if state.epoch:
        parts.append(f"epoch {state.epoch}/{state.planned.epochs}")
    if state.validation_accuracy is not None:
        parts.append(f"validation {state.validation_accuracy:.2%}")
    if state.test_difference is not None:
        parts.append(f"test {100 * state.test_difference:+.2f} points")
    if state.seconds is not None:
        parts.append(hours(state.seconds))
    if state.error:
        parts.append(state.error.split("\n")[0])
    return ", ".join(parts)
