"""Instance normalization: torch's own, with refusals in words (Ulyanov, Vedaldi and Lempitsky, 2016, arXiv 1607.08022).

Each channel of each example is normalized by its own mean and variance over positions, which takes contrast out of a
picture. It is group normalization with a group for each channel.
"""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from setpoint.errors import InputError
from setpoint.nn.norm.checks import expect_floating


class _InstanceNorm(nn.modules.instancenorm._InstanceNorm):
    """What the three instance norms share: the axes that an input may have, and what is said of others."""

    dims: ClassVar[int]

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Normalize every channel of every example; shape and dtype stay."""
        self._check_input_dim(x)
        if not x.numel():  # where torch's kernel fails, and that of group norm does not
            return F.group_norm(x, self.num_features, self.weight, self.bias, self.eps)
        return super().forward(x)

    def _get_no_batch_dim(self) -> int:
        return self.dims - 1

    def _check_input_dim(self, x: Tensor) -> None:
        """An input of one more axis than an example, or an example alone; and in it the right number of channels.

        torch only warns of other channels where there are no parameters.
        """
        name = type(self).__name__
        expect_floating(x, name)
        if x.dim() not in (self.dims - 1, self.dims):
            raise InputError(
                f"{name}: expected an input with {self.dims} axes, or {self.dims - 1} for one example, got {x.dim()} "
                f"(shape {tuple(x.shape)})"
            )
        channels = x.shape[1 - self.dims]
        if channels != self.num_features:
            raise InputError(
                f"{name}: expected {self.num_features} channels, got {channels} (shape {tuple(x.shape)}); make the "
                "layer with the number that comes"
            )
        statistics_of_input = self.training or not self.track_running_stats
        if statistics_of_input and x.shape[2 - self.dims :].numel() == 1:
            raise InputError(
                f"{name}: expected more than one position in each channel, got shape {tuple(x.shape)}; a single number "
                "is its own mean and has no variance"
            )


class InstanceNorm1d(_InstanceNorm, nn.InstanceNorm1d):
    """`torch.nn.InstanceNorm1d`, and a refusal of what it can't normalize that says what to do.

    Args:
        num_features: Number of channels C.
        eps: Added to the variance, inside the root.
        momentum: Weight of the new value in the running averages.
        affine: Have ``weight`` (initially 1) and ``bias`` (initially 0) per channel; without unless asked.
        track_running_stats: Keep running averages for evaluation; without, each example has its own there too.
        device, dtype: Of the parameters and buffers.

    Shape:
        Input and output ``(N, C, L)`` or ``(C, L)``.

    Raises:
        InputError: On call, another number of channels or axes, or a single position.
        TypeError: On call, an input that is not floating-point.

    Reference:
        Ulyanov, Vedaldi and Lempitsky, 2016, "Instance Normalization", arXiv 1607.08022.

    Example:
        >>> import torch
        >>> InstanceNorm1d(1)(torch.tensor([[[1.0, 3.0]]]))
        tensor([[[-1.0000,  1.0000]]])
    """

    dims = 3


class InstanceNorm2d(_InstanceNorm, nn.InstanceNorm2d):
    """`torch.nn.InstanceNorm2d`, and a refusal of what it can't normalize that says what to do.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: As for `InstanceNorm1d`.

    Shape:
        Input and output ``(N, C, H, W)`` or ``(C, H, W)``.

    Raises:
        InputError: On call, another number of channels or axes, or a single position.
        TypeError: On call, an input that is not floating-point.

    Reference:
        Ulyanov, Vedaldi and Lempitsky, 2016, "Instance Normalization", arXiv 1607.08022.

    Example:
        >>> import torch
        >>> InstanceNorm2d(1)(torch.tensor([[[[1.0, 3.0]]]]))
        tensor([[[[-1.0000,  1.0000]]]])
    """

    dims = 4


class InstanceNorm3d(_InstanceNorm, nn.InstanceNorm3d):
    """`torch.nn.InstanceNorm3d`, and a refusal of what it can't normalize that says what to do.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: As for `InstanceNorm1d`.

    Shape:
        Input and output ``(N, C, D, H, W)`` or ``(C, D, H, W)``.

    Raises:
        InputError: On call, another number of channels or axes, or a single position.
        TypeError: On call, an input that is not floating-point.

    Reference:
        Ulyanov, Vedaldi and Lempitsky, 2016, "Instance Normalization", arXiv 1607.08022.

    Example:
        >>> import torch
        >>> InstanceNorm3d(1)(torch.tensor([[[[[1.0, 3.0]]]]])).shape
        torch.Size([1, 1, 1, 1, 2])
    """

    dims = 5
