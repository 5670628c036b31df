"""A small generator of images from label maps: residual units at full size, with norms that are passed in.

Behind a first convolution and a norm, ``x + conv(f(norm(conv(f(norm(x))))))`` with ``f`` a leaky ReLU of slope 0.2, as
in the generator of SPADE (Park et al., 2019, arXiv 1903.07291), whose norms find the labels by
`setpoint.nn.conditioned`. Other norms see them at the input alone, or, with ``relabel``, beside the features at every
convolution. Convolutions pad by reflection: a border of zeros would tell a label where all pixels have one and a norm
has made them equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from setpoint.errors import InputError
from setpoint.models.plain import rebuild, to_plain
from setpoint.nn.block.base import NormFactory
from setpoint.nn.conditioning import conditioned
from setpoint.nn.norm.spade import SPADE

Labels = Int[Tensor, "batch height width"]


@dataclass(frozen=True, kw_only=True)
class LabelsToImageConfig:
    """Sizes of a `LabelsToImage`.

    Args:
        label_nc: Number of labels.
        channels: Colours of the image.
        width: Channels inside.
        depth: Residual units.
        relabel: Show the labels to every convolution.

    Raises:
        InputError: A size below 1.
    """

    label_nc: int
    channels: int = 3
    width: int = 32
    depth: int = 3
    relabel: bool = False

    def __post_init__(self) -> None:
        if min(self.label_nc, self.channels, self.width, self.depth) < 1:
            raise InputError(f"expected sizes of at least 1, got {self}")


class LabelsToImage(nn.Module):
    """Paints a label map.

    Args:
        config: Sizes.
        norm: Makes each norm from its number of channels; None for a `SPADE` of 16 hidden channels.

    Example:
        >>> model = LabelsToImage(LabelsToImageConfig(label_nc=4, width=8))
        >>> model(torch.randint(4, (2, 16, 16))).shape
        torch.Size([2, 3, 16, 16])
    """

    def __init__(self, config: LabelsToImageConfig, *, norm: NormFactory | None = None) -> None:
        super().__init__()
        self.config = config
        self._norm = partial(SPADE, label_nc=config.label_nc, hidden=16) if norm is None else norm
        shown = config.label_nc if config.relabel else 0
        self.stem = _convolution(config.label_nc, config.width)
        self.norm = self._norm(config.width)
        self.units = nn.ModuleList(_Unit(config.width, shown, self._norm) for _ in range(config.depth))
        self.head = _convolution(config.width + shown, config.channels)

    def forward(self, labels: Labels) -> Float[Tensor, "batch channels height width"]:
        """Images between 0 and 1.

        Args:
            labels: Whole numbers; another than those of the labels is none.

        Raises:
            InputError: No whole numbers, or another number of axes.
        """
        if labels.dim() != 3 or labels.is_floating_point():
            raise InputError(
                f"expected whole numbers of labels shaped (batch, height, width), got {labels.dtype} of shape "
                f"{tuple(labels.shape)}"
            )
        numbers = torch.arange(self.config.label_nc, device=labels.device)[:, None, None]
        one_hot = (labels.unsqueeze(1) == numbers).to(self.stem.weight.dtype)

        shown = one_hot if self.config.relabel else one_hot[:, :0]
        with conditioned(segmap=one_hot):
            x: Tensor = self.norm(self.stem(one_hot))
            for unit in self.units:
                x = unit(x, shown)
        return torch.sigmoid(self.head(torch.cat([F.leaky_relu(x, 0.2), shown], 1)))

    def to_dict(self) -> dict[str, Any]:
        """Sizes and parts as data that JSON can hold; `from_dict` builds the model from it."""
        return {"config": asdict(self.config), "norm": to_plain(self._norm)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LabelsToImage:
        """A model, freshly initialized, from what `to_dict` returned.

        Raises:
            InputError: A name that is no part, or a field that there is not.
        """
        return rebuild(cls, LabelsToImageConfig, data, ("norm",))


class _Unit(nn.Module):
    """Two convolutions, each behind a norm and a leaky ReLU, beside a skip."""

    def __init__(self, width: int, shown: int, norm: NormFactory) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(width), norm(width)
        self.conv1, self.conv2 = _convolution(width + shown, width), _convolution(width + shown, width)

    def forward(self, x: Tensor, shown: Tensor) -> Tensor:
        branch = self.conv1(torch.cat([F.leaky_relu(self.norm1(x), 0.2), shown], 1))
        branch = self.conv2(torch.cat([F.leaky_relu(self.norm2(branch), 0.2), shown], 1))
        y: Tensor = x + branch
        return y


def _convolution(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, padding_mode="reflect")
