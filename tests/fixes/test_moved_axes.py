"""Norms of images that move the channels to the end inside their own forward, as ConvNeXt's do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from setpoint import fix
from setpoint.fixing import Refused
from setpoint.surgery import Anatomy


class LayerNorm2d(nn.LayerNorm):
    """Over the channels of ``(batch, channels, height, width)``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def images(side: int) -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), LayerNorm2d(4), nn.Conv2d(4, 2, 1))
    return model.eval(), torch.randn(2, 3, side, side)


@pytest.mark.parametrize("side", [4, 6])  # with as many rows and columns as channels nothing would fail
@pytest.mark.parametrize("spec", ["scalenorm", "osp:projections=false", "unified-norm", "powernorm", "prenormalize"])
def test_a_norm_that_moves_axes_first_is_not_replaced(spec: str, side: int) -> None:
    model, batch = images(side)
    with pytest.raises(Refused, match="1: moves axes or computes something before it normalizes"):
        fix(model, spec, [batch], timed=False)
    assert not Anatomy.trace(model, batch).norms["1"].as_given


def test_a_norm_that_reshapes_what_is_before_its_axes_is_as_given() -> None:
    class Flat(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (5, 2)).transpose(0, 1)

    model = nn.Sequential(nn.Linear(4, 4), Flat(4), nn.Linear(4, 2))
    batch = torch.randn(2, 5, 4)
    assert Anatomy.trace(model, batch).norms["1"].as_given
    assert type(fix(model, "scalenorm", [batch], timed=False).model[1]).__name__ == "ScaleNorm"
