"""Units that never speak, and units that rarely do.

A hidden unit (or a convolution's channel) that is zero on every input has no gradient and takes no part: it is dead.
Whether it is dead or only rare depends on how much was seen: a unit that stayed silent on n independent tokens is
active, with 95 % confidence, on at most a share 3/n of them.

Sparsity is the share of hidden activations that are exactly zero. High sparsity of a ReLU network is an opportunity:
what is zero need not be computed (Luo et al., 2024, arXiv 2411.02335). How many can be skipped when nothing is exactly
zero is measured by the intervention in `setpoint.probe.interventions.sparsity`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from setpoint.probe.base import Needs, Probe, known, profile
from setpoint.types import Finding, Record, Severity, SiteRole, Stat, Trace
from setpoint.words import listed, percent

_ROLES: tuple[SiteRole, ...] = ("hidden", "convolution")


@dataclass(frozen=True)
class DeadUnits(Probe):
    """Hidden units or channels that are inactive on all of the data.

    ``warning`` when a layer has more than ``share`` of its units dead and at least ``tokens`` tokens (or positions of
    feature maps) were seen, ``info`` otherwise.

    Args:
        share: Share of a layer's units (setpoint: a quarter of the width is lost; a trained MobileNetV2 was measured at
            0.5 % over all, and 12 % in its first layer).
        tokens: Tokens below which silence proves little (setpoint: by the rule of three a unit silent on 1000
            tokens is active on at most 0.3 % of them).
        tiny: A channel is silent when it never exceeds this share of the median channel's maximum (batch norms with a
            vanished gain leave 1e-20 rather than 0).
    """

    share: float = 0.25
    tokens: int = 1000
    tiny: float = 1e-6

    code: ClassVar[str] = "dead-units"
    title: ClassVar[str] = "Units that are never active"
    needs: ClassVar[Needs] = {role: frozenset({Stat.MOMENTS, Stat.CHANNELS, Stat.ZEROS}) for role in _ROLES}
    explanation: ClassVar[str] = (
        "These units were zero on everything that was run. A dead unit computes nothing and, behind a ReLU, receives "
        "no gradient, so training doesn't revive it: the layer is narrower than it looks. Usual causes are a learning "
        "rate that was too high, a large negative bias, or a norm whose gain went to zero. The count depends on the "
        "amount and variety of data: a unit that answers to something rare looks dead on a short sample. Dead units "
        "can be pruned without any change to the output on such data."
    )

    def dead(self, record: Record) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
        """Indices of the units that are silent at a site; a unit without a finite value is not known to be."""
        silent: np.ndarray[tuple[int], np.dtype[np.bool_]] | None = None
        if record.channel_active is not None:
            silent = np.asarray(record.channel_active) <= 0
        if record.channel_max is not None and len(record.channel_max):
            largest = np.asarray(record.channel_max)
            # Where nothing finite was seen the largest finite value is 0, as where all was zero.
            seen = np.full(len(largest), not record.non_finite)
            if silent is not None and len(silent) == len(largest):
                seen |= silent | (largest > 0)
            tiny = seen & (largest <= self.tiny * float(np.median(largest[seen]))) if seen.any() else seen
            silent = tiny if silent is None or len(silent) != len(tiny) else silent | tiny
        return np.flatnonzero(silent) if silent is not None else np.zeros(0, dtype=np.intp)

    def __call__(self, trace: Trace) -> list[Finding]:
        """At most one finding for hidden units and one for channels of convolutions."""
        found = []
        for role, words in (("hidden", "hidden units"), ("convolution", "convolution channels")):
            records = [r for r in trace.records.values() if r.site.role == role and _finite(r)]
            dead = {r.site.name: (r, self.dead(r)) for r in records if r.tokens > 0}
            dead = {name: pair for name, pair in dead.items() if len(pair[1])}
            if dead:
                found.append(self._finding(role, words, dead, records))
        return found

    def _finding(
        self,
        role: str,
        words: str,
        dead: dict[str, tuple[Record, np.ndarray[tuple[int], np.dtype[np.intp]]]],
        records: list[Record],
    ) -> Finding:
        shares = {name: len(units) / _width(record) for name, (record, units) in dead.items()}
        worst = max(shares, key=shares.__getitem__)
        record, units = dead[worst]
        total = sum(len(u) for _, u in dead.values())
        width = sum(_width(r) for r in records)
        severity: Severity = "warning" if shares[worst] > self.share and record.tokens >= self.tokens else "info"
        return self.finding(
            role,
            severity,
            value=shares[worst],
            unit="share of a layer",
            threshold=self.share,
            source="setpoint: a warning from a quarter of a layer's width on, seen on at least 1000 tokens",
            sites=sorted(shares, key=lambda name: -shares[name]),
            evidence=f"{total:,} of {width:,} {words} ({percent(total / width)}) were never active on "
            f"{record.tokens:,} {'tokens' if role == 'hidden' else 'positions'}; worst is {worst} with {len(units)} of "
            f"{_width(record)}. With more data some may turn out rare rather than dead (95 % bound on how often "
            f"they are active: {percent(min(1.0, 3 / record.tokens))}).",
            numbers={
                "dead": total,
                "units": width,
                "share": total / width,
                "worst_share": shares[worst],
                "tokens": record.tokens,
                "worst_units": listed([int(u) for u in units], 12),
            },
            chart=profile(
                f"Share of {words} that are never active",
                "share",
                {"dead": [(x, shares.get(r.site.name, 0.0)) for x, r in _places(records)]},
                x=_axis(records),
                threshold=self.share,
            ),
        )


@dataclass(frozen=True)
class ActivationSparsity(Probe):
    """Most hidden activations are exactly zero.

    ``info`` when the mean over the feed-forwards is above ``notable``: something to use. ``warning`` when a layer is
    almost silent, above ``silent``.

    Args:
        notable: Share of zeros worth using (setpoint: at half the work saved; Luo et al., 2024, measured ReLU models
            at 90 % and more).
        silent: Share of zeros beyond which a layer hardly takes part (setpoint: under one active unit in 200; the
            sparsest healthy models of Luo et al., 2024, keep 6.5 %).
    """

    notable: float = 0.5
    silent: float = 0.995

    code: ClassVar[str] = "activation-sparsity"
    title: ClassVar[str] = "Hidden activations are mostly zero"
    needs: ClassVar[Needs] = {"hidden": frozenset({Stat.ZEROS, Stat.MOMENTS})}
    explanation: ClassVar[str] = (
        "Only a small part of the hidden units of the feed-forwards is active at a token. That is how trained ReLU "
        "networks work and no fault: the products with zeros need not be computed, and kernels that skip them are "
        "several times faster at decoding. A layer in which next to nothing is active contributes next to nothing. "
        "For networks whose activation is never exactly zero (SiLU, GELU), --deep measures how many units can be "
        "silenced before perplexity rises by one per cent."
    )

    def __call__(self, trace: Trace) -> list[Finding]:
        """At most one finding for all feed-forwards."""
        records = [r for r in trace.by_role("hidden") if r.zeros is not None and known(r.zeros)]
        if not records:
            return []
        zeros = {r.site.name: float(r.zeros or 0.0) for r in records}
        mean = sum(zeros.values()) / len(zeros)
        worst = max(zeros, key=zeros.__getitem__)
        silent = zeros[worst] > self.silent
        if not silent and mean <= self.notable:
            return []
        return [
            self.finding(
                "hidden",
                "warning" if silent else "info",
                value=zeros[worst] if silent else mean,
                unit="share of zeros",
                threshold=self.silent if silent else self.notable,
                source="setpoint: fewer than one active unit in 200 (Luo et al., 2024 · arXiv 2411.02335: 6.5 % and up)"
                if silent
                else "setpoint: half of the products could be skipped",
                sites=sorted(zeros, key=lambda name: -zeros[name]),
                evidence=f"{percent(mean)} of the hidden activations are exactly zero over {len(zeros)} feed-forward"
                f"{'s' if len(zeros) > 1 else ''}; the sparsest is {worst} at {percent(zeros[worst])}.",
                numbers={"mean": mean, "largest": zeros[worst], "smallest": min(zeros.values())},
                chart=profile(
                    "Share of hidden activations that are exactly zero",
                    "share",
                    {"zeros": [(x, r.zeros) for x, r in _places(records)]},
                    x=_axis(records),
                ),
            )
        ]


def _finite(record: Record) -> bool:
    """Whether a site carried any finite value, as far as it was counted."""
    return not record.non_finite or record.non_finite < record.count


def _width(record: Record) -> int:
    for channels in (record.channel_active, record.channel_max):
        if channels is not None:
            return max(1, len(channels))
    return 1


def _in_blocks(records: Sequence[Record]) -> bool:
    """Whether the sites stand one to a block, so that blocks can be the axis."""
    blocks = [r.site.block for r in records]
    return None not in blocks and len(set(blocks)) == len(blocks)


def _places(records: Sequence[Record]) -> list[tuple[int, Record]]:
    """Where each site stands on the axis that `_axis` names."""
    if _in_blocks(records):
        return [(r.site.block or 0, r) for r in records]
    return list(enumerate(records))


def _axis(records: Sequence[Record]) -> str:
    if _in_blocks(records):
        return "block"
    kind = "convolution" if records and records[0].site.role == "convolution" else "layer"
    return f"{kind}, in order of execution"
