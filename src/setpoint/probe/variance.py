"""How fast the residual stream grows over depth.

Each block of a pre-norm network adds its output to the stream, so the stream's variance grows. At initialization it
grows along a straight line, at most by 1.5 times the input variance per block (Xiong et al., 2020, arXiv 2002.04745);
training can turn that into exponential growth, and then each deep block changes a stream that is already much larger
than anything it adds (Sun et al., 2025, arXiv 2502.05795; Kim et al., 2025, arXiv 2502.02732). A residual network
without normalization doubles its variance at every block (Brock et al., 2021, arXiv 2101.08692).

Growth is judged on the *typical* variance, (median |h| / 0.6745)^2, which is the variance for a Gaussian: one massive
entry of 2e4 would otherwise pass for growth of the whole stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import exp, log
from typing import ClassVar

import numpy as np

from setpoint.probe.base import Needs, Probe, known, profile, stream
from setpoint.types import Finding, Record, Severity, Stat, Trace
from setpoint.words import rounded

GAUSSIAN_MEDIAN = 0.674489750196082
"""Median of |z| for a standard normal z."""


@dataclass(frozen=True)
class Growth:
    """A straight line and an exponential fitted to a positive series over depth.

    Args:
        rate: Factor per block of the exponential fit.
        slope: Increase per block of the straight line, in units of the first value.
        exponential_r2, linear_r2: Share of the variance of the logarithms that each fit explains (the line is
            fitted to relative errors, so that both weigh all depths alike).
    """

    rate: float
    slope: float
    exponential_r2: float
    linear_r2: float

    @property
    def form(self) -> str:
        """The better fit in a word."""
        return "exponential" if self.exponential_r2 > self.linear_r2 else "linear"


def fit_growth(values: np.ndarray[tuple[int], np.dtype[np.float64]] | list[float]) -> Growth:
    """Fit a line and an exponential to ``values``, one per block, all positive.

    Args:
        values: At least three positive numbers.

    Returns:
        Both fits.

    Example:
        >>> fit_growth([1.0, 2.0, 4.0, 8.0]).form, round(fit_growth([1.0, 2.0, 4.0, 8.0]).rate, 6)
        ('exponential', 2.0)
        >>> fit_growth([1.0, 2.0, 3.0, 4.0]).form, round(fit_growth([1.0, 2.0, 3.0, 4.0]).slope, 6)
        ('linear', 1.0)
    """
    v = np.asarray(values, dtype=np.float64)
    depth = np.arange(len(v), dtype=np.float64)
    logs = np.log(v)
    spread = float(((logs - logs.mean()) ** 2).sum())

    b, a = np.polyfit(depth, logs, 1)
    exponential = float(((logs - (a + b * depth)) ** 2).sum())

    design = np.stack([1 / v, depth / v], axis=1)
    (offset, slope), *_ = np.linalg.lstsq(design, np.ones_like(v), rcond=None)
    line = offset + slope * depth
    linear = float(((logs - np.log(line)) ** 2).sum()) if (line > 0).all() else float("inf")

    def explained(residual: float) -> float:
        return 1.0 - residual / spread if spread > 0 else 1.0

    return Growth(exp(float(b)), float(slope / v[0]), explained(exponential), explained(linear))


def typical_variance(record: Record) -> float | None:
    """Variance of the typical entries of a site: from the median magnitude, else the plain variance."""
    if record.median is not None and known(record.median) and record.median > 0:
        return (record.median / GAUSSIAN_MEDIAN) ** 2
    return record.variance if record.variance is not None and known(record.variance) else None


@dataclass(frozen=True)
class VarianceGrowth(Probe):
    """The stream's typical variance grows further over the blocks than a healthy network's does.

    ``info`` when the growth exceeds the straight-line bound of an untrained pre-norm network many times over and an
    exponential describes it better; ``warning`` when it exceeds ``limit``.

    Args:
        limit: Growth from the first to the last block that is a warning (setpoint: ten times what was measured on
            trained pre-norm models, 550 on SmolLM2-135M and 1,030 on a DINOv2 ViT-S).
        slack: How many times the bound 1 + 1.5 L of Xiong et al. (2020) growth may reach before it is worth a note.
    """

    limit: float = 1e4
    slack: float = 4.0

    code: ClassVar[str] = "variance-growth"
    title: ClassVar[str] = "The residual stream grows over depth"
    needs: ClassVar[Needs] = {"residual": frozenset({Stat.MOMENTS, Stat.MEDIAN})}
    explanation: ClassVar[str] = (
        "Every block adds its output to the residual stream. If the stream's variance multiplies from block to block "
        "instead of growing by a steady amount, a deep block adds little to a stream that is already large: its "
        "gradient and its influence shrink, and the depth is partly wasted. Some growth is normal in trained "
        "pre-norm networks. It is harmful when deep blocks become idle, or when the largest values approach the "
        "limit of the number format."
    )

    def lacks(self, trace: Trace) -> str:
        """A stream of some depth."""
        return super().lacks(trace) or ("" if len(stream(trace)) >= 3 else "fewer than 3 blocks")

    def __call__(self, trace: Trace) -> list[Finding]:
        """At most one finding for the whole stream."""
        measured = [(r, v) for r in stream(trace) if (v := typical_variance(r)) is not None and v > 0]
        if len(measured) < 3:
            return []
        values = [v for _, v in measured]
        growth = values[-1] / values[0]
        fit = fit_growth(values)
        verdict = self._judge(growth, len(values) - 1, fit)
        if verdict is None:
            return []
        severity, threshold, source = verdict
        steps = [after / before for before, after in pairwise(values)]
        steepest = max(range(len(steps)), key=steps.__getitem__)
        first, last = measured[0][0].site, measured[-1][0].site
        return [
            self.finding(
                "residual",
                severity,
                value=growth,
                unit="x over depth",
                threshold=threshold,
                source=source,
                sites=dict.fromkeys((measured[steepest + 1][0].site.name, last.name)),
                evidence=f"The typical variance grows {rounded(growth)}-fold from block {first.block} to block "
                f"{last.block}, {fit.rate:.2f}x per block ({fit.form}: R² {fit.exponential_r2:.2f} for an exponential, "
                f"{max(fit.linear_r2, 0.0):.2f} for a line); the steepest step is {rounded(steps[steepest])}x, at "
                f"block {measured[steepest + 1][0].site.block}.",
                numbers={
                    "growth": growth,
                    "per_block": fit.rate,
                    "form": fit.form,
                    "exponential_r2": fit.exponential_r2,
                    "linear_r2": fit.linear_r2 if np.isfinite(fit.linear_r2) else "none",
                    "steepest_step": steps[steepest],
                    "steepest_block": measured[steepest + 1][0].site.block or 0,
                    "doublings": log(growth, 2),
                },
                chart=profile(
                    "Variance of the residual stream",
                    "variance",
                    {
                        "typical entries": [(r.site.block or 0, v) for r, v in measured],
                        "all entries": [(r.site.block or 0, r.variance) for r, _ in measured],
                    },
                    log=True,
                ),
            )
        ]

    def _judge(self, growth: float, steps: int, fit: Growth) -> tuple[Severity, float, str] | None:
        """Severity, the threshold that was crossed and its source; None when the growth is ordinary."""
        if growth >= self.limit:
            return "warning", self.limit, "setpoint: ten times what trained pre-norm models were measured at (1,030)"
        bound = self.slack * (1 + 1.5 * steps)
        if growth >= bound and fit.form == "exponential":
            return "info", bound, f"Xiong et al., 2020 · arXiv 2002.04745: 1 + 1.5 L, times {rounded(self.slack)}"
        return None
