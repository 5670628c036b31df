"""What follows from the measurements: findings, their charts and what treats them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Severity = Literal["info", "warning", "error"]
SEVERITIES: tuple[Severity, ...] = ("info", "warning", "error")


@dataclass(frozen=True, slots=True)
class Remedy:
    """A method that treats a finding.

    Args:
        key: The method's key, as in ``setpoint show KEY``.
        title: What doing it means, in a few words.
        when: ``"now"`` on the model as it is, ``"training"`` when it is (re)trained.
        reference: Authors, year and arXiv number.
        available: Whether this version of setpoint carries the method; if not, only the paper is named.
        shell: How it is applied at a shell, with ``MODEL`` for the model; "" where it can't be.
        python: How it is applied in Python.
        proof: The method whose proof shows what it does, as in ``setpoint prove KEY``; "" for none.
    """

    key: str
    title: str
    when: Literal["now", "training"]
    reference: str
    available: bool = False
    shell: str = ""
    python: str = ""
    proof: str = ""


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart: ``y`` against ``x``, None where there is no value."""

    name: str
    x: tuple[float, ...]
    y: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Chart:
    """A picture as data; the report draws it.

    Args:
        kind: ``"profile"`` lines over depth, ``"heatmap"`` channels x blocks (one series per block, x channels).
        title: What it shows, with the unit.
        x, y: Axis titles.
        series: The data.
        log: Whether the value axis (colour for a heat map) is logarithmic.
        threshold: A horizontal rule at the threshold, None for none.
    """

    kind: Literal["profile", "heatmap"]
    title: str
    x: str
    y: str
    series: tuple[Series, ...]
    log: bool = False
    threshold: float | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong, or worth knowing, with the evidence.

    Args:
        code: What kind ("massive-activation"); remedies are looked up by it.
        id: Stable over runs on the same model, ``code@place``; what ``--ignore`` takes.
        severity: ``info < warning < error``.
        value: The measured number that crossed the threshold.
        unit: Its unit in words ("x median", "nats").
        threshold: The number it was held against.
        source: Where the threshold comes from.
        sites: Names of the sites concerned, worst first.
        evidence: One line of plain words with the numbers.
        explanation: A paragraph: what it is, why it matters, when it is harmless.
        remedies: Methods that treat it and accept this model.
        numbers: The finding's figures by name.
        chart: What to draw.
    """

    code: str
    id: str
    severity: Severity
    value: float
    unit: str
    threshold: float
    source: str
    sites: tuple[str, ...]
    evidence: str
    explanation: str = ""
    remedies: tuple[Remedy, ...] = ()
    numbers: Mapping[str, float | int | str] = field(default_factory=dict)
    chart: Chart | None = None
