"""Infinities and NaNs: where they first appear.

One non-finite value spreads to everything that reads it, so only the first place in execution order says anything
about the cause; the places behind it are listed as its wake. A gradient runs the other way: its first place is the last
in execution order.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

from setpoint.probe.base import Needs, Probe, place
from setpoint.types import Finding, SiteRole, Stat, Trace
from setpoint.words import listed, percent

_EVERYWHERE: tuple[SiteRole, ...] = ("embedding", "residual", "norm", "hidden", "convolution", "logits")


@dataclass(frozen=True)
class NonFinite(Probe):
    """Any inf or nan among parameters, activations, the loss or its gradients is an error.

    Args:
        most: Non-finite activations that are tolerated.
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
    loss_explanation: ClassVar[str] = (
        "One step along such a gradient makes every weight it reaches not a number. Where all activations are finite "
        "the loss itself is the cause: a logarithm of zero, a division by a count of zero, a label outside its range, "
        "or an overflow in a narrow number format. A loss scaler skips single steps of this kind and is no fault."
    )

    def __call__(self, trace: Trace) -> list[Finding]:
        """One error each for damaged parameters, activations, and the loss or its gradients."""
        return [*self._parameters(trace), *self._activations(trace), *self._loss(trace)]

    def _parameters(self, trace: Trace) -> list[Finding]:
        broken = [p for p in trace.parameters.values() if not isfinite(p.norm)]
        if not broken:
            return []
        return [
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
        ]

    def _activations(self, trace: Trace) -> list[Finding]:
        hit = [r for r in trace.records.values() if r.non_finite > self.most]
        if not hit:
            return []
        first = hit[0]
        share = first.non_finite / max(first.count, first.non_finite)
        given = int(trace.facts.get("non_finite_inputs", 0))
        origin = f"The input already holds {given:,}; this" if given else "This"
        wake = len(hit) - 1
        behind = f", and {wake} place{'s' if wake > 1 else ''} behind it carry some too" if wake else ""
        return [
            self.finding(
                place(first.site),
                "error",
                value=first.non_finite,
                unit="values",
                threshold=self.most,
                source="an activation must be a finite number",
                sites=[r.site.name for r in hit],
                evidence=f"{first.non_finite:,} values ({percent(share)}) are inf or nan at {first.site.name}. "
                f"{origin} is the first of {len(trace.records)} measured places with any{behind}.",
                numbers={"non_finite": first.non_finite, "share": share, "sites": len(hit), "in_the_input": given},
            )
        ]

    def _loss(self, trace: Trace) -> list[Finding]:
        gradients = [p for p in trace.parameters.values() if p.gradient_norm is not None]
        broken = [p.name for p in gradients if p.gradient_norm is not None and not isfinite(p.gradient_norm)]
        lost = trace.loss is not None and not isfinite(trace.loss)
        if not lost and not broken:
            return []
        passed = [r for r in trace.records.values() if r.gradient_rms is not None and not isfinite(r.gradient_rms)]
        found = [f"The loss is {trace.loss}"] if lost else []
        if broken:
            found.append(f"the gradients of {len(broken)} of {len(gradients)} parameters hold inf or nan")
        if passed:
            found.append(f"on the way back they first appear at {passed[-1].site.name}")
        words = "; ".join(found)
        return [
            self.finding(
                "loss" if lost else "gradients",
                "error",
                value=trace.loss if lost and trace.loss is not None else len(broken),
                unit="loss" if lost else "parameters",
                threshold=0,
                source="a loss and its gradients must be finite numbers",
                sites=broken,
                evidence=words[0].upper() + words[1:] + ".",
                numbers={"loss": "unknown" if trace.loss is None else trace.loss, "gradients": len(broken)},
                explanation=self.loss_explanation,
            )
        ]
