"""Tuning: every arm tries the same settings, on the validation split and on seeds that are never judged.

Runs go shared setting by shared setting through all arms, so that a stage that is cut short has tried the same for
each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from setpoint.errors import InputError
from setpoint.studies.declare import TUNING_SEED, Arm, Study, Tuning
from setpoint.studies.engine.execute import Task
from setpoint.studies.engine.store import Row
from setpoint.types.proving import Trial


@dataclass(frozen=True, slots=True)
class Tuned:
    """Settings to judge with.

    Args:
        settings: One per arm.
        trials: What was tried, by arm.
        words: Where the settings come from, in one line.
        notes: What a reader must know about it.
    """

    settings: Mapping[str, Mapping[str, Any]]
    trials: Mapping[str, tuple[Trial, ...]]
    words: str
    notes: tuple[str, ...] = ()


def plan(study: Study, make: Callable[[str, Mapping[str, Any], int], Task]) -> list[Task]:
    """The runs of the tuning stage, in order.

    Args:
        study: What is tuned.
        make: Gives the task of an arm, a setting and a seed.
    """
    assert study.tuning is not None
    return [
        make(arm.name, setting, TUNING_SEED + seed)
        for shared in _shared(study)
        for arm in study.arms
        for setting in _of(study.tuning, arm, shared)
        for seed in range(study.tuning.seeds)
    ]


def choose(study: Study, make: Callable[[str, Mapping[str, Any], int], Task], rows: Mapping[str, Row]) -> Tuned:
    """The best setting of each arm among those that all arms have tried.

    Args:
        study: What was tuned.
        make: As for `plan`.
        rows: Finished tuning runs by key.

    Raises:
        InputError: No setting has been tried in every arm, or a run broke.
    """
    tuning = study.tuning
    assert tuning is not None
    cells = _shared(study)
    tried = [shared for shared in cells if _complete(study, tuning, shared, make, rows)]
    if not tried:
        raise InputError(f"tuning of {study.name!r} ended before every arm had tried one setting; give it more time")
    trials = {
        arm.name: tuple(
            Trial(setting, _score(tuning, [_row(make, arm, setting, seed, rows) for seed in range(tuning.seeds)]))
            for shared in tried
            for setting in _of(tuning, arm, shared)
        )
        for arm in study.arms
    }
    notes = []
    if len(tried) < len(cells):
        notes.append(
            f"tuning stopped after {tuning.minutes:g} minutes with {len(tried)} of {len(cells)} settings tried"
        )
    settings = {}
    for arm in study.arms:
        scored = [trial for trial in trials[arm.name] if trial.score is not None]
        if not scored:
            notes.append(f"every tuning run of {arm.name} diverged; it is judged with the first setting")
        sign = 1 if tuning.better == "lower" else -1
        best = min(scored, key=lambda trial: sign * (trial.score or 0.0), default=trials[arm.name][0])
        settings[arm.name] = best.setting
        notes += _edges(tuning, arm, best.setting)
    count = len(tried) * tuning.seeds
    words = f"{count} tuning runs per arm" if not any(arm.knobs for arm in study.arms) else "a grid per arm"
    return Tuned(settings, trials, f"{words} on the validation split, seeds from {TUNING_SEED}", tuple(notes))


def time_left(study: Study, rows: Sequence[Row], jobs: int) -> float:
    """`time.monotonic` at which the stage has had its minutes, earlier calls included."""
    assert study.tuning is not None
    spent = sum(row.seconds for row in rows) / jobs
    return time.monotonic() + max(0.0, 60 * study.tuning.minutes - spent)


def _shared(study: Study) -> list[dict[str, Any]]:
    assert study.tuning is not None
    return study.tuning.settings(Arm("shared", ""))


def _of(tuning: Tuning, arm: Arm, shared: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [setting for setting in tuning.settings(arm) if all(setting[name] == shared[name] for name in shared)]


def _row(
    make: Callable[[str, Mapping[str, Any], int], Task],
    arm: Arm,
    setting: Mapping[str, Any],
    seed: int,
    rows: Mapping[str, Row],
) -> Row | None:
    return rows.get(make(arm.name, setting, TUNING_SEED + seed).key.hash)


def _complete(
    study: Study,
    tuning: Tuning,
    shared: Mapping[str, Any],
    make: Callable[[str, Mapping[str, Any], int], Task],
    rows: Mapping[str, Row],
) -> bool:
    found = [
        _row(make, arm, setting, seed, rows)
        for arm in study.arms
        for setting in _of(tuning, arm, shared)
        for seed in range(tuning.seeds)
    ]
    for row in found:
        if row is not None and row.status == "failed":
            raise InputError(f"a tuning run of {row.key.arm} broke: {row.error.splitlines()[-1]}")
    return all(row is not None for row in found)


def _score(tuning: Tuning, rows: Sequence[Row | None]) -> float | None:
    values = []
    for row in rows:
        assert row is not None
        if row.status == "diverged" or row.outcome is None:
            return None
        if tuning.metric not in row.outcome.metrics:
            known = ", ".join(row.outcome.metrics) or "none"
            raise InputError(f"tuning looks at the metric {tuning.metric!r}, which runs do not give; they give {known}")
        values.append(float(row.outcome.metrics[tuning.metric]))
    return sum(values) / len(values)


def _edges(tuning: Tuning, arm: Arm, setting: Mapping[str, Any]) -> list[str]:
    """A best value at the end of its range may not be the best there is."""
    found = []
    for name, values in {**tuning.grid, **arm.knobs}.items():
        numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
        if len(numbers) == len(values) > 2 and setting[name] in (min(numbers), max(numbers)):
            found.append(f"{arm.name} is best at the edge of its grid: {name} {setting[name]}")
    return found
