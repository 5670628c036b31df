"""Rank collapse: all tokens of a sequence end up with the same vector.

Attention averages tokens; if residual branches and feed-forwards don't keep them apart, the mean cosine between the
token vectors of a sequence goes to 1 over depth, and what distinguished the tokens is gone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from setpoint.probe.base import Needs, Probe, known, profile, stream
from setpoint.types import Finding, Stat, Trace
from setpoint.words import range_words, rounded


@dataclass(frozen=True)
class RankCollapse(Probe):
    """The mean cosine between token vectors comes close to 1: ``warning``, ``error`` beyond ``identical``.

    Args:
        cosine: Mean pairwise cosine (setpoint: 0.99 is an angle of 8 degrees between any two tokens; trained models
            were measured below 0.75).
        identical: Mean pairwise cosine at which the tokens are one vector in all but rounding.
    """

    cosine: float = 0.99
    identical: float = 0.99999

    code: ClassVar[str] = "rank-collapse"
    title: ClassVar[str] = "All tokens become alike"
    needs: ClassVar[Needs] = {
        "residual": frozenset({Stat.COSINE}),
        "embedding": frozenset({Stat.COSINE}),
    }
    explanation: ClassVar[str] = (
        "The vectors of different tokens of one sequence point the same way, so later layers can no longer tell the "
        "tokens apart. Causes are attention without a working residual path, uniform attention in every layer, or a "
        "common offset that has outgrown everything else (a bias or one large channel that all tokens share); in the "
        "last case the differences are still there, but small beside the offset, and a norm with centring or a narrow "
        "number format may lose them."
    )

    def __call__(self, trace: Trace) -> list[Finding]:
        """At most one finding for the whole stream."""
        measured = [
            (r, float(r.cosine)) for r in stream(trace, embedding=True) if r.cosine is not None and known(r.cosine)
        ]
        alike = [(r, c) for r, c in measured if r.site.block is not None and c > self.cosine]
        if not alike:
            return []
        worst = max(alike, key=lambda pair: pair[1])
        start = measured[0]
        where = "at the embedding" if start[0].site.block is None else f"after block {start[0].site.block}"
        return [
            self.finding(
                "residual",
                "error" if worst[1] > self.identical else "warning",
                value=worst[1],
                unit="mean cosine",
                threshold=self.identical if worst[1] > self.identical else self.cosine,
                source="setpoint: trained models were measured below 0.75",
                sites=[r.site.name for r, _ in sorted(alike, key=lambda pair: -pair[1])],
                evidence=f"The mean cosine between the tokens of a sequence is {start[1]:.3f} {where} and "
                f"{worst[1]:.5f} after block {worst[0].site.block}; it is above {rounded(self.cosine)} in "
                f"{range_words(r.site.block for r, _ in alike if r.site.block is not None)}.",
                numbers={"start": start[1], "largest": worst[1], "blocks": len(alike)},
                chart=profile(
                    "Mean cosine between token vectors",
                    "cosine",
                    {"cosine": [(-1 if r.site.block is None else r.site.block, c) for r, c in measured]},
                    threshold=self.cosine,
                ),
            )
        ]
