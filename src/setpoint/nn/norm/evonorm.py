"""EvoNorm: normalization and activation as one expression, found by evolution (Liu, Brock, Simonyan and Le, 2020).

A layer of this family takes the place of a batch norm *and* the activation behind it (arXiv 2004.02967). None of them
subtracts a mean. With ``bstd`` the standard deviation of a channel over the batch, ``istd`` and ``irms`` those of one
channel of one image, ``gstd`` and ``grms`` of a group of channels of one image, and ``eps`` inside every root:

| layer | what the input is turned into, before gain and addend | trains with |
| --- | --- | --- |
| `EvoNorm2dB0` | ``x / max(bstd, v x + istd)`` | large batches |
| `EvoNorm2dB1` | ``x / max(bstd, (x + 1) irms)`` | large batches |
| `EvoNorm2dB2` | ``x / max(bstd, irms - x)`` | large batches |
| `EvoNorm2dS0` | ``x sigmoid(v x) / gstd`` | any batch |
| `EvoNorm2dS1` | ``x sigmoid(x) / gstd`` | any batch |
| `EvoNorm2dS2` | ``x sigmoid(x) / grms`` | any batch |

Evaluation takes a running average for ``bstd``; the statistics of an image are always its own, so none of them folds
into a convolution. Where no activation follows, as behind the last convolution of a residual branch, the paper puts
gain and addend alone (``apply_act=False``); gains of such layers start at 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from setpoint.errors import InputError
from setpoint.nn.norm.checks import expect_channels
from setpoint.nn.norm.functional import wide
from setpoint.nn.norm.stateful import StatefulNorm, mean_over_positions

Maps = Float[Tensor, "batch channels height width"]
PerImage = Float[Tensor, "batch channels"]


class _EvoNorm(StatefulNorm, ABC):
    """What all have: gain, addend and, in two of them, the slope ``v`` of the gate."""

    has_slope = False
    v: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        apply_act: bool,
        eps: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(num_features, eps, True, device, dtype)
        self.apply_act = apply_act
        slope = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.register_parameter("v", slope if self.has_slope and apply_act else None)

    def reset_parameters(self) -> None:
        """Gain and slope to 1, addend to 0, and nothing averaged."""
        super().reset_parameters()
        if self.v is not None:
            nn.init.ones_(self.v)

    def forward(self, x: Maps) -> Maps:
        """Normalize and activate ``(N, C, H, W)``; shape and dtype stay."""
        expect_channels(x, self.num_features, type(self).__name__, (4,))
        assert self.weight is not None
        assert self.bias is not None
        values = wide(x)
        if self.apply_act:
            # Every statistic of the family follows from these two, so the maps are read once.
            variance, mean = torch.var_mean(values, (2, 3), correction=0)
            values = self._activated(values, mean, variance)
        return torch.addcmul(_maps(self.bias), values, _maps(self.weight)).to(x.dtype)

    @abstractmethod
    def _activated(self, x: Maps, mean: PerImage, variance: PerImage) -> Maps:
        """The maps normalized and activated, given mean and variance of each channel of each image."""


class _BatchEvoNorm(_EvoNorm):
    """A quotient by the larger of a batch statistic and a term of each image's own."""

    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        apply_act: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, apply_act, eps, device, dtype)
        self.momentum = momentum
        self._add_state("running_var", num_features)
        self.reset_parameters()

    def reset_state(self) -> None:
        """Running variance to 1."""
        self.running_var.fill_(1.0)

    def _activated(self, x: Maps, mean: PerImage, variance: PerImage) -> Maps:
        over_batch = (
            self._batch_variance(mean, variance, x.shape[2] * x.shape[3]) if self.training else self.running_var
        )
        return x / torch.maximum(_maps(torch.sqrt(over_batch + self.eps)), self._own_term(x, mean, variance))

    @abstractmethod
    def _own_term(self, x: Maps, mean: PerImage, variance: PerImage) -> Maps:
        """What stands beside the batch's standard deviation under the maximum."""

    def _batch_variance(self, mean: PerImage, variance: PerImage, pixels: int) -> Float[Tensor, " channels"]:
        """Over the batches of all processes, from the images' own moments; taken into the running average."""
        together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if len(mean) * pixels == 1 and not together:
            raise InputError(
                f"{type(self).__name__}: expected more than one value per channel in training, got one image of one "
                "pixel, which has no variance; use larger batches, eval(), or a layer of the S series"
            )
        centre, images = mean_over_positions(mean, None)
        whole, _ = mean_over_positions(variance + (mean - centre).square(), None)
        with torch.no_grad():
            count = images * pixels
            unbiased = whole * (count / (count - 1).clamp_min(1))
            new = torch.where(count > 0, self.momentum, 0.0).to(unbiased)
            self.running_var.copy_(torch.lerp(self.running_var.to(unbiased), unbiased, new))
        return whole

    def extra_repr(self) -> str:
        """Channels, whether it normalizes at all, momentum and eps."""
        return f"{self.num_features}, apply_act={self.apply_act}, momentum={self.momentum}, eps={self.eps}"


class EvoNorm2dB0(_BatchEvoNorm):
    """EvoNorm-B0, for batches large enough for batch statistics: ``x / max(bstd, v x + istd) * weight + bias``.

    Under `torch.distributed` the variance is that of all processes, whose images must have one size. Names of
    parameters and buffers are timm's, so its checkpoints load; its ``eps`` is 1e-3.

    Args:
        num_features: Number of channels C.
        apply_act: False for gain and addend alone, where no activation is wanted.
        momentum: Weight of the new value in the running variance.
        eps: Added to the variances, inside the roots.
        device, dtype: Of the parameters; the running variance stays in float32.

    Shape:
        Input and output ``(N, C, H, W)``.

    Raises:
        InputError: On call, another number of channels or axes; in training, a single value per channel.
        TypeError: On call, an input that is not floating-point.

    Reference:
        Liu, Brock, Simonyan and Le, 2020, "Evolving Normalization-Activation Layers", arXiv 2004.02967.

    Example:
        >>> layer = EvoNorm2dB0(1, eps=0.0)
        >>> layer(torch.tensor([[[[-1.0, 1.0]]]])).flatten().tolist()  # both standard deviations are 1
        [-1.0, 0.5]
    """

    has_slope = True

    def _own_term(self, x: Maps, mean: PerImage, variance: PerImage) -> Maps:  # noqa: ARG002
        assert self.v is not None
        return torch.addcmul(_maps(torch.sqrt(variance + self.eps)), x, _maps(self.v))


class EvoNorm2dB1(_BatchEvoNorm):
    """EvoNorm-B1: ``x / max(bstd, (x + 1) irms) * weight + bias``; otherwise as `EvoNorm2dB0`.

    >>> EvoNorm2dB1(1, eps=0.0)(torch.tensor([[[[-1.0, 1.0]]]])).flatten().tolist()
    [-1.0, 0.5]
    """

    def _own_term(self, x: Maps, mean: PerImage, variance: PerImage) -> Maps:
        return (x + 1) * _root_mean_square(mean, variance, self.eps)


class EvoNorm2dB2(_BatchEvoNorm):
    """EvoNorm-B2: ``x / max(bstd, irms - x) * weight + bias``; otherwise as `EvoNorm2dB0`.

    >>> EvoNorm2dB2(1, eps=0.0)(torch.tensor([[[[-1.0, 1.0]]]])).flatten().tolist()
    [-0.5, 1.0]
    """

    def _own_term(self, x: Maps, mean: PerImage, variance: PerImage) -> Maps:
        return _root_mean_square(mean, variance, self.eps) - x


class _SampleEvoNorm(_EvoNorm):
    """A gated input divided by a statistic of its group of channels."""

    def __init__(
        self,
        num_features: int,
        groups: int = 32,
        group_size: int | None = None,
        apply_act: bool = True,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, apply_act, eps, device, dtype)
        self.groups = groups if group_size is None else num_features // max(group_size, 1)
        if self.groups < 1 or num_features % self.groups or group_size not in (None, num_features // self.groups):
            given = f"groups={groups}" if group_size is None else f"group_size={group_size}"
            raise InputError(
                f"{type(self).__name__}: expected {num_features} channels to divide into equal groups, got {given}; "
                "group_size=8 or another divisor sets the channels in a group"
            )
        self.reset_parameters()

    def reset_state(self) -> None:
        """There is none: an image is normalized by itself."""

    def _group_moments(self, mean: PerImage, variance: PerImage) -> tuple[PerImage, PerImage]:
        """Mean and variance of each group, one value for each of its channels."""
        means, variances = (t.unflatten(1, (self.groups, -1)) for t in (mean, variance))  # type: ignore[no-untyped-call]
        centre = means.mean(2, keepdim=True)
        whole = (variances + (means - centre).square()).mean(2, keepdim=True)
        return centre.expand_as(means).flatten(1), whole.expand_as(means).flatten(1)

    def extra_repr(self) -> str:
        """Channels, groups, whether it normalizes at all, and eps."""
        return f"{self.num_features}, groups={self.groups}, apply_act={self.apply_act}, eps={self.eps}"


class EvoNorm2dS0(_SampleEvoNorm):
    """EvoNorm-S0, for batches of any size: ``x sigmoid(v x) / gstd * weight + bias``; training and evaluation agree.

    Names of parameters are timm's, so its checkpoints load.

    Args:
        num_features: Number of channels C.
        groups: Groups of channels that are normalized apart.
        group_size: Channels in a group, in place of ``groups``.
        apply_act: False for gain and addend alone, where no activation is wanted.
        eps: Added to the variance, inside the root.
        device, dtype: Of the parameters.

    Shape:
        Input and output ``(N, C, H, W)``.

    Raises:
        InputError: ``num_features`` does not divide into such groups; on call, another number of channels or axes.
        TypeError: On call, an input that is not floating-point.

    Reference:
        Liu, Brock, Simonyan and Le, 2020, "Evolving Normalization-Activation Layers", arXiv 2004.02967.

    Example:
        >>> layer = EvoNorm2dS0(1, groups=1, eps=0.0)
        >>> layer(torch.tensor([[[[-2.0, 2.0]]]])).flatten().tolist()  # sigmoid(±2) times ±1
        [-0.119..., 0.880...]
    """

    has_slope = True

    def _activated(self, x: Maps, mean: PerImage, variance: PerImage) -> Maps:
        assert self.v is not None
        _, whole = self._group_moments(mean, variance)
        return x * torch.sigmoid(x * _maps(self.v)) * _maps(torch.rsqrt(whole + self.eps))


class EvoNorm2dS1(_SampleEvoNorm):
    """EvoNorm-S1: ``x sigmoid(x) / gstd * weight + bias``; otherwise as `EvoNorm2dS0`.

    >>> EvoNorm2dS1(1, groups=1, eps=0.0)(torch.tensor([[[[-2.0, 2.0]]]])).flatten().tolist()
    [-0.119..., 0.880...]
    """

    def _activated(self, x: Maps, mean: PerImage, variance: PerImage) -> Maps:
        _, whole = self._group_moments(mean, variance)
        return F.silu(x) * _maps(torch.rsqrt(whole + self.eps))


class EvoNorm2dS2(_SampleEvoNorm):
    """EvoNorm-S2: ``x sigmoid(x) / grms * weight + bias``; otherwise as `EvoNorm2dS0`.

    >>> EvoNorm2dS2(1, groups=1, eps=0.0)(torch.tensor([[[[2.0, 2.0]]]])).flatten().tolist()
    [0.880..., 0.880...]
    """

    def _activated(self, x: Maps, mean: PerImage, variance: PerImage) -> Maps:
        return F.silu(x) / _root_mean_square(*self._group_moments(mean, variance), self.eps)


def _maps(values: Tensor) -> Tensor:
    """``(C,)`` or ``(N, C)`` to be multiplied with maps ``(N, C, H, W)``."""
    return values[..., None, None]


def _root_mean_square(mean: PerImage, variance: PerImage, eps: float) -> Tensor:
    return _maps(torch.sqrt(variance + mean.square() + eps))
