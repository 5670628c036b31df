"""Infinities and NaNs: where they first appear.

One non-finite value spreads to everything that reads it, so only the first place in execution order says anything
about the cause; the places behind it are listed as its wake.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

from setpoint.probe.base import Needs, Probe, listed, percent, place
from setpoint.types import Finding, SiteRole, Stat, Trace

_EVERYWHERE: tuple[SiteRole, ...] = ("embedding", "residual", "norm", "hidden", "convolution", "logits")


@dataclass(frozen=True)
class NonFinite(Probe):
    """Any inf or nan among activations or parameters is an error.

    Args:
        most: Non-finite values that are tolerated.
    """

    most: int = 0

    code: ClassVar[str] = "non-finite"
    title: ClassVar[str] = "Infinite or undefined values"
    needs: ClassVar[Needs] = {role: frozenset({Stat.MOMENTS}) for role in _EVERYWHERE}
    explanation: ClassVar[str] = (
        "Values that are infinite or not a number make every result behind them meaningless. The first place where "
        "they appear is the one to mend: an overflow in a narrow number format, a division by a norm of zero, the "
        "logarithm or root of a negative number, or weights that were already damaged by training. Places behind it "
        "only pass the damage on."
    )

    def __call__(self, trace: Trace) -> list[Finding]:
        """One error for damaged parameters, one for the first site that carries non-finite values."""
        found: list[Finding] = []
        broken = [p for p in trace.parameters.values() if not isfinite(p.norm)]
        if broken:
            found.append(
                self.finding(
                    "parameters",
                    "error",
                    value=len(broken),
                    unit="parameters",
                    threshold=0,
                    source="a weight must be a finite number",
                    sites=[p.name for p in broken],
                    evidence=f"{len(broken)} of {len(trace.parameters)} parameters hold inf or nan: "
                    f"{listed([p.name for p in broken], 3)}.",
                    numbers={"parameters": len(broken), "first": broken[0].name},
                )
            )
        hit = [r for r in trace.records.values() if r.non_finite > self.most]
        if hit:
            first = hit[0]
            total = first.non_finite + first.count if first.count >= 0 else first.non_finite
            share = first.non_finite / max(total, 1)
            behind = f"; {len(hit) - 1} of the {len(trace.records)} measured places carry them" if len(hit) > 1 else ""
            found.append(
                self.finding(
                    place(first.site),
                    "error",
                    value=first.non_finite,
                    unit="values",
                    threshold=self.most,
                    source="an activation must be a finite number",
                    sites=[r.site.name for r in hit],
                    evidence=f"{first.non_finite:,} values ({percent(share)}) are inf or nan at "
                    f"{first.site.name}, the first place where they appear{behind}.",
                    numbers={"non_finite": first.non_finite, "share": share, "sites": len(hit)},
                )
            )
        return found
