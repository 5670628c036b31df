"""Layer normalization: each example by its own mean and variance (Ba, Kiros and Hinton, 2016, arXiv 1607.06450).

``y = weight * (x - mean) / sqrt(var + eps) + bias`` with the mean and the biased variance over the normalized axes.
There are no running statistics, so training and evaluation are the same, and a batch of one is like any other.

`LayerNorm` is torch's layer with its fused kernel; what is added is that a wrong input is refused in words. Images know
two forms that differ in what the statistics are taken over: `LayerNorm2d` normalizes the channels of every pixel by
themselves, `LayerNormCHW` channels and pixels of an image together, which is what the paper does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from setpoint.nn.norm.checks import expect_channels, expect_trailing, shape_of
from setpoint.nn.norm.functional import layer_norm


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm`, and a refusal of what it can't normalize that says what to do.

    Args:
        normalized_shape: Sizes of the axes normalized over, or one size for the last axis.
        eps: Added to the variance, inside the root. BERT checkpoints use 1e-12, many image models 1e-6.
        elementwise_affine: Have ``weight`` (initially 1) and ``bias``.
        bias: Have ``bias`` (initially 0).
        device, dtype: Of the parameters.

    Shape:
        Input and output ``(*, *normalized_shape)``.

    Raises:
        InputError: A size below 1; on call, other trailing sizes than ``normalized_shape``.
        TypeError: On call, an input that is not floating-point.

    Reference:
        Ba, Kiros and Hinton, 2016, "Layer Normalization", arXiv 1607.06450.

    Example:
        >>> LayerNorm(4)(torch.tensor([1.0, 2.0, 3.0, 4.0])).detach()
        tensor([-1.3416, -0.4472,  0.4472,  1.3416])
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = list(shape_of(normalized_shape, "LayerNorm"))
        super().__init__(shape, eps, elementwise_affine, bias, device=device, dtype=dtype)

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Normalize ``(*, *normalized_shape)``; shape and dtype stay."""
        expect_trailing(x, self.normalized_shape, "LayerNorm")
        return layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class LayerNorm2d(nn.LayerNorm):
    """Layer normalization over the channels of every pixel of ``(N, C, H, W)``.

    ConvNeXt's form. The result has the memory format ``channels_last``, in which it costs no copy.

    Args:
        num_channels: Size of axis 1.
        eps: Added to the variance, inside the root.
        elementwise_affine: Have ``weight`` (initially 1) and ``bias``.
        bias: Have ``bias`` (initially 0).
        device, dtype: Of the parameters.

    Shape:
        Input and output ``(N, num_channels, H, W)``.

    Raises:
        InputError: ``num_channels`` below 1; on call, another number of axes or channels.
        TypeError: On call, an input that is not floating-point.

    Reference:
        Liu, Mao, Wu, Feichtenhofer, Darrell and Xie, 2022, "A ConvNet for the 2020s", arXiv 2201.03545.

    Example:
        >>> LayerNorm2d(2)(torch.tensor([1.0, 3.0]).reshape(1, 2, 1, 1)).flatten().tolist()
        [-0.999..., 0.999...]
    """

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-6,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = list(shape_of(num_channels, "LayerNorm2d"))
        super().__init__(shape, eps, elementwise_affine, bias, device=device, dtype=dtype)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        """Normalize every pixel of ``(N, C, H, W)``; shape and dtype stay."""
        expect_channels(x, self.normalized_shape[0], "LayerNorm2d", dims=(4,))
        pixels = layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return pixels.permute(0, 3, 1, 2)


class LayerNormCHW(nn.GroupNorm):
    """Layer normalization over channels and positions together, with gain and bias per channel.

    The paper's form for feature maps but for the gain, which the paper has per element: `torch.nn.GroupNorm` with one
    group.

    Args:
        num_channels: Size of axis 1.
        eps: Added to the variance, inside the root.
        affine: Have ``weight`` (initially 1) and ``bias`` (initially 0) per channel.
        device, dtype: Of the parameters.

    Shape:
        Input and output ``(N, num_channels, *)``.

    Raises:
        InputError: ``num_channels`` below 1; on call, another number of channels.
        TypeError: On call, an input that is not floating-point.

    Reference:
        Ba, Kiros and Hinton, 2016, "Layer Normalization", arXiv 1607.06450.

    Example:
        >>> LayerNormCHW(1)(torch.tensor([1.0, 3.0]).reshape(1, 1, 2)).flatten().tolist()
        [-0.999..., 0.999...]
    """

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        (channels,) = shape_of(num_channels, "LayerNormCHW")
        super().__init__(1, channels, eps, affine, device=device, dtype=dtype)

    def forward(self, x: Float[Tensor, "batch channels ..."]) -> Float[Tensor, "batch channels ..."]:
        """Normalize every example of ``(N, C, *)``; shape and dtype stay."""
        expect_channels(x, self.num_channels, "LayerNormCHW")
        return super().forward(x)

    def extra_repr(self) -> str:
        """Channels, eps and whether it has parameters."""
        return f"{self.num_channels}, eps={self.eps}, affine={self.affine}"
