"""Mean-only batch normalization: each channel minus its batch mean, and not divided by anything.

``y = x - mean + bias``; evaluation takes a running average in place of the mean (Salimans and Kingma, 2016, section 4,
arXiv 1602.07868). It goes with weight normalization, which has the scale already: `weight_norm` the layer in front and
make it without a bias. Its noise is a sum over examples where batch normalization's is a quotient, so it is gentler.
Under `torch.distributed` the mean is that of all processes.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.nn.norm.checks import expect_channels
from setpoint.nn.norm.functional import per_channel, wide
from setpoint.nn.norm.stateful import mean_over_positions
from setpoint.optim.decay import no_weight_decay


class _MeanOnlyBatchNorm(nn.Module):
    """What the layers below share; they differ in the axes that they accept."""

    dims: ClassVar[tuple[int, ...]]
    bias: nn.Parameter | None
    running_mean: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        momentum: float | None = 0.1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_features < 1:
            raise InputError(f"{type(self).__name__}: expected num_features of at least 1, got {num_features!r}")
        self.num_features = num_features
        self.momentum = momentum
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)) if bias else None
        )
        self.register_buffer("running_mean", torch.empty(num_features, device=device, dtype=dtype))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long, device=device))
        no_weight_decay(self)
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Forget what was averaged."""
        self.running_mean.zero_()
        self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Addend to 0, and nothing averaged."""
        self.reset_running_stats()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Float[Tensor, "batch channels ..."]) -> Float[Tensor, "batch channels ..."]:
        """Centre ``(N, C, *)``; shape and dtype stay."""
        expect_channels(x, self.num_features, type(self).__name__, self.dims)
        mean = self._batch_mean(x) if self.training else wide(self.running_mean)
        shift = -mean if self.bias is None else wide(self.bias) - mean
        return (wide(x) + per_channel(shift, x)).to(x.dtype)

    def _batch_mean(self, x: Tensor) -> Tensor:
        """The mean over the batches of all processes, taken into the average; where all are empty, the average."""
        mean, count = mean_over_positions(wide(x).movedim(1, -1), None)
        running = wide(self.running_mean)
        mean = torch.where(count > 0, mean, running)
        with torch.no_grad():
            self.num_batches_tracked.add_((count > 0).squeeze())
            new = 1.0 / self.num_batches_tracked.clamp_min(1) if self.momentum is None else self.momentum
            self.running_mean.copy_(running + new * (mean.detach() - running))
        return mean

    def extra_repr(self) -> str:
        """Channels, momentum and whether there is an addend."""
        return f"{self.num_features}, momentum={self.momentum}, bias={self.bias is not None}"


class MeanOnlyBatchNorm1d(_MeanOnlyBatchNorm):
    """Subtract the batch mean of each channel of ``(N, C)`` or ``(N, C, L)``, and nothing more.

    Args:
        num_features: Number of channels C.
        momentum: Weight of the new mean in the running average; None for the average over all batches seen.
        bias: Have an addend ``bias`` (initially 0).
        device, dtype: Of the parameter and the running average.

    Shape:
        Output as input.

    Raises:
        InputError: ``num_features`` below 1; on call, another number of channels or axes.
        TypeError: On call, an input that is not floating-point.

    Reference:
        Salimans and Kingma, 2016, "Weight Normalization", section 4, arXiv 1602.07868.

    Example:
        >>> MeanOnlyBatchNorm1d(1)(torch.tensor([[1.0], [5.0]])).flatten().tolist()
        [-2.0, 2.0]
    """

    dims = (2, 3)


class MeanOnlyBatchNorm2d(_MeanOnlyBatchNorm):
    """`MeanOnlyBatchNorm1d` for images ``(N, C, H, W)``.

    >>> MeanOnlyBatchNorm2d(3)(torch.randn(2, 3, 4, 4)).mean((0, 2, 3)).abs().max() < 1e-6
    tensor(True)
    """

    dims = (4,)


class MeanOnlyBatchNorm3d(_MeanOnlyBatchNorm):
    """`MeanOnlyBatchNorm1d` for volumes ``(N, C, D, H, W)``.

    >>> MeanOnlyBatchNorm3d(3)(torch.randn(2, 3, 2, 2, 2)).shape
    torch.Size([2, 3, 2, 2, 2])
    """

    dims = (5,)
