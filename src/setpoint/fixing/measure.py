"""What a change did: size, outputs, loss and time, measured on real inputs."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from setpoint.running import Forward, evaluated, tensors_of
from setpoint.surgery import Anatomy
from setpoint.surgery.comparing import distance
from setpoint.types import Change

NOISE = 0.02
"""Two timings of one model may differ by this share before a ratio is called not measurable."""
BUDGET = 5.0
"""Seconds that a comparison of times may take, beyond the three rounds that it needs."""


def change_between(
    before: nn.Module,
    after: nn.Module,
    batches: Sequence[Any],
    forward: Forward,
    *,
    anatomy: Anatomy,
    loss: Callable[[Any, Any], Tensor] | None = None,
    exact: tuple[float, float] | None = None,
    timed: bool = True,
) -> Change:
    """Measure one model against another.

    Args:
        before, after: The models.
        batches: Real inputs.
        forward: How to run one.
        anatomy: Of ``before``; says whether there is a head.
        loss: Mean next-token loss in nats, for the perplexity of a language model.
        exact: What the judge of exactness saw.
        timed: Whether to take times.

    Returns:
        The change. Outputs that are not finite make its figures NaN or infinite.
    """
    gaps: list[float] = []
    relatives: list[float] = []
    divergences: list[float] = []
    losses: list[tuple[float, float]] = []
    for batch in batches:
        old, new = (_run(model, batch, forward) for model in (before, after))
        tensors = [[t for t in tensors_of(output) if t.is_floating_point()] for output in (old, new)]
        relatives.append(distance(tensors[1], tensors[0]))
        gaps.append(_gap(*tensors))
        logits = [_logits(output) for output in (old, new)] if anatomy.head is not None else [None, None]
        if logits[0] is not None and logits[1] is not None and logits[0].shape == logits[1].shape:
            divergences.append(_divergence(logits[0], logits[1]))
        if loss is not None:
            losses.append((float(loss(old, batch)), float(loss(new, batch))))
    perplexity = None
    if losses:
        means = [statistics.fmean(pair[side] for pair in losses) for side in (0, 1)]
        perplexity = (_exp(means[0]), _exp(means[1]))
    return Change(
        parameters=(_count(before), _count(after)),
        bytes=(_bytes(before), _bytes(after)),
        difference=_worst(gaps),
        relative=_worst(relatives),
        divergence=statistics.fmean(divergences) if divergences else None,
        perplexity=perplexity,
        time=time_ratio(before, after, batches[0], forward) if timed else None,
        exact=exact,
    )


def _run(model: nn.Module, batch: Any, forward: Forward) -> Any:
    with evaluated(model):
        return forward(model, batch)


def _gap(old: Sequence[Tensor], new: Sequence[Tensor]) -> float:
    """Largest absolute difference; infinite where shapes differ."""
    if [t.shape for t in old] != [t.shape for t in new]:
        return math.inf
    return _worst([float((x.double() - y.double()).abs().max()) for x, y in zip(new, old, strict=True) if x.numel()])


def _worst(values: Sequence[float]) -> float:
    """The largest; NaN if one is NaN, which Python's ``max`` would pass over."""
    return math.nan if any(map(math.isnan, values)) else max(values, default=0.0)


def _logits(output: Any) -> Tensor | None:
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if found is None:
        tensors = [t for t in tensors_of(output) if t.is_floating_point()]
        found = tensors[0] if len(tensors) == 1 else None
    return found if isinstance(found, Tensor) and found.dim() >= 2 else None


def _divergence(before: Tensor, after: Tensor) -> float:
    """Mean KL divergence from the old to the new distribution over the last axis, in nats."""
    p, q = (functional.log_softmax(x.double(), -1) for x in (before, after))
    return float(functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean().clamp(min=0.0))


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, each once."""
    return [*model.parameters(), *model.buffers()]


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _bytes(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in _tensors(model))


def time_ratio(before: nn.Module, after: nn.Module, batch: Any, forward: Forward) -> float | None:
    """Forward time of one model over another's, from interleaved runs.

    Args:
        before, after: The models.
        batch: What to run.
        forward: How. Each round runs the old, the new and the old model; there are 3 to 15 rounds, as many as fit into
            `BUDGET`.

    Returns:
        The median of the ratios, or None where the old model against itself is off by more than `NOISE`, or so unsteady
        that its median is not known to `NOISE`.
    """

    def seconds(model: nn.Module) -> float:
        with evaluated(model):
            start = time.perf_counter()
            output = forward(model, batch)
            for tensor in tensors_of(output):
                if tensor.is_cuda:
                    torch.cuda.synchronize(tensor.device)
            return time.perf_counter() - start

    warm = seconds(before) + seconds(after)
    rounds = min(15, max(3, int(BUDGET / (1.5 * warm + 1e-6))))
    taken = [(seconds(before), seconds(after), seconds(before)) for _ in range(rounds)]
    controls = [b / a for a, _, b in taken]
    plain = statistics.median(controls)
    spread = statistics.median(abs(control - plain) for control in controls)
    error = 1.86 * spread / math.sqrt(rounds)  # of the median, if ratios are about normal
    if abs(plain - 1.0) > NOISE or error > NOISE:
        return None
    return statistics.median(2 * new / (a + b) for a, new, b in taken)
