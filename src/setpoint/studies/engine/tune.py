"""Tuning: every arm tries the same settings, on the validation split and on seeds that are never judged.

Runs go cell by cell through all arms (a cell is one combination of the values that arms share), so that a stage that is
cut short has tried the same for each. Where an arm's best value lies at an end of its range, the range is carried on,
for every arm that has the axis: else an arm whose best value happens to lie inside the grid would be ahead of one whose
best value does not. What is run next follows from the finished runs alone, so a stage that was stopped goes on as it
would have.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from setpoint.errors import InputError
from setpoint.studies.declare import TUNING_SEED, Study, Tuning
from setpoint.studies.engine.execute import Task
from setpoint.studies.engine.grid import End, Grid, beyond, declared, has_ends, within_reach
from setpoint.studies.engine.store import Row
from setpoint.types.proving import Trial

Make = Callable[[str, Mapping[str, Any], int], Task]
"""Gives the task of an arm, a setting and a seed."""
Rows = Mapping[str, Row]
"""Finished tuning runs by key."""
Trials = Mapping[str, tuple[Trial, ...]]
"""What was tried, by arm."""


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
    trials: Trials
    words: str
    notes: tuple[str, ...] = ()


def grids(study: Study, make: Make, rows: Rows) -> list[Grid]:
    """The declared grid, and each wider one that the finished runs call for.

    Args:
        study: What is tuned.
        make: Gives a task.
        rows: What has been run.

    Returns:
        Each grid holds the one before. The last has runs that are still missing, or needs none that is wider.

    Raises:
        InputError: A run of the declared grid broke.
    """
    found = [declared(study)]
    while not missing(study, found[-1], make, rows) and (wider := _widened(study, found, make, rows)) is not None:
        found.append(wider)
    return found


def missing(study: Study, grid: Grid, make: Make, rows: Rows) -> list[Task]:
    """The runs of a grid that are still to be done, in order."""
    tasks = (task for cell in grid.cells() for task in _tasks(study, grid, cell, make))
    return [task for task in tasks if task.key.hash not in rows]


def choose(study: Study, make: Make, rows: Rows) -> Tuned:
    """The best setting of each arm among those that all arms have tried.

    Args:
        study: What was tuned.
        make: Gives a task.
        rows: What has been run.

    Raises:
        InputError: No setting has been tried in every arm, or a run of the declared grid broke.
    """
    tuning = study.tuning
    assert tuning is not None
    stages = grids(study, make, rows)
    tried = _tried(study, stages, make, rows)
    if not tried:
        raise InputError(f"tuning of {study.name!r} ended before every arm had tried one setting; give it more time")
    trials = _trials(study, tried, make, rows)
    notes = []
    if missing(study, stages[-1], make, rows):
        cells = len(stages[-1].cells())
        notes.append(f"tuning stopped after {tuning.minutes:g} minutes with {len(tried)} of {cells} settings tried")
    if broken := _broken(study, stages[-1], make, rows):
        notes.append(f"beyond the declared grid a run broke, and what broke was left out: {_words(broken)}")
    settings = {}
    for arm in study.arms:
        best = _best(tuning, trials[arm.name])
        if best is None:
            notes.append(f"every tuning run of {arm.name} diverged; it is judged with the first setting")
        settings[arm.name] = (best or trials[arm.name][0]).setting
        for name, end, _ in _edges(tuning, trials[arm.name]):
            value = (max if end == "upper" else min)(trial.setting[name] for trial in trials[arm.name])
            notes.append(f"{arm.name} is best at the edge of its grid: {name} {value}")
    counts = sorted({tuning.seeds * len(found) for found in trials.values()})
    count = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    words = f"{count} tuning runs per arm on the validation split, seeds from {TUNING_SEED}"
    return Tuned(settings, trials, "; ".join([words, *_added(study, trials)]), tuple(notes))


def could_give(study: Study, arm: str, setting: Mapping[str, Any]) -> bool:
    """Whether tuning can come to a setting: each value declared, or one that may be added."""
    assert study.tuning is not None
    axes = declared(study).axes(arm)
    return set(axes) == set(setting) and all(
        setting[name] in within_reach(values, study.tuning.widen) for name, values in axes.items()
    )


def time_left(study: Study, rows: Sequence[Row], jobs: int) -> float:
    """`time.monotonic` at which the stage has had its minutes, earlier calls included."""
    assert study.tuning is not None
    spent = sum(row.seconds for row in rows) / jobs
    return time.monotonic() + max(0.0, 60 * study.tuning.minutes - spent)


def _widened(study: Study, stages: Sequence[Grid], make: Make, rows: Rows) -> Grid | None:
    """A finished grid with one more value at each end where some arm is best; None where there is no such end."""
    tuning, grid = study.tuning, stages[-1]
    assert tuning is not None
    trials = _trials(study, _tried(study, stages, make, rows), make, rows)
    if _broken(study, grid, make, rows):
        return None
    for arm in study.arms:
        for name, end, value in _edges(tuning, trials[arm.name]):
            added = [v for v in grid.axes(arm.name)[name] if _outside(v, stages[0].axes(arm.name)[name], end)]
            if value not in added and len(added) < tuning.widen:
                grid = grid.with_value(name, value)
    return grid if grid != stages[-1] else None


def _outside(value: Any, values: Sequence[Any], end: End) -> bool:
    return bool(value > max(values) if end == "upper" else value < min(values))


def _edges(tuning: Tuning, trials: Sequence[Trial]) -> Iterator[tuple[str, End, Any]]:
    """Axes on which the best value is the last that was tried, with the end and the value that comes next there."""
    sign = 1 if tuning.better == "lower" else -1
    for name in trials[0].setting:
        values = tuple(trial.setting[name] for trial in trials)
        if not has_ends(values):
            continue
        best: dict[Any, float] = {}
        for value, trial in zip(values, trials, strict=True):
            if trial.score is not None:
                best[value] = min(best.get(value, float("inf")), sign * trial.score)
        for end in get_args(End):
            last = max(values) if end == "upper" else min(values)
            others = [score for value, score in best.items() if value != last]
            following = beyond(values, end)
            if following is not None and best.get(last, float("inf")) < min(others, default=float("inf")):
                yield name, end, following


def _tasks(study: Study, grid: Grid, cell: Mapping[str, Any], make: Make) -> list[Task]:
    assert study.tuning is not None
    return [
        make(arm.name, setting, TUNING_SEED + seed)
        for arm in study.arms
        for setting in grid.settings(arm.name, cell)
        for seed in range(study.tuning.seeds)
    ]


def _tried(study: Study, stages: Sequence[Grid], make: Make, rows: Rows) -> list[tuple[Grid, dict[str, Any]]]:
    """The cells that all arms have been through, each with the widest of the grids whose knobs they all tried there."""
    found = []
    for cell in stages[-1].cells():
        for grid in reversed(stages):
            if cell in grid.cells() and _complete(_tasks(study, grid, cell, make), rows, first=grid is stages[0]):
                found.append((grid, cell))
                break
    return found


def _complete(tasks: Sequence[Task], rows: Rows, *, first: bool) -> bool:
    """Whether all runs of a cell are there; in the declared grid a run that broke is an error."""
    found = [rows.get(task.key.hash) for task in tasks]
    broken = next((row for row in found if row is not None and row.status == "failed"), None)
    if broken is not None and first:
        raise InputError(f"a tuning run of {_words(broken)}")
    return broken is None and all(row is not None for row in found)


def _broken(study: Study, grid: Grid, make: Make, rows: Rows) -> Row | None:
    found = (rows.get(task.key.hash) for cell in grid.cells() for task in _tasks(study, grid, cell, make))
    return next((row for row in found if row is not None and row.status == "failed"), None)


def _words(broken: Row) -> str:
    return f"{broken.key.arm} broke: {broken.error.splitlines()[-1]}"


def _trials(study: Study, tried: Sequence[tuple[Grid, dict[str, Any]]], make: Make, rows: Rows) -> Trials:
    tuning = study.tuning
    assert tuning is not None

    def trial(arm: str, setting: Mapping[str, Any]) -> Trial:
        seeds = range(TUNING_SEED, TUNING_SEED + tuning.seeds)
        return Trial(setting, _score(tuning, [rows[make(arm, setting, seed).key.hash] for seed in seeds]))

    return {
        arm.name: tuple(trial(arm.name, setting) for grid, cell in tried for setting in grid.settings(arm.name, cell))
        for arm in study.arms
    }


def _score(tuning: Tuning, rows: Sequence[Row]) -> float | None:
    values = []
    for row in rows:
        if row.status == "diverged" or row.outcome is None:
            return None
        if tuning.metric not in row.outcome.metrics:
            known = ", ".join(row.outcome.metrics) or "none"
            raise InputError(f"tuning looks at the metric {tuning.metric!r}, which runs do not give; they give {known}")
        values.append(float(row.outcome.metrics[tuning.metric]))
    return sum(values) / len(values)


def _best(tuning: Tuning, trials: Sequence[Trial]) -> Trial | None:
    sign = 1 if tuning.better == "lower" else -1
    scored = [trial for trial in trials if trial.score is not None]
    return min(scored, key=lambda trial: sign * (trial.score or 0.0), default=None)


def _added(study: Study, trials: Trials) -> list[str]:
    """What was tried beyond the declared grid, in words."""
    assert study.tuning is not None
    found: dict[tuple[str, str], list[str]] = {}
    for arm in study.arms:
        for name, values in declared(study).axes(arm.name).items():
            added = {trial.setting[name] for trial in trials[arm.name] if trial.setting[name] not in values}
            if added:
                found.setdefault((name, f"{name} {' and '.join(map(str, sorted(added)))}"), []).append(arm.name)
    return [
        f"beyond the declared grid {'every arm' if name in study.tuning.grid else ' and '.join(arms)} tried {words}"
        for (name, words), arms in found.items()
    ]
