"""Outlier channels: a few channels carry values far beyond those of all others.

Two measures. Excess kurtosis of a site's values, E[((x - mean) / std)^4] - 3, which is 0 for a Gaussian and grows with
the reach of the tails; Park et al. (2025, arXiv 2506.19697) show that it predicts what rounding to four bits costs
(their Table 2, W4A4KV4 perplexity: kurtosis 0.04 -> 20, 67 -> 44, 361 and above -> hundreds to useless). And each
channel's largest magnitude beside that of the median channel, which says where the tail sits.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from setpoint.probe.base import Needs, Probe, heatmap, known
from setpoint.types import Finding, Record, Severity, Site, SiteRole, Stat, Trace
from setpoint.words import listed, plural, range_words, rounded

MOST_IN_CHART = 40
_ROLES: tuple[SiteRole, ...] = ("residual", "norm")
_WORDS = {"residual": "residual stream", "norm": "norm outputs"}


@dataclass(frozen=True)
class Outliers:
    """The outlier channels of one site.

    Args:
        record: The site's record.
        ratios: Channel -> its largest magnitude over that of the median channel, largest first.
        brief: Whether the largest of them owes its reach to a few tokens.
    """

    record: Record
    ratios: dict[int, float]
    brief: bool

    @property
    def kurtosis(self) -> float:
        """Excess kurtosis of the site."""
        return self.record.kurtosis or 0.0


@dataclass(frozen=True)
class OutlierChannels(Probe):
    """Heavy tails that sit in particular channels, in the residual stream and behind the norms.

    A site counts when its excess kurtosis is above ``heavy`` and at least one channel's largest magnitude is above
    ``channel`` times the median channel's. ``warning`` when the mean kurtosis over all norm outputs, which is what
    matrix products read and quantization rounds, is above ``ruinous``; ``info`` otherwise, and always in the stream
    itself. Sites whose tail is made by one or two tokens of a sequence don't count towards a warning: those are
    `massive-activation`'s to judge.

    Args:
        heavy: Excess kurtosis of a heavy tail (Park et al., 2025, Table 2: at 67 four-bit perplexity had doubled).
        ruinous: Mean excess kurtosis from which plain four-bit rounding destroyed the model (Park et al., 2025,
            Table 2: 361 is the lowest value among the ruined ones).
        channel: Multiple of the median channel's maximum that makes a channel an outlier (setpoint: at most places of
            trained models the widest channel was measured at 2 to 10).
        few: Share of the tokens that are "a few", if two of each sequence are less.
    """

    heavy: float = 67.0
    ruinous: float = 361.0
    channel: float = 10.0
    few: float = 0.02

    code: ClassVar[str] = "outlier-channels"
    title: ClassVar[str] = "A few channels reach far beyond all others"
    needs: ClassVar[Needs] = {role: frozenset({Stat.MOMENTS, Stat.TAILS, Stat.CHANNELS}) for role in _ROLES}
    explanation: ClassVar[str] = (
        "Some channels carry values many times larger than those of the typical channel. The network itself copes "
        "with it; rounding to few bits does not, because one scale per tensor or per token has to cover the largest "
        "value and leaves few levels for the rest. Scales per channel, a rotation, moving the scale into the weights, "
        "or training that never forms outliers are the ways out. In float32 and bfloat16 this is harmless."
    )

    def outliers(self, record: Record, few: float) -> Outliers | None:
        """The outlier channels of a site, None when it has no heavy tail or no such channel.

        Args:
            record: The site's record.
            few: Share of the tokens that are a few.
        """
        kurtosis, largest = record.kurtosis, record.channel_max
        if kurtosis is None or not known(kurtosis) or kurtosis <= self.heavy or largest is None or len(largest) < 4:
            return None
        finite = np.where(np.isfinite(largest), largest, 0.0)
        typical = float(np.median(finite))
        if typical <= 0:
            return None
        ratios = finite / typical
        order = np.argsort(-ratios)
        found = {int(c): float(ratios[c]) for c in order if ratios[c] > self.channel}
        if not found:
            return None
        return Outliers(record, found, _from_few_tokens(record, next(iter(found)), few))

    def __call__(self, trace: Trace) -> list[Finding]:
        """At most one finding for the residual stream and one for the norms."""
        few = max(self.few, 2 * trace.sequences / max(trace.tokens, 1))
        found = []
        for role in _ROLES:
            hits = [hit for record in trace.by_role(role) if (hit := self.outliers(record, few))]
            if hits:
                found.append(self._finding(role, hits, trace))
        return sorted(found, key=lambda f: (f.severity == "info", -f.value))

    def _finding(self, role: SiteRole, hits: list[Outliers], trace: Trace) -> Finding:
        lasting = [hit for hit in hits if not hit.brief]
        brief = {hit.record.site.name for hit in hits if hit.brief}
        judged = [k for r in trace.by_role(role) if r.site.name not in brief and known(k := r.kurtosis)]
        mean = sum(k for k in judged if k is not None) / max(len(judged), 1)
        severity: Severity = "warning" if role == "norm" and lasting and mean > self.ruinous else "info"
        shown = lasting or hits
        worst = max(shown, key=lambda hit: hit.kurtosis)
        often = Counter(c for hit in shown for c in hit.ratios)
        reach = {c: max(hit.ratios.get(c, 0.0) for hit in shown) for c in often}
        top = sorted(often, key=lambda c: -reach[c])
        blocks = sorted({hit.record.site.block for hit in shown if hit.record.site.block is not None})
        where = range_words(blocks) if blocks else worst.record.site.name
        note = "" if lasting else " A few tokens make the whole tail (see massive-activation)."
        average = f", {rounded(mean)} on average over {len(judged)} places" if lasting else ""
        return self.finding(
            role,
            severity,
            value=mean if severity == "warning" else worst.kurtosis,
            unit="excess kurtosis",
            threshold=self.ruinous if severity == "warning" else self.heavy,
            source="Park et al., 2025 · arXiv 2506.19697, Table 2",
            sites=[hit.record.site.name for hit in sorted(shown, key=lambda hit: -hit.kurtosis)],
            evidence=f"Excess kurtosis of the {_WORDS[role]} is up to {rounded(worst.kurtosis)} "
            f"({worst.record.site.name}){average}; {len(often)} "
            f"channel{'s exceed' if len(often) > 1 else ' exceeds'} the median channel's maximum more than "
            f"{rounded(self.channel)}-fold in {where}: {listed(top, 3)}, up to {rounded(reach[top[0]])}x.{note}",
            numbers={
                "kurtosis": worst.kurtosis,
                "mean_kurtosis": mean,
                "channels": len(often),
                "worst_channel": top[0],
                "worst_ratio": reach[top[0]],
                "from_few_tokens": "no" if lasting else "yes",
            },
            chart=None
            if len(shown) * len(top) < 4  # the sentence says as much
            else heatmap(
                f"Largest magnitude of the {plural(min(len(top), MOST_IN_CHART), 'channel')} that reach furthest, "
                f"{_WORDS[role]} with outliers only",
                "site (others left out)",
                {
                    _row(hit.record.site): {c: float(hit.record.channel_max[c]) for c in top[:MOST_IN_CHART]}
                    for hit in shown
                    if hit.record.channel_max is not None
                },
                sorted(top[:MOST_IN_CHART]),
            ),
        )


def _row(site: Site) -> str:
    """A place by its name; one in no block, such as the norm behind the last, says so."""
    if site.block is not None:
        return site.name
    return f"{site.name.removesuffix(f' {site.role}')} (in no block) {site.role}"


def _from_few_tokens(record: Record, channel: int, share: float) -> bool:
    """Whether at most a share of the tokens makes a channel's energy, judged by its crest factor.

    If a share s of the tokens carried the largest value and the rest nothing, max / rms would be 1 / sqrt(s).
    """
    rms, largest = record.channel_rms, record.channel_max
    if rms is None or largest is None or channel >= len(rms) or rms[channel] <= 0:
        return False
    return bool(largest[channel] / rms[channel] > share**-0.5)
