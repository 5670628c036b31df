"""Region normalization: each region of the maps by its own statistics, so that a hole does not shift what is around it.

An image with a hole that is filled with one colour has another mean and variance than the image; a norm over all pixels
passes that on to the pixels that are fine (Yu, Guo, Jin, Wu, Chen, Li, Zhang and Liu, 2020, arXiv 1911.10375). For each
channel and each region R, with ``S`` of the ``N`` pixels of the batch in it,

    ``mean = sum_R(x) / S``,  ``var = sum_R((x - mean)²) / S``,  ``y = (x - mean) / sqrt(var + eps N / S)`` on R.

That ``eps`` grows as a region shrinks is what the official code computes, which fills what is outside a region with its
mean, normalizes over all pixels and scales by ``sqrt(S / N)``. The paper's network takes the regions from the given
mask where the hole is still to be seen, in its first layers (`RNB`), and from the features themselves in later ones
(`RNL`). There are no running averages: evaluation uses the statistics of its own batch.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.nn.conditioning import condition, nearest
from setpoint.nn.norm.checks import expect_channels
from setpoint.nn.norm.functional import per_channel, wide
from setpoint.nn.norm.stateful import mean_over_examples

Maps = Float[Tensor, "batch channels ..."]
Stats = Literal["batch", "instance"]


def region_norm(
    x: Maps, regions: Shaped[Tensor, "batch ..."], stats: Stats = "batch", eps: float = 1e-5, num_regions: int = 2
) -> Maps:
    """Normalize each region of the maps by its own mean and variance.

    Args:
        x: Maps ``(N, C, *)``. Half precision is computed in float32 and cast back.
        regions: Which region a pixel belongs to, in the size of ``x``. A mask ``(N, 1, *)`` or ``(N, *)``, boolean or
            of zeros and ones, whose inside and outside are two regions; one mask for each region ``(N, K, *)``; or
            numbers of regions ``(N, *)``. A batch of one serves all examples. No gradient passes through it.
        stats: Over the pixels of the whole batch, or of each example.
        eps: Added to the variance of a region that has all pixels; of one that has a share of them, over that share.
        num_regions: With numbers: how many. A pixel with another number belongs to no region, as may a pixel with one
            mask for each.

    Returns:
        A tensor of the shape and dtype of ``x``; 0 where there is no region.

    Raises:
        InputError: Regions of another size, or that are neither boolean nor zeros and ones.
        TypeError: ``x`` is not floating-point.

    Reference:
        Yu et al., 2020, "Region Normalization for Image Inpainting", arXiv 1911.10375.

    Example:
        >>> x, hole = torch.tensor([[[0.0, 2.0, 10.0, 14.0]]]), torch.tensor([[False, False, True, True]])
        >>> region_norm(x, hole).round(decimals=3)
        tensor([[[-1.,  1., -1.,  1.]]])
    """
    expect_channels(x, x.shape[1] if x.dim() > 1 else 1, "region_norm")
    masks = masks_of(regions, x, num_regions, "region_norm")
    return _normalized(wide(x), masks, stats, eps, together=False).to(x.dtype)


class RegionNorm(nn.Module):
    """Region normalization without parameters; see `region_norm`.

    Args:
        num_features: Number of channels C.
        stats: Over the pixels of the whole ``"batch"``, in training under `torch.distributed` over those of all
            processes; or of each ``"instance"``.
        eps: As in `region_norm`.
        num_regions: Where regions come as numbers: how many there are.
        condition: Name of the map under which `setpoint.nn.conditioned` gives the regions.

    Shape:
        Input and output ``(N, C, *)`` with one to three axes of space; regions as in `region_norm`, of any size.

    Raises:
        InputError: Other words for ``stats``; on call, another number of channels, regions of another batch size, or
            none.
        TypeError: On call, an input that is not floating-point.

    Reference:
        Yu et al., 2020, "Region Normalization for Image Inpainting", arXiv 1911.10375.

    Example:
        >>> layer = RegionNorm(1, num_regions=3)
        >>> layer(torch.tensor([[[0.0, 2.0, 5.0, 7.0, 9.0]]]), torch.tensor([[0, 0, 1, 1, 2]])).round(decimals=3)
        tensor([[[-1.,  1., -1.,  1.,  0.]]])
    """

    def __init__(
        self,
        num_features: int,
        stats: Stats = "batch",
        eps: float = 1e-5,
        num_regions: int = 2,
        condition: str = "mask",
    ) -> None:
        super().__init__()
        _expect_arguments(type(self).__name__, num_features, stats)
        self.num_features = num_features
        self.stats: Stats = stats
        self.eps = eps
        self.num_regions = num_regions
        self.condition = condition

    def forward(self, x: Maps, regions: Shaped[Tensor, "batch ..."] | None = None) -> Maps:
        """Normalize ``(N, C, *)``; without regions they are those of `setpoint.nn.conditioned`."""
        name = type(self).__name__
        expect_channels(x, self.num_features, name, (3, 4, 5))
        regions = condition(self.condition, name) if regions is None else regions
        masks = masks_of(regions, x, self.num_regions, name, resize=True)
        return _normalized(wide(x), masks, self.stats, self.eps, together=self.training).to(x.dtype)

    def extra_repr(self) -> str:
        """Channels, statistics, eps."""
        return f"{self.num_features}, stats={self.stats!r}, eps={self.eps}, num_regions={self.num_regions}"


class RNB(nn.Module):
    """RN-B, basic region normalization: by the given mask, with a gain and an addend for each of the two regions.

    ``y = RN(x) (1 + gamma) + beta`` with the gamma and beta of the pixel's region, all 0 at first. The official code
    adds both betas at every pixel; ``official_bias=True`` does so too. Its checkpoints load.

    Args:
        num_features: Number of channels C.
        stats, eps, condition: As for `RegionNorm`.
        official_bias: Add the betas of both regions everywhere.
        device, dtype: Of the parameters.

    Shape:
        Input and output ``(N, C, *)``; mask ``(N, 1, *)`` or ``(N, *)`` of any size, true (or 1) in the foreground,
        which in inpainting is the hole. A region that has no pixel left after resizing has no part in anything.

    Raises:
        InputError: As for `RegionNorm`.
        TypeError: On call, an input that is not floating-point.

    Reference:
        Yu et al., 2020, "Region Normalization for Image Inpainting", arXiv 1911.10375.

    Example:
        >>> x, hole = torch.tensor([[[0.0, 2.0, 10.0, 14.0]]]), torch.tensor([[False, False, True, True]])
        >>> RNB(1)(x, hole).detach().round(decimals=3)
        tensor([[[-1.,  1., -1.,  1.]]])
    """

    def __init__(
        self,
        num_features: int,
        stats: Stats = "batch",
        eps: float = 1e-5,
        official_bias: bool = False,
        condition: str = "mask",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _expect_arguments("RNB", num_features, stats)
        self.num_features = num_features
        self.stats: Stats = stats
        self.eps = eps
        self.official_bias = official_bias
        self.condition = condition
        self.foreground_gamma = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.foreground_beta = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.background_gamma = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.background_beta = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Everything to 0, where the layer is the plain norm."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Maps, mask: Shaped[Tensor, "batch ..."] | None = None) -> Maps:
        """Normalize ``(N, C, *)``; without a mask it is that of `setpoint.nn.conditioned`."""
        expect_channels(x, self.num_features, "RNB", (3, 4, 5))
        mask = condition(self.condition, "RNB") if mask is None else mask
        if mask.dim() == x.dim() and mask.shape[1] != 1:
            raise InputError(f"RNB: expected a mask of one channel, got {tuple(mask.shape)}; RegionNorm takes several")
        masks = masks_of(mask, x, 2, "RNB", resize=True)
        y = _normalized(wide(x), masks, self.stats, self.eps, together=self.training)
        gain = torch.where(masks[0], per_channel(self.foreground_gamma, x), per_channel(self.background_gamma, x))
        if self.official_bias:
            beta = per_channel(self.foreground_beta + self.background_beta, x)
        else:
            beta = torch.where(masks[0], per_channel(self.foreground_beta, x), per_channel(self.background_beta, x))
        return (y * (1 + gain) + beta).to(x.dtype)

    def extra_repr(self) -> str:
        """Channels, statistics, eps."""
        official = ", official_bias=True" if self.official_bias else ""
        return f"{self.num_features}, stats={self.stats!r}, eps={self.eps}{official}"


class RNL(nn.Module):
    """RN-L, learnable region normalization: the features say themselves which pixels belong together.

    A convolution of the mean and the maximum over channels gives a map ``s`` between 0 and 1. Where it reaches the
    threshold is one region, the rest another; two more convolutions of ``s`` give a gain and an addend for each pixel,
    which all channels share: ``y = RN(x) (1 + gamma) + beta``. The split itself passes no gradient, so that ``s``
    learns by gain and addend alone. Checkpoints of the official code load.

    Args:
        num_features: Number of channels C.
        threshold: From which value of ``s`` on a pixel is foreground.
        kernel_size: Of the three convolutions, 3 or 7.
        stats, eps: As for `RegionNorm`.
        device, dtype: Of the parameters.

    Shape:
        Input and output ``(N, C, H, W)``.

    Raises:
        InputError: Another kernel size; on call, another number of channels or axes.
        TypeError: On call, an input that is not floating-point.

    Reference:
        Yu et al., 2020, "Region Normalization for Image Inpainting", arXiv 1911.10375.

    Example:
        >>> RNL(8)(torch.randn(2, 8, 16, 16)).shape
        torch.Size([2, 8, 16, 16])
    """

    def __init__(
        self,
        num_features: int,
        threshold: float = 0.8,
        kernel_size: Literal[3, 7] = 7,
        stats: Stats = "batch",
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _expect_arguments("RNL", num_features, stats)
        self.num_features = num_features
        self.threshold = threshold
        self.stats: Stats = stats
        self.eps = eps
        self.sa = _SelfAware(kernel_size, device, dtype)

    def forward(self, x: Maps) -> Maps:
        """Normalize ``(N, C, H, W)``; shape and dtype stay."""
        expect_channels(x, self.num_features, "RNL", (4,))
        importance, gamma, beta = self.sa(x)
        foreground = importance.detach() >= self.threshold
        y = _normalized(wide(x), [foreground, ~foreground], self.stats, self.eps, together=self.training)
        affine: Tensor = y * (1 + gamma) + beta
        return affine.to(x.dtype)

    def extra_repr(self) -> str:
        """Channels, threshold, statistics, eps."""
        return f"{self.num_features}, threshold={self.threshold}, stats={self.stats!r}, eps={self.eps}"


class _SelfAware(nn.Module):
    """A map of importance from the features, and gain and addend from the map, each ``(N, 1, H, W)``."""

    def __init__(self, kernel_size: int, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        if kernel_size not in (3, 7):
            raise InputError(f"RNL: expected kernel_size to be 3 or 7, got {kernel_size!r}")
        sizes = {"kernel_size": kernel_size, "padding": kernel_size // 2, "device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(2, 1, bias=False, **sizes)  # type: ignore[arg-type]
        self.gamma_conv = nn.Conv2d(1, 1, **sizes)  # type: ignore[arg-type]
        self.beta_conv = nn.Conv2d(1, 1, **sizes)  # type: ignore[arg-type]

    def forward(self, x: Maps) -> tuple[Tensor, Tensor, Tensor]:
        summary = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True).values], 1)
        importance = torch.sigmoid(self.conv1(summary))
        gamma: Tensor = self.gamma_conv(importance)
        beta: Tensor = self.beta_conv(importance)
        return importance, gamma, beta


def masks_of(
    regions: Shaped[Tensor, "batch ..."], x: Maps, num_regions: int, layer: str, *, resize: bool = False
) -> list[Bool[Tensor, "batch 1 ..."]]:
    """A boolean mask ``(N, 1, *)`` for each region, in the size of the maps, from any form that `region_norm` takes.

    Raises:
        InputError: Regions of another size, or that are neither boolean nor zeros and ones.
    """
    regions = regions.detach().to(x.device)
    masks = regions if regions.dim() == x.dim() else regions.unsqueeze(1)
    if masks.dim() != x.dim() or masks.shape[0] not in (1, x.shape[0]):
        raise InputError(
            f"{layer}: expected regions of shape (N, 1, *) or (N, *) for an input of shape {tuple(x.shape)}, got "
            f"{tuple(regions.shape)}; give one map per example, or one for all"
        )
    if masks.shape[2:] != x.shape[2:]:
        if not resize:
            raise InputError(
                f"{layer}: expected regions in the size {tuple(x.shape[2:])} of the input, got "
                f"{tuple(masks.shape[2:])}; bring them to it by setpoint.nn.nearest"
            )
        masks = nearest(masks, x.shape[2:])
    if masks.dtype != torch.bool and not masks.is_floating_point() and regions.dim() < x.dim():
        return [masks == number for number in range(num_regions)]
    if masks.dtype != torch.bool:
        _expect_binary(masks, layer)
        masks = masks != 0
    return [masks, ~masks] if masks.shape[1] == 1 else list(torch.split(masks, 1, 1))


def _expect_binary(masks: Tensor, layer: str) -> None:
    # Contents can't be looked at while a program is traced, on the meta device, or under torch.func.
    if torch.compiler.is_compiling() or masks.is_meta or torch._C._functorch.peek_interpreter_stack() is not None:
        return
    if not bool(((masks == 0) | (masks == 1)).all()):
        raise InputError(
            f"{layer}: expected a mask that is boolean, or of zeros and ones, got other values; choose a threshold, as "
            "in mask > 0.5"
        )


def _normalized(x: Maps, masks: list[Bool[Tensor, "batch 1 ..."]], stats: Stats, eps: float, *, together: bool) -> Maps:
    """Each region by its own statistics; with ``together`` those of a batch are taken over all processes."""
    space = tuple(range(2, x.dim()))
    pixels = x.shape[2:].numel()

    def of_regions(values: Tensor) -> Tensor:
        """Sums over each region of an example, ``(N, regions, channels)``."""
        return torch.stack([torch.where(mask, values, 0.0).sum(space) for mask in masks], 1)

    def pooled(sums: Tensor) -> Tensor:
        """Their mean over examples where statistics are those of a batch, ``(1, regions, channels)``."""
        if stats == "instance":
            return sums
        return mean_over_examples(sums, together)[0].unsqueeze(0)

    def spread(values: Tensor) -> Tensor:
        """To every pixel the value of its region, ``(N, channels, *)``; 0 where there is none."""
        each = values.reshape(*values.shape, *(1 for _ in space)).unbind(1)
        parts = [torch.where(mask, value, 0.0) for mask, value in zip(masks, each, strict=True)]
        return torch.stack(parts).sum(0)

    sums = pooled(torch.cat([of_regions(x), of_regions(torch.ones_like(x[:, :1]))], 2))
    count = torch.where(sums[..., -1:] > 0, sums[..., -1:], 1.0)
    centred = x - spread(sums[..., :-1] / count)
    variance = pooled(of_regions(centred.square())) / count
    return centred * spread(torch.rsqrt(variance + eps * pixels / count))


def _expect_arguments(layer: str, num_features: int, stats: str) -> None:
    if num_features < 1:
        raise InputError(f"{layer}: expected num_features of at least 1, got {num_features!r}")
    if stats not in get_args(Stats):
        raise InputError(f"{layer}: expected stats to be 'batch' or 'instance', got {stats!r}")
