"""What every probe and every intervention has in common.

A *probe* is a frozen dataclass whose fields are its thresholds and whose call is a pure function from a
`setpoint.types.Trace` to findings: no model, no tensor library, the same trace gives the same findings. It declares
which statistics it reads at which kind of site (`needs`), so that a recorder takes the union and nothing else.

An *intervention* answers what a recording can't: what happens to the output when something is changed. It gets the
model itself, runs passes of its own with hooks, and leaves the model as it was.

Writing one: subclass `Probe`, set `code`, `title`, `explanation`, `needs`, write `__call__` with `self.finding(...)`,
and add it to `setpoint.probe.registry.PROBES`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING, Any, ClassVar

from setpoint.types import Chart, Finding, Record, Series, Severity, Site, SiteRole, Stat, Trace

if TYPE_CHECKING:
    from torch import Tensor, nn

Needs = Mapping[SiteRole, frozenset[Stat]]


class _Reporter:
    """Builds findings under one code."""

    code: ClassVar[str]
    title: ClassVar[str]
    explanation: ClassVar[str]

    def finding(
        self,
        place: str,
        severity: Severity,
        *,
        value: float,
        unit: str,
        threshold: float,
        source: str,
        sites: Iterable[str],
        evidence: str,
        numbers: Mapping[str, float | int | str] | None = None,
        chart: Chart | None = None,
        explanation: str = "",
    ) -> Finding:
        """A finding of this probe at ``place``, whose id is ``code@place``."""
        return Finding(
            code=self.code,
            id=f"{self.code}@{place}",
            severity=severity,
            value=float(value),
            unit=unit,
            threshold=float(threshold),
            source=source,
            sites=tuple(sites),
            evidence=evidence,
            explanation=explanation or self.explanation,
            numbers=dict(numbers or {}),
            chart=chart,
        )


class Probe(_Reporter, ABC):
    """A pure function from a trace to findings. Subclasses are frozen dataclasses; their fields are thresholds."""

    needs: ClassVar[Needs]

    @abstractmethod
    def __call__(self, trace: Trace) -> list[Finding]:
        """Findings, worst first; empty when nothing is wrong or the trace lacks what the probe needs."""


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """The model under an intervention, and what is needed to run it.

    Args:
        model: The network, in eval mode. Interventions leave it untouched.
        anatomy: Its `setpoint.surgery.Anatomy`.
        batches: Real inputs; a few hundred tokens are enough for every intervention here.
        forward: ``forward(model, batch)`` returns the output.
        loss: ``loss(output, batch)``, a scalar (mean nats per token for a language model), or None.
        progress: ``progress(done, total, text)``, or None.
        failed: Interventions that this model could not take, one line each; filled as they run.
    """

    model: nn.Module
    anatomy: Any
    batches: Sequence[Any]
    forward: Callable[[nn.Module, Any], Any]
    loss: Callable[[Any, Any], Tensor] | None = None
    progress: Callable[[int, int, str], None] | None = None
    failed: list[str] = field(default_factory=list)


class Intervention(_Reporter, ABC):
    """Runs the model with something changed and says what came of it."""

    @abstractmethod
    def __call__(self, subject: Subject, trace: Trace) -> list[Finding]:
        """Findings; empty when there is nothing to change in this model."""


# --------------------------------------------------------------------------------------------------------------------
# Reading a trace


def stream(trace: Trace, *, embedding: bool = False) -> list[Record]:
    """Records of the residual stream after each block, in order of depth, led by the embedding if asked for.

    Sites without a block index (a stream that could not be placed) are left out.
    """
    after = [r for r in trace.by_role("residual") if r.site.block is not None]
    after.sort(key=lambda r: r.site.block or 0)
    return [*trace.by_role("embedding")[:1], *after] if embedding else after


def peak(record: Record) -> float | None:
    """Largest magnitude seen at a site, from its extremes or its listed peaks; None when neither was taken."""
    sizes = [abs(v) for v in (record.minimum, record.maximum) if v is not None and isfinite(v)]
    sizes += [abs(p.value) for p in record.peaks[:1] if isfinite(p.value)]
    return max(sizes, default=None)


def place(site: Site) -> str:
    """A site's part of a finding's id: its module, without blanks, so that it can be typed at a shell."""
    return site.module or site.name.replace(" ", ".")


def known(value: float | None) -> bool:
    """Whether a statistic was taken and is a finite number."""
    return value is not None and isfinite(value)


# --------------------------------------------------------------------------------------------------------------------
# Words and pictures


def number(value: float) -> str:
    """A figure for a person to read.

    >>> [number(v) for v in (0.0, 0.00123, 0.4567, 3.0, 7.25, 48.3, 23902.3, 3.7e9)]
    ['0', '0.0012', '0.46', '3', '7.2', '48', '23,902', '3.7e+09']
    """
    size = abs(value)
    if size == 0:
        return "0"
    if not isfinite(value) or size < 1e-3 or size >= 1e7:
        return f"{value:.2g}"
    if size < 1:
        return f"{value:.2g}"
    return f"{value:.1f}".removesuffix(".0") if size < 10 else f"{value:,.0f}"


def percent(share: float) -> str:
    """A share as a percentage, never rounded to 0 % or 100 % when it isn't.

    >>> [percent(s) for s in (0.0, 0.0004, 0.123, 0.98, 0.9996, 1.0)]
    ['0 %', '0.04 %', '12 %', '98 %', '99.96 %', '100 %']
    """
    value = 100 * share
    if value in (0.0, 100.0) or 1 <= value <= 99:
        return f"{value:.0f} %"
    return f"{value:.2g} %" if value < 1 else f"{value:.4g} %"


def listed(names: Sequence[Any], most: int = 4) -> str:
    """Names in a sentence, cut after ``most``.

    >>> listed([3, 4, 5]), listed(range(9))
    ('3, 4 and 5', '0, 1, 2, 3 and 5 more')
    """
    words = [str(n) for n in names]
    if len(words) > most + 1:
        words = [*words[:most], f"{len(words) - most} more"]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1] if words else "none"


def spans(blocks: Iterable[int]) -> list[tuple[int, int]]:
    """Runs of consecutive integers as ``(first, last)``.

    >>> spans([2, 11, 12, 13, 20])
    [(2, 2), (11, 13), (20, 20)]
    """
    runs: list[tuple[int, int]] = []
    for block in sorted(set(blocks)):
        if runs and block == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], block)
        else:
            runs.append((block, block))
    return runs


def range_words(blocks: Iterable[int]) -> str:
    """Blocks in words.

    >>> range_words([3]), range_words([1, 2, 3, 7])
    ('block 3', 'blocks 1-3 and 7')
    """
    runs = spans(blocks)
    parts = [str(a) if a == b else f"{a}-{b}" for a, b in runs]
    many = len(runs) > 1 or bool(runs and runs[0][0] != runs[0][1])
    return ("blocks " if many else "block ") + listed(parts)


def profile(
    title: str,
    y: str,
    lines: Mapping[str, Iterable[tuple[int, float | None]]],
    *,
    x: str = "block",
    log: bool = False,
    threshold: float | None = None,
) -> Chart:
    """A chart of quantities over depth, counted in blocks unless ``x`` says otherwise; non-finite values are gaps."""
    series = []
    for name, points in lines.items():
        pairs = [(float(x), float(v) if v is not None and isfinite(v) else None) for x, v in points]
        series.append(Series(name, tuple(x for x, _ in pairs), tuple(v for _, v in pairs)))
    return Chart("profile", title, x, y, tuple(series), log=log, threshold=threshold)


def heatmap(title: str, y: str, rows: Mapping[str, Mapping[int, float]], channels: Sequence[int]) -> Chart:
    """A chart of the given channels (x) over sites (one series each), coloured on a logarithmic scale."""
    xs = tuple(float(c) for c in channels)
    series = tuple(
        Series(name, xs, tuple(v if (v := values.get(c)) is not None and isfinite(v) else None for c in channels))
        for name, values in rows.items()
    )
    return Chart("heatmap", title, "channel", y, series, log=True)
