"""Which entries of a weight belong to which output unit, whatever layer it is of.

A linear layer keeps the weights of a unit in a row. A convolution keeps them in ``weight[unit]``, a transposed one in
``weight[:, unit]``, and one with groups has several matrices in one tensor. `Units` brings all of them to one form,
``(groups, out, in, *kernel)``, in which a method is written once.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from setpoint.errors import InputError

_Transposed = nn.modules.conv._ConvTransposeNd


@dataclass(frozen=True, slots=True)
class Units:
    """Where a weight keeps its output units.

    Args:
        dim: The axis that counts output units, of one group.
        groups: How many matrices are laid end to end along axis 0.

    >>> Units(dim=1, groups=2).split(torch.zeros(6, 4, 3, 3)).shape  # nn.ConvTranspose2d(6, 8, 3, groups=2)
    torch.Size([2, 4, 3, 3, 3])
    """

    dim: int = 0
    groups: int = 1

    def split(self, weight: Tensor) -> Float[Tensor, "groups outputs inputs ..."]:
        """A weight, or anything that broadcasts against it, as ``(groups, out, in, *kernel)``."""
        grouped = weight.unflatten(0, (self.groups, weight.shape[0] // self.groups))  # type: ignore[no-untyped-call]
        return grouped.movedim(self.dim + 1, 1)  # type: ignore[no-any-return]

    def join(self, units: Float[Tensor, "groups outputs inputs ..."]) -> Tensor:
        """The inverse of `split`."""
        return units.movedim(1, self.dim + 1).flatten(0, 1)


ROWS = Units()
"""Units are rows, as in a linear layer."""


def units_of(module: nn.Module, name: str = "weight") -> Units:
    """Where a module keeps the output units of a weight.

    Args:
        module: Any module; one of another kind than those below keeps them on axis 0.
        name: The weight's name.

    Raises:
        InputError: There is no such weight, or it has fewer than two axes.

    >>> units_of(nn.Linear(3, 2)), units_of(nn.ConvTranspose1d(4, 6, 3, groups=2))
    (Units(dim=0, groups=1), Units(dim=1, groups=2))
    """
    expect_weight(module, name)
    if isinstance(module, _Transposed):
        return Units(1, module.groups)
    if isinstance(module, nn.modules.conv._ConvNd):
        return Units(0, module.groups)
    transposed = type(module).__name__ == "Conv1D" and hasattr(module, "nf")  # GPT-2's linear layer
    return Units(1 if transposed else 0)


def expect_weight(module: nn.Module, name: str) -> Tensor:
    """A parameter with two axes or more and at least one entry.

    Raises:
        TypeError: ``module`` is not a module.
        InputError: There is no such parameter; it is a vector or empty; or it is not floating-point.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(module).__name__}")
    weight = getattr(module, name, None)
    kind = type(module).__name__
    if isinstance(weight, nn.UninitializedParameter):
        raise InputError(f"{kind}.{name} has no shape yet; run the lazy module once first")
    if not isinstance(weight, Tensor):
        own = [key for key, value in module.named_parameters(recurse=False) if value.dim() >= 2]
        raise InputError(
            f"{kind} has no parameter {name!r}; it has {', '.join(own)}"
            if own
            else f"{kind} has no parameter {name!r} and no other matrix of its own; apply this to the layers inside it"
        )
    if weight.dim() < 2 or not weight.numel() or not weight.is_floating_point():
        raise InputError(
            f"{kind}.{name}: expected a floating-point weight with two axes or more, got shape {tuple(weight.shape)} "
            f"({weight.dtype})"
        )
    return weight


def inverse_norms(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    """``1 / ||x||`` over some axes, kept as axes of size 1; 0 where the norm is at most ``eps``.

    So a row of zeros, which has no direction, stays zero and gets a gradient of zero: a pruned unit stays pruned, and
    nothing is divided by zero.

    >>> inverse_norms(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), (1,), 1e-12).flatten()
    tensor([0.2000, 0.0000])
    """
    squares = x.square().sum(dims, keepdim=True)
    alive = squares > eps**2
    return torch.where(alive, torch.rsqrt(torch.where(alive, squares, 1.0)), 0.0)


def fan_in(units: Float[Tensor, "groups outputs inputs ..."]) -> int:
    """How many entries a unit has."""
    return prod(units.shape[2:])
