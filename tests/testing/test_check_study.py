"""The suite for studies: passes what is right, and catches each fault that is planted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from setpoint.studies import (
    Arm,
    Better,
    Budget,
    Claim,
    Context,
    NotWorse,
    Outcome,
    Study,
    Tuning,
    find_studies,
    study,
    study_keys,
)
from setpoint.testing import ConformanceError, check_study
from setpoint.types import Series

SIZES = {
    "smoke": Budget(2, 0.1, {"steps": 3}),
    "laptop": Budget(3, 5, {"steps": 30}),
    "full": Budget(5, 60, {"steps": 300}),
}
ARMS = (Arm("plain", "as it was", {"shift": 0.0}), Arm("method", "shifted", {"shift": 1.0}))
CLAIM = Claim("It ends lower.", Better(0.1), "loss", "method", "plain")
TUNING = Tuning({"lr": (0.1, 0.2)}, "loss")


def sound(arm: Arm, setting: Any, seed: int, budget: Budget, ctx: Context) -> Outcome:
    loss = torch.randn(()).item() + setting["lr"] - arm["shift"] + (ctx.split == "valid")
    ctx.progress(budget["steps"], budget["steps"], "")
    return Outcome(
        {"loss": loss},
        curves=(Series("loss over step", (0.0, 1.0), (loss + 1, loss)),),
        cost={"parameters": 100},
        conditions={"steps": budget["steps"]},
    )


def declare(run: Any = sound, **changes: Any) -> Study:
    values: dict[str, Any] = {"arms": ARMS, "claims": (CLAIM,), "budgets": SIZES, "tuning": TUNING} | changes
    question = values.pop("question", "Does it end lower?")
    return study(question, **values)(run)


def test_a_sound_study_passes() -> None:
    check_study(declare())


def forgetful(arm: Arm, setting: Any, seed: int, budget: Budget, ctx: Context) -> Outcome:
    """Draws from a generator that the seed does not set."""
    found = sound(arm, setting, seed, budget, ctx)
    return replace(found, metrics={"loss": torch.rand((), generator=LOOSE).item()})


LOOSE = torch.Generator().manual_seed(0)


def seedless(arm: Arm, setting: Any, seed: int, budget: Budget, ctx: Context) -> Outcome:
    torch.manual_seed(0)
    return sound(arm, setting, seed, budget, ctx)


def half_seedless(arm: Arm, setting: Any, seed: int, budget: Budget, ctx: Context) -> Outcome:
    """The baseline is the same in every replicate, the method is not."""
    return (seedless if arm.name == "plain" else sound)(arm, setting, seed, budget, ctx)


def peeking(arm: Arm, setting: Any, seed: int, budget: Budget, ctx: Context) -> Outcome:
    return sound(arm, setting, seed, budget, replace(ctx, split="test"))


def favoured(arm: Arm, setting: Any, seed: int, budget: Budget, ctx: Context) -> Outcome:
    found = sound(arm, setting, seed, budget, ctx)
    return replace(found, conditions={"steps": budget["steps"] * (2 if arm.name == "method" else 1)})


def unconditional(arm: Arm, setting: Any, seed: int, budget: Budget, ctx: Context) -> Outcome:
    return replace(sound(arm, setting, seed, budget, ctx), conditions={})


def larger(arm: Arm, setting: Any, seed: int, budget: Budget, ctx: Context) -> Outcome:
    found = sound(arm, setting, seed, budget, ctx)
    return replace(found, cost={"parameters": 200 if arm.name == "method" else 100})


def stubborn(arm: Arm, setting: Any, seed: int, budget: Budget, ctx: Context) -> Outcome:
    """The method turns the shared knob; the baseline has a value of its own."""
    return sound(arm, setting if arm.name == "method" else {"lr": 0.1}, seed, budget, ctx)


def silent(arm: Arm, setting: Any, seed: int, budget: Budget, ctx: Context) -> Outcome:
    return sound(arm, setting, seed, budget, Context(split=ctx.split))


def nameless(arm: Arm, setting: Any, seed: int, budget: Budget, ctx: Context) -> Outcome:
    return replace(sound(arm, setting, seed, budget, ctx), metrics={"lose": 1.0})


def exploding(arm: Arm, setting: Any, seed: int, budget: Budget, ctx: Context) -> Outcome:
    found = sound(arm, setting, seed, budget, ctx)
    return replace(found, metrics={"loss": float("inf")})


def broken(arm: Arm, setting: Any, seed: int, budget: Budget, ctx: Context) -> Outcome:
    raise KeyError("width")


def careless(arm: Arm, setting: Any, seed: int, budget: Budget, ctx: Context) -> Outcome:
    torch.set_grad_enabled(False)
    return sound(arm, setting, seed, budget, ctx)


def lopsided(arm: Arm, setting: Any, seed: int, budget: Budget, ctx: Context) -> Outcome:
    found = sound(arm, setting, seed, budget, ctx)
    return replace(found, curves=(Series("loss over step", (0.0, 1.0), (1.0,)),))


@pytest.mark.parametrize(
    ("run", "advice"),
    [
        (forgetful, "other figures on arm 'plain' when seed 0 runs again"),
        (seedless, "same figures for every seed on arm 'plain'"),
        (half_seedless, "same figures for every seed on arm 'plain'"),
        (peeking, "measure on the part that ctx.split names"),
        (favoured, "make them equal"),
        (unconditional, "gives no conditions"),
        (larger, "match them, or say with parameter_slack"),
        (stubborn, "tunes lr, which arm 'plain' never reads"),
        (silent, "never calls ctx.progress"),
        (nameless, r"claims about 'loss', and arm 'plain' gives \['diverged', 'lose'\]"),
        (exploding, "diverges at smoke"),
        (broken, "breaks on arm 'plain' at {'lr': 0.1} .KeyError: 'width'."),
        (lopsided, "x and y of different lengths"),
    ],
)
def test_a_planted_fault_of_the_run_is_caught(run: Any, advice: str) -> None:
    with pytest.raises(ConformanceError, match=advice):
        check_study(declare(run))


def test_state_that_a_run_leaves_changed_is_caught() -> None:
    try:
        with pytest.raises(ConformanceError, match="grad mode"):
            check_study(declare(careless))
    finally:
        torch.set_grad_enabled(True)


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"question": "It ends lower."}, "put its question as a question"),
        ({"arms": (Arm("plain", "", {"shift": 0.0}), ARMS[1])}, "does not say what the arm 'plain' is"),
        ({"arms": (ARMS[0], Arm("method", "the same", {"shift": 0.0}))}, "differ in nothing"),
        ({"claims": (replace(CLAIM, better="higher"),)}, "claims the opposite"),
        ({"claims": (replace(CLAIM, better="higher"),), "tuning": None}, "set `better` the other way"),
        ({"claims": (CLAIM, Claim("x", NotWorse(0.1), "loss", "method", "plain", better="higher"))}, "in one claim"),
        ({"claims": (replace(CLAIM, text=" "),)}, "without a text"),
        ({"budgets": SIZES | {"laptop": Budget(3, 30, {"steps": 30})}}, "at most 10"),
        ({"budgets": SIZES | {"laptop": Budget(2, 5, {"steps": 30})}}, "at least 3"),
        ({"tuning": Tuning({"lr": (0.1, 0.2)}, "loss", minutes=90)}, "at most 60"),
        ({"tuning": Tuning({"lr": (0.1, 0.2)}, "accuracy", better="higher")}, "tunes 'accuracy', which arm"),
        ({"claims": (replace(CLAIM, steady="again"),)}, "wants 'again' to be steady"),
    ],
)
def test_a_planted_fault_of_the_declaration_is_caught(changes: dict[str, Any], advice: str) -> None:
    with pytest.raises(ConformanceError, match=advice):
        check_study(declare(**changes))


SHIPPED = [(key, study.name) for key in study_keys() for study in find_studies(key)]


@pytest.mark.parametrize(("key", "name"), SHIPPED, ids=[f"{key}-{name}" for key, name in SHIPPED])
def test_every_study_that_ships_passes_the_suite(key: str, name: str) -> None:
    check_study(next(study for study in find_studies(key) if study.name == name))
