"""A small U-Net that fills holes in images.

What is in the hole is painted over with one colour, an encoder of strided convolutions and a decoder with skips put
something there. Norms are passed in; the hole reaches those that ask for it (`setpoint.nn.RNB`) by
`setpoint.nn.conditioned`. As in the network of region normalization (Yu et al., 2020, arXiv 1911.10375), norms of the
encoder and later ones may differ, since a hole is to be seen in the first features and less and less in later ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from setpoint.errors import InputError
from setpoint.models.plain import rebuild, to_plain
from setpoint.nn.block.base import NormFactory
from setpoint.nn.conditioning import conditioned

Images = Float[Tensor, "batch channels height width"]
Holes = Bool[Tensor, "batch 1 height width"]


@dataclass(frozen=True, kw_only=True)
class InpaintingConfig:
    """Sizes of an `InpaintingUNet`.

    Args:
        channels: Colours of the image.
        widths: Channels at each resolution; each but the first halves it.
        middle: Dilated convolutions at the lowest resolution.
        mask_channel: Show the hole to the first convolution as a channel of its own.
        fill: The colour of holes in the input.

    Raises:
        InputError: No width, or one below 1.
    """

    channels: int = 3
    widths: tuple[int, ...] = (32, 64, 64)
    middle: int = 2
    mask_channel: bool = False
    fill: float = 1.0

    def __post_init__(self) -> None:
        if not self.widths or min(*self.widths, self.channels) < 1 or self.middle < 0:
            raise InputError(
                f"expected channels and widths of at least 1 and middle of at least 0, got {self.channels}, "
                f"{self.widths} and {self.middle}"
            )


class InpaintingUNet(nn.Module):
    """Fills holes: an encoder, dilated convolutions, a decoder with skips.

    Args:
        config: Sizes.
        norm: Makes each norm of the encoder from its number of channels; ``nn.Identity`` for none.
        late_norm: Makes those behind it; None for the same.
        activation: Makes each activation.

    Example:
        >>> from setpoint.nn import RNB, RNL
        >>> model = InpaintingUNet(InpaintingConfig(widths=(4, 8)), norm=RNB, late_norm=RNL)
        >>> holes = torch.zeros(2, 1, 16, 16, dtype=torch.bool)
        >>> holes[:, :, 4:9, 4:9] = True
        >>> model(torch.rand(2, 3, 16, 16), holes).shape
        torch.Size([2, 3, 16, 16])
    """

    def __init__(
        self,
        config: InpaintingConfig,
        *,
        norm: NormFactory = nn.BatchNorm2d,
        late_norm: NormFactory | None = None,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        self.config = config
        self._parts = {"norm": norm, "late_norm": late_norm, "activation": activation}
        late = norm if late_norm is None else late_norm
        self.encoder = nn.ModuleList()
        inputs = config.channels + config.mask_channel
        for index, width in enumerate(config.widths):
            self.encoder.append(_unit(inputs, width, norm, activation, stride=2 if index else 1))
            inputs = width
        self.middle = nn.Sequential(
            *(_unit(inputs, inputs, late, activation, dilation=2) for _ in range(config.middle))
        )
        self.decoder = nn.ModuleList()
        for width in reversed(config.widths[:-1]):
            self.decoder.append(_unit(inputs + width, width, late, activation))
            inputs = width
        self.head = nn.Conv2d(inputs, config.channels, 3, padding=1)
        self.initialize_weights()

    def forward(self, images: Images, holes: Holes) -> Images:
        """The whole images anew, between 0 and 1; what was around the holes can be put back by the caller.

        Args:
            images: Between 0 and 1; what they hold in the holes is not looked at.
            holes: True where something is missing.

        Raises:
            InputError: Another number of colours, a size that does not halve so often, or holes of another size.
        """
        self._expect(images, holes)
        x = torch.where(holes, self.config.fill, images)
        if self.config.mask_channel:
            x = torch.cat([x, holes.to(x)], 1)
        with conditioned(mask=holes):
            skips = []
            for stage in self.encoder:
                x = stage(x)
                skips.append(x)
            x = self.middle(x)
            for stage, skip in zip(self.decoder, reversed(skips[:-1]), strict=True):
                x = stage(torch.cat([F.interpolate(x, scale_factor=2.0, mode="nearest"), skip], 1))
        painted: Tensor = (torch.tanh(self.head(x)) + 1) / 2
        return painted

    def _expect(self, images: Tensor, holes: Tensor) -> None:
        factor = 2 ** (len(self.config.widths) - 1)
        if (
            images.dim() != 4
            or images.shape[1] != self.config.channels
            or images.shape[-1] % factor + (images.shape[-2] % factor)
        ):
            raise InputError(
                f"expected images shaped (batch, {self.config.channels}, height, width) with sides that {factor} "
                f"divides, got {tuple(images.shape)}"
            )
        if holes.dtype != torch.bool or holes.shape[1:] != (1, *images.shape[2:]) or len(holes) not in (1, len(images)):
            raise InputError(
                f"expected boolean holes shaped ({len(images)}, 1, {images.shape[2]}, {images.shape[3]}), true where "
                f"something is missing, got {holes.dtype} of shape {tuple(holes.shape)}"
            )

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Draw convolutions from N(0, 2 / fan_in), biases 0; norms stay as they are."""
        for module in [*self.encoder, *self.middle, *self.decoder]:
            nn.init.kaiming_normal_(module[0].weight, nonlinearity="relu")
            nn.init.zeros_(module[0].bias)
        nn.init.xavier_normal_(self.head.weight)
        assert self.head.bias is not None
        nn.init.zeros_(self.head.bias)

    def to_dict(self) -> dict[str, Any]:
        """Sizes and parts as data that JSON can hold; `from_dict` builds the model from it."""
        sizes = {key: to_plain(value) for key, value in asdict(self.config).items()}
        return {"config": sizes, **{name: to_plain(part) for name, part in self._parts.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> InpaintingUNet:
        """A model, freshly initialized, from what `to_dict` returned.

        Raises:
            InputError: A name that is no part, or a field that there is not.
        """
        return rebuild(cls, InpaintingConfig, data, ("norm", "late_norm", "activation"))


def _unit(
    inputs: int,
    outputs: int,
    norm: NormFactory,
    activation: Callable[[], nn.Module],
    stride: int = 1,
    dilation: int = 1,
) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, dilation, dilation, padding_mode="reflect")
    return nn.Sequential(convolution, norm(outputs), activation())
