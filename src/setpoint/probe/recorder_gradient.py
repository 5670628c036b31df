"""Norms of parameters and of their gradients, and the small services that gradients need."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from setpoint.probe.stat_kernels import sum_of_squares
from setpoint.types import ParameterRecord


def in_backward() -> bool:
    """Whether the autograd engine is running, so that a forward now is a recomputation under checkpointing."""
    return bool(torch._C._current_graph_task_id() != -1)


def watch_gradient(tensor: Tensor, arrived: Callable[[Tensor], None]) -> None:
    """Call ``arrived`` with the gradient of the loss by ``tensor`` as it is now, even if it is written to later.

    A hook on a view is lost when the view is then written in place (``y = linear(x); y += x`` is such a case, since
    a linear returns a view of its matrix product). The gradient still reaches the tensor that was viewed, so that is
    watched too, and heard only if the view's own hook kept silent.
    """
    heard = False

    def directly(gradient: Tensor) -> None:
        nonlocal heard
        heard = True
        arrived(gradient)

    tensor.register_hook(directly)  # type: ignore[no-untyped-call]
    base = tensor._base
    if base is None or base.grad_fn is None or base.numel() != tensor.numel():
        return
    place = base.output_nr

    def through_base(gradients: tuple[Tensor | None, ...]) -> None:
        gradient = gradients[place]
        if not heard and gradient is not None:
            arrived(gradient)

    base.grad_fn.register_prehook(through_base)


def gather(mine: Any) -> list[Any]:
    """What every process has, in order of rank; ``[mine]`` without `torch.distributed`."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def squared_norm(tensor: Tensor) -> float:
    """Squared L2 norm in float64; of a sharded tensor, over all its shards."""
    full = getattr(tensor, "full_tensor", None)
    if full is None:
        return sum_of_squares(tensor)
    norm = torch.linalg.vector_norm(tensor.detach().float())
    return float(getattr(norm, "full_tensor", lambda: norm)()) ** 2


class ParameterWatch:
    """Notes the squared norm of every parameter's gradient after each backward.

    It is the norm of ``parameter.grad`` as it stands then: set gradients to zero between batches, as a training loop
    does, or the sum over batches is what is measured.

    Args:
        model: The network.
        late: Read the gradients when the next pass begins instead of as they arrive, for wrappers that average them
            over processes at the end of the backward.
    """

    def __init__(self, model: nn.Module, *, late: bool = False) -> None:
        self._named = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
        self._late = late
        self._fresh: dict[str, float | Tensor] = {}
        self._squares: dict[str, float] = {}
        self._passes: dict[str, int] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        """Be ready to `watch`."""
        return self

    def watch(self) -> None:
        """Hook every parameter that can have a gradient; due at the first pass that has a graph, idle later."""
        if self._handles:
            return
        for name, parameter in self._named.items():
            if parameter.requires_grad and parameter.is_leaf:
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._note(name)))  # type: ignore[no-untyped-call]

    def __exit__(self, *_: object) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _note(self, name: str) -> Callable[[Tensor], None]:
        def arrived(parameter: Tensor) -> None:
            gradient = parameter.grad
            if gradient is not None:
                # A shared parameter may get here several times in one backward; the last time has the whole sum.
                self._fresh[name] = gradient if self._late else squared_norm(gradient)

        return arrived

    def commit(self) -> None:
        """Take the gradients of the pass that ended into the averages."""
        for name, fresh in self._fresh.items():
            square = squared_norm(fresh) if isinstance(fresh, Tensor) else fresh
            self._squares[name] = self._squares.get(name, 0.0) + square
            self._passes[name] = self._passes.get(name, 0) + 1
        self._fresh.clear()

    def records(self, block_of: Callable[[str], int | None]) -> dict[str, ParameterRecord]:
        """One record per parameter; gradient norms are root mean squares over the passes (and processes)."""
        everyone = gather((self._squares, self._passes))
        found = {}
        for name, parameter in self._named.items():
            squares = sum(s.get(name, 0.0) for s, _ in everyone)
            passes = sum(p.get(name, 0) for _, p in everyone)
            norm = math.sqrt(squares / passes) if passes else None
            found[name] = ParameterRecord(
                name=name,
                block=block_of(name),
                size=parameter.numel(),
                norm=math.sqrt(squared_norm(parameter.detach())),
                gradient_norm=norm,
                gradient_rms=norm / math.sqrt(max(parameter.numel(), 1)) if norm is not None else None,
            )
        return found
