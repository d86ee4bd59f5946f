"""A sweep's report: the paper's Figures 6 to 10 and Tables 3 to 7 for this sweep, a ranking, a page, CSV files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from roma_ray.ablations import paper, sweep_tables
from roma_ray.ablations.factors import VariedSetting, centre_text, columns
from roma_ray.ablations.plan import describe_shared
from roma_ray.ablations.space import CENTRE
from roma_ray.ablations.space_file import grid_tag
from roma_ray.ablations.sweep import DONE, STOPPED, State, Sweep
from roma_ray.ablations.sweep_results import Findings, SettingResult, read_findings
from roma_ray.ablations.sweep_transfer import TRANSFER_LEGEND, held_out_table
from roma_ray.ablations.sweep_words import headline, notes
from roma_ray.borders.text import duration_text
from roma_ray.engine.progress import Progress
from roma_ray.engine.steps import Facts, make
from roma_ray.errors import ArtifactError
from roma_ray.evaluation.measures import LEGEND
from roma_ray.figures import sweep_figures as figures
from roma_ray.figures.run_report import MARKDOWN, PAGE, Picture, environment
from roma_ray.figures.style import save
from roma_ray.store.artifacts import write_text
from roma_ray.store.files import local_place
from roma_ray.versions import library_versions

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

    def write() -> Facts | None:
        count = len(sweep.space.file.one_at_a_time) + len(sweep.space.file.grid) + 1
        with progress.meter("report", count, "figures") as meter:
            pictures = []
            for picture in draw(sweep, findings, stage.path / FIGURES):
                pictures.append(picture)
                meter.advance(1)
        sweep_tables.write_csv_files(stage.path / TABLES, sweep, findings)
        told = headline(findings)
        values = {
            "name": sweep.space.file.name,
            "sweep": sweep,
            "findings": findings,
            "headline": told,
            "notes": notes(sweep, findings),
            "lines": [f"Centre: {centre_text(sweep.space)}", *describe_shared(sweep.plan)],
            "pictures": pictures,
            "ranking": sweep_tables.ranking(sweep, findings),
            "factors": [
                (
                    f"factor_{n + 1}",
                    title(sweep, factor),
                    sweep_tables.factor_table(sweep, findings, factor, levels(sweep, factor)),
                )
                for n, factor in enumerate(sweep.space.file.one_at_a_time)
            ],
            "measures": list(sweep_tables.measure_tables(sweep, findings)),
            "legend": LEGEND,
            "held_out": held_out_table(sweep, findings),
            "held_out_legend": TRANSFER_LEGEND,
            "tasks": list(sweep_tables.task_tables(sweep, findings)),
            "shares": list(sweep_tables.share_tables(sweep, findings)),
            "shifted": sweep_tables.SHIFTED,
            "unfinished": sweep_tables.unfinished(sweep),
            "config": sweep.space.centre,
            "identity": sweep.space.identity,
            "pins": sorted({f.pin for result in findings.results for f in result.finished}),
            "versions": library_versions(),
        }
        for name, template in _TEMPLATES.items():
            write_text(stage.path / name, environment().get_template(template).render(values))
        if len(sweep.having(DONE, STOPPED)) < len(sweep.states) or sweep.missing_samples:
            return None
        return {"trials": len(sweep.states), "stopped": len(sweep.having(STOPPED)), "headline": told}

    return make(stage, write).path / PAGE


def draw(sweep: Sweep, findings: Findings, folder: Path) -> Iterator[Picture]:
    """Draw every figure into `folder`."""
    for number, factor in enumerate(sweep.space.file.one_at_a_time):
        yield _factor_picture(sweep, findings, factor, f"factor_{number + 1}", folder)
    file, varied = sweep.space.file, columns(sweep.space)
    for number, grid in enumerate(file.grid):
        tag = grid_tag(file, number)
        members = [r for r in findings.results if any(factor == tag for factor, _ in r.trial.factors)]
        axes = [column for column in varied if len(column.keys) == 1 and len(grid.get(column.keys[0], ())) > 1]
        picture = _grid_picture(members, axes, findings, tag.replace(" ", "_"), folder) if members else None
        if picture:
            yield picture
    members = [r for r in findings.results if any(factor == "sample" for factor, _ in r.trial.factors)]
    axes = [column for column in varied if set(column.keys) & set(file.sample)]
    if members and (picture := _curves(members, axes, findings, "sample", folder)):
        yield picture


def _factor_picture(sweep: Sweep, findings: Findings, factor: str, name: str, folder: Path) -> Picture:
    model = sweep.space.paper
    column = next(column for column in columns(sweep.space) if column.factor == factor)
    bars = []
    for level in levels(sweep, factor):
        found, theirs = findings.of(factor, level), paper.result(model, factor, level)
        bars.append(
            figures.Bar(
                column.level(sweep.space.trials[0]) if level == CENTRE else level,
                found.accuracy.mean if found else None,
                found.accuracy.questions if found else 0.0,
                bool(found and found.centre),
                theirs / 100 if theirs is not None else None,
                found.accuracy.seeds if found else None,
                column.number(found.trial.config) if found and sweep.space.file.one_at_a_time[factor].setting else None,
            )
        )
    known = model if model and any(bar.paper is not None for bar in bars) else None
    figure = figures.factor_levels(
        bars,
        findings.base.mean,
        findings.base.questions,
        paper=paper.MODELS[known] if known else None,
        paper_base=paper.BASE[known] / 100 if known else None,
    )
    width = round(76 * figure.get_figwidth())
    return Picture(name, title(sweep, factor), _caption(known, factor), save(figure, folder, name), width)


def _grid_picture(
    members: Sequence[SettingResult], axes: Sequence[VariedSetting], findings: Findings, name: str, folder: Path
) -> Picture | None:
    """A grid's figure: a line (or dots) of one setting, maps of two, curves of more."""
    if len(axes) not in (1, 2):
        return _curves(members, axes, findings, name, folder)
    found = []
    for result in members:
        trial, gain = result.trial, result.gain.judged.micro
        found.append(
            figures.Level(
                tuple(axis.level(trial) for axis in axes),
                tuple(axis.number(trial.config) for axis in axes),
                (result.validation.mean, result.validation.questions),
                (gain.difference, gain.difference_stderr),
                result.centre,
            )
        )
    if len(axes) == 1:
        figure = figures.grid_line(axes[0].name, found, findings.first.base_validation.mean)
        caption = "Validation accuracy, by which a setting may be chosen, and the paired gain over the base model on test questions."
    else:
        figure = figures.grid_maps((axes[0].name, axes[1].name), found)
        caption = (
            "Left: validation accuracy, by which a setting may be chosen. Right: the paired gain over the base model on test "
            "questions. The centre is framed where it lies in the grid; empty cells are not finished. Errors are in the tables."
        )
    heading = " and ".join(axis.name for axis in axes)
    return Picture(name, f"Grid: {heading}", caption, save(figure, folder, name), round(76 * figure.get_figwidth()))


def _curves(
    members: Sequence[SettingResult], axes: Sequence[VariedSetting], findings: Findings, name: str, folder: Path
) -> Picture | None:
    """Validation accuracy over each setting that is a number, the others telling series apart; None where none is."""
    panels = []
    for axis in axes:
        points = []
        for result in members:
            number = axis.number(result.trial.config)
            if number is not None:
                others = [f"{other.name} {other.level(result.trial)}" for other in axes if other is not axis]
                points.append(figures.Point(number, result.validation.mean, ", ".join(others)))
        if len({point.x for point in points}) > 1:
            panels.append((axis.name, points))
    if not panels:
        return None
    figure = figures.setting_curves(panels, findings.first.base_validation.mean)
    caption = "Validation accuracy of each trial, mean over seeds, over each setting that is a number."
    return Picture(
        name, f"Settings of the {name}", caption, save(figure, folder, name), round(76 * figure.get_figwidth())
    )


def title(sweep: Sweep, factor: str) -> str:
    """A factor's heading; the paper's figure is named where the factor is one of its ablations."""
    model = sweep.space.paper or "olmoe"
    source = paper.SOURCES[model].get(factor)
    text = _TITLES.get(factor, factor)
    return f"{text} (as the paper's {source})" if source else text


def _caption(model: str | None, factor: str) -> str:
    text = (
        "Test accuracy; the scale does not start at zero. The centre, of which every other level differs in this factor alone, is "
        "marked. All levels answered the same questions: judge a difference by the table's paired one."
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


def find_sweep_file(place: str | Path) -> Path:
    """The space file that a sweep's name, folder or file means. Raises ArtifactError."""
    path = local_place(str(place))
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
        parts.append(duration_text(state.seconds))
    if state.error:
        parts.append(state.error.split("\n")[0])
    return ", ".join(parts)
