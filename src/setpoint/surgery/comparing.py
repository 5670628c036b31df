"""Running models in float64, and how far two outputs are apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from setpoint.running import Forward, evaluated, map_tensors, tensors_of


class _Lifted(TorchFunctionMode):
    """Casts to float32 become casts to float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        kwargs = {name: torch.float64 if a is torch.float32 else a for name, a in (kwargs or {}).items()}
        return func(*args, **kwargs)


def outputs(model: nn.Module, batch: Any, forward: Forward, *, grad: bool = False) -> list[Tensor]:
    """Every floating-point tensor that a model returns, in order, detached.

    Args:
        model: The model; modes, buffers and random states are put back.
        batch: One batch.
        forward: How to run it.
        grad: Record gradients meanwhile.
    """
    with evaluated(model, grad=grad):
        return [t.detach() for t in tensors_of(forward(model, batch)) if t.is_floating_point()]


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no entry is NaN or infinite."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


@contextmanager
def lifted() -> Iterator[None]:
    """Casts to float32 become casts to float64: models in float64 often go back to float32 inside."""
    with _Lifted():
        yield


def double(batch: Any) -> Any:
    """A batch with its floating-point tensors in float64."""
    return map_tensors(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, batch)


def distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Largest difference between two lists of tensors, each relative to the largest entry of its counterpart in ``b``.

    Infinite if they are not of the same number and shapes; non-finite entries count as equal where both have them (and
    say nothing then: see `all_finite`).

    >>> distance([torch.tensor([1.0, 2.5])], [torch.tensor([1.0, 2.0])])
    0.25
    """
    if len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b, strict=True)):
        return float("inf")
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if not x.numel():
            continue
        x, y = x.double(), y.double()
        same = (x == y) | (x.isnan() & y.isnan())
        gap = torch.where(same, 0.0, (x - y).abs()).max()
        scale = torch.where(y.isfinite(), y, 0.0).abs().max().clamp(min=torch.finfo(torch.float64).tiny)
        worst = max(worst, float(gap / scale)) if bool(gap.isfinite()) else float("inf")
    return worst
