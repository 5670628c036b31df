"""Residual convolutional networks: units, stems, configuration and model, in that order.

``y = activation(x + branch(x))``, where the branch is two or three convolutions, each with a norm behind it, and the
skip is convolved where width or resolution changes (v1.5: in a bottleneck the 3 x 3 convolution has the stride). The
norm, the activation, the unit and the stem are passed in.

Reference: He et al., 2015, "Deep Residual Learning for Image Recognition", arXiv 1512.03385.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.models.plain import rebuild, to_plain
from setpoint.nn.block.base import NormFactory

# units ---------------------------------------------------------------------------------------------------------------


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside a skip.

    Args:
        in_channels: Channels of the input.
        width: Channels inside; the output has ``expansion`` times as many.
        stride: Of the first convolution.
        norm: Makes each norm.
        activation: Makes each activation.
    """

    expansion: ClassVar[int] = 1

    def __init__(
        self, in_channels: int, width: int, stride: int, norm: NormFactory, activation: Callable[[], nn.Module]
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.norm1 = norm(width)
        self.activation1 = activation()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = norm(width)
        self.shortcut = _shortcut(in_channels, width, stride, norm)
        self.activation2 = activation()

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch out height2 width2"]:
        """The maps after the unit."""
        branch = self.activation1(self.norm1(self.conv1(x)))
        branch = self.norm2(self.conv2(branch))
        y: Tensor = self.activation2(self.shortcut(x) + branch)
        return y


class Bottleneck(nn.Module):
    """A 1 x 1, a 3 x 3 and a 1 x 1 convolution beside a skip.

    Args:
        in_channels, width, stride, norm, activation: As for `BasicBlock`.
    """

    expansion: ClassVar[int] = 4

    def __init__(
        self, in_channels: int, width: int, stride: int, norm: NormFactory, activation: Callable[[], nn.Module]
    ) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.norm1 = norm(width)
        self.activation1 = activation()
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.norm2 = norm(width)
        self.activation2 = activation()
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.norm3 = norm(out_channels)
        self.shortcut = _shortcut(in_channels, out_channels, stride, norm)
        self.activation3 = activation()

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch out height2 width2"]:
        """The maps after the unit."""
        branch = self.activation1(self.norm1(self.conv1(x)))
        branch = self.activation2(self.norm2(self.conv2(branch)))
        branch = self.norm3(self.conv3(branch))
        y: Tensor = self.activation3(self.shortcut(x) + branch)
        return y


def _shortcut(in_channels: int, out_channels: int, stride: int, norm: NormFactory) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), norm(out_channels))


# stems ---------------------------------------------------------------------------------------------------------------


class CifarStem(nn.Sequential):
    """For small images: a 3 x 3 convolution that keeps the resolution.

    Args:
        in_channels: Colours of the image.
        width: Channels that come out.
        norm: Makes the norm.
        activation: Makes the activation.
    """

    def __init__(self, in_channels: int, width: int, norm: NormFactory, activation: Callable[[], nn.Module]) -> None:
        super().__init__(nn.Conv2d(in_channels, width, 3, padding=1, bias=False), norm(width), activation())


class ImageNetStem(nn.Sequential):
    """For photographs: a 7 x 7 convolution and a pooling, which leave a quarter of the resolution.

    Args:
        in_channels, width, norm, activation: As for `CifarStem`.
    """

    def __init__(self, in_channels: int, width: int, norm: NormFactory, activation: Callable[[], nn.Module]) -> None:
        super().__init__(
            nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False),
            norm(width),
            activation(),
            nn.MaxPool2d(3, stride=2, padding=1),
        )


# configuration and model ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """Sizes of a `ResNet`.

    Args:
        channels: Colours of the image.
        num_classes: Number of classes.
        stem_width: Channels after the stem.
        widths: Channels inside the units of each stage; every stage but the first halves the resolution.
        depths: Units of each stage.

    Raises:
        InputError: Other numbers of widths than of depths.

    Example:
        >>> ResNetConfig(depths=(3, 3, 3), widths=(16, 32, 64), stem_width=16).num_classes
        10
    """

    channels: int = 3
    num_classes: int = 10
    stem_width: int = 16
    widths: tuple[int, ...] = (16, 32, 64)
    depths: tuple[int, ...] = (3, 3, 3)

    def __post_init__(self) -> None:
        if len(self.widths) != len(self.depths) or not self.depths or min(*self.widths, *self.depths) < 1:
            raise InputError(
                f"expected as many widths as depths, each at least 1, got widths={self.widths} and depths={self.depths}"
            )


class ResNet(nn.Module):
    """A residual convolutional classifier.

    Args:
        config: Sizes; the default is the 20-layer network for small images.
        block: The unit, `BasicBlock` or `Bottleneck`.
        stem: What comes before the first stage, `CifarStem` or `ImageNetStem`.
        norm: Makes each norm from its number of channels: ``nn.BatchNorm2d``, ``partial(nn.GroupNorm, 8)``, ...
        activation: Makes each activation.

    Example:
        >>> ResNet(ResNetConfig(depths=(1, 1), widths=(8, 16), stem_width=8))(torch.randn(2, 3, 16, 16)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        config: ResNetConfig,
        *,
        block: type[BasicBlock] | type[Bottleneck] = BasicBlock,
        stem: type[CifarStem] | type[ImageNetStem] = CifarStem,
        norm: NormFactory = nn.BatchNorm2d,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        self.config = config
        self._parts = {"block": block, "stem": stem, "norm": norm, "activation": activation}
        self.stem = stem(config.channels, config.stem_width, norm, activation)
        self.stages = nn.ModuleList()
        channels = config.stem_width
        for index, (width, depth) in enumerate(zip(config.widths, config.depths, strict=True)):
            stage = nn.Sequential()
            for unit in range(depth):
                stride = 2 if index and not unit else 1
                stage.append(block(channels, width, stride, norm, activation))
                channels = width * block.expansion
            self.stages.append(stage)
        self.head = nn.Linear(channels, config.num_classes)
        self.initialize_weights()

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Class logits.

        Args:
            images: Of any size that the stages don't shrink to nothing.

        Raises:
            InputError: Another number of axes or colours.
        """
        logits: Tensor = self.head(self.features(images).mean((2, 3)))
        return logits

    def features(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch out height2 width2"]:
        """The maps after the last stage."""
        if images.dim() != 4 or images.shape[1] != self.config.channels:
            raise InputError(
                f"expected images shaped (batch, {self.config.channels}, height, width), got {tuple(images.shape)}; "
                f"build the model with channels= the number of colours"
            )
        x: Tensor = self.stem(images)
        for stage in self.stages:
            x = stage(x)
        return x

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Draw convolutions from N(0, 2 / fan_out) (He et al., 2015, arXiv 1502.01852); norms stay as they are."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.head.weight, 0.0, 0.01)
        nn.init.zeros_(self.head.bias)

    @property
    def num_parameters(self) -> int:
        """Trained numbers."""
        return sum(parameter.numel() for parameter in self.parameters())

    def to_dict(self) -> dict[str, Any]:
        """Sizes and parts as data that JSON can hold; `from_dict` builds the model from it."""
        sizes = {key: to_plain(value) for key, value in asdict(self.config).items()}
        return {"config": sizes, **{name: to_plain(part) for name, part in self._parts.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ResNet:
        """A model, freshly initialized, from what `to_dict` returned.

        Raises:
            InputError: A name that is no part, or a field that there is not.
        """
        return rebuild(cls, ResNetConfig, data, ("block", "stem", "norm", "activation"))
