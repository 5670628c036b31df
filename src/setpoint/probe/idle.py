"""Idle layers: blocks that hardly change what passes through them.

Measured is the mean angle between a token's vector before and after a block: the direction is what the next norm
lets through, so a block that doesn't turn the stream does next to nothing. Deep blocks of pre-norm networks tend that
way as the stream grows (Sun et al., 2025, arXiv 2502.05795), for an update of fixed size turns a longer vector less
(Li et al., 2025, arXiv 2512.08374). What leaving a block out costs is measured by an intervention
(`setpoint.probe.interventions.removal`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from setpoint.probe.base import Needs, Probe, known, looks_untrained, profile, stream
from setpoint.types import Finding, Severity, Stat, Trace
from setpoint.words import percent, range_words, rounded


@dataclass(frozen=True)
class IdleLayers(Probe):
    """Blocks that turn the stream by less than ``angle`` degrees.

    ``warning`` when they make up at least ``share`` of the depth, ``info`` below that, and where the weights look
    freshly initialized (`setpoint.probe.base.looks_untrained`).

    Args:
        angle: Degrees (setpoint: 3 degrees is an update of 5 % of the stream; the least active blocks of trained
            models were measured at 10 and more).
        share: Share of all blocks (setpoint: a quarter; Sun et al., 2025, find up to half of the depth idle).
    """

    angle: float = 3.0
    share: float = 0.25

    code: ClassVar[str] = "idle-layers"
    title: ClassVar[str] = "Blocks that hardly change the stream"
    needs: ClassVar[Needs] = {"residual": frozenset({Stat.STEP})}
    explanation: ClassVar[str] = (
        "These blocks return nearly what they were given: the token vectors keep their direction, and the next norm "
        "sees the same input. They cost time and memory and contribute little, and could be removed or merged. In a "
        "pre-norm network the usual cause is a stream that has grown so large that what a block adds no longer "
        "matters; zero-initialized branches that were never trained look the same. A single idle block is no harm."
    )

    def __call__(self, trace: Trace) -> list[Finding]:
        """At most one finding for all idle blocks."""
        turned = [(r, float(r.angle)) for r in stream(trace) if r.angle is not None and known(r.angle)]
        idle = sorted(((r, a) for r, a in turned if a < self.angle), key=lambda pair: pair[1])
        if not idle:
            return []
        share = len(idle) / len(turned)
        fresh = looks_untrained(trace)
        start = " The blocks' weights are of one size to within chance, as before any training." if fresh else ""
        severity: Severity = "warning" if share >= self.share and len(idle) > 1 and not fresh else "info"
        blocks = [r.site.block for r, _ in idle if r.site.block is not None]
        least = idle[0]
        median = sorted(a for _, a in turned)[len(turned) // 2]
        return [
            self.finding(
                "blocks",
                severity,
                value=least[1],
                unit="degrees",
                threshold=self.angle,
                source="setpoint: an update of 5 % of the stream; trained blocks were measured at 10 degrees and more",
                sites=[r.site.name for r, _ in idle],
                evidence=f"{len(idle)} of {len(turned)} blocks ({percent(share)}) turn the stream by under "
                f"{rounded(self.angle)} degrees: {range_words(blocks)}; the least is block {least[0].site.block} at "
                f"{rounded(least[1])} degrees, the median block turns it by {rounded(median)}.{start}",
                numbers={
                    "blocks": len(idle),
                    "share": share,
                    "least": least[1],
                    "median": median,
                    "looks_untrained": "yes" if fresh else "no",
                },
                chart=profile(
                    "Angle between a block's input and output",
                    "degrees",
                    {"angle": [(r.site.block or 0, a) for r, a in turned]},
                    threshold=self.angle,
                ),
            )
        ]
