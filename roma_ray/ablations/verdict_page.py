"""A verdict's tables, sentences and page, derived from its figures, whichever way they go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from roma_ray.ablations import paper
from roma_ray.ablations.arms import BASE
from roma_ray.ablations.naming import assigned, level_name, short_names
from roma_ray.ablations.sweep import Sweep
from roma_ray.ablations.sweep_tables import interval, percent
from roma_ray.ablations.verdict import ArmResult, ArmsVerdict
from roma_ray.borders.text import figure
from roma_ray.engine.steps import Facts, make
from roma_ray.evaluation.equivalence import Finding
from roma_ray.evaluation.measures import LEGEND, MEASURES
from roma_ray.evaluation.shares import answer_shares, shift_notes
from roma_ray.evaluation.statistics import SIGNIFICANCE, p_value
from roma_ray.figures.report_tables import Table, write_csv
from roma_ray.figures.run_report import MARKDOWN, PAGE, environment
from roma_ray.store.artifacts import MEMBERS, Stage, fingerprint, write_json, write_text
from roma_ray.versions import library_versions

VERSION = 1
ARMS = ("arm", "validation %", "test %", "± seeds", "gain", "95 %, with seeds", "to base", "settings")
FINDINGS = ("compared with", "difference", "95 %, with seeds", "p", "p, equal", "finding")


def arm_table(found: ArmsVerdict) -> Table:
    """Each arm with what was chosen for it, its accuracy and its gain on the base model."""
    base = found.first
    known = (
        percent(base.base_validation),
        figure(vars(found.found[found.measure][BASE, found.judged].paired), "base"),
    )
    rows: list[tuple[str, ...]] = [(BASE, *known, *("" for _ in ARMS[3:]))]
    for name, arm in found.arms.items():
        one = found.found[found.measure][BASE, name]
        seeds = "" if arm.accuracy.seeds is None else f"{100 * arm.accuracy.seeds:.2f}"
        rows.append(
            (
                name,
                f"{100 * arm.validation:.2f}",
                percent(arm.accuracy),
                seeds,
                figure(vars(one.paired), "difference"),
                interval(found.intervals[BASE, name]),
                brief(one, found.measure),
                settings(arm),
            )
        )
    rows += [(name, "not trained", *("" for _ in ARMS[2:])) for name in found.missing]
    return Table(ARMS, rows)


def settings(arm: ArmResult) -> str:
    """What was chosen of its grid and set for it, as a cell."""
    keys = list(arm.settings)
    return ", ".join(map(assigned, short_names(keys), map(level_name, arm.settings.values())))


def finding_table(found: ArmsVerdict, measure: str) -> Table:
    """The judged arm against every other arm by one measure."""
    form, accuracy = MEASURES[measure], measure == found.measure
    rows = [
        (
            before,
            form.figure(vars(one.paired), "difference"),
            *([interval(found.intervals[before, after])] if accuracy else []),
            p_value(one.difference_p),
            p_value(one.equivalence_p),
            brief(one, measure),
        )
        for (before, after), one in found.found[measure].items()
        if before != BASE
    ]
    return Table(FINDINGS if accuracy else tuple(h for h in FINDINGS if "seeds" not in h), rows)


def brief(one: Finding, measure: str) -> str:
    """A finding in a cell."""
    if one.kind == "unresolved":
        return "not known" + (f"; {one.needed:,} questions would tell" if one.needed else "")
    if one.kind == "equivalent":
        return f"equal within {_margin(one, measure)}"
    return one.kind + (f", but within {_margin(one, measure)}" if one.within else "")


def _margin(one: Finding, measure: str) -> str:
    form = MEASURES[measure]
    unit = "points" if form.unit == "%" else form.unit
    return f"{form.scale * one.margin:g} {unit}"


def sentences(found: ArmsVerdict) -> list[str]:
    """What a reader takes away: the judged arm against base and against each other arm, and what the manifold is good for."""
    name, measure = found.judged, found.measure
    gain = found.found[measure][BASE, name]
    lines = [f"{name} against the base model: {told(gain, measure)}."]
    for (before, after), one in found.found[measure].items():
        if before != BASE:
            lines.append(f"{after} against {before}: {told(one, measure)}.")
    for arm, result in found.arms.items():
        if arm != name and _pulls_to_start(result):
            lines.append(_beyond_start(found.found[measure][arm, name], arm, measure))
    lines += [f"{arm} could not be trained: {reason}" for arm, reason in found.missing.items()]
    return lines


def _pulls_to_start(arm: ArmResult) -> bool:
    config = arm.trials[0].trial.config
    term = config.finetune.regularizer
    return term.kind == "base" or (term.kind == "manifold" and config.neighbors.method == "self")


def told(one: Finding, measure: str) -> str:
    """A finding in words, with its figures."""
    form = MEASURES[measure]
    unit = "points" if form.unit == "%" else form.unit
    figures = f"{form.figure(vars(one.paired), 'difference')} {unit}, p {p_value(one.difference_p)}"
    if one.kind == "equivalent":
        return (
            f"equal within {_margin(one, measure)} ({figures}; p {p_value(one.equivalence_p)} of a larger difference)"
        )
    if one.kind == "unresolved":
        return f"neither a difference nor equality is shown ({figures}){_needed(one)}"
    return f"{one.kind} ({figures}){f', though by less than {_margin(one, measure)}' if one.within else ''}"


def _needed(one: Finding) -> str:
    return f"; about {one.needed:,} questions would tell, were the difference what it seems" if one.needed else ""


def _beyond_start(one: Finding, arm: str, measure: str) -> str:
    if one.kind == "better" and not one.within:
        return f"So the manifold adds to a pull to the start ({arm})."
    if one.kind == "worse":
        return f"So the manifold adds nothing: a pull to the start ({arm}) does better."
    if one.within:
        return f"So the manifold adds nothing beyond a pull to the start ({arm}), within {_margin(one, measure)}."
    return f"That the manifold adds anything beyond a pull to the start ({arm}) is not shown."


def notes(found: ArmsVerdict) -> list[str]:
    """What a reader must know of the statements."""
    statements = len(found.found[found.measure])
    lines = [
        f"p: corrected (Holm, with Shaffer's factors) for {statements} statements of this page and {found.others} other evaluations on the "
        f"same questions in this storage, level {SIGNIFICANCE:.0%}. p, equal: of a difference as large as the margin or larger. The "
        "measures beside the configured one are corrected each by itself",
        f"settings were chosen by validation accuracy alone ({found.first.validation_questions:,} questions, first seed), each arm "
        "within its own grid: " + "; ".join(f"{name} of {arm.tried}" for name, arm in found.arms.items()),
        "±, p and the margin's test are over questions, of each one's mean over the seeds; the interval is over both, by drawing seeds and "
        "questions (a few seeds say little of all seeds)",
    ]
    return [*lines, *shifts(found)]


def shifts(found: ArmsVerdict) -> list[str]:
    """Tasks whose difference between two arms lives in a shift between answers alone, with the first seed."""
    after, lines = found.arms[found.judged].trials[0], []
    for name, arm in found.arms.items():
        if name != found.judged:
            before = arm.trials[0]
            shares = answer_shares(
                before.judged.scores["tuned"], after.judged.scores["tuned"], after.judged.asked, after.choices
            )
            lines += [
                f"{found.judged} against {name}, {line}"
                for line in shift_notes(shares, before=name, after=found.judged)
            ]
    return lines


def task_table(found: ArmsVerdict, measure: str) -> Table:
    """The judged arm's differences to the others by task, and their mean."""
    pairs = {a: one for (a, b), one in found.by_task[measure].items() if b == found.judged}
    form = MEASURES[measure]
    tasks = list(next(iter(pairs.values())).tasks)

    def row(title: str, figures: Mapping[str, Any]) -> tuple[str, ...]:
        return (title, *(form.figure(vars(one), "difference") if one else "" for one in figures.values()))

    rows = [row(task, {a: one.tasks[task] for a, one in pairs.items()}) for task in tasks]
    rows.append(row("all questions", {a: one.micro for a, one in pairs.items()}))
    if len(tasks) > 1:
        rows.append(row("mean of tasks", {a: one.macro for a, one in pairs.items()}))
    return Table((f"{found.judged} against", *pairs), rows)


def paper_table() -> Table:
    """The paper's own controls: average accuracy over its eight benchmarks, other questions than these."""
    rows = []
    for model, name in paper.MODELS.items():
        results = paper.RESULTS[model]
        cells = [results["neighbors"]["random"], *(results["regularizer"][k] for k in ("l2", "entropy", "manifold"))]
        rows.append((name, f"{paper.BASE[model]:.1f}", *(f"{cell:.1f}" for cell in cells)))
    return Table(("the paper's", "base", "random neighbors", "L2", "entropy", "RoMA"), rows)


def measure_tables(found: ArmsVerdict) -> Iterator[tuple[str, Table]]:
    """The judged arm against the others by every further measure."""
    for measure in found.found:
        if measure != found.measure:
            yield _title(measure), finding_table(found, measure)


def _title(measure: str) -> str:
    form = MEASURES[measure]
    return f"{form.title}, {'points' if form.unit == '%' else form.unit}"


def plain(found: ArmsVerdict) -> dict[str, Any]:
    """As data: {judged, measure, arms {name: settings, validation, accuracy, seeds}, missing, statements [by measure], sentences}."""
    return {
        "format": 1,
        "judged": found.judged,
        "measure": found.measure,
        "arms": {
            name: {
                "settings": dict(arm.settings),
                "tried": arm.tried,
                "validation_accuracy": arm.validation,
                "accuracy": vars(arm.accuracy),
                "seeds": [f.trial.seed for f in arm.trials],
            }
            for name, arm in found.arms.items()
        },
        "missing": dict(found.missing),
        "others": found.others,
        "statements": [
            {
                "measure": measure,
                "from": before,
                "to": after,
                **one.paired.plain(),
                "margin": one.margin,
                "corrected_p": one.difference_p,
                "equivalence_p": one.equivalence_p,
                "kind": one.kind,
                "within": one.within,
                "needed": one.needed,
                **({"interval": found.intervals[before, after]} if measure == found.measure else {}),
            }
            for measure, by in found.found.items()
            for (before, after), one in by.items()
        ],
        "sentences": sentences(found),
    }


def write_page(found: ArmsVerdict, name: str, sweeps: tuple[Sweep, Sweep]) -> Stage:
    """Write the page of a verdict of this name, as HTML and Markdown, with its tables and data. Raises StorageError."""
    grid, chosen = sweeps
    data = plain(found)
    identity = {"name": name, "grid": grid.space.identity, "chosen": chosen.space.identity, "data": fingerprint(data)}
    stage = chosen.plan.store.stage("verdict", identity, {}, VERSION)

    def write() -> Facts:
        values = {
            "name": name,
            "found": found,
            "config": chosen.space.centre,
            "sentences": sentences(found),
            "notes": notes(found),
            "arms": arm_table(found),
            "findings": finding_table(found, found.measure),
            "measures": list(measure_tables(found)),
            "tasks": [(_title(measure), task_table(found, measure)) for measure in found.by_task],
            "paper": paper_table(),
            "legend": LEGEND,
            "pin": found.first.pin,
            "sweeps": [sweep.space.identity for sweep in sweeps],
            "versions": library_versions(),
        }
        for file, template in ((PAGE, "verdict.html"), (MARKDOWN, "verdict.md")):
            write_text(stage.path / file, environment().get_template(template).render(values))
        write_json(stage.path / "verdict.json", data)
        rows = [tuple(str(one.get(key, "")) for key in data["statements"][0]) for one in data["statements"]]
        write_csv(stage.path / "tables" / "statements.csv", tuple(data["statements"][0]), rows)
        members = {s.planned.stages["evaluate"].fingerprint for sweep in sweeps for s in sweep.states.values()}
        write_json(stage.path / MEMBERS, {"stages": sorted(members)})
        return {"statements": len(rows), "headline": data["sentences"][0]}

    return make(stage, write)
