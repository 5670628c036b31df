"""Weight standardization: every unit's weights with mean zero and standard deviation one, at every use.

``W_s = (W - mean(W_i)) / (std(W_i) + eps)`` over the weights of each output unit (Qiao, Wang, Liu, Shen and Yuille,
2019, arXiv 1903.10520). It was made for convolutions in front of a group norm, in training with few images a batch: the
norm behind takes the scale out again, which the larger weights would otherwise change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.nn.norm.functional import wide
from setpoint.nn.weight.reparametrize import put, put_everywhere
from setpoint.nn.weight.units import ROWS, Units, fan_in, units_of

Module = TypeVar("Module", bound=nn.Module)


class WeightStandardization(nn.Module):
    """The parametrization behind `weight_standardization`.

    Args:
        eps: Added to the standard deviation, outside the root, as the authors' code does.
        units: Where the weight keeps its output units.

    Reference:
        Qiao, Wang, Liu, Shen and Yuille, 2019, "Micro-Batch Training with Batch-Channel Normalization and Weight
        Standardization", arXiv 1903.10520.

    Example:
        >>> WeightStandardization(eps=1e-9)(torch.tensor([[1.0, 2.0, 3.0]]))
        tensor([[-1.,  0.,  1.]])
    """

    def __init__(self, eps: float = 1e-5, units: Units = ROWS) -> None:
        super().__init__()
        if not eps > 0:
            raise InputError(f"expected eps above 0, got {eps!r}; the authors use 1e-5")
        self.eps = eps
        self.units = units

    def forward(self, weight: Float[Tensor, "outputs inputs ..."]) -> Float[Tensor, "outputs inputs ..."]:
        """The standardized weight; statistics in float32 for half precision. The deviation is the unbiased one."""
        matrix = self.units.split(wide(weight))
        dims = tuple(range(2, matrix.dim()))
        centred = matrix - matrix.mean(dims, keepdim=True)
        variance = centred.square().sum(dims, keepdim=True) / (fan_in(matrix) - 1)
        varied = variance > 0  # the root has no slope at zero, where all weights of a unit are equal
        deviation = torch.where(varied, torch.where(varied, variance, 1.0).sqrt(), 0.0)
        return self.units.join(centred / (deviation + self.eps)).to(weight.dtype)

    def extra_repr(self) -> str:
        """Eps."""
        return f"eps={self.eps}"


def weight_standardization(module: Module, name: str = "weight", eps: float = 1e-5) -> Module:
    """Have a layer use its weight with mean zero and standard deviation one for every output unit.

    Args:
        module: A convolution (or linear layer) with a norm behind it, changed in place.
        name: The weight.
        eps: Added to the standard deviation.

    Returns:
        The module. `fold_weights` makes the standardized weight a plain one.

    Raises:
        InputError: No such weight; it is standardized already; a unit has a single weight, which has no deviation.

    Reference:
        Qiao, Wang, Liu, Shen and Yuille, 2019, arXiv 1903.10520.

    Example:
        >>> layer = weight_standardization(nn.Conv2d(3, 8, 3))
        >>> layer.weight.mean((1, 2, 3)).abs().max() < 1e-6
        tensor(True)
    """
    return put(module, name, _made(module, name, eps))


def standardize_weights(
    model: Module, types: Sequence[type[nn.Module]] = (nn.modules.conv._ConvNd,), eps: float = 1e-5
) -> Module:
    """`weight_standardization` on every convolution of a model.

    Args:
        model: Changed in place.
        types: Classes of layers.
        eps: Added to the standard deviations.

    Returns:
        The model. Weights that are shared stay shared.

    Raises:
        InputError: No such layer, or one whose units have a single weight (a depthwise convolution of width 1); the
            model is then as it was.

    Example:
        >>> model = standardize_weights(nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8)))
        >>> type(model[0]).__name__
        'ParametrizedConv2d'
    """
    return put_everywhere(
        model, lambda _, module: isinstance(module, tuple(types)), lambda module: _made(module, "weight", eps)
    )


def _made(module: nn.Module, name: str, eps: float) -> WeightStandardization:
    units = units_of(module, name)
    if fan_in(units.split(getattr(module, name))) < 2:
        raise InputError(
            f"{type(module).__name__}.{name} of shape {tuple(getattr(module, name).shape)} has a single weight for "
            "each output unit, which has no deviation; leave this layer out"
        )
    return WeightStandardization(eps, units)
