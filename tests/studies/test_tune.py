"""Choosing settings: equal chances for every arm, whatever happened on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from setpoint.errors import InputError
from setpoint.studies import Arm, Better, Budget, Claim, Context, Outcome, Study, Tuning, study
from setpoint.studies.engine import tune
from setpoint.studies.engine.execute import Task
from setpoint.studies.engine.grid import beyond, declared
from setpoint.studies.engine.store import Row, RunKey, Status

SIZE = Budget(2, 1)


class Ran(NamedTuple):
    tuned: tune.Tuned
    order: list[tuple[str, Mapping[str, Any]]]
    rows: dict[str, Row]

    def tried(self, arm: str, name: str) -> list[Any]:
        return sorted({trial.setting[name] for trial in self.tuned.trials[arm]})


ARMS = (Arm("plain", "as it was"), Arm("method", "with a knob", knobs={"alpha": (1, 2)}))


def declare(arms: tuple[Arm, ...] = ARMS, **changes: Any) -> Study:
    def run(arm: Arm, setting: Any, seed: int, budget: Budget, ctx: Context) -> Outcome:
        raise AssertionError("these tests make their own rows")

    return study(
        "Which is best?",
        arms=arms,
        claims=(Claim("lower", Better(0.1), "loss", "method", "plain"),),
        budgets={"smoke": SIZE, "laptop": SIZE, "full": SIZE},
        tuning=replace(Tuning({"lr": (0.1, 0.2, 0.4)}, "loss", widen=0), **changes),
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


def plan(made: Study) -> list[Task]:
    """The runs of the declared grid."""
    return tune.missing(made, declared(made), make, {})


def carried_out(made: Study, loss: Callable[[str, Mapping[str, Any]], float | Status], most: int = 1000) -> Ran:
    """Run what is asked for until nothing is, or until so many runs are done."""
    done: dict[str, Row] = {}
    order: list[tuple[str, Mapping[str, Any]]] = []
    while waiting := tune.missing(made, tune.grids(made, make, done)[-1], make, done):
        for task in waiting[: most - len(order)]:
            arm, setting = task.key.arm, task.key.setting
            done |= rows([task], {(arm, setting["lr"], setting.get("alpha")): loss(arm, setting)})
            order.append((arm, setting))
        if len(order) >= most:
            break
    return Ran(tune.choose(made, make, done), order, done)


def test_runs_go_through_all_arms_setting_by_setting() -> None:
    order = [(task.key.arm, task.key.setting["lr"]) for task in plan(declare())]
    assert order[:3] == [("plain", 0.1), ("method", 0.1), ("method", 0.1)]
    assert [lr for _, lr in order] == [0.1] * 3 + [0.2] * 3 + [0.4] * 3


def test_each_arm_gets_its_own_best() -> None:
    made = declare()
    found = tune.choose(made, make, rows(plan(made), full()))
    assert found.settings == {"plain": {"lr": 0.1}, "method": {"lr": 0.4, "alpha": 2}}
    assert [len(found.trials[arm.name]) for arm in made.arms] == [3, 6]


def test_higher_can_be_better() -> None:
    made = declare(better="higher")
    assert tune.choose(made, make, rows(plan(made), full())).settings["plain"] == {"lr": 0.4}


def test_a_stage_cut_short_compares_what_every_arm_has_tried() -> None:
    made, losses = declare(), full()
    del losses["method", 0.4, 2]
    found = tune.choose(made, make, rows(plan(made), losses))
    assert found.settings["method"] == {"lr": 0.2, "alpha": 2}
    assert [len(found.trials[arm.name]) for arm in made.arms] == [2, 4]
    assert any("2 of 3 settings" in note for note in found.notes)


def test_a_setting_that_diverged_is_never_the_best() -> None:
    made, losses = declare(), full()
    losses["plain", 0.1, None] = "diverged"
    found = tune.choose(made, make, rows(plan(made), losses))
    assert found.settings["plain"] == {"lr": 0.2}
    assert found.trials["plain"][0].score is None


def test_an_arm_that_always_diverges_is_said_to() -> None:
    made, losses = declare(), full()
    losses |= {("plain", lr, None): "diverged" for lr in (0.1, 0.2, 0.4)}
    found = tune.choose(made, make, rows(plan(made), losses))
    assert found.settings["plain"] == {"lr": 0.1}
    assert any("every tuning run of plain diverged" in note for note in found.notes)


def test_a_run_that_broke_is_an_error_and_not_a_bad_score() -> None:
    made, losses = declare(), full()
    losses["plain", 0.2, None] = "failed"
    with pytest.raises(InputError, match="a tuning run of plain broke: boom"):
        tune.choose(made, make, rows(plan(made), losses))


def test_several_tuning_seeds_are_averaged() -> None:
    made = declare(seeds=2)
    tasks = plan(made)
    assert {task.key.seed for task in tasks} == {1000, 1001}
    found = rows(tasks, full())
    odd = next(task for task in tasks if task.key.seed == 1001 and task.key.setting == {"lr": 0.1})
    found[odd.key.hash] = replace(found[odd.key.hash], outcome=Outcome({"loss": 9.0}))
    assert tune.choose(made, make, found).settings["plain"] == {"lr": 0.2}


def test_a_metric_that_no_run_gives_is_named() -> None:
    made = declare(metric="lost")
    with pytest.raises(InputError, match="'lost', which runs do not give; they give loss"):
        tune.choose(made, make, rows(plan(made), full()))


def test_earlier_calls_count_towards_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made = declare(minutes=5)
    stored = list(rows(plan(made), full()).values())[:4]  # four minutes
    monkeypatch.setattr(tune.time, "monotonic", lambda: 1000.0)
    assert tune.time_left(made, stored, jobs=1) == 1000 + 60
    assert tune.time_left(made, stored, jobs=2) == 1000 + 180
    assert tune.time_left(made, stored * 2, jobs=1) == 1000


def best_at(**best: Mapping[str, float]) -> Callable[[str, Mapping[str, Any]], float]:
    """Loss that grows with the distance, in factors, from each arm's best setting."""

    def loss(arm: str, setting: Mapping[str, Any]) -> float:
        return 1.0 + sum(abs(math.log(setting[name] / value)) for name, value in best[arm].items())

    return loss


def test_a_shared_axis_is_carried_on_for_every_arm_when_one_is_best_at_its_end() -> None:
    made = declare(widen=2)
    ran = carried_out(made, best_at(plain={"lr": 0.2}, method={"lr": 0.8, "alpha": 1.5}))
    assert ran.tuned.settings["method"]["lr"] == 0.8
    assert ran.tried("plain", "lr") == ran.tried("method", "lr") == [0.1, 0.2, 0.4, 0.8, 1.6]
    assert not any("edge of its grid: lr" in note for note in ran.tuned.notes)
    assert "beyond the declared grid every arm tried lr 0.8 and 1.6" in ran.tuned.words


def test_a_knob_is_carried_on_for_the_arms_that_have_it() -> None:
    made = declare(
        widen=1,
        arms=(Arm("plain", ""), *(Arm(name, "", knobs={"alpha": (1.0, 2.0)}) for name in ("method", "other"))),
    )
    best = {"lr": 0.2, "alpha": 4.0}
    ran = carried_out(made, best_at(plain={"lr": 0.2}, method=best, other={"lr": 0.2, "alpha": 1.5}))
    assert ran.tried("method", "alpha") == ran.tried("other", "alpha") == [1.0, 2.0, 4.0]
    assert ran.tried("plain", "lr") == [0.1, 0.2, 0.4]
    assert "beyond the declared grid method and other tried alpha 4.0" in ran.tuned.words


def test_a_range_is_carried_on_so_far_and_then_its_end_is_told() -> None:
    made = declare(widen=2)
    ran = carried_out(made, best_at(plain={"lr": 1e-9}, method={"lr": 0.2, "alpha": 1.5}))
    assert ran.tried("method", "lr") == [0.025, 0.05, 0.1, 0.2, 0.4]
    assert ran.tuned.settings["plain"] == {"lr": 0.025}
    assert "plain is best at the edge of its grid: lr 0.025" in ran.tuned.notes


def test_axes_of_two_values_have_ends_too() -> None:
    made = declare(grid={"lr": (1e-4, 1e-3)})
    ran = carried_out(made, best_at(plain={"lr": 1e-3}, method={"lr": 3e-4, "alpha": 1.5}))
    assert "plain is best at the edge of its grid: lr 0.001" in ran.tuned.notes
    wider = carried_out(replace(made, tuning=replace(made.tuning, widen=1)), best_at(plain={"lr": 1e-3}, method={}))
    assert wider.tried("plain", "lr") == [1e-4, 1e-3, 1e-2]


def test_an_axis_that_makes_no_difference_has_no_best_end() -> None:
    made = declare(widen=2)
    assert len(carried_out(made, lambda arm, setting: 1.0).order) == len(plan(made))


def test_no_run_depends_on_anything_but_those_before_it() -> None:
    """Stopped after any number of runs and taken up again, the stage ends where it would have."""
    made, loss = declare(widen=2), best_at(plain={"lr": 3.0}, method={"lr": 0.2, "alpha": 9.0})
    whole = carried_out(made, loss)
    assert len(whole.order) > len(plan(made))
    assert tune.choose(made, make, dict(reversed(whole.rows.items()))) == whole.tuned
    for most in (9, 10, 13, 20):
        done = carried_out(made, loss, most=most).rows
        while waiting := tune.missing(made, tune.grids(made, make, done)[-1], make, done):
            done |= {task.key.hash: whole.rows[task.key.hash] for task in waiting[:2]}
        assert tune.choose(made, make, done) == whole.tuned


@pytest.mark.parametrize("most", range(10, 40, 3))
def test_a_widening_cut_short_compares_what_every_arm_has_tried(most: int) -> None:
    made = declare(widen=2)
    ran = carried_out(made, best_at(plain={"lr": 3.0}, method={"lr": 0.2, "alpha": 9.0}), most=most)
    assert ran.tried("plain", "lr") == ran.tried("method", "lr")
    assert {0.1, 0.2, 0.4} <= set(ran.tried("plain", "lr"))
    assert len(ran.tuned.trials["method"]) >= 6


def test_what_breaks_beyond_the_declared_grid_ends_the_axis_there() -> None:
    def loss(arm: str, setting: Mapping[str, Any]) -> float | Status:
        return "failed" if setting["lr"] > 0.5 and arm == "method" else 2 - setting["lr"] - 0.1 * (arm == "plain")

    ran = carried_out(declare(widen=2), loss)
    assert ran.tuned.settings["plain"] == {"lr": 0.4}
    assert ran.tried("plain", "lr") == [0.1, 0.2, 0.4]
    assert any("beyond the declared grid a run broke" in note and "boom" in note for note in ran.tuned.notes)


def test_what_diverges_beyond_the_declared_grid_is_not_the_best() -> None:
    def loss(arm: str, setting: Mapping[str, Any]) -> float | Status:
        return "diverged" if setting["lr"] > 0.5 else 2 - setting["lr"]

    ran = carried_out(declare(widen=2), loss)
    assert ran.tried("plain", "lr") == [0.1, 0.2, 0.4, 0.8]
    assert ran.tuned.settings["plain"] == {"lr": 0.4}


@pytest.mark.parametrize(
    ("values", "end", "following"),
    [
        ((1e-3, 2e-3, 4e-3, 8e-3), "upper", 1.6e-2),
        ((4e-3, 1e-3), "lower", 2.5e-4),
        ((0.02, 0.2, 0.63), "upper", 1.9845),
        ((0.02, 0.2, 0.63), "lower", 2e-3),
        ((16, 32), "upper", 64),
        ((1, 2), "lower", None),
        ((0.0, 0.1), "lower", None),
        ((0.0, 0.1), "upper", 0.2),
        ((-1.0, 0.0, 1.0), "upper", 2.0),
        ((-1, 0, 1), "lower", -2),
        ((1e-300, 1e300), "upper", None),
    ],
)
def test_what_lies_beyond_an_end(values: tuple[float, ...], end: Any, following: float | None) -> None:
    assert beyond(values, end) == following
    assert type(beyond(values, end)) in (type(values[0]), type(None))


def test_words_have_no_ends() -> None:
    made = declare(grid={"lr": (0.1, 0.2), "schedule": ("cosine", "flat"), "nesterov": (False, True)}, widen=2)
    ran = carried_out(made, lambda arm, setting: 1.0 + setting["nesterov"] + 9 * (setting["schedule"] == "flat"))
    assert all(len({trial.setting["schedule"] for trial in trials}) == 2 for trials in ran.tuned.trials.values())
    assert ran.tuned.notes == ()
