"""How close the values come to the limits of narrow number formats.

float16 ends at 65504: beyond it lies inf. Symmetric int8 with one scale per tensor has steps of max / 127: what is
smaller than half a step becomes zero, so when the largest value is more than 254 times the median magnitude, over half
of the values vanish. float8 e4m3 ends at 448 and, unlike int8, keeps its relative precision over a factor of 28,672
(448 / 2^-6); used without a scale it clips what is larger.

float16 is judged wherever values pass; int8 and float8 where matrix products read them: behind the norms, in front of
the down projections, and behind convolutions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from setpoint.probe.base import FLOAT16_MAX, Needs, Probe, known, peak, profile
from setpoint.types import Chart, Finding, Record, Severity, SiteRole, Stat, Trace
from setpoint.words import percent, rounded

FLOAT8_E4M3_MAX = 448.0
INT8_LEVELS = 127

_CARRIED: tuple[SiteRole, ...] = ("embedding", "residual", "hidden", "convolution", "norm", "logits")
_READ: tuple[SiteRole, ...] = ("norm", "hidden", "convolution")


@dataclass(frozen=True)
class PrecisionRisk(Probe):
    """Values that don't fit float16, int8 or float8; one finding per format.

    float16: ``warning`` when the largest value is within a factor ``tight`` of what it holds or beyond, and ``error``
    then if the model runs in float16; ``info`` within ``near``.
    int8, one scale per tensor: an input of a matrix product is coarse when the typical channel's largest value spans
    fewer than ``steps`` steps; ``warning`` when at least a ``share`` of all inputs are, ``info`` when some are. float8
    without a scale: ``info`` when a value is clipped.

    Args:
        tight: Factor to 65504 (setpoint: other inputs easily bring a factor of 2).
        near: Factor to 65504 worth a note (setpoint).
        steps: Steps for the typical channel's largest value (8 either way is what 4 bits have).
        share: Share of coarse inputs (setpoint: half; single ones can be kept in a wider format).
    """

    tight: float = 2.0
    near: float = 8.0
    steps: float = 8.0
    share: float = 0.5

    code: ClassVar[str] = "precision-risk"
    title: ClassVar[str] = "Values come close to the limits of a number format"
    needs: ClassVar[Needs] = {
        **{role: frozenset({Stat.MOMENTS}) for role in _CARRIED},
        **{role: frozenset({Stat.MOMENTS, Stat.CHANNELS}) for role in _READ},
    }
    explanation: ClassVar[str] = (
        "Largest and typical values lie so far apart, or so high, that a narrow number format can't hold both. Whether "
        "that matters depends on what you run in: float32 and bfloat16 share one range and are safe."
    )
    float16_explanation: ClassVar[str] = (
        "float16 holds nothing above 65504; one value beyond it becomes inf and then nan. Another input, a longer text "
        "or a step of training can add the missing factor, and a norm that squares its input in float16 overflows at "
        "256 already. Run in bfloat16 or float32, which have the range, or lower the stream's scale."
    )
    int8_explanation: ClassVar[str] = (
        "With one int8 scale for a whole tensor the largest value sets the step, and the typical channel is left with "
        "a handful of levels: most of what it says is rounded away. A scale per channel or per token, moving the scale "
        "into the weights, or clipping avoids it. It only matters if you quantize activations this way."
    )
    float8_explanation: ClassVar[str] = (
        "float8 e4m3 clips at 448. Cast without a scale, larger values are cut off; with one scale per tensor the "
        "format keeps its relative precision over a factor of 28,672 below the largest value, and only what is smaller "
        "than that loses digits."
    )

    def __call__(self, trace: Trace) -> list[Finding]:
        """At most one finding per number format."""
        carried = [(r, p) for r in trace.records.values() if r.site.role in _CARRIED and (p := peak(r)) is not None]
        found = [*self._float16(carried), *self._int8(trace), *self._float8(carried)]
        return sorted(found, key=lambda f: ("error", "warning", "info").index(f.severity))

    def _float16(self, carried: list[tuple[Record, float]]) -> list[Finding]:
        close = [(r, p) for r, p in carried if p * self.near > FLOAT16_MAX]
        if not close:
            return []
        worst, largest = max(close, key=lambda pair: pair[1])
        headroom = FLOAT16_MAX / largest
        in_use = worst.dtype == "float16"
        severity: Severity = "info" if headroom >= self.tight else "error" if in_use else "warning"
        runs = ", in which the model runs," if in_use else ""
        return [
            self.finding(
                "float16",
                severity,
                value=headroom,
                unit="x headroom",
                threshold=self.near if severity == "info" else self.tight,
                source="IEEE 754 binary16: largest finite value 65504",
                sites=[r.site.name for r, _ in sorted(close, key=lambda pair: -pair[1])],
                evidence=f"The largest value is {rounded(largest)} at {worst.site.name}: "
                + (
                    f"{rounded(1 / headroom)} times what float16{runs} can hold."
                    if headroom < 1
                    else f"float16{runs} leaves a factor of {headroom:.1f}."
                ),
                numbers={"largest": largest, "headroom": headroom, "sites": len(close)},
                chart=profile(
                    "Largest magnitude",
                    "magnitude",
                    {
                        "residual stream": [
                            (r.site.block, p)
                            for r, p in carried
                            if r.site.role == "residual" and r.site.block is not None
                        ]
                    },
                    log=True,
                    threshold=FLOAT16_MAX,
                ),
                explanation=self.float16_explanation,
            )
        ]

    def _int8(self, trace: Trace) -> list[Finding]:
        levels = {r.site.name: v for r in trace.records.values() if (v := typical_levels(r)) is not None}
        coarse = {name: v for name, v in levels.items() if v < self.steps}
        if not coarse:
            return []
        worst = min(coarse, key=coarse.__getitem__)
        severity: Severity = "warning" if len(coarse) >= self.share * len(levels) else "info"
        record = trace.records[worst]
        largest = peak(record) or 0.0
        step = largest / INT8_LEVELS
        lost = ""
        if record.median is not None and known(record.median) and record.median < step / 2:
            lost = " and over half of all values round to zero"
        return [
            self.finding(
                "int8",
                severity,
                value=coarse[worst],
                unit="int8 steps for the typical channel",
                threshold=self.steps,
                source="symmetric int8, one scale per tensor: step = max / 127",
                sites=sorted(coarse, key=coarse.__getitem__),
                evidence=f"At {len(coarse)} of {len(levels)} inputs of matrix products one int8 scale per tensor "
                f"leaves the typical channel under {rounded(self.steps)} of 127 steps; fewest at {worst}: "
                f"{rounded(coarse[worst])} (step {rounded(step)}){lost}.",
                numbers={"levels": coarse[worst], "step": step, "largest": largest, "sites": len(coarse)},
                chart=_steps_chart([r for r in trace.records.values() if r.site.name in levels], levels, self.steps),
                explanation=self.int8_explanation,
            )
        ]

    def _float8(self, carried: list[tuple[Record, float]]) -> list[Finding]:
        clipped = [(r, p) for r, p in carried if r.site.role in _READ and p > FLOAT8_E4M3_MAX]
        if not clipped:
            return []
        worst, largest = max(clipped, key=lambda pair: pair[1])
        read = sum(r.site.role in _READ for r, _ in carried)
        return [
            self.finding(
                "float8",
                "info",
                value=largest / FLOAT8_E4M3_MAX,
                unit="x the float8 range",
                threshold=1.0,
                source="float8 e4m3: largest finite value 448",
                sites=[r.site.name for r, _ in sorted(clipped, key=lambda pair: -pair[1])],
                evidence=f"{len(clipped)} of {read} inputs of matrix products ({percent(len(clipped) / read)}) exceed "
                f"448, float8's largest value, and need a scale; the largest is {rounded(largest)} at "
                f"{worst.site.name}.",
                numbers={"largest": largest, "sites": len(clipped)},
                explanation=self.float8_explanation,
            )
        ]


def _steps_chart(records: Sequence[Record], levels: Mapping[str, float], threshold: float) -> Chart:
    """Steps left over depth: the fewest in each block, or place by place where some stand outside of blocks."""
    title = "int8 steps left for the typical channel"
    lines: dict[str, dict[int, float]] = {}
    blocks = [r.site.block for r in records]
    for place, (record, block) in enumerate(zip(records, blocks, strict=True)):
        row, steps = lines.setdefault(record.site.role, {}), levels[record.site.name]
        x = place if block is None or None in blocks else block
        row[x] = min(steps, row.get(x, steps))
    points = {role: sorted(row.items()) for role, row in lines.items()}
    if None in blocks:
        return profile(title, "steps", points, x="place, in order of execution", log=True, threshold=threshold)
    return profile(f"{title}, fewest in each block", "steps", points, log=True, threshold=threshold)


def typical_levels(record: Record) -> float | None:
    """Int8 steps that one scale per tensor leaves for the median channel's largest magnitude; None if unknown."""
    if record.site.role not in _READ or record.channel_max is None or len(record.channel_max) < 4:
        return None
    finite = np.asarray(record.channel_max)[np.isfinite(record.channel_max)]
    live = finite[finite > 0]
    if not len(live):
        return None
    return float(INT8_LEVELS * np.median(live) / live.max())
