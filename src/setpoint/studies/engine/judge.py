"""From stored runs to verdicts.

Replicates are paired: the two arms of a claim see the same seed (or the same slice of data), and the interval is over
their differences. What is missing stays missing: a run that broke leaves the claim undecided, a run that diverged
counts as the claim says, and neither is ever dropped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from setpoint.errors import InputError
from setpoint.studies.engine.statistics import fit, interval
from setpoint.studies.engine.store import Row
from setpoint.types.proving import Better, Claim, Interval, Judgement, Pair, Shape, Verdict

Runs = Mapping[str, Mapping[int, Row]]
"""Judged runs by arm and replicate."""
STEADY = 0.02
"""How far plain against plain may move before a machine counts as too restless for a claim on speed."""


class _Undecided(Exception):
    """Why there is no verdict."""


@dataclass(frozen=True, slots=True)
class _Values:
    """A claim's metric in one arm, by replicate, with what to say of runs that diverged."""

    by_replicate: Mapping[int, float]
    note: str


def judge(claim: Claim, runs: Runs, replicates: Sequence[int]) -> Judgement:
    """Hold a claim against the runs.

    Args:
        claim: The claim.
        runs: Rows by arm and replicate.
        replicates: Those that should be there.

    Returns:
        The verdict with the effect and the values behind it.

    Raises:
        InputError: The study contradicts itself: a metric that no run has, a ratio of values that are not positive.
    """
    pairs = _pairs(claim, runs, replicates)
    effect = control = None
    try:
        _present(claim, runs, replicates)
        _restless(claim, runs, replicates)
        if isinstance(claim.criterion, Shape):
            return _judge_shape(claim, claim.criterion, runs, replicates, pairs)
        raw, notes = _effect(claim, claim.method, runs, replicates)
        effect, bound = _shown(claim, raw), _scaled(claim, claim.criterion.bound)
        blind = False
        if isinstance(claim.criterion, Better):
            verdict = claim.criterion.judge(raw, bound)
        else:
            raw_control = None
            if claim.control is not None:
                raw_control, more = _effect(claim, claim.control, runs, replicates)
                control, notes = _shown(claim, raw_control), [*notes, *more]
                blind = claim.criterion.passes(raw_control, bound)
            verdict = claim.criterion.judge(raw, bound, raw_control)
        reason = "; ".join([_reason(claim, verdict, effect, control if blind else None), *notes])
    except _Undecided as why:
        return Judgement(claim, "undecided", str(why), effect, pairs, control)
    return Judgement(claim, verdict, reason, effect, pairs, control)


def _value(claim: Claim, row: Row, diverged: float | None) -> float | None:
    """The metric of one run; ``diverged`` for one that diverged."""
    if claim.metric == "diverged":
        return float(row.status == "diverged")
    if row.status == "diverged":
        return diverged
    assert row.outcome is not None
    if claim.metric not in row.outcome.metrics:
        known = ", ".join(row.outcome.metrics) or "none"
        raise InputError(f"claim {claim.text!r}: no run has the metric {claim.metric!r}; there are {known}, diverged")
    return float(row.outcome.metrics[claim.metric])


def _counts_as(claim: Claim, runs: Runs, replicates: Sequence[int]) -> float | None:
    """What a run that diverged counts as: what the claim says, or the worst value of its arms if that is worse.

    A study can't know beforehand how bad a run may end that stays finite; one that broke down is never ahead of it.
    None if the claim says nothing.
    """
    if claim.diverged is None:
        return None
    rows = (runs.get(arm, {}).get(replicate) for arm in _arms(claim) for replicate in replicates)
    finite = [row.outcome.metrics.get(claim.metric) for row in rows if row and row.status == "done" and row.outcome]
    worst = min if claim.better == "higher" else max
    return worst([claim.diverged, *(float(value) for value in finite if value is not None)])


def _arms(claim: Claim) -> list[str]:
    return [arm for arm in (claim.method, claim.baseline, claim.control) if arm is not None]


def _present(claim: Claim, runs: Runs, replicates: Sequence[int]) -> None:
    lacking = []
    for arm in _arms(claim):
        rows = [runs.get(arm, {}).get(replicate) for replicate in replicates]
        broken = sum(row is not None and row.status == "failed" for row in rows)
        missing = sum(row is None for row in rows)
        lacking += [f"{broken} of {len(rows)} runs of {arm} broke with an error"] if broken else []
        lacking += [f"{missing} of {len(rows)} runs of {arm} are missing"] if missing else []
    if lacking:
        raise _Undecided("; ".join(lacking))
    if len(replicates) < 2:
        raise _Undecided("one replicate gives no interval; run at least two")


def _restless(claim: Claim, runs: Runs, replicates: Sequence[int]) -> None:
    if claim.steady is None:
        return
    probe = replace(claim, metric=claim.steady)
    moved = max(abs(_value(probe, runs[claim.method][replicate], math.inf) or 0.0) for replicate in replicates)
    if moved > STEADY:
        raise _Undecided(
            f"not measurable here: plain against plain moved by {100 * moved:.1f} %, more than {100 * STEADY:.0f} %"
        )


def _values(claim: Claim, arm: str, runs: Runs, replicates: Sequence[int]) -> _Values:
    rows = {replicate: runs[arm][replicate] for replicate in replicates}
    counts_as = _counts_as(claim, runs, replicates)
    diverged = [replicate for replicate, row in rows.items() if row.status == "diverged"]
    note = ""
    if diverged and claim.metric != "diverged":
        note = f"{len(diverged)} of {len(rows)} runs of {arm} diverged"
        if counts_as is None:
            raise _Undecided(f"{note}, and the claim does not say what that counts as")
        note += f" and count as {counts_as:g}"
        note += "" if counts_as == claim.diverged else ", the worst value of a run that did not"
    return _Values({replicate: _value(claim, row, counts_as) or 0.0 for replicate, row in rows.items()}, note)


def _effect(claim: Claim, arm: str, runs: Runs, replicates: Sequence[int]) -> tuple[Interval, list[str]]:
    """Paired differences of ``arm`` against the baseline, positive is better; logarithms of them for a ratio."""
    ours = _values(claim, arm, runs, replicates)
    if claim.baseline is not None:
        theirs = _values(claim, claim.baseline, runs, replicates)
    else:
        theirs = _Values(dict.fromkeys(replicates, 1.0 if claim.scale == "ratio" else 0.0), "")
    sign = 1 if claim.better == "higher" else -1
    differences = []
    for replicate in replicates:
        a, b = ours.by_replicate[replicate], theirs.by_replicate[replicate]
        if claim.scale == "ratio":
            if a <= 0 or b <= 0:
                raise InputError(
                    f"claim {claim.text!r} is about a ratio and needs positive values, got {a:g} and {b:g}"
                )
            a, b = math.log(a), math.log(b)
        differences.append(sign * (a - b))
    found = interval(differences)
    notes = [values.note for values in (ours, theirs) if values.note]
    if found.low == found.high:
        notes.append("every replicate gave the same difference, so the interval has no width")
    return found, notes


def _judge_shape(
    claim: Claim, shape: Shape, runs: Runs, replicates: Sequence[int], pairs: tuple[Pair, ...]
) -> Judgement:
    found = []
    for replicate in replicates:
        outcome = runs[claim.method][replicate].outcome
        curve = next((s for s in (outcome.curves if outcome else ()) if s.name == claim.metric), None)
        if curve is None:
            raise _Undecided(f"replicate {replicate} of {claim.method} has no curve {claim.metric!r}")
        points = [(x, y) for x, y in zip(curve.x, curve.y, strict=True) if y is not None]
        found.append(fit(shape.form, [x for x, _ in points], [y for _, y in points]))
    effect = interval([slope for slope, _ in found])
    r2 = sum(quality for _, quality in found) / len(found)
    verdict = shape.judge(effect, r2)
    reason = (
        f"{shape.form} with parameter {effect.estimate:.4g} [{effect.low:.4g}, {effect.high:.4g}], "
        f"expected {shape.low:g} to {shape.high:g}; mean R² {r2:.3f}"
    )
    pairs = tuple(replace(p, method=slope) for p, (slope, _) in zip(pairs, found, strict=True))
    return Judgement(claim, verdict, reason, effect, pairs)


def _pairs(claim: Claim, runs: Runs, replicates: Sequence[int]) -> tuple[Pair, ...]:
    def value(arm: str | None, replicate: int) -> float | None:
        row = runs.get(arm, {}).get(replicate) if arm is not None else None
        if row is None or row.status not in ("done", "diverged") or isinstance(claim.criterion, Shape):
            return None
        return _value(claim, row, counts_as)

    counts_as = _counts_as(claim, runs, replicates)
    return tuple(Pair(r, value(claim.method, r), value(claim.baseline, r)) for r in replicates)


def _scaled(claim: Claim, bound: float) -> float:
    return math.log1p(bound) if claim.scale == "ratio" else bound


def _shown(claim: Claim, effect: Interval) -> Interval:
    """An effect in the unit that people read: a fraction instead of a logarithm."""
    if claim.scale != "ratio":
        return effect
    return Interval(
        estimate=math.expm1(effect.estimate),
        low=math.expm1(effect.low),
        high=math.expm1(effect.high),
        bootstrap_low=math.expm1(effect.bootstrap_low),
        bootstrap_high=math.expm1(effect.bootstrap_high),
        replicates=effect.replicates,
    )


def _reason(claim: Claim, verdict: Verdict, effect: Interval, passing: Interval | None) -> str:
    """Why, in one line; ``passing`` is the effect of a control arm that passes where it should fail."""
    from setpoint.report.proof_words import amount_of, span_of, zone_of

    interval_words = f"the interval {span_of(claim, effect)}"
    assert not isinstance(claim.criterion, Shape)
    bound, zone = amount_of(claim, claim.criterion.bound), zone_of(claim, claim.criterion.bound)
    if passing is not None:
        return (
            f"the control arm {claim.control} passes too ({span_of(claim, passing)}): this setting can't tell, "
            f"whatever {interval_words} says"
            if verdict == "no effect"
            else f"the control arm {claim.control} passes ({span_of(claim, passing)}), so this setting can't tell, "
            f"though {interval_words} is not above the bound"
        )
    return f"{interval_words} {_PHRASES[type(claim.criterion).__name__, verdict].format(bound=bound, zone=zone)}"


_PHRASES: Mapping[tuple[str, Verdict], str] = {
    ("Better", "holds"): "is all on the better side and the estimate reaches {bound}",
    ("Better", "reversed"): "is all on the worse side",
    ("Better", "no effect"): "lies within {zone}, the smallest effect that matters",
    ("Better", "undecided"): "allows more than one answer (smallest effect that matters: {bound})",
    ("NotWorse", "holds"): "is all above the margin of −{bound}",
    ("NotWorse", "reversed"): "is all below the margin of −{bound}",
    ("NotWorse", "undecided"): "reaches over the margin of −{bound}",
    ("Equal", "holds"): "lies within {zone}",
    ("Equal", "reversed"): "is all outside {zone}",
    ("Equal", "undecided"): "reaches over the edge of {zone}",
}
