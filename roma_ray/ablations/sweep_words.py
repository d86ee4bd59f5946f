"""What a sweep says, in sentences that are derived from its figures, whichever way they go."""

from __future__ import annotations

from collections.abc import Sequence

from roma_ray.ablations.sweep import FAILED, STOPPED, Sweep
from roma_ray.ablations.sweep_results import Findings, SettingResult
from roma_ray.ablations.sweep_tables import SHIFTED, interval, percent, points
from roma_ray.ablations.sweep_transfer import held_out_notes, validated_differently
from roma_ray.evaluation.measures import coincidence
from roma_ray.evaluation.shares import shift_notes
from roma_ray.evaluation.statistics import SIGNIFICANCE, p_value, significant

_MOST_NAMED = 5


def headline(findings: Findings) -> str:
    """The sweep in a few sentences: the best by validation, what it is worth on test questions, what is better and worse."""
    best, centre = findings.results[0], findings.centre
    if len(findings.results) == 1 and len(best.seeds) > 1:
        return (
            f"Over {len(best.seeds)} seeds the tuned routers differ from the base model by {points(best.gain)} points on "
            f"{findings.questions:,} test questions (p {p_value(best.gain.p)}); with seeds and questions both drawn, 95 % lie in "
            f"{interval(best.gain.interval)}."
        )
    if validated_differently(findings):
        return (
            "Settings that hold out different tasks are validated on different questions, so none is called the best. "
            f"{_beside_centre(findings)}"
        ).strip()
    equal = sum(result.validation.mean == best.validation.mean for result in findings.results) - 1
    drawn = f"of {findings.first.validation_questions:,} validation questions"
    first = f"Best on validation questions: {best.name} ({percent(best.validation)} % {drawn}"
    if equal:
        first += f", as {equal} other{'s' if equal > 1 else ''}"
    gains = f"On {findings.questions:,} test questions it gains {points(best.gain)} points on the base model."
    if centre is None:
        return f"{first}); the centre is not finished. {gains}"
    if best.centre:
        text = f"No setting is better on validation questions than the centre ({percent(best.validation)} % {drawn}). {gains}"
        return f"{text} {_beside_centre(findings)}".strip()
    near = best.to_centre
    text = f"{first}; the centre {percent(centre.validation)} %)."
    if near is not None:
        sure = f"p = {p_value(near.corrected_p)} after correction" if near.clear else "which is no clear difference"
        text += (
            f" On {findings.questions:,} test questions it differs from the centre by {points(near)} points, {sure}."
        )
    return f"{text} {_beside_centre(findings)}".strip()


def _beside_centre(findings: Findings) -> str:
    """Which settings are better and which worse than the centre on test questions."""
    compared = [r for r in findings.results if r.to_centre]
    if not compared:
        return ""
    better, worse = ([r for r in compared if r.to_centre and r.to_centre.clear == sign] for sign in (1, -1))
    rule = f"(Holm's correction, {SIGNIFICANCE:.0%})"
    if not better and not worse:
        return (
            f"On the test questions none of {len(compared)} settings is clearly better or worse than the centre {rule}."
        )
    parts = [f"{len(some)} {word}{_named(some)}" for some, word in ((better, "better"), (worse, "worse"))]
    return f"Of {len(compared)} settings, {' and '.join(parts)} than the centre on the test questions {rule}."


def _named(results: Sequence[SettingResult]) -> str:
    if not results:
        return ""
    more = f" and {len(results) - _MOST_NAMED} more" if len(results) > _MOST_NAMED else ""
    return f" ({'; '.join(r.name for r in results[:_MOST_NAMED])}{more})"


def notes(sweep: Sweep, findings: Findings) -> list[str]:
    """What a reader must know."""
    lines = [*held_out_notes(findings), *_other_measures(findings), *_shifts(findings)]
    if findings.first.judged.asked.coincide:
        lines.append(coincidence({"coincide": True}))
    seeds = {len(result.seeds) for result in findings.results}
    if max(seeds) == 1:
        lines.append(
            "one seed a setting: errors are those of the questions drawn, not of the training's own randomness"
        )
    else:
        lines.append(
            "behind ±: the standard error over questions, of the mean over seeds; in columns of their own: over seeds, the "
            "training's own randomness. Neither holds the other; “95 %, both” draws seeds and questions (a few seeds say little of all)"
        )
        if len(seeds) > 1:
            lines.append("not all settings have the same number of seeds: their errors are not alike")
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


def _other_measures(findings: Findings) -> list[str]:
    """How many settings each other measure tells from the centre: they may see what accuracy does not, or disagree."""
    lines = []
    compared = [r.to_centre for r in findings.results if r.to_centre]
    names = dict.fromkeys(name for near in compared for name in near.measures)
    for name in names:
        signs = [
            near.measures[name].micro.difference > 0
            for near in compared
            if name in near.measures and significant(near.corrected.get(name))
        ]
        if name != findings.first.measure and signs:
            lines.append(
                f"by {name}, {sum(signs)} of {len(compared)} settings are better and {len(signs) - sum(signs)} worse than the "
                f"centre after Holm's correction"
            )
    return lines


def _shifts(findings: Findings) -> list[str]:
    """Differences that are nothing but another share of the answers."""
    lines = []
    if findings.centre:
        told = shift_notes(findings.centre.finished[0].shares, before="the base model", after="the centre")
        lines += [f"centre against base model: {line}" for line in told]
    shifted = [f"{r.name} against the centre: {line}" for r in findings.results for line in r.shifted.values()]
    lines += shifted[:_MOST_NAMED]
    if len(shifted) > _MOST_NAMED:
        lines.append(
            f"{len(shifted) - _MOST_NAMED} more differences to the centre live in such a shift alone: {SHIFTED} in the tables"
        )
    return lines
