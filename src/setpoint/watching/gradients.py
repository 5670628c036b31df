"""Gradients of parameters at the one moment when every loop has them whole."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Variable

from setpoint.probe.recorder_gradient import ParameterWatch, squared_norm

_ENGINE: Any = Variable._execution_engine


class WholeGradients(ParameterWatch):
    """Norms of the gradients as the last backward pass of a step leaves them.

    They are then summed over the batches that a step accumulates, averaged over processes, and not yet clipped:
    what loops do between the last backward pass and the update, and the callbacks that they offer, come too late.
    """

    _waiting = False

    def watch(self) -> None:
        """Hook every parameter that can have a gradient, to learn that a backward pass is under way."""
        if self._handles:
            return
        for parameter in self._named.values():
            if parameter.requires_grad and parameter.is_leaf:
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._under_way))  # type: ignore[no-untyped-call]

    def _under_way(self, _: Tensor) -> None:
        if not self._waiting:
            self._waiting = True
            # Queued from the queue: behind what a wrapper has queued to average the gradients over processes.
            _ENGINE.queue_callback(lambda: _ENGINE.queue_callback(self._measure))

    def _measure(self) -> None:
        self._waiting = False
        named = self._named.items()
        self._squares = {name: squared_norm(p.grad) for name, p in named if p.grad is not None}
        self._passes = dict.fromkeys(self._squares, 1)
