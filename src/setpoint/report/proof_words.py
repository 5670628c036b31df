"""Words and figures of a proof that the terminal, the page and the catalogue share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from setpoint.report.wording import amount, number
from setpoint.types.proving import Better, Claim, Criterion, Equal, Interval, NotWorse, Shape, Verdict

VERDICTS: Mapping[Verdict, str] = {"holds": "good", "reversed": "error", "no effect": "info", "undecided": "warning"}
"""The colour each verdict has."""


def amount_of(claim: Claim, value: float, *, signed: bool = False, factor: bool = False) -> str:
    """An effect or a bound in the claim's unit; a ratio as a percentage, or as a factor where that reads better.

    >>> claim = Claim("faster", Better(0.5), "steps", "a", "b", scale="ratio")
    >>> amount_of(claim, 0.02, signed=True), amount_of(claim, 6.5), amount_of(claim, -0.013)
    ('+2 %', '7.5 ×', '−1.3 %')
    """
    sign = "−" if value < 0 else "+" if signed and value > 0 else ""
    if claim.scale == "ratio":
        return f"{1 + value:.3g} ×" if factor or value >= 1 else f"{sign}{100 * abs(value):.3g} %"
    return sign + number(float(f"{abs(value):.3g}")) + (f" {claim.unit}" if claim.unit else "")


def estimate_of(claim: Claim, effect: Interval) -> str:
    """The estimate of an effect.

    >>> claim = Claim("lower", Better(0.5), "loss", "a", "b", unit="nats")
    >>> estimate_of(claim, Interval(0.2, -0.1, 0.5, 0.0, 0.4, 3))
    '+0.2 nats'
    """
    return amount_of(claim, effect.estimate, signed=not isinstance(claim.criterion, Shape), factor=as_factor(effect))


def zone_of(claim: Claim, bound: float) -> str:
    """What lies closer to no effect than a bound.

    >>> zone_of(Claim("faster", Better(1.0), "steps", "a", "b", scale="ratio"), 1.0)
    'a factor of 2'
    """
    if claim.scale == "ratio" and bound >= 0.1:
        return f"a factor of {1 + bound:.3g}"
    return f"±{amount_of(claim, bound)}"


def span_of(claim: Claim, effect: Interval, *, bootstrap: bool = False) -> str:
    """The interval of an effect.

    >>> claim = Claim("lower", Better(0.5), "loss", "a", "b", unit="nats")
    >>> span_of(claim, Interval(0.2, -0.1, 0.5, 0.0, 0.4, 3))
    '−0.1 to +0.5 nats'
    """
    low, high = (effect.bootstrap_low, effect.bootstrap_high) if bootstrap else (effect.low, effect.high)
    signed, factor = not isinstance(claim.criterion, Shape), as_factor(effect)
    ends = [amount_of(claim, end, signed=signed, factor=factor) for end in (low, high)]
    unit = (
        f" {claim.unit}" if claim.unit and claim.scale != "ratio" else " ×" if factor and claim.scale == "ratio" else ""
    )
    return f"{ends[0].removesuffix(unit)} to {ends[1]}"


def as_factor(effect: Interval) -> bool:
    """Whether a ratio is so large anywhere that all of it reads better as a factor."""
    return max(effect.estimate, effect.high) >= 1


def criterion_of(claim: Claim) -> str:
    """What is held against a claim, in words.

    >>> criterion_of(Claim("same", NotWorse(0.01), "loss", "dyt", "layernorm", scale="ratio"))
    'dyt at most 1 % worse than layernorm in loss'
    """
    kind: Criterion = claim.criterion
    against = f" than {claim.baseline}" if claim.baseline else ""
    metric = f" in {plain(claim.metric)}"
    if isinstance(kind, Better):
        return f"{claim.method} better{against}{metric} by {amount_of(claim, kind.delta)} or more"
    if isinstance(kind, NotWorse):
        return f"{claim.method} at most {amount_of(claim, kind.margin)} worse{against}{metric}"
    if isinstance(kind, Equal):
        with_ = f" and {claim.baseline}" if claim.baseline else ""
        return f"{claim.method}{with_} equal{metric} within {amount_of(claim, kind.tolerance)}"
    return f"{claim.metric} of {claim.method} is {kind.form}, parameter {kind.low:g} to {kind.high:g}"


def plain(name: str) -> str:
    """A name of the code's in words.

    >>> plain("seconds_per_step"), plain("held_out")
    ('seconds per step', 'held out')
    """
    return name.replace("_", " ")


def setting_of(setting: Mapping[str, Any]) -> str:
    """Tuned values in a line.

    >>> setting_of({"lr": 0.5, "embed_std": 0.02}), setting_of({})
    ('lr 0.5, embed std 0.02', 'nothing to tune')
    """
    return ", ".join(f"{plain(name)} {value}" for name, value in setting.items()) or "nothing to tune"


def cost_of(name: str, value: float) -> str:
    """A cost with its unit.

    >>> cost_of("seconds", 83.21), cost_of("memory", 3.5e8), cost_of("parameters", 27110)
    ('83.2 s', '350 MB', '27.1k')
    """
    if name == "seconds":
        return f"{value:.3g} s" if value < 600 else f"{value / 60:.3g} min"
    if name in ("memory", "bytes"):
        return f"{value / 1e6:.3g} MB" if value < 1e9 else f"{value / 1e9:.3g} GB"
    return amount(value) if value == round(value) else number(value)
