"""Measuring a model on held-out batches while it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from setpoint.data.batches import Batches, run_inputs
from setpoint.errors import InputError
from setpoint.running import kept_modes, map_tensors
from setpoint.train.history import first_tensor

Metric = Callable[[Any, Any], Tensor]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Means of metrics over batches, in eval mode and without gradients.

    Args:
        batches: One pass, such as ``data.batches("valid", 64)``; it is iterated at each evaluation.
        metrics: Name -> ``metric(output, batch)``, a mean over the batch.
        forward: ``forward(model, batch)``.

    >>> from setpoint.data import accuracy
    >>> batches = [(torch.eye(2), torch.tensor([0, 1])), (torch.eye(2)[:1], torch.tensor([1]))]
    >>> round(Evaluation(batches, {"accuracy": accuracy})(nn.Identity())["accuracy"], 3)
    0.667
    """

    batches: Iterable[Any]
    metrics: Mapping[str, Metric]
    forward: Callable[[nn.Module, Any], Any] = field(default=run_inputs)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """The means; batches count by what they hold, so a small last batch does not weigh as much as a full one."""
        totals = dict.fromkeys(self.metrics, 0.0)
        weight = 0
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        with kept_modes(model), torch.no_grad():
            model.eval()
            for batch in self.batches:
                batch = move(batch, device)
                output = self.forward(model, batch)
                held = _counted(batch)
                weight += held
                for name, metric in self.metrics.items():
                    totals[name] += float(metric(output, batch)) * held
        if not weight:
            raise InputError("The batches to evaluate on are empty, or were an iterator that is used up. Give a list.")
        return {name: total / weight for name, total in totals.items()}


def move(batch: Any, device: torch.device) -> Any:
    """A batch on a device.

    >>> move({"a": (torch.zeros(1), "text")}, torch.device("cpu"))
    {'a': (tensor([0.]), 'text')}
    """
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), batch)


def _counted(batch: Any) -> int:
    """What a mean over the batch was taken over: targets that count, or samples."""
    if isinstance(batch, Mapping) and isinstance(batch.get("targets"), Tensor):
        return int((batch["targets"] != -100).sum())
    first = first_tensor(batch)
    return len(first) if first is not None and first.dim() else 1


def evaluation_for(evaluate: Any, loss: Metric, forward: Callable[[nn.Module, Any], Any]) -> Callable[..., Any] | None:
    """What the user gave to evaluate with, as a callable on the model: None, a callable, or batches."""
    if evaluate is None:
        return None
    if callable(evaluate) and not isinstance(evaluate, Batches):
        return evaluate  # type: ignore[no-any-return]
    if isinstance(evaluate, Batches) and evaluate.endless:
        raise InputError("evaluate got an endless stream of batches; give a pass, such as data.batches('valid', 64)")
    if isinstance(evaluate, Iterable):
        return Evaluation(evaluate, {"loss": loss}, forward)
    raise InputError(f"expected evaluate as batches or a callable on the model, got {type(evaluate).__name__}")
