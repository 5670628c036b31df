"""SPADE: a norm whose gain and addend are maps, made from a segmentation map by convolutions.

A network that is shown a label map at its input only soon forgets it: where one label fills the image, a convolution
gives a constant and an instance norm turns that into zero, whichever label it was. So the labels enter at every norm
(Park, Liu, Wang and Zhu, 2019, arXiv 1903.07291). With a norm ``PF`` that has no parameters, and the labels ``S``
brought to the size of x by the nearest pixel:

    ``a = ReLU(conv(S))``,  ``y = PF(x) (1 + conv_gamma(a)) + conv_beta(a)``.

(The paper's formula has gamma in the place of ``1 + gamma``; its code, as here, adds the 1.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.nn.conditioning import condition, nearest
from setpoint.nn.norm.checks import expect_channels

Maps = Float[Tensor, "batch channels height width"]

NORMS: Mapping[str, Callable[[int], nn.Module]] = {
    "instance": lambda channels: nn.InstanceNorm2d(channels, affine=False),
    "batch": lambda channels: nn.BatchNorm2d(channels, affine=False),
    "syncbatch": lambda channels: nn.SyncBatchNorm(channels, affine=False),
}
"""What stands inside, by the names of the official code."""


class SPADE(nn.Module):
    """Spatially-adaptive normalization: gain and addend of each pixel from a map of labels around it.

    Weights start small (Xavier, gain 0.02) and biases at 0, so that the layer begins as the norm inside it. State has
    the official names. Weights of its convolutions are decayed like any other.

    Args:
        num_features: Number of channels C.
        label_nc: Number of labels L, or of channels of a map that holds anything else.
        hidden: Channels between the two convolutions.
        kernel_size: Of all three convolutions, odd.
        norm: ``"instance"``, ``"batch"`` (with running averages), ``"syncbatch"`` (over all processes, on a GPU), or a
            module without gain and addend.
        condition: Name of the map under which `setpoint.nn.conditioned` gives the labels.
        device, dtype: Of parameters and buffers.

    Shape:
        Input and output ``(N, C, H, W)``; the map in any size, ``(N, L, *, *)`` one-hot or of weights of labels, or
        ``(N, *, *)`` with numbers of labels, where another number (such as 255) is no label. A batch of one serves all
        examples.

    Raises:
        InputError: An even kernel size, another word for the norm; on call, another number of channels, a map with
            another number of channels or examples, or none.
        TypeError: On call, an input that is not floating-point.

    Reference:
        Park, Liu, Wang and Zhu, 2019, "Semantic Image Synthesis with Spatially-Adaptive Normalization",
        arXiv 1903.07291.

    Example:
        >>> layer, labels = SPADE(8, label_nc=3, hidden=16), torch.randint(3, (2, 32, 32))
        >>> layer(torch.randn(2, 8, 16, 16), labels).shape
        torch.Size([2, 8, 16, 16])
    """

    def __init__(
        self,
        num_features: int,
        label_nc: int,
        hidden: int = 128,
        kernel_size: int = 3,
        norm: Literal["instance", "batch", "syncbatch"] | nn.Module = "instance",
        condition: str = "segmap",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(num_features, label_nc, hidden, kernel_size) < 1 or kernel_size % 2 == 0:
            raise InputError(
                "SPADE: expected num_features, label_nc and hidden of at least 1 and an odd kernel_size, got "
                f"{num_features}, {label_nc}, {hidden} and {kernel_size}"
            )
        if not isinstance(norm, nn.Module):
            if norm not in NORMS:
                raise InputError(f"SPADE: expected norm to be a module or one of {', '.join(NORMS)}, got {norm!r}")
            norm = NORMS[norm](num_features).to(device=device, dtype=dtype)
        self.num_features = num_features
        self.label_nc = label_nc
        self.condition = condition
        self.param_free_norm = norm

        def convolution(inputs: int, outputs: int) -> nn.Conv2d:
            return nn.Conv2d(inputs, outputs, kernel_size, padding=kernel_size // 2, device=device, dtype=dtype)

        self.mlp_shared = nn.Sequential(convolution(label_nc, hidden), nn.ReLU())
        self.mlp_gamma = convolution(hidden, num_features)
        self.mlp_beta = convolution(hidden, num_features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights by Xavier with gain 0.02, biases 0; running averages, where there are any, as before training."""
        for convolution in (self.mlp_shared[0], self.mlp_gamma, self.mlp_beta):
            assert isinstance(convolution, nn.Conv2d)
            nn.init.xavier_normal_(convolution.weight, gain=0.02)
            assert convolution.bias is not None
            nn.init.zeros_(convolution.bias)
        reset = getattr(self.param_free_norm, "reset_parameters", None)
        if callable(reset):
            reset()

    def forward(self, x: Maps, segmap: Shaped[Tensor, "batch ..."] | None = None) -> Maps:
        """Normalize ``(N, C, H, W)``; without a map it is that of `setpoint.nn.conditioned`."""
        expect_channels(x, self.num_features, "SPADE", (4,))
        segmap = condition(self.condition, "SPADE") if segmap is None else segmap
        if len(segmap) not in (1, len(x)):
            raise InputError(
                f"SPADE: expected a map of {len(x)} examples, as the input has, or of one for all, got {len(segmap)}"
            )
        gamma, beta = self.modulation(segmap, x.shape[2:], x.dtype)
        normalized: Tensor = self.param_free_norm(x)
        return (normalized * (1 + gamma) + beta).to(x.dtype)

    def modulation(
        self, segmap: Shaped[Tensor, "batch ..."], size: torch.Size, dtype: torch.dtype | None = None
    ) -> tuple[Maps, Maps]:
        """Gain (less 1) and addend of each pixel, which do not depend on x: for one layout they can be kept.

        Args:
            segmap: As in a call.
            size: ``(H, W)`` of the maps to be normalized.
            dtype: Of the convolutions' input; None for that of their weights.

        Returns:
            gamma and beta, each ``(N, C, H, W)``.

        Raises:
            InputError: Another number of axes or channels.

        Example:
            >>> layer = SPADE(8, label_nc=3, hidden=16)
            >>> gamma, beta = layer.modulation(torch.randint(3, (1, 4, 4)), torch.Size((8, 8)))
            >>> y = layer.param_free_norm(torch.randn(5, 8, 8, 8)) * (1 + gamma) + beta
        """
        weight = self.mlp_gamma.weight
        labels = self._one_hot(segmap.to(weight.device), size).to(weight.dtype if dtype is None else dtype)
        active = self.mlp_shared(labels)
        return self.mlp_gamma(active), self.mlp_beta(active)

    def _one_hot(self, segmap: Tensor, size: torch.Size) -> Tensor:
        """The map in the size asked for, ``(N, label_nc, H, W)``."""
        if segmap.dim() == 3 and not segmap.is_floating_point():
            numbers = torch.arange(self.label_nc, device=segmap.device)[:, None, None]
            return nearest(segmap.unsqueeze(1), size) == numbers
        if segmap.dim() != 4 or segmap.shape[1] != self.label_nc:
            raise InputError(
                f"SPADE: expected a map of shape (N, {self.label_nc}, H, W), or (N, H, W) with numbers of labels, got "
                f"{tuple(segmap.shape)}; make the layer with label_nc= the channels that come"
            )
        return nearest(segmap, size)

    def extra_repr(self) -> str:
        """Channels and labels."""
        return f"{self.num_features}, label_nc={self.label_nc}"
