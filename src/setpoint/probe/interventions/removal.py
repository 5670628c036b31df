"""What leaving a block out costs.

A block is left out by handing its input on as its output, or, where its output can't be caught in one place, by setting
what its branches add to zero (which is the same in a pre-norm network). One pass per block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from setpoint.probe.base import Intervention, Subject, looks_untrained, profile
from setpoint.probe.idle import IdleLayers
from setpoint.probe.interventions.hooks import caught, edited
from setpoint.probe.interventions.outcome import Bench, Outcome
from setpoint.types import Block, Finding, Severity, Tap, Trace
from setpoint.words import listed, percent, range_words, rounded


def bypass(model: nn.Module, block: Block) -> Callable[[], AbstractContextManager[None]] | None:
    """A context in which one forward pass leaves a block out, or None if this block can't be.

    Args:
        model: The network.
        block: From `setpoint.surgery.Anatomy.blocks`.

    Returns:
        A function that opens the context, once per pass. A block whose output has another shape than its input (a
        down-sampling one) passes its own output on unchanged, so that the result equals the plain pass.
    """
    if block.input is not None and block.output is not None and block.output.side == "output":
        source, target = block.input, block.output
        return lambda: _passed_on(model, source, target)
    writes = [branch.writes for branch in block.branches]
    if writes and all(w is not None and w.side == "output" for w in writes):
        if any(branch.after_norms for branch in block.branches):
            return None
        silent = {w: torch.zeros_like for w in writes if w is not None}
        return lambda: edited(model, silent)
    return None


@contextmanager
def _passed_on(model: nn.Module, source: Tap, target: Tap) -> Iterator[None]:
    held: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        held.append(tensor)
        return tensor

    def put(tensor: Tensor) -> Tensor:
        before = held.pop() if held else tensor
        return before if before.shape == tensor.shape else tensor

    with edited(model, {source: keep, target: put}):
        yield


def _reshaping(subject: Subject, blocks: Sequence[Block]) -> set[int]:
    """Indices of the blocks whose output has another shape than their input: those can't be left out."""
    taps = [tap for b in blocks for tap in (b.input, b.output) if tap is not None]
    with torch.no_grad(), caught(subject.model, taps) as tensors:
        subject.forward(subject.model, subject.batches[0])
        shapes = {tap: tensor.shape for tap, tensor in tensors.items()}
    return {b.index for b in blocks if b.input in shapes and b.output in shapes and shapes[b.input] != shapes[b.output]}


@dataclass(frozen=True)
class BlockRemoval(Intervention):
    """Leaves each block out in turn. ``warning`` when at least ``share`` of them cost next to nothing, else ``info``.

    Always ``info`` where the weights look freshly initialized (`setpoint.probe.base.looks_untrained`).

    Args:
        cheap: Rise of the loss, or relative change of the output, below which a block costs next to nothing
            (setpoint: 0.01 nats is one per cent of perplexity).
        share: Share of the blocks (as `setpoint.probe.idle.IdleLayers`).
        batches: Batches to use, at most.
    """

    cheap: float = 0.01
    share: float = IdleLayers.share
    batches: int = 1

    code: ClassVar[str] = IdleLayers.code
    title: ClassVar[str] = "What leaving a block out costs"
    explanation: ClassVar[str] = (
        "Each block was left out in turn, its input handed on as its output, and the damage measured on the given "
        "data. Blocks that cost next to nothing could be removed or merged; the cost of removing several together is "
        "more than the sum. A block that turns the stream little can still be needed, and one that turns it much can "
        "be redundant: this measures the effect, the angle only hints at it."
    )

    def __call__(self, subject: Subject, trace: Trace) -> list[Finding]:
        """One finding for all blocks."""
        blocks: Sequence[Block] = subject.anatomy.blocks
        reshaping = _reshaping(subject, blocks)
        ways = [(b, way) for b in blocks if b.index not in reshaping and (way := bypass(subject.model, b)) is not None]
        if len(ways) < 3:
            return []
        bench = Bench(subject, subject.batches[: self.batches])
        outcomes: list[tuple[Block, Outcome]] = []
        for done, (block, way) in enumerate(ways):
            if subject.progress is not None:
                subject.progress(done, len(ways), "leaving blocks out")
            outcomes.append((block, bench.outcome(lambda _, way=way: way())))  # type: ignore[misc]
        return [self._finding(outcomes, bench, trace)]

    def _finding(self, outcomes: Sequence[tuple[Block, Outcome]], bench: Bench, trace: Trace) -> Finding:
        with_loss = bench.loss is not None
        order = sorted(outcomes, key=lambda pair: pair[1].rise)
        cheap = [b.index for b, o in order if o.rise < self.cheap]
        many = len(cheap) >= max(2, self.share * len(outcomes))
        severity: Severity = "warning" if many and not looks_untrained(trace) else "info"
        sites = {r.site.block: r.site.name for r in trace.by_role("residual")}
        (least, low), (most, high) = order[0], order[-1]

        def cost(outcome: Outcome) -> str:
            return f"{outcome.rise:+.3f}{nats}" if with_loss else f"output moved by {percent(outcome.rise)}"

        nats = " nats" if trace.task == "language-model" else ""
        unit = (nats.strip() or "loss") if with_loss else "relative change of the output"
        words = f"{len(cheap)} of {len(outcomes)} blocks cost under {rounded(self.cheap)} {unit} when left out"
        where = f" ({range_words(cheap)})" if cheap else ""
        return self.finding(
            "removal",
            severity,
            value=low.rise,
            unit=unit,
            threshold=self.cheap,
            source="setpoint: 0.01 nats is one per cent of perplexity",
            sites=[sites.get(b.index, f"block {b.index}") for b, _ in order[: max(1, len(cheap))]],
            evidence=f"{words}{where}. Least needed is block {least.index} ({cost(low)}), "
            f"most needed block {most.index} ({cost(high)}).",
            numbers={
                "cheap": len(cheap),
                "blocks": len(outcomes),
                "least_needed": least.index,
                "least_cost": low.rise,
                "most_needed": most.index,
                "most_cost": high.rise,
                "cheapest_five": listed([b.index for b, _ in order[:5]], 5),
            },
            chart=profile(
                "Rise of the loss when a block is left out" if with_loss else "Change of the output without a block",
                unit,
                {"left out": [(b.index, o.rise) for b, o in outcomes]},
                threshold=self.cheap,
            ),
        )
