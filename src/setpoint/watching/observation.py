"""What was seen at one step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from setpoint.report.codec import encode
from setpoint.types import Finding, Trace


@dataclass(frozen=True, slots=True, eq=False)
class Observation:
    """One recorded step.

    Args:
        step: Number of the step, from 0: steps done before it.
        trace: What the recorder measured, gradients included.
        findings: What the probes say of it, worst first, without those that were to be ignored.
        loss: Loss of the step, None if the loop did not tell it.
    """

    step: int
    trace: Trace
    findings: tuple[Finding, ...]
    loss: float | None = None

    def scalars(self) -> dict[str, float]:
        """The course of training in numbers: one name for each curve, grouped by kind of place."""
        found: dict[str, float | None] = {"loss": self.loss}
        for name, record in self.trace.records.items():
            place = f"{record.site.role}/{name}"
            found[f"{place}/rms"] = record.rms
            if record.minimum is not None and record.maximum is not None:
                found[f"{place}/largest"] = max(abs(record.minimum), abs(record.maximum))
            found[f"{place}/kurtosis"] = record.kurtosis
            found[f"{place}/zeros"] = record.zeros
            found[f"{place}/cosine"] = record.cosine
            found[f"{place}/step_ratio"] = record.step_ratio
            found[f"{place}/gradient_rms"] = record.gradient_rms
        for name, attention in self.trace.attention.items():
            place = f"attention/{name}"
            found[f"{place}/entropy"] = float(attention.entropy.mean())
            found[f"{place}/sink"] = float(attention.sink.max())
            found[f"{place}/logit_max"] = float(attention.logit_max.max())
        gradients = [p.gradient_norm for p in self.trace.parameters.values() if p.gradient_norm is not None]
        if gradients:
            found["parameters/gradient_norm"] = math.hypot(*gradients)
        found["parameters/norm"] = math.hypot(*(p.norm for p in self.trace.parameters.values()))
        for severity in ("error", "warning"):
            found[f"findings/{severity}"] = float(sum(finding.severity == severity for finding in self.findings))
        return {name: value for name, value in found.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON: the numbers of `scalars`, and the findings without their charts."""
        keys = ("code", "id", "severity", "value", "unit", "threshold", "evidence", "sites")
        return {
            "step": self.step,
            "scalars": encode(self.scalars()),
            "findings": [
                {
                    **{key: encode(getattr(finding, key)) for key in keys},
                    "remedies": [remedy.key for remedy in finding.remedies],
                }
                for finding in self.findings
            ],
        }
