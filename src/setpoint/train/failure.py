"""What happens when the loss stops being a number: the run stops, and the moment before is examined."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.train.history import History

if TYPE_CHECKING:
    from setpoint.report import Report


class NonFiniteLoss(InputError):
    """The loss, or the norm of its gradient, became infinite or not a number.

    The weights are those of the moment before: the update that would have spoiled them was not made.

    Args:
        message: What happened, in a line.
        step: The step it happened in, from 1.
        history: The course up to there.
        report: What `setpoint.check` finds on these weights and this batch, None if it could not run.
        batches: The batches of the step.
    """

    def __init__(
        self, message: str, *, step: int, history: History, report: Report | None, batches: tuple[Any, ...]
    ) -> None:
        super().__init__(message)
        self.step, self.history, self.report, self.batches = step, history, report, batches


def failure(
    model: nn.Module,
    batches: tuple[Any, ...],
    *,
    loss: Callable[[Any, Any], Tensor],
    forward: Callable[[nn.Module, Any], Any],
    value: float,
    norm: float | None,
    step: int,
    rate: float,
    history: History,
) -> NonFiniteLoss:
    """Examine a step that went wrong, before its update.

    Args:
        model: The network.
        batches: The batches of the step.
        loss, forward: As given to `setpoint.train.train`.
        value: The loss.
        norm: Norm of the gradient, None if the loss failed first.
        step: Number of the step, from 1.
        rate: Its learning rate.
        history: The course up to there.

    Returns:
        The error to raise.
    """
    what = f"the loss is {value}" if not math.isfinite(value) else f"the norm of the gradient is {norm}"
    spoiled = [name for name, parameter in model.named_parameters() if not bool(torch.isfinite(parameter).all())]
    report, where = None, ""
    if spoiled:
        where = f"{len(spoiled)} parameters already held non-finite values, {spoiled[0]} first"
    else:
        report, where = _examined(model, batches, loss, forward)
    message = f"Training stopped in step {step}: {what} (learning rate {rate:.3g}); {where}."
    return NonFiniteLoss(message, step=step, history=history, report=report, batches=batches)


def _examined(
    model: nn.Module, batches: tuple[Any, ...], loss: Callable[[Any, Any], Tensor], forward: Callable[..., Any]
) -> tuple[Report | None, str]:
    from setpoint.checkup import check

    model.zero_grad(set_to_none=True)
    try:
        report = check(model, list(batches), forward=forward, loss=loss)
    except (InputError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        return None, f"a check of the weights before it was not possible ({' '.join(str(error).split())[:200]})"
    first = next((finding for finding in report.findings if finding.code == "non-finite"), None)
    first = first or next(iter(report.findings), None)
    if first is None:
        return report, "a check of the weights before it found nothing wrong in the signals: look at the loss"
    return report, f"a check of the weights before it found {first.id}: {first.evidence.rstrip('.')}"
