"""What a run leaves behind, and what its callbacks see while it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn


@dataclass(slots=True)
class History:
    """The course of a training run.

    Args:
        steps: Number of each step, from 1.
        losses: Training loss of each step, before its update; the mean over its batches and over processes.
        rates: Peak learning rate of each step times the schedule.
        evaluations: What each evaluation gave, with its ``step``.
        seconds: Time spent on steps, over all sittings; evaluations, checkpoints and ``on_step`` are not in it.
        items: Tokens trained on, or samples where a batch holds no token ids, over all processes.
    """

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    items: int = 0

    @property
    def items_per_second(self) -> float:
        """Tokens or samples, as in ``items``, for each second of training; 0 before the first."""
        return self.items / self.seconds if self.seconds else 0.0

    @property
    def final(self) -> dict[str, float]:
        """What the last evaluation gave; empty without one."""
        return dict(self.evaluations[-1]) if self.evaluations else {}


@dataclass(slots=True)
class Run:
    """A run as its callbacks see it.

    Args:
        model: The network itself, without wrappers.
        optimizer: The optimizer.
        steps: How many there will be.
        history: The course so far.
        step: Steps done.
        loss: Loss of the last step.
        batches: The batches of the step, in order of accumulation.
        gradient_norm: Norm of the gradient before clipping; None before the first step. (Without clipping in
            ``"16-mixed"`` it is the norm of the scaled gradient.)
        is_main: Whether this process is the one that writes and prints.
        stop: Set it to True and the run ends after this step.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    steps: int
    history: History
    step: int = 0
    loss: float = float("nan")
    batches: tuple[Any, ...] = ()
    gradient_norm: float | None = None
    is_main: bool = True
    stop: bool = False


class Callback(Protocol):
    """Anything with some of these methods; the ones it lacks are not called.

    With ``state_dict()`` and ``load_state_dict(state)`` its state (tensors, numbers, strings, and dicts and lists of
    them) goes into the checkpoints.
    """

    def on_start(self, run: Run) -> None:
        """Before the first step of this sitting."""

    def on_step_start(self, run: Run) -> None:
        """Before a step's first forward pass."""

    def on_backward(self, run: Run) -> None:
        """After the last backward pass of a step, before clipping and the update."""

    def on_step(self, run: Run) -> None:
        """After the optimizer's step; gradients are still there."""

    def on_evaluate(self, run: Run) -> None:
        """After an evaluation; it is ``run.history.evaluations[-1]``."""

    def on_end(self, run: Run) -> None:
        """After the last step, or after an error."""


def tell(callbacks: Any, event: str, run: Run) -> None:
    """Call one method of every callback that has it."""
    for callback in callbacks:
        method = getattr(callback, event, None)
        if method is not None:
            method(run)


def items_in(batch: Any) -> int:
    """Tokens of a batch if it has integer ids of two axes, else its samples.

    >>> items_in({"tokens": torch.zeros(2, 8, dtype=torch.long)}), items_in((torch.zeros(5, 3), torch.zeros(5)))
    (16, 5)
    """
    first = first_tensor(batch)
    if first is None or not first.dim():
        return 1
    return first.numel() if holds_tokens(batch) else len(first)


def holds_tokens(batch: Any) -> bool:
    """Whether the first tensor of a batch is integer ids of two axes."""
    first = first_tensor(batch)
    return first is not None and first.dim() == 2 and not first.is_floating_point()


def first_tensor(batch: Any) -> torch.Tensor | None:
    """The first tensor of a batch, which is what a model reads; None if there is none."""
    while not isinstance(batch, torch.Tensor):
        values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
        if not values:
            return None
        batch = next(iter(values))
    return batch
