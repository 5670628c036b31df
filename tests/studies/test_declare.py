"""A declaration that contradicts itself is refused before anything runs."""

from __future__ import annotations

from typing import Any

import pytest

from setpoint.errors import InputError
from setpoint.studies import (
    Arm,
    Better,
    Budget,
    Claim,
    Context,
    NotWorse,
    Outcome,
    Shape,
    Study,
    Tuning,
    find_studies,
    study,
    study_keys,
)

SMALL = Budget(2, 1)


def one(arm: Arm, setting: Any, seed: int, budget: Budget, ctx: Context) -> Outcome:
    return Outcome({"loss": 1.0})


def declare(run: Any = one, **changes: Any) -> Study:
    values: dict[str, Any] = {
        "arms": (Arm("plain", "as it was"), Arm("method", "changed")),
        "claims": (Claim("lower", Better(0.1), "loss", "method", "plain"),),
        "budgets": {"smoke": SMALL, "laptop": SMALL, "full": SMALL},
        "tuning": Tuning({"lr": (0.1, 0.2)}, "loss"),
    }
    return study("Is it lower?", **(values | changes))(run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ()}, "arms with different names"),
        ({"arms": (Arm("plain", ""), Arm("plain", ""))}, "arms with different names"),
        ({"claims": ()}, "at least one claim"),
        ({"claims": (Claim("lower", Better(0.1), "loss", "methid", "plain"),)}, "names the method 'methid'"),
        ({"claims": (Claim("lower", Better(0.1), "loss", "plain", "plain"),)}, "compares 'plain' with itself"),
        ({"claims": (Claim("x", Better(0.1), "loss", "method", "plain", control="plain"),)}, "NotWorse and Equal only"),
        ({"claims": (Claim("x", NotWorse(0.1), "loss", "method", "plain", control="no"),)}, "names the control 'no'"),
        ({"claims": (Claim("x", Shape("linear", 0, 1), "loss", "method", "plain"),)}, "neither a baseline nor a ratio"),
        ({"budgets": {"smoke": SMALL}}, "expected the budgets smoke, laptop, full"),
        ({"budgets": dict.fromkeys(("smoke", "laptop", "full"), Budget(1, 1))}, "needs at least 2"),
        (
            {"budgets": dict.fromkeys(("smoke", "laptop", "full"), Budget(2, 1, {"f": one}))},
            "numbers, strings and lists",
        ),
        ({"tuning": Tuning({"lr": ()}, "loss")}, "tuple of values to try"),
        ({"tuning": Tuning({"lr": (0.1,)}, "loss", seeds=0)}, "at least one seed"),
        ({"tuning": Tuning({"lr": (0.1,)}, "loss", widen=-1)}, "0 for none, got -1"),
        (
            {"tuning": None, "arms": (Arm("plain", ""), Arm("method", "", knobs={"a": (1,)}))},
            "has knobs but there is no",
        ),
        ({"arms": (Arm("plain", ""), Arm("method", "", knobs={"lr": (1,)}))}, "which all arms share"),
        ({"run": lambda arm, seed: Outcome({})}, "takes .arm, setting, seed, budget, ctx."),
    ],
)
def test_a_declaration_that_contradicts_itself_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        declare(**changes)


def test_an_arm_tunes_the_shared_grid_times_its_own_knobs() -> None:
    made = declare(arms=(Arm("plain", ""), Arm("method", "", knobs={"alpha": (0.3, 0.5, 1.0)})))
    assert made.settings(made.arm("plain")) == [{"lr": 0.1}, {"lr": 0.2}]
    assert len(made.settings(made.arm("method"))) == 6


def test_an_option_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(InputError, match=r"arm 'plain' has no option 'norn'; it has norm"):
        Arm("plain", "", {"norm": 1})["norn"]
    with pytest.raises(InputError, match=r"budget 'laptop' has no option 'width'"):
        declare().budgets["laptop"]["width"]


@pytest.mark.parametrize("key", study_keys())
def test_every_study_that_ships_belongs_to_its_module(key: str) -> None:
    found = find_studies(key)
    assert {study.key for study in found} == {key}
    assert len({study.name for study in found}) == len(found)
