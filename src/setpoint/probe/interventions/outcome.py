"""What an intervention did to the output, as one number.

With a loss it is the loss itself (nats per token for a language model); without one it is how far the output moved,
relative to its size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import exp, inf, isfinite
from typing import Any

import torch
from torch import Tensor

from setpoint.probe.base import Subject
from setpoint.running import tensors_of
from setpoint.types import Task
from setpoint.words import percent

ChangedPass = Callable[[int], AbstractContextManager[Any]]
"""``change(index)`` opens the context in which the changed pass of batch ``index`` runs."""


@dataclass(frozen=True)
class Outcome:
    """Mean loss before and after, or the relative change of the output when there is no loss.

    Args:
        before, after: Mean loss, in nats for a language model; None without a loss.
        moved: ``|after - before| / |before|`` of the output, over all batches.
    """

    before: float | None
    after: float | None
    moved: float

    @property
    def rise(self) -> float:
        """Rise of the loss, or the output's relative change when there is no loss."""
        return self.moved if self.before is None or self.after is None else self.after - self.before

    def figure(self, task: Task) -> str:
        """The state after the change: perplexity, loss, or how far the output moved."""
        return percent(self.moved) if self.after is None else level(self.after, task)


def level(loss: float, task: Task) -> str:
    """A loss for a person to read: as perplexity for a language model, as it is otherwise.

    >>> level(2.0, "language-model"), level(15.0, "language-model"), level(2.0, "encoder")
    ('7.39', '3.27e+06', '2.000')
    """
    if task != "language-model":
        return f"{loss:.3f}"
    value = perplexity(loss)
    return f"{value:.2f}" if value < 1000 else f"{value:.3g}"


def perplexity(loss: float) -> float:
    """exp(loss), inf where that overflows."""
    return exp(loss) if isfinite(loss) and loss < 700 else inf


def first_output(output: Any) -> Tensor | None:
    """The first floating-point tensor of a model's output."""
    return next((t for t in tensors_of(output) if t.is_floating_point()), None)


class Bench:
    """Runs the subject unchanged once per batch and compares changed passes with that.

    Args:
        subject: The model and what runs it.
        batches: Batches to use; all of the subject's by default.
    """

    def __init__(self, subject: Subject, batches: Sequence[Any] | None = None) -> None:
        self.subject = subject
        self.batches = list(subject.batches if batches is None else batches)
        self._plain = [self._run(batch, nullcontext()) for batch in self.batches]

    @property
    def loss(self) -> float | None:
        """Mean loss of the unchanged model."""
        return _mean([loss for _, loss in self._plain])

    def outcome(self, change: ChangedPass) -> Outcome:
        """What ``change`` does to the output."""
        losses: list[float | None] = []
        moved = size = 0.0
        for index, (batch, (plain, _)) in enumerate(zip(self.batches, self._plain, strict=True)):
            output, loss = self._run(batch, change(index))
            losses.append(loss)
            if plain is not None and output is not None and plain.shape == output.shape:
                moved += float((output - plain).double().square().sum())
                size += float(plain.double().square().sum())
        share = (moved / size) ** 0.5 if size > 0 else 0.0
        return Outcome(self.loss, _mean(losses), share if isfinite(share) else inf)

    def _run(self, batch: Any, context: AbstractContextManager[Any]) -> tuple[Tensor | None, float | None]:
        with torch.no_grad(), context:
            output = self.subject.forward(self.subject.model, batch)
            loss = None if self.subject.loss is None else float(self.subject.loss(output, batch))
        # With a loss the output itself is not needed; logits of a large vocabulary would be held for every batch.
        return (first_output(output) if loss is None else None), loss


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
