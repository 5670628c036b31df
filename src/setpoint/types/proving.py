"""What a proof claims, what one run gave, and what was judged.

A claim names two arms and a metric and holds their paired differences, oriented so that positive is better for the
method, against a criterion. There are four answers: ``holds``, ``reversed``, ``no effect`` and ``undecided``. The last
one is the answer whenever the interval does not allow another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from setpoint.errors import InputError
from setpoint.types.findings import Series

Verdict = Literal["holds", "reversed", "no effect", "undecided"]
Form = Literal["linear", "exponential", "power"]


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over replicates with its 95 % intervals.

    Args:
        estimate: The mean; for a claim on a ratio, the geometric mean minus 1.
        low, high: Student t.
        bootstrap_low, bootstrap_high: Percentile bootstrap over the same replicates; with few of them it is too narrow.
        replicates: How many.
    """

    estimate: float
    low: float
    high: float
    bootstrap_low: float
    bootstrap_high: float
    replicates: int

    def within(self, low: float, high: float) -> bool:
        """Whether all of the Student interval lies in ``[low, high]``."""
        return low <= self.low and self.high <= high


@dataclass(frozen=True, slots=True)
class Better:
    """The method is better by at least ``delta``, the smallest effect that matters.

    Holds when the whole interval is above 0 and the estimate reaches ``delta``; reversed when the whole interval is
    below 0; no effect when the whole interval lies within ±``delta``.

    >>> Better(0.1).judge(Interval(0.2, 0.05, 0.35, 0.1, 0.3, 5), 0.1)
    'holds'
    """

    delta: float
    controlled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _positive("delta", self.delta)

    @property
    def bound(self) -> float:
        """Edge of what matters, in the claim's unit."""
        return self.delta

    def judge(self, effect: Interval, bound: float) -> Verdict:
        """The verdict on an effect. ``bound`` is ``self.bound`` on the scale of the effect."""
        if effect.low > 0 and effect.estimate >= bound:
            return "holds"
        if effect.high < 0:
            return "reversed"
        return "no effect" if effect.within(-bound, bound) else "undecided"


@dataclass(frozen=True, slots=True)
class NotWorse:
    """The method is at most ``margin`` worse.

    Holds when the whole interval is above −``margin``; reversed when all of it is below. A test that a control arm
    passes which is bound to fail shows nothing, for the method or against it: no effect if the method passes as well,
    undecided if it does not.

    >>> NotWorse(0.01).judge(Interval(0.0, -0.02, 0.02, -0.01, 0.01, 3), 0.01)
    'undecided'
    """

    margin: float
    controlled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _positive("margin", self.margin)

    @property
    def bound(self) -> float:
        """Edge of what matters, in the claim's unit."""
        return self.margin

    def judge(self, effect: Interval, bound: float, control: Interval | None = None) -> Verdict:
        """The verdict on an effect, given that of the control arm against the same baseline."""
        if control is not None and self.passes(control, bound):
            return "no effect" if self.passes(effect, bound) else "undecided"
        if effect.high < -bound:
            return "reversed"
        return "holds" if self.passes(effect, bound) else "undecided"

    def passes(self, effect: Interval, bound: float) -> bool:
        """Whether an effect is certain to be no worse than the margin."""
        return effect.low > -bound


@dataclass(frozen=True, slots=True)
class Equal:
    """Method and baseline differ by at most ``tolerance``.

    Holds when the whole interval lies within ±``tolerance``; reversed when all of it lies outside, on one side. With a
    control arm that should differ and does not, no effect if the method is equal too, undecided if it is not.

    >>> Equal(1e-5).judge(Interval(2e-7, 1e-7, 3e-7, 1e-7, 3e-7, 3), 1e-5)
    'holds'
    """

    tolerance: float
    controlled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _positive("tolerance", self.tolerance)

    @property
    def bound(self) -> float:
        """Edge of what matters, in the claim's unit."""
        return self.tolerance

    def judge(self, effect: Interval, bound: float, control: Interval | None = None) -> Verdict:
        """The verdict on an effect, given that of the control arm against the same baseline."""
        if control is not None and self.passes(control, bound):
            return "no effect" if self.passes(effect, bound) else "undecided"
        if self.passes(effect, bound):
            return "holds"
        return "reversed" if effect.low > bound or effect.high < -bound else "undecided"

    def passes(self, effect: Interval, bound: float) -> bool:
        """Whether an effect is certain to be within the tolerance."""
        return effect.within(-bound, bound)


@dataclass(frozen=True, slots=True)
class Shape:
    """A curve of one arm has a form, and a parameter of it lies in a range.

    ``linear`` is y = a + b·x with parameter b; ``exponential`` is y = a·exp(b·x); ``power`` is y = a·x^b. The form is
    fitted to the curve of each replicate. Holds when the fits are good (mean R² at least ``r2``) and the whole interval
    of b lies in ``[low, high]``; reversed when all of it lies outside, on one side; no effect when the form does not
    fit.

    >>> Shape("power", 0.4, 0.6).judge(Interval(0.5, 0.45, 0.55, 0.46, 0.54, 3), fit=0.99)
    'holds'
    """

    form: Form
    low: float
    high: float
    r2: float = 0.9
    controlled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise InputError(f"expected low < high for the parameter of a shape, got {self.low} and {self.high}")

    def judge(self, parameter: Interval, fit: float) -> Verdict:
        """The verdict on the fitted parameter; ``fit`` is the mean R²."""
        if fit < self.r2:
            return "no effect"
        if parameter.within(self.low, self.high):
            return "holds"
        return "reversed" if parameter.low > self.high or parameter.high < self.low else "undecided"


Criterion = Better | NotWorse | Equal | Shape


@dataclass(frozen=True, slots=True)
class Claim:
    """One sentence that the runs of a study confirm or not.

    Args:
        text: The claim in plain words.
        criterion: What is held against it: `Better`, `NotWorse`, `Equal` or `Shape`.
        metric: Name of the metric of a run (for `Shape`: of a curve). ``"diverged"`` is there for every run, 0 or 1.
        method: Name of the arm that the claim is about.
        baseline: Name of the arm it is compared with, replicate by replicate. None: the metric is a comparison in
            itself (a difference, or a ratio with ``scale="ratio"``) and is held against nothing, 0 or 1.
        better: Whether lower or higher values of the metric are better.
        scale: ``"difference"``, in the metric's unit, or ``"ratio"``: effects and bounds are then fractions, 0.01 for
            one per cent and 1.0 for twice as good. A ratio needs positive metrics.
        unit: The metric's unit in words.
        diverged: What the metric counts as for a run that diverged, or the worst finite value of the claim's arms if
            that is worse. None: such a run leaves the claim undecided. It is never left out.
        control: For `NotWorse` and `Equal`, an arm that should fail the criterion if the study can tell anything.
        steady: Name of a metric of the same runs that should be 0 (plain against plain, as a fraction). Beyond ±2 % in
            any replicate this machine is too restless for the claim, which then stays undecided.
    """

    text: str
    criterion: Criterion
    metric: str
    method: str
    baseline: str | None = None
    better: Literal["lower", "higher"] = "lower"
    scale: Literal["difference", "ratio"] = "difference"
    unit: str = ""
    diverged: float | None = None
    control: str | None = None
    steady: str | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one run of a study gives.

    Args:
        metrics: Final figures by name. One that is not finite marks the run as diverged.
        curves: Figures over the run, for the page and for `Shape`. The name says what over what: ``"loss over step"``.
        cost: What the run cost, by name: ``parameters``, ``bytes``, … Seconds and memory are measured by the engine.
        conditions: What has to be the same in every arm: steps, batch size, tokens seen. The engine compares them.
    """

    metrics: Mapping[str, float]
    curves: tuple[Series, ...] = ()
    cost: Mapping[str, float] = field(default_factory=dict)
    conditions: Mapping[str, float | int | str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Pair:
    """What one replicate gave in the two arms of a claim; None where a value is missing.

    Args:
        replicate: Its seed, or number of its data slice.
        method, baseline: The metric in each arm.
    """

    replicate: int
    method: float | None
    baseline: float | None


@dataclass(frozen=True, slots=True)
class Judgement:
    """A claim and what the runs say about it.

    Args:
        claim: The claim.
        verdict: One of the four words.
        reason: Why, in one line.
        effect: The effect with its intervals; None when there are too few values.
        pairs: The values behind it.
        control: The same effect for the control arm, if the claim has one.
    """

    claim: Claim
    verdict: Verdict
    reason: str
    effect: Interval | None = None
    pairs: tuple[Pair, ...] = ()
    control: Interval | None = None


@dataclass(frozen=True, slots=True)
class Band:
    """A curve of an arm over its replicates: mean, lowest and highest at each x."""

    name: str
    x: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Trial:
    """One setting that was tried in the tuning stage.

    Args:
        setting: The values.
        score: Mean of the tuning metric over the tuning seeds; None when a run diverged.
    """

    setting: Mapping[str, Any]
    score: float | None


@dataclass(frozen=True, slots=True)
class ArmResult:
    """One arm of a study.

    Args:
        name: Its name.
        does: What it is, in a sentence.
        setting: The tuned values it ran with.
        runs, diverged, failed: How many judged runs ended, diverged, or broke with an error.
        cost: Means over its runs: ``seconds``, ``memory`` (bytes), ``parameters``, …
        trials: What tuning tried.
        curves: Its curves over the replicates.
        error: What the last run that broke said, in a line; "" if none did.
    """

    name: str
    does: str
    setting: Mapping[str, Any]
    runs: int = 0
    diverged: int = 0
    failed: int = 0
    cost: Mapping[str, float] = field(default_factory=dict)
    trials: tuple[Trial, ...] = ()
    curves: tuple[Band, ...] = ()
    error: str = ""

    @property
    def broke(self) -> bool:
        """Whether every run broke, so that nothing is known of this arm."""
        return 0 < self.runs == self.failed


@dataclass(frozen=True, slots=True)
class StudyResult:
    """What one study gave.

    Args:
        name: Its name, unique within the method.
        question: What it asks, in a sentence.
        judgements: One per claim.
        arms: One per arm.
        replicate: What a replicate is: ``"seed"`` or ``"slice"``.
        replicates: The seeds or slices that were judged.
        options: What the budget set.
        tuning: Where the settings come from, in one line.
        tuning_metric: What tuning looked at; "" without tuning.
        notes: Facts that a reader must know to judge the result.
    """

    name: str
    question: str
    judgements: tuple[Judgement, ...]
    arms: tuple[ArmResult, ...]
    replicate: str
    replicates: tuple[int, ...]
    options: Mapping[str, Any]
    tuning: str = ""
    tuning_metric: str = ""
    notes: tuple[str, ...] = ()


def _positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"expected a positive {name}, the smallest effect that matters, got {value!r}")
