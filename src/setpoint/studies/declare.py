"""How a proof is declared.

A study says what is compared (arms), what is claimed, what is tuned and how large it is run; one function runs one arm
once. Everything else (tuning, seeds, storing, judging, the page) is the engine's::

    @study(
        "Does batch normalization make a sigmoid network trainable?",
        arms=(Arm("plain", "without normalization"), Arm("batchnorm", "after each linear layer")),
        claims=(Claim("It needs fewer steps", Better(0.5), "steps", "batchnorm", "plain", scale="ratio"),),
        tuning=Tuning({"lr": (0.1, 0.5, 2.0)}, metric="loss"),
        budgets={"smoke": Budget(2, 0.2, {"steps": 20}), "laptop": Budget(5, 10, {"steps": 3000}), ...},
    )
    def digits(arm, setting, seed, budget, ctx) -> Outcome: ...
"""

from __future__ import annotations

import inspect
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from setpoint.errors import InputError
from setpoint.progress import Progress, unseen
from setpoint.types.proving import Claim, Outcome, Shape

BudgetName = Literal["smoke", "laptop", "full"]
BUDGETS: tuple[BudgetName, ...] = get_args(BudgetName)
TUNING_SEED = 1000
"""Tuning counts its seeds from here, so that no judged seed was ever tuned on."""


class Diverged(FloatingPointError):
    """Raised by a run whose numbers stopped being finite; the run counts as diverged, and as the claim says."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One side of a comparison.

    Args:
        name: Lower-case words joined by hyphens.
        does: What it is, in a sentence.
        options: What makes it differ from the other arms, by name; read in the run as ``arm["norm"]``.
        knobs: Values to tune that only this arm has, on top of the grid that all arms share.
    """

    name: str
    does: str
    options: Mapping[str, Any] = field(default_factory=dict)
    knobs: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def __getitem__(self, option: str) -> Any:
        return _look_up(self.options, option, f"arm {self.name!r}", "option")


@dataclass(frozen=True, slots=True)
class Budget:
    """How large a study is run.

    Args:
        seeds: Replicates of each arm, at least two.
        minutes: What the judged runs should take at most, on two cores (``full``: on a GPU).
        options: Sizes, the same for every arm; read in the run as ``budget["steps"]``.
        name: Set by the study.
    """

    seeds: int
    minutes: float
    options: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""

    def __getitem__(self, option: str) -> Any:
        return _look_up(self.options, option, f"budget {self.name!r}", "option")


@dataclass(frozen=True, slots=True)
class Tuning:
    """What is tuned before anything is judged: on the validation split and on seeds of its own.

    Args:
        grid: Values by name, the same for every arm.
        metric: Metric of a run that decides; the mean over the tuning seeds is compared.
        better: Whether lower or higher is better.
        seeds: Seeds per setting.
        minutes: The stage stops after this time; the settings that every arm has tried then decide.
        options: Sizes that differ from those of the budget, such as fewer steps.
        widen: How many values may be added at an end of an axis of numbers while some arm is best there: on a shared
            axis for every arm, on a knob for the arms that have it. They go on by the ratio of the last two.
    """

    grid: Mapping[str, tuple[Any, ...]]
    metric: str
    better: Literal["lower", "higher"] = "lower"
    seeds: int = 1
    minutes: float = 60.0
    options: Mapping[str, Any] = field(default_factory=dict)
    widen: int = 2

    def settings(self, arm: Arm) -> list[dict[str, Any]]:
        """Every combination that is declared for ``arm``, in a fixed order."""
        axes = {**self.grid, **arm.knobs}
        return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


@dataclass(frozen=True, slots=True)
class Context:
    """What a run is given besides its arm.

    Args:
        split: Which held-out part to measure on: ``"valid"`` while tuning, ``"test"`` when judged.
        device: Where to run, as torch names it.
        data: A corpus of the user's to run on instead of the study's own; None for its own.
        folder: Scratch folder of this run. What lies in it after a kill is there when the run starts again, so a long
            run can go on from its checkpoint; it is removed when the run has ended.
        progress: Called with steps done, steps in all, and a few words.
    """

    split: Literal["valid", "test"] = "test"
    device: str = "cpu"
    data: Path | None = None
    folder: Path | None = None
    progress: Progress = unseen


class Run(Protocol):
    """Trains or measures one arm once."""

    def __call__(self, arm: Arm, setting: Mapping[str, Any], seed: int, budget: Budget, ctx: Context, /) -> Outcome:
        """One run. Random number generators are seeded with ``seed`` before the call."""


@dataclass(frozen=True)
class Study:
    """A declared study; made by `study`. Calling it runs one arm once.

    Args:
        name: Name of the function.
        module: Where it is declared.
        question: What it asks, in a sentence.
        arms, claims, tuning, budgets: As declared.
        run: The function.
        data: Names of the data sets it reads, for the record and for the store's keys.
        data_version: Gives a text that changes when the data do, such as a version or a checksum.
        takes_data: Whether it can run on a corpus of the user's.
        replicate: What a replicate is.
        alone: Whether runs must not share the machine with each other (anything that is timed).
        parameter_slack: By what fraction the parameter counts of two arms may differ.
    """

    name: str
    module: str
    question: str
    arms: tuple[Arm, ...]
    claims: tuple[Claim, ...]
    budgets: Mapping[str, Budget]
    run: Run = field(repr=False)
    tuning: Tuning | None = None
    data: tuple[str, ...] = ()
    data_version: Callable[[], str] | None = field(default=None, repr=False)
    takes_data: bool = False
    replicate: Literal["seed", "slice"] = "seed"
    alone: bool = False
    parameter_slack: float = 0.05

    def __post_init__(self) -> None:
        _check(self)

    def __call__(self, arm: Arm, setting: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
        """Run one arm once."""
        return self.run(arm, setting, seed, budget, ctx)

    @property
    def key(self) -> str:
        """Key of the method it belongs to: the module's last name with hyphens."""
        return self.module.rpartition(".")[2].replace("_", "-")

    def arm(self, name: str) -> Arm:
        """The arm of this name."""
        return next(arm for arm in self.arms if arm.name == name)

    def settings(self, arm: Arm) -> list[dict[str, Any]]:
        """Every setting that tuning tries for ``arm`` at first; one empty setting without tuning."""
        return self.tuning.settings(arm) if self.tuning else [{}]


def study(
    question: str,
    *,
    arms: tuple[Arm, ...],
    claims: tuple[Claim, ...],
    budgets: Mapping[str, Budget],
    tuning: Tuning | None = None,
    data: tuple[str, ...] = (),
    data_version: Callable[[], str] | None = None,
    takes_data: bool = False,
    replicate: Literal["seed", "slice"] = "seed",
    alone: bool = False,
    parameter_slack: float = 0.05,
) -> Callable[[Run], Study]:
    """Declare a study; decorates the function that runs one arm once.

    Args:
        question: What it asks, in a sentence.
        arms: The sides of the comparison.
        claims: What is claimed; the first claim of a method's first study is its headline.
        budgets: A `Budget` for each of smoke, laptop and full.
        tuning: What is tuned before, None if there is nothing to tune.
        data: Names of the data sets it reads.
        data_version: Gives a text that changes when the data do; results on other data are then stale.
        takes_data: Whether ``ctx.data`` is honoured.
        replicate: What a replicate is: a seed, or a slice of data (the run is then given its number as seed).
        alone: Whether runs must not share the machine with each other.
        parameter_slack: By what fraction the parameter counts of two arms may differ.

    Returns:
        A decorator that turns the function into a `Study`.

    Raises:
        InputError: The declaration contradicts itself; the message says where.

    >>> from setpoint.types import Better
    >>> small = Budget(seeds=2, minutes=0.1)
    >>> @study(
    ...     "Is two more than one?",
    ...     arms=(Arm("one", "gives 1"), Arm("two", "gives 2")),
    ...     claims=(Claim("it is", Better(0.5), "value", "two", "one", better="higher"),),
    ...     budgets={"smoke": small, "laptop": small, "full": small},
    ... )
    ... def counting(arm, setting, seed, budget, ctx):
    ...     return Outcome({"value": 1.0 if arm.name == "one" else 2.0})
    >>> counting.arm("two").does
    'gives 2'
    """

    def declare(run: Run) -> Study:
        return Study(
            name=getattr(run, "__name__", "run"),
            module=getattr(run, "__module__", ""),
            question=question,
            arms=arms,
            claims=claims,
            budgets={name: replace(budget, name=name) for name, budget in budgets.items()},
            run=run,
            tuning=tuning,
            data=data,
            data_version=data_version,
            takes_data=takes_data,
            replicate=replicate,
            alone=alone,
            parameter_slack=parameter_slack,
        )

    return declare


def _look_up(options: Mapping[str, Any], name: str, owner: str, what: str) -> Any:
    try:
        return options[name]
    except KeyError:
        raise InputError(f"{owner} has no {what} {name!r}; it has {', '.join(options) or 'none'}") from None


def _check(made: Study) -> None:
    """A declaration that contradicts itself is refused before minutes of work."""
    where = f"study {made.name!r}:"
    names = [arm.name for arm in made.arms]
    if not names or len(set(names)) != len(names):
        raise InputError(f"{where} expected arms with different names, got {names}")
    if not made.claims:
        raise InputError(f"{where} expected at least one claim")
    for claim in made.claims:
        _check_claim(where, claim, names)
    if set(made.budgets) != set(BUDGETS):
        raise InputError(f"{where} expected the budgets {', '.join(BUDGETS)}, got {', '.join(made.budgets) or 'none'}")
    for name, budget in made.budgets.items():
        if budget.seeds < 2:
            raise InputError(f"{where} budget {name!r} has {budget.seeds} seeds; an interval needs at least 2")
        _check_plain(f"{where} budget {name!r}", budget.options)
    parameters = inspect.signature(made.run).parameters
    if len(parameters) != 5:
        raise InputError(f"{where} its function takes (arm, setting, seed, budget, ctx), not {tuple(parameters)}")
    if made.tuning:
        for arm in made.arms:
            _check_grid(f"{where} arm {arm.name!r}", made.tuning, arm)
    elif any(arm.knobs for arm in made.arms):
        raise InputError(f"{where} an arm has knobs but there is no tuning; give tuning=Tuning(…)")


def _check_claim(where: str, claim: Claim, names: list[str]) -> None:
    for role in ("method", "baseline", "control"):
        name = getattr(claim, role)
        if name is not None and name not in names:
            raise InputError(f"{where} claim {claim.text!r} names the {role} {name!r}; the arms are {', '.join(names)}")
    if claim.baseline == claim.method:
        raise InputError(f"{where} claim {claim.text!r} compares {claim.method!r} with itself")
    if claim.control is not None and not claim.criterion.controlled:
        raise InputError(f"{where} claim {claim.text!r}: a control arm is for NotWorse and Equal only")
    if isinstance(claim.criterion, Shape) and (claim.baseline is not None or claim.scale == "ratio"):
        raise InputError(f"{where} claim {claim.text!r}: a Shape has neither a baseline nor a ratio")


def _check_grid(where: str, tuning: Tuning, arm: Arm) -> None:
    shared = set(tuning.grid) & set(arm.knobs)
    if shared:
        raise InputError(f"{where} narrows {', '.join(sorted(shared))}, which all arms share; rename its own knob")
    for name, values in {**tuning.grid, **arm.knobs}.items():
        if not isinstance(values, tuple) or not values:
            raise InputError(f"{where} {name!r} should be a tuple of values to try, not {values!r}")
        _check_plain(where, {name: list(values)})
    if tuning.seeds < 1:
        raise InputError(f"{where} tuning needs at least one seed, got {tuning.seeds}")
    if tuning.widen < 0:
        raise InputError(f"{where} widen is how many values may be added at an end, 0 for none, got {tuning.widen}")
    _check_plain(where, tuning.options)


def _check_plain(where: str, values: Mapping[str, Any]) -> None:
    try:
        json.dumps(dict(values), allow_nan=False)
    except (TypeError, ValueError):
        raise InputError(
            f"{where} should hold numbers, strings and lists only, got {dict(values)!r}; what an arm builds with "
            "belongs into Arm.options"
        ) from None
