"""MobileNetV2: inverted residuals with linear bottlenecks.

A block widens its input with a 1 x 1 convolution, filters each channel on its own with a 3 x 3 convolution, and
projects back to few channels *without* an activation, because a ReLU on a narrow representation destroys information.
Where stride and width allow, input and output of the block are added. Every convolution is followed by batch norm.

Parameter names are those of torchvision's checkpoint, so that it loads as it is.

Reference: Sandler, Howard, Zhu, Zhmoginov, Chen, 2018, arXiv 1801.04381.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from setpoint.data.pictures import ImageTransform
from setpoint.errors import InputError
from setpoint.loading.pickles import read_pickle
from setpoint.loading.wording import one_line
from setpoint.running import run_batch
from setpoint.types import Loaded

_STAGES = (
    # expansion, output channels, blocks, stride of the first
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_STEM, _LAST = 32, 1280


class ConvNormActivation(nn.Sequential):
    """Convolution without bias, batch norm, ReLU6; "same" padding for odd kernels.

    Args:
        in_channels, out_channels: Widths.
        kernel_size: Side of the filter.
        stride: Step of the filter.
        groups: Channel groups; ``in_channels`` filters each channel on its own.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, groups: int = 1
    ) -> None:
        padding = kernel_size // 2
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU6(inplace=True),
        )


class InvertedResidual(nn.Module):
    """Widen, filter per channel, project back linearly; add the input where shapes agree.

    Args:
        in_channels, out_channels: Widths outside.
        stride: Of the 3 x 3 convolution.
        expansion: Width inside over ``in_channels``.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = in_channels * expansion
        widen = [ConvNormActivation(in_channels, width, kernel_size=1)] if expansion > 1 else []
        self.conv = nn.Sequential(
            *widen,
            ConvNormActivation(width, width, stride=stride, groups=width),
            nn.Conv2d(width, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, in_channels, height, width)`` to ``(batch, out_channels, height / stride, width / stride)``."""
        branch: Tensor = self.conv(x)
        return x + branch if self.residual else branch


class MobileNetV2(nn.Module):
    """MobileNetV2 at width 1.0.

    Args:
        num_classes: Size of the head's output.

    >>> MobileNetV2(num_classes=10).eval()(torch.zeros(1, 3, 64, 64)).shape
    torch.Size([1, 10])
    """

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        layers: list[nn.Module] = [ConvNormActivation(3, _STEM, stride=2)]
        channels = _STEM
        for expansion, width, blocks, first_stride in _STAGES:
            for block in range(blocks):
                layers.append(InvertedResidual(channels, width, first_stride if block == 0 else 1, expansion))
                channels = width
        layers.append(ConvNormActivation(channels, _LAST, kernel_size=1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(_LAST, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(batch, 3, height, width)`` to logits ``(batch, num_classes)``."""
        logits: Tensor = self.classifier(self.features(x).mean(dim=(2, 3)))
        return logits


def load_mobilenet(path: Path, dtype: torch.dtype) -> Loaded:
    """Build MobileNetV2 from its checkpoint.

    Args:
        path: A state dict with torchvision's names.
        dtype: Type to run in.

    Returns:
        The model in eval mode with the transform it was trained for.

    Raises:
        InputError: The file is damaged or of another model.
    """
    state = read_pickle(path)
    with torch.device("meta"):
        model = MobileNetV2()
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise InputError(f"{path} does not fit MobileNetV2: {one_line(error)}") from error
    return Loaded(
        model=model.to(dtype).eval().requires_grad_(True),
        processor=ImageTransform(),
        task="image-classification",
        forward=run_batch,
        source=str(path),
    )
