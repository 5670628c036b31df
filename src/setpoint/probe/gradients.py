"""How evenly the loss gradient is spread over depth.

Compared are the rms gradients of all parameters of each block, or of each linear and convolution where there are no
blocks: with post-norm the gradient at initialization is larger
near the output, with pre-norm it is small and even (Xiong et al., 2020, arXiv 2002.04745). When early and late blocks
differ by orders of magnitude, one learning rate can't serve both, and an optimizer without a scale of its own (SGD)
trains only one end of the network.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

import numpy as np

from setpoint.probe.base import Needs, Probe, known, profile
from setpoint.types import Chart, Finding, ParameterRecord, SiteRole, Stat, Trace
from setpoint.words import listed, range_words, rounded

_LAYERS: tuple[SiteRole, ...] = ("hidden", "convolution")


@dataclass(frozen=True)
class Depth:
    """The parts of a network in order of depth, and the gradient that each gets.

    Args:
        part: ``"block"``, or ``"layer"`` for a network without blocks: a linear or a convolution.
        names: Of all parts, with a gradient or without.
        gradients: Part -> rms gradient over all its parameters; empty when no loss was given.
    """

    part: str
    names: tuple[str, ...]
    gradients: Mapping[int, float]


def depth_of(trace: Trace) -> Depth:
    """Blocks where the network has them, else its layers in order of execution."""
    numbers = {p.block for p in trace.parameters.values() if p.block is not None}
    if numbers:
        names = tuple(f"block {b}" for b in range(max(numbers) + 1))
        return Depth("block", names, _pooled(trace, lambda p: p.block))
    layers = tuple(dict.fromkeys(r.site.module for r in trace.records.values() if r.site.role in _LAYERS))
    order = {layer: index for index, layer in enumerate(layers)}
    return Depth("layer", layers, _pooled(trace, lambda p: order.get(p.name.rpartition(".")[0])))


def _pooled(trace: Trace, part_of: Callable[[ParameterRecord], int | None]) -> dict[int, float]:
    squares: dict[int, float] = defaultdict(float)
    sizes: dict[int, int] = defaultdict(int)
    for p in trace.parameters.values():
        part = part_of(p)
        if part is not None and p.gradient_norm is not None and known(p.gradient_norm):
            squares[part] += p.gradient_norm**2
            sizes[part] += p.size
    return {b: sqrt(squares[b] / sizes[b]) for b in sorted(squares) if sizes[b]}


@dataclass(frozen=True)
class GradientImbalance(Probe):
    """Early and late blocks (or layers) get gradients of very different size. Silent without a loss.

    The first and last thirds are compared by the geometric mean of their rms gradients: ``warning`` beyond ``limit``.
    Layers stand in for blocks where a network has none. Blocks whose gradient is exactly zero while others have one are
    a ``warning`` too; blocks that no gradient reaches, because they are frozen or cut off, are ``info``.

    Args:
        limit: Ratio between the ends (setpoint: measured at 1 to 4 on a trained MobileNetV2 and on freshly initialized
            GPT-2, Llama and BERT models of 6 to 24 layers; on plain networks with PyTorch's default initialization at
            66 to 117 for 12 ReLU layers, 250,000 and more for 24, and 1,500 and more for 6 sigmoid layers).
        fewest: Blocks or layers below which nothing is said.
    """

    limit: float = 100.0
    fewest: int = 3

    code: ClassVar[str] = "gradient-imbalance"
    title: ClassVar[str] = "Gradients differ by orders of magnitude over depth"
    needs: ClassVar[Needs] = {
        "residual": frozenset({Stat.GRADIENT}),
        "embedding": frozenset({Stat.GRADIENT}),
        **{role: frozenset({Stat.MOMENTS}) for role in _LAYERS},
    }
    explanation: ClassVar[str] = (
        "The gradient of the loss reaches the blocks at one end of the network with a size far from that at the "
        "other: it vanishes or explodes on its way back. Blocks with tiny gradients learn slowly or not at all, and a "
        "learning rate that suits them is too large for the others. Adam divides by the size of the gradient and so "
        "hides much of it; plain SGD and gradient clipping do not. The gradient was measured on the given batches "
        "only, without dropout."
    )

    def lacks(self, trace: Trace) -> str:
        """A loss, or depth."""
        if all(p.gradient_norm is None for p in trace.parameters.values()):
            return "needs a loss"
        return "" if len(depth_of(trace).gradients) >= self.fewest else f"fewer than {self.fewest} blocks or layers"

    def __call__(self, trace: Trace) -> list[Finding]:
        """At most one finding for the imbalance and one for blocks without gradient."""
        depth = depth_of(trace)
        gradients = depth.gradients
        if len(gradients) < self.fewest:
            return []
        chart = profile(
            f"Rms gradient of each {depth.part}'s parameters",
            "gradient",
            {"rms": gradients.items()},
            x=depth.part if depth.part == "block" else "layer, in order of execution",
            log=True,
        )
        found = self._unreached(trace, depth, chart)
        alive = {b: g for b, g in gradients.items() if g > 0}
        if len(alive) < self.fewest:
            return found
        values = np.log(np.array(list(alive.values())))
        third = max(1, len(values) // 3)
        early, late = float(np.exp(values[:third].mean())), float(np.exp(values[-third:].mean()))
        ratio = max(early / late, late / early)
        if ratio > self.limit:
            toward = "vanishes toward the input" if late > early else "grows toward the input"
            parts = list(alive)
            worst = parts[0] if late < early else parts[-1]
            found.append(
                self.finding(
                    f"{depth.part}s",
                    "warning",
                    value=ratio,
                    unit="x between the ends",
                    threshold=self.limit,
                    source="setpoint: normalized networks were measured at 1 to 4, 24 plain ReLU layers at 250,000",
                    sites=[depth.names[worst]],
                    evidence=f"The gradient {toward}: rms {rounded(early)} in the first {third} {depth.part}s, "
                    f"{rounded(late)} in the last {third}, a factor of {rounded(ratio)}.",
                    numbers={"early": early, "late": late, "ratio": ratio, "loss": trace.loss or "unknown"},
                    chart=chart,
                )
            )
        return found

    def _unreached(self, trace: Trace, depth: Depth, chart: Chart) -> list[Finding]:
        """Parts without gradient while others have one."""
        zero = [b for b, g in depth.gradients.items() if not g > 0]
        if len(zero) == len(depth.gradients):
            return []
        held = {p.block for p in trace.parameters.values()} if depth.part == "block" else range(len(depth.names))
        parts = sorted({b for b in held if b is not None} - depth.gradients.keys() | set(zero))
        if not parts:
            return []
        which = range_words(parts) if depth.part == "block" else listed([depth.names[b] for b in parts])
        return [
            self.finding(
                "no-gradient",
                "warning" if zero else "info",
                value=len(parts),
                unit=f"{depth.part}s",
                threshold=0,
                source=f"a trained {depth.part} must receive a gradient",
                sites=[depth.names[b] for b in parts],
                evidence=f"{len(parts)} of {len(set(parts) | depth.gradients.keys())} {depth.part}s receive no "
                f"gradient at all ({which}): "
                + ("it is exactly zero." if zero else "they are frozen, or the stream is detached behind them."),
                numbers={f"{depth.part}s": len(parts), "first": parts[0]},
                chart=chart,
            )
        ]
