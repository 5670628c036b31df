"""From the rows of a study to its result: verdicts, arms with their cost and curves, and what a reader must know."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from setpoint.errors import InputError
from setpoint.studies.declare import Arm, Budget, Study
from setpoint.studies.engine.judge import Runs, judge
from setpoint.studies.engine.store import Row
from setpoint.studies.engine.tune import Tuned
from setpoint.types.proving import ArmResult, Band, Claim, Judgement, StudyResult

POINTS = 200
"""Points of a curve that are kept."""


def assemble(study: Study, budget: Budget, tuned: Tuned, runs: Runs, replicates: Sequence[int]) -> StudyResult:
    """Judge a study.

    Args:
        study: What was run.
        budget: How large.
        tuned: With which settings.
        runs: Rows by arm and replicate.
        replicates: Seeds or slices that should be there.

    Returns:
        The result.

    Raises:
        InputError: The arms differ in what should be the same, or a claim asks for what no run gives.
    """
    _same_conditions(study, runs, replicates)
    return StudyResult(
        name=study.name,
        question=study.question,
        judgements=tuple(_judged(claim, runs, replicates, budget) for claim in study.claims),
        arms=tuple(_arm(arm, tuned, list(runs.get(arm.name, {}).values())) for arm in study.arms),
        replicate=study.replicate,
        replicates=tuple(replicates),
        options=budget.options,
        tuning=tuned.words,
        tuning_metric=study.tuning.metric if study.tuning else "",
        notes=(*tuned.notes, *_parameters(study, runs), *_errors(runs)),
    )


def _judged(claim: Claim, runs: Runs, replicates: Sequence[int], budget: Budget) -> Judgement:
    found = judge(claim, runs, replicates)
    if budget.name != "smoke":
        return found
    return replace(found, verdict="undecided", reason="a smoke run only shows that the study runs from end to end")


def _same_conditions(study: Study, runs: Runs, replicates: Sequence[int]) -> None:
    for replicate in replicates:
        seen: dict[str, tuple[str, object]] = {}
        for arm in study.arms:
            row = runs.get(arm.name, {}).get(replicate)
            for name, value in (row.outcome.conditions if row and row.status == "done" and row.outcome else {}).items():
                first, before = seen.setdefault(name, (arm.name, value))
                if before != value:
                    raise InputError(
                        f"study {study.name!r}: the arms should have the same {name}; "
                        f"{first} has {before}, {arm.name} has {value}"
                    )


def _arm(arm: Arm, tuned: Tuned, rows: Sequence[Row]) -> ArmResult:
    done = [row for row in rows if row.status == "done" and row.outcome]
    return ArmResult(
        name=arm.name,
        does=arm.does,
        setting=tuned.settings[arm.name],
        runs=len(rows),
        diverged=sum(row.status == "diverged" for row in rows),
        failed=sum(row.status == "failed" for row in rows),
        cost=_mean_costs(done),
        trials=tuned.trials.get(arm.name, ()),
        curves=_bands(rows),
        error=next((_last_line(row) for row in reversed(rows) if row.status == "failed"), ""),
    )


def _mean_costs(rows: Sequence[Row]) -> Mapping[str, float]:
    found: dict[str, list[float]] = {name: [] for name in ("seconds", "memory", "parameters")}  # these come first
    for row in rows:
        for name, value in (row.outcome.cost if row.outcome else {}).items():
            found.setdefault(name, []).append(float(value))
    return {name: sum(values) / len(values) for name, values in found.items() if values}


def _bands(rows: Sequence[Row]) -> tuple[Band, ...]:
    """Mean and range over the replicates that reached each x; a run that stopped early ends there."""
    values: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        for curve in row.outcome.curves if row.outcome else ():
            at = values.setdefault(curve.name, {})
            for x, y in zip(curve.x, curve.y, strict=True):
                if y is not None and math.isfinite(y):
                    at.setdefault(float(x), []).append(float(y))
    return tuple(_band(name, at) for name, at in values.items() if at)


def _band(name: str, at: Mapping[float, Sequence[float]]) -> Band:
    xs = sorted(at)
    step = math.ceil(len(xs) / POINTS)
    kept = xs[(len(xs) - 1) % step :: step]  # thinned so that the last point stays
    return Band(
        name,
        x=tuple(kept),
        mean=tuple(sum(at[x]) / len(at[x]) for x in kept),
        low=tuple(min(at[x]) for x in kept),
        high=tuple(max(at[x]) for x in kept),
    )


def _parameters(study: Study, runs: Runs) -> list[str]:
    counts = {
        arm: row.outcome.cost["parameters"]
        for arm, rows in runs.items()
        for row in rows.values()
        if row.outcome and "parameters" in row.outcome.cost
    }
    if not counts or max(counts.values()) <= (1 + study.parameter_slack) * min(counts.values()):
        return []
    listed = ", ".join(f"{arm} {count:,.0f}" for arm, count in counts.items())
    return [f"the arms differ in parameters: {listed}"]


def _errors(runs: Runs) -> list[str]:
    """Each different error once, with the arms that had it."""
    arms: dict[str, dict[str, None]] = {}
    for arm, rows in runs.items():
        for row in rows.values():
            if row.error:
                arms.setdefault(_last_line(row), {})[arm] = None
    return [f"{', '.join(names)}: {line}" for line, names in arms.items()]


def _last_line(row: Row) -> str:
    return row.error.splitlines()[-1] if row.error else ""
