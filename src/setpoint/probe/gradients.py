"""How evenly the loss gradient is spread over depth.

Compared are the rms gradients of all parameters of each block: with post-norm the gradient at initialization is larger
near the output, with pre-norm it is small and even (Xiong et al., 2020, arXiv 2002.04745). When early and late blocks
differ by orders of magnitude, one learning rate can't serve both, and an optimizer without a scale of its own (SGD)
trains only one end of the network.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

import numpy as np

from setpoint.probe.base import Needs, Probe, known, number, profile, range_words
from setpoint.types import Finding, Stat, Trace


def block_gradients(trace: Trace) -> dict[int, float]:
    """Rms gradient over all parameters of each block; empty when no loss was given."""
    squares: dict[int, float] = defaultdict(float)
    sizes: dict[int, int] = defaultdict(int)
    for p in trace.parameters.values():
        if p.block is not None and p.gradient_norm is not None and known(p.gradient_norm):
            squares[p.block] += p.gradient_norm**2
            sizes[p.block] += p.size
    return {b: sqrt(squares[b] / sizes[b]) for b in sorted(squares) if sizes[b]}


@dataclass(frozen=True)
class GradientImbalance(Probe):
    """Early and late blocks get gradients of very different size. Silent without a loss.

    The first and last thirds of the blocks are compared by the geometric mean of their rms gradients: ``warning``
    beyond ``limit``. Blocks whose gradient is exactly zero while others have one are a ``warning`` too; blocks that no
    gradient reaches, because they are frozen or cut off, are ``info``.

    Args:
        limit: Ratio between the ends (setpoint: measured at 1 to 4 on a trained MobileNetV2 and on freshly initialized
            GPT-2, Llama and BERT models of 6 to 24 layers, at 1,000 and more on a plain ReLU network of 12 layers with
            PyTorch's default initialization).
        fewest: Blocks below which nothing is said.
    """

    limit: float = 100.0
    fewest: int = 3

    code: ClassVar[str] = "gradient-imbalance"
    title: ClassVar[str] = "Gradients differ by orders of magnitude over depth"
    needs: ClassVar[Needs] = {
        "residual": frozenset({Stat.GRADIENT}),
        "embedding": frozenset({Stat.GRADIENT}),
    }
    explanation: ClassVar[str] = (
        "The gradient of the loss reaches the blocks at one end of the network with a size far from that at the "
        "other: it vanishes or explodes on its way back. Blocks with tiny gradients learn slowly or not at all, and a "
        "learning rate that suits them is too large for the others. Adam divides by the size of the gradient and so "
        "hides much of it; plain SGD and gradient clipping do not. The gradient was measured on the given batches "
        "only, without dropout."
    )

    def __call__(self, trace: Trace) -> list[Finding]:
        """At most one finding for the imbalance and one for blocks without gradient."""
        gradients = block_gradients(trace)
        if len(gradients) < self.fewest:
            return []
        alive = {b: g for b, g in gradients.items() if g > 0}
        dead = [b for b in gradients if b not in alive]
        unreached = sorted({p.block for p in trace.parameters.values() if p.block is not None} - gradients.keys())
        chart = profile("Rms gradient of each block's parameters", "gradient", {"rms": gradients.items()}, log=True)
        found: list[Finding] = []
        if alive and (dead or unreached):
            blocks = sorted([*dead, *unreached])
            found.append(
                self.finding(
                    "no-gradient",
                    "warning" if dead else "info",
                    value=len(blocks),
                    unit="blocks",
                    threshold=0,
                    source="a trained block must receive a gradient",
                    sites=[f"block {b}" for b in blocks],
                    evidence=f"{len(blocks)} of {len(gradients) + len(unreached)} blocks receive no gradient at all "
                    f"({range_words(blocks)}): "
                    + ("it is exactly zero." if dead else "they are frozen, or the stream is detached behind them."),
                    numbers={"blocks": len(blocks), "first": blocks[0]},
                    chart=chart,
                )
            )
        if len(alive) < self.fewest:
            return found
        values = np.log(np.array(list(alive.values())))
        third = max(1, len(values) // 3)
        early, late = float(np.exp(values[:third].mean())), float(np.exp(values[-third:].mean()))
        ratio = max(early / late, late / early)
        if ratio > self.limit:
            toward = "vanishes toward the input" if late > early else "grows toward the input"
            blocks = list(alive)
            worst = blocks[0] if late < early else blocks[-1]
            found.append(
                self.finding(
                    "blocks",
                    "warning",
                    value=ratio,
                    unit="x between the ends",
                    threshold=self.limit,
                    source="setpoint: normalized networks were measured at 1 to 4, an unnormalized one at 1,000",
                    sites=[f"block {worst}"],
                    evidence=f"The gradient {toward}: rms {number(early)} in the first {third} blocks, "
                    f"{number(late)} in the last {third}, a factor of {number(ratio)}.",
                    numbers={"early": early, "late": late, "ratio": ratio, "loss": trace.loss or "unknown"},
                    chart=chart,
                )
            )
        return found
