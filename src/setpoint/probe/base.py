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

import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, sqrt
from typing import TYPE_CHECKING, Any, ClassVar

from setpoint.progress import Progress
from setpoint.types import Chart, Finding, Record, Series, Severity, Site, SiteRole, Stat, Trace

if TYPE_CHECKING:
    from torch import Tensor, nn

Needs = Mapping[SiteRole, frozenset[Stat]]

_NUMBER = re.compile(r"\d+")

FLOAT16_MAX = 65504.0
"""The largest number that float16 holds."""


_KINDS: Mapping[SiteRole, str] = {
    "embedding": "residual stream",
    "residual": "residual stream",
    "branch": "residual stream",
    "norm": "norm",
    "hidden": "hidden layer",
    "attention": "attention",
    "convolution": "convolution",
    "logits": "head",
}


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

    def lacks(self, trace: Trace) -> str:
        """Why a trace can't answer this probe's question, in a few words; "" when it can."""
        found = {r.site.role for r in trace.records.values()} | {r.site.role for r in trace.attention.values()}
        if not found.isdisjoint(self.needs):
            return ""
        kinds = " or ".join(dict.fromkeys(_KINDS[role] for role in self.needs))
        return f"no {kinds}"


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
        failed: Interventions that this model could not take, code -> reason; filled as they run.
    """

    model: nn.Module
    anatomy: Any
    batches: Sequence[Any]
    forward: Callable[[nn.Module, Any], Any]
    loss: Callable[[Any, Any], Tensor] | None = None
    progress: Progress | None = None
    failed: dict[str, str] = field(default_factory=dict)


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


def looks_untrained(trace: Trace) -> bool:
    """Whether the weights of all blocks are of one size to within chance, as freshly initialized ones are.

    The norm of n independent values is known to a share of 1 / sqrt(2 n); over some blocks it spreads by six of these.
    Training moves the blocks apart by per cents.
    """
    families: dict[tuple[str, int], list[float]] = defaultdict(list)
    for p in trace.parameters.values():
        if p.block is not None and p.size >= 1000:
            families[_NUMBER.sub("#", p.name), p.size].append(p.norm)
    alike = [
        (max(norms) - min(norms)) * sqrt(2 * size) <= 6 * min(norms)
        for (_, size), norms in families.items()
        if len(norms) > 1
    ]
    return bool(alike) and all(alike)


def known(value: float | None) -> bool:
    """Whether a statistic was taken and is a finite number."""
    return value is not None and isfinite(value)


# --------------------------------------------------------------------------------------------------------------------
# Pictures


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
