"""Choosing settings: equal chances for every arm, whatever happened on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from setpoint.errors import InputError
from setpoint.studies import Arm, Better, Budget, Claim, Context, Outcome, Study, Tuning, study
from setpoint.studies.engine import tune
from setpoint.studies.engine.execute import Task
from setpoint.studies.engine.store import Row, RunKey, Status

SIZE = Budget(2, 1)


def declare(**changes: Any) -> Study:
    def run(arm: Arm, setting: Any, seed: int, budget: Budget, ctx: Context) -> Outcome:
        raise AssertionError("these tests make their own rows")

    return study(
        "Which is best?",
        arms=(Arm("plain", "as it was"), Arm("method", "with a knob", knobs={"alpha": (1, 2)})),
        claims=(Claim("lower", Better(0.1), "loss", "method", "plain"),),
        budgets={"smoke": SIZE, "laptop": SIZE, "full": SIZE},
        tuning=replace(Tuning({"lr": (0.1, 0.2, 0.4)}, "loss"), **changes),
    )(run)


def make(arm: str, setting: Mapping[str, Any], seed: int) -> Task:
    return Task("", RunKey("m", "s", "tune", "laptop", arm, setting, seed, "f"), None, "cpu", 1, Path())


def rows(tasks: list[Task], losses: Mapping[tuple[Any, ...], float | Status]) -> dict[str, Row]:
    """Rows of tasks whose ``(arm, lr, alpha)`` is in ``losses``: a number, or a status."""
    found = {}
    for task in tasks:
        key = (task.key.arm, task.key.setting["lr"], task.key.setting.get("alpha"))
        if key in losses:
            value = losses[key]
            status: Status = "done" if isinstance(value, float) else value
            outcome = Outcome({"loss": value}) if isinstance(value, float) else Outcome({})
            error = "boom" if status == "failed" else ""
            found[task.key.hash] = Row(task.key, status, None if error else outcome, error, 60.0)
    return found


def full(**changes: float | Status) -> dict[tuple[Any, ...], float | Status]:
    losses: dict[tuple[Any, ...], float | Status] = {("plain", lr, None): 1 + lr for lr in (0.1, 0.2, 0.4)}
    losses |= {("method", lr, a): 2 - lr - 0.1 * a for lr in (0.1, 0.2, 0.4) for a in (1, 2)}
    return losses


def test_runs_go_through_all_arms_setting_by_setting() -> None:
    order = [(task.key.arm, task.key.setting["lr"]) for task in tune.plan(declare(), make)]
    assert order[:3] == [("plain", 0.1), ("method", 0.1), ("method", 0.1)]
    assert [lr for _, lr in order] == [0.1] * 3 + [0.2] * 3 + [0.4] * 3


def test_each_arm_gets_its_own_best() -> None:
    made = declare()
    found = tune.choose(made, make, rows(tune.plan(made, make), full()))
    assert found.settings == {"plain": {"lr": 0.1}, "method": {"lr": 0.4, "alpha": 2}}
    assert [len(found.trials[arm.name]) for arm in made.arms] == [3, 6]


def test_higher_can_be_better() -> None:
    made = declare(better="higher")
    assert tune.choose(made, make, rows(tune.plan(made, make), full())).settings["plain"] == {"lr": 0.4}


def test_a_stage_cut_short_compares_what_every_arm_has_tried() -> None:
    made, losses = declare(), full()
    del losses["method", 0.4, 2]
    found = tune.choose(made, make, rows(tune.plan(made, make), losses))
    assert found.settings["method"] == {"lr": 0.2, "alpha": 2}
    assert [len(found.trials[arm.name]) for arm in made.arms] == [2, 4]
    assert any("2 of 3 settings" in note for note in found.notes)


def test_a_setting_that_diverged_is_never_the_best() -> None:
    made, losses = declare(), full()
    losses["plain", 0.1, None] = "diverged"
    found = tune.choose(made, make, rows(tune.plan(made, make), losses))
    assert found.settings["plain"] == {"lr": 0.2}
    assert found.trials["plain"][0].score is None


def test_an_arm_that_always_diverges_is_said_to() -> None:
    made, losses = declare(), full()
    losses |= {("plain", lr, None): "diverged" for lr in (0.1, 0.2, 0.4)}
    found = tune.choose(made, make, rows(tune.plan(made, make), losses))
    assert found.settings["plain"] == {"lr": 0.1}
    assert any("every tuning run of plain diverged" in note for note in found.notes)


def test_a_run_that_broke_is_an_error_and_not_a_bad_score() -> None:
    made, losses = declare(), full()
    losses["plain", 0.2, None] = "failed"
    with pytest.raises(InputError, match="a tuning run of plain broke: boom"):
        tune.choose(made, make, rows(tune.plan(made, make), losses))


def test_several_tuning_seeds_are_averaged() -> None:
    made = declare(seeds=2)
    plan = tune.plan(made, make)
    assert {task.key.seed for task in plan} == {1000, 1001}
    found = rows(plan, full())
    odd = next(task for task in plan if task.key.seed == 1001 and task.key.setting == {"lr": 0.1})
    found[odd.key.hash] = replace(found[odd.key.hash], outcome=Outcome({"loss": 9.0}))
    assert tune.choose(made, make, found).settings["plain"] == {"lr": 0.2}


def test_a_metric_that_no_run_gives_is_named() -> None:
    made = declare(metric="lost")
    with pytest.raises(InputError, match="'lost', which runs do not give; they give loss"):
        tune.choose(made, make, rows(tune.plan(made, make), full()))


def test_earlier_calls_count_towards_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made = declare(minutes=5)
    stored = list(rows(tune.plan(made, make), full()).values())[:4]  # four minutes
    monkeypatch.setattr(tune.time, "monotonic", lambda: 1000.0)
    assert tune.time_left(made, stored, jobs=1) == 1000 + 60
    assert tune.time_left(made, stored, jobs=2) == 1000 + 180
    assert tune.time_left(made, stored * 2, jobs=1) == 1000
