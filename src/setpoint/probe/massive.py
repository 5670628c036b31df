"""Massive activations: a few entries of the residual stream thousands of times larger than the rest.

The rule is the one of Owen et al. (2025, arXiv 2503.22329): an entry h of a block's output is massive when |h| > 100
and |h| > 1000 times the median magnitude of that output. They usually sit at one token (often the first) and one or two
channels, are written by one block and carried to almost the last; the attention of later blocks uses that token as a
place to put mass that should go nowhere. What depends on them only an intervention can say
(`setpoint.probe.interventions.massive`).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from setpoint.probe.base import FLOAT16_MAX, Needs, Probe, known, place, profile, stream
from setpoint.types import Chart, Finding, Peak, Record, Severity, Stat, Trace
from setpoint.words import listed, range_words, rounded, spans


@dataclass(frozen=True)
class Run:
    """A massive entry followed through depth.

    Args:
        first, last: Blocks between which it stays massive, both included.
        channels: Its channels, largest value first.
        tokens: Token positions, most often seen first.
        worst: The largest entry.
        block: Block after which ``worst`` was measured.
        median: Median magnitude there.
    """

    first: int
    last: int
    channels: tuple[int, ...]
    tokens: tuple[int, ...]
    worst: Peak
    block: int
    median: float

    @property
    def ratio(self) -> float:
        """Largest magnitude over the median magnitude at its block."""
        return abs(self.worst.value) / self.median if self.median > 0 else float("inf")


@dataclass(frozen=True)
class MassiveActivation(Probe):
    """Entries of the residual stream that are massive by the rule of Owen et al. (2025).

    ``info`` while they fit the number format with room to spare: most language models have them and work. ``warning``
    when the largest is within a factor ``1 / headroom`` of what float16 can hold.

    Args:
        absolute: Smallest magnitude of a massive entry (Owen et al., 2025).
        relative: Smallest multiple of the median magnitude (Owen et al., 2025).
        headroom: Share of float16's largest number (65504) above which precision is at risk.
    """

    absolute: float = 100.0
    relative: float = 1000.0
    headroom: float = 0.5

    code: ClassVar[str] = "massive-activation"
    title: ClassVar[str] = "A few entries dwarf the rest of the stream"
    needs: ClassVar[Needs] = {"residual": frozenset({Stat.MOMENTS, Stat.MEDIAN, Stat.PEAKS, Stat.CHANNELS})}
    explanation: ClassVar[str] = (
        "A massive activation is an entry of the residual stream thousands of times larger than the typical one, at "
        "the same channel and usually at the first token whatever the input. It acts as a fixed bias: later attention "
        "heads send the mass they don't need to that token. Most language models have some and rely on them, so they "
        "are harmless in float32 and bfloat16; setting them to zero usually ruins the model, setting them to their "
        "mean doesn't. They are in the way of quantization: one scale per tensor has to cover them, and nothing is "
        "left for the typical entries. Run with --deep to see what depends on this one."
    )

    def is_massive(self, value: float, median: float) -> bool:
        """Whether an entry of magnitude ``|value|`` is massive beside the site's median magnitude."""
        return abs(value) > self.absolute and abs(value) > self.relative * median

    def runs(self, trace: Trace) -> list[Run]:
        """Massive entries followed through depth, largest first."""
        found: dict[int, dict[int, list[tuple[Peak, float]]]] = defaultdict(lambda: defaultdict(list))
        for record in stream(trace):
            if record.median is None or not known(record.median):
                continue
            for entry in record.peaks:
                if known(entry.value) and self.is_massive(entry.value, record.median):
                    found[entry.channel][record.site.block or 0].append((entry, record.median))
        by_start: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        for channel, blocks in found.items():
            for first, last in spans(blocks):
                by_start[first].append((channel, first, last))
        return sorted(
            (self._run(group, found) for group in by_start.values()),
            key=lambda run: -abs(run.worst.value),
        )

    @staticmethod
    def _run(
        group: list[tuple[int, int, int]],
        found: dict[int, dict[int, list[tuple[Peak, float]]]],
    ) -> Run:
        """Channels that become massive at the same block are one finding."""
        entries = [
            (entry, block, median)
            for channel, first, last in group
            for block in range(first, last + 1)
            for entry, median in found[channel][block]
        ]
        worst, block, median = max(entries, key=lambda e: abs(e[0].value))
        size: dict[int, float] = defaultdict(float)
        seen: dict[int, int] = defaultdict(int)
        for entry, _, _ in entries:
            size[entry.channel] = max(size[entry.channel], abs(entry.value))
            seen[entry.token] += 1
        return Run(
            first=min(first for _, first, _ in group),
            last=max(last for _, _, last in group),
            channels=tuple(sorted(size, key=lambda c: -size[c])),
            tokens=tuple(sorted(seen, key=lambda t: (-seen[t], t))),
            worst=worst,
            block=block,
            median=median,
        )

    def __call__(self, trace: Trace) -> list[Finding]:
        """One finding per block that first writes massive entries, largest first."""
        records = stream(trace)
        return [self._finding(run, records) for run in self.runs(trace)]

    def _finding(self, run: Run, records: list[Record]) -> Finding:
        at_risk = abs(run.worst.value) > self.headroom * FLOAT16_MAX
        severity: Severity = "warning" if at_risk else "info"
        blocks = range(run.first, run.last + 1)
        held = [r.site for r in records if r.site.block in blocks]
        word = "token" if held[0].channel_axis == -1 else "position"
        tokens = f"{word}{'s' if len(run.tokens) > 1 else ''} {listed(run.tokens)}"
        also = f" (also channel{'s' if len(run.channels) > 2 else ''} {listed(run.channels[1:])})"
        risk = f" That is {rounded(abs(run.worst.value) / FLOAT16_MAX)} times what float16 can hold." if at_risk else ""
        return self.finding(
            place(held[0]),
            severity,
            value=run.ratio,
            unit="x median",
            threshold=self.relative,
            source="Owen et al., 2025 · arXiv 2503.22329: |h| > 100 and > 1000 x the median",
            sites=[site.name for site in held],
            evidence=f"Channel {run.worst.channel}{also if len(run.channels) > 1 else ''} reaches "
            f"{rounded(run.worst.value)} at {tokens} in {range_words(blocks)}: "
            f"{rounded(run.ratio)} times the median {rounded(run.median)} (largest after block {run.block}).{risk}",
            numbers={
                "value": run.worst.value,
                "median": run.median,
                "ratio": run.ratio,
                "token": run.worst.token,
                "channel": run.worst.channel,
                "first_block": run.first,
                "last_block": run.last,
                "largest_after_block": run.block,
                "channels": ", ".join(map(str, run.channels)),
                "tokens": ", ".join(map(str, run.tokens)),
            },
            chart=self._chart(run, records),
        )

    def _chart(self, run: Run, records: list[Record]) -> Chart:
        channel = run.worst.channel
        wide = [(r.site.block or 0, r.channel_max) for r in records if r.channel_max is not None]
        held = [(block, largest) for block, largest in wide if channel < len(largest) > 1]
        return profile(
            "Largest and typical magnitude in the residual stream",
            "magnitude",
            {
                f"channel {channel}": [(block, float(largest[channel])) for block, largest in held],
                "largest other channel": [(block, float(np.delete(largest, channel).max())) for block, largest in held],
                "median": [(r.site.block or 0, r.median) for r in records],
            },
            log=True,
            threshold=self.absolute,
        )
