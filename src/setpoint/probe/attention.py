"""Attention that looks at everything alike, and attention that looks at one place only.

With p a row of attention weights over n visible keys, the normalized entropy H(p) / ln n is 1 when all keys count alike
and 0 when a single one does. Both ends are measured per head: near 1 the head is a plain mean and its queries and keys
are without effect; near 0 the softmax is saturated, and its Jacobian, whose spectral norm is at most
trace(diag(p) - p p^T) <= 2 (1 - max p), lets no gradient through (Mudarisov et al., 2025, arXiv 2508.17821, study these
limits). Mass on the first token is kept apart: heads that have nothing to do send it there, which is common in healthy
language models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from setpoint.probe.base import Needs, Probe, looks_untrained, profile
from setpoint.types import AttentionRecord, Chart, Finding, Severity, Stat, Trace
from setpoint.words import listed, percent, rounded

_NEEDS: Needs = {"attention": frozenset({Stat.ATTENTION})}


def _block(index: int, record: AttentionRecord) -> int:
    return record.site.block if record.site.block is not None else index


def _spread(trace: Trace, field: str, title: str, y: str, threshold: float | None = None) -> Chart:
    """Mean over heads with the lowest and highest head, over depth."""
    rows = [(_block(i, r), np.asarray(getattr(r, field))) for i, r in enumerate(trace.attention.values())]
    return profile(
        title,
        y,
        {
            "mean of heads": [(b, float(v.mean())) for b, v in rows],
            "lowest head": [(b, float(v.min())) for b, v in rows],
            "highest head": [(b, float(v.max())) for b, v in rows],
        },
        threshold=threshold,
    )


@dataclass(frozen=True)
class AttentionCollapse(Probe):
    """Heads whose weights are spread evenly over all visible tokens.

    ``warning`` when at least ``share`` of the model's heads are uniform, ``info`` when a whole layer is, and always
    where the weights look freshly initialized (`setpoint.probe.base.looks_untrained`).

    Args:
        entropy: Normalized entropy of a uniform head (setpoint: the most even of 414 trained heads, of SmolLM2-135M,
            MiniLM and a ViT-S, was measured at 0.97).
        share: Share of all heads.
    """

    entropy: float = 0.99
    share: float = 0.5

    code: ClassVar[str] = "attention-collapse"
    title: ClassVar[str] = "Attention is uniform"
    needs: ClassVar[Needs] = _NEEDS
    explanation: ClassVar[str] = (
        "These heads give every visible token nearly the same weight, so what they return is the plain mean of the "
        "values: queries and keys play no part, and all tokens receive the same message. A network with freshly "
        "initialized weights looks like this, and then it is no fault; in a trained one the queries or keys have "
        "shrunk, or a temperature is far too high."
    )

    def __call__(self, trace: Trace) -> list[Finding]:
        """At most one finding for the whole model."""
        if not trace.attention:
            return []
        uniform = {name: np.asarray(r.entropy) > self.entropy for name, r in trace.attention.items()}
        tally = _tally(uniform, self.share)
        if tally is None:
            return []
        fresh = looks_untrained(trace)
        start = " The blocks' weights are of one size to within chance, as before any training." if fresh else ""
        highest = max(float(np.max(r.entropy)) for r in trace.attention.values())
        return [
            self.finding(
                "heads",
                "info" if fresh else tally.severity,
                value=tally.count / tally.heads,
                unit="share of heads",
                threshold=self.share,
                source="setpoint: the most even of 414 trained heads was measured at 0.97",
                sites=tally.worst,
                evidence=f"{tally.count} of {tally.heads} heads attend to all visible tokens alike (normalized entropy "
                f"above {self.entropy:.2f}, up to {highest:.4f}); uniform throughout: {listed(tally.whole, 3)}.{start}",
                numbers={
                    "heads": tally.heads,
                    "uniform": tally.count,
                    "highest_entropy": highest,
                    "looks_untrained": "yes" if fresh else "no",
                    "layers": len(tally.whole),
                },
                chart=_spread(trace, "entropy", "Normalized entropy of the attention", "entropy", self.entropy),
            )
        ]


@dataclass(frozen=True)
class AttentionSaturation(Probe):
    """Heads whose rows are one-hot, and heads that send their mass to the first token.

    Saturated heads: ``warning`` when at least ``share`` of the model's heads are, ``info`` when one whole layer is.
    Heads that are one-hot on the first token don't count: they are sinks, always ``info``.

    Args:
        rows: Share of a head's rows whose largest weight is above 0.999 that makes it saturated. At 0.999 the
            softmax's Jacobian is at most 0.002, 1/250 of its largest possible value 1/2.
        share: Share of all heads (setpoint: a quarter; in trained models 1 head of 414 was measured to be saturated).
        sink: Mean mass on the first token that makes a head a sink (setpoint: 0.3; an even split over 256 tokens
            gives 0.02).
        sink_heads: Share of a layer's heads that are sinks before it is worth a note.
    """

    rows: float = 0.9
    share: float = 0.25
    sink: float = 0.3
    sink_heads: float = 0.5

    code: ClassVar[str] = "attention-saturation"
    title: ClassVar[str] = "Attention looks at one token only"
    needs: ClassVar[Needs] = _NEEDS
    explanation: ClassVar[str] = (
        "In these heads nearly all of the weight of a row falls on one token, so the softmax works as a hard choice. "
        "Its gradient with respect to queries and keys is then close to zero and training can't move it. The usual "
        "cause is logits that have grown without bound; a norm on queries and keys, or a cap on the logits, prevents "
        "it. Heads that copy the previous token are sharp too and healthy, in small numbers."
    )
    sink_explanation: ClassVar[str] = (
        "Many heads put much of their weight on the first token whatever it is. That is how trained language models "
        "switch a head off: the first token's value vector is small, so attending to it adds almost nothing. It is no "
        "fault in itself. It comes with massive activations at that token, it must be kept when a cache drops old "
        "tokens, and those entries must be kept in higher precision when activations are rounded."
    )

    def __call__(self, trace: Trace) -> list[Finding]:
        """At most one finding for saturated heads and one for sinks."""
        if not trace.attention:
            return []
        return [*self._saturated(trace), *self._sinks(trace)]

    def _saturated(self, trace: Trace) -> list[Finding]:
        hard = {
            name: (np.asarray(r.saturated) > self.rows) & (np.asarray(r.sink) < self.rows)
            for name, r in trace.attention.items()
        }
        tally = _tally(hard, self.share)
        if tally is None:
            return []
        logit = max(float(np.max(r.logit_max)) for r in trace.attention.values())
        return [
            self.finding(
                "heads",
                tally.severity,
                value=tally.count / tally.heads,
                unit="share of heads",
                threshold=self.share if tally.severity == "warning" else self.rows,
                source="exact: above 0.999 a row's softmax Jacobian is at most 0.002, 1/250 of the largest possible",
                sites=tally.worst,
                evidence=f"{tally.count} of {tally.heads} heads give over 0.999 of the weight to one token in more "
                f"than {percent(self.rows)} of their rows; the largest logit is {rounded(logit)}, first "
                f"in {tally.worst[0]}.",
                numbers={
                    "heads": tally.heads,
                    "saturated": tally.count,
                    "largest_logit": logit,
                    "layers": len(tally.whole),
                },
                chart=_spread(trace, "saturated", "Share of rows with one weight above 0.999", "share", self.rows),
            )
        ]

    def _sinks(self, trace: Trace) -> list[Finding]:
        layers = {
            name: float((np.asarray(r.sink) > self.sink).mean())
            for name, r in trace.attention.items()
            if r.keys > 2 / self.sink
        }
        sinks = {name: share for name, share in layers.items() if share >= self.sink_heads}
        if not sinks:
            return []
        mass = {name: float(np.mean(trace.attention[name].sink)) for name in layers}
        worst = sorted(sinks, key=lambda n: -mass[n])
        overall = sum(mass.values()) / len(mass)
        return [
            self.finding(
                "first-token",
                "info",
                value=mass[worst[0]],
                unit="mass on the first token",
                threshold=self.sink,
                source="setpoint: an even split over 256 tokens gives 0.02",
                sites=worst,
                evidence=f"In {len(sinks)} of {len(trace.attention)} layers at least half of the heads send more than "
                f"{percent(self.sink)} of their mass to the first token; the mean over all layers is "
                f"{percent(overall)}, the most {percent(mass[worst[0]])} in {worst[0]}.",
                numbers={"layers": len(sinks), "mean_mass": overall, "largest_mass": mass[worst[0]]},
                chart=_spread(trace, "sink", "Attention mass on the first token", "share", self.sink),
                explanation=self.sink_explanation,
            )
        ]


@dataclass(frozen=True)
class _Tally:
    """Heads of a model that show something: how many, in which layers, and how bad that is."""

    heads: int
    count: int
    whole: list[str]
    worst: list[str]
    severity: Severity


def _tally(marked: Mapping[str, np.ndarray], share: float) -> _Tally | None:
    """Count marked heads; None when they are fewer than ``share`` of all and fill no layer.

    Args:
        marked: Site name -> bool per head, shape ``(heads,)``.
        share: Share of all heads that is a warning; a whole layer is a note.
    """
    heads = sum(len(m) for m in marked.values())
    count = sum(int(m.sum()) for m in marked.values())
    whole = [name for name, m in marked.items() if len(m) and m.all()]
    if not heads or (count < share * heads and not whole):
        return None
    worst = sorted((n for n, m in marked.items() if m.any()), key=lambda n: -float(marked[n].mean()))
    return _Tally(heads, count, whole, worst, "warning" if count >= share * heads else "info")
