from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from setpoint.data.holes import free_form_holes
from setpoint.errors import InputError
from setpoint.models import InpaintingConfig, InpaintingUNet
from setpoint.nn import RNB, RNL

CONFIG = InpaintingConfig(channels=1, widths=(4, 6, 8), middle=1)
IMAGES = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
HOLES = free_form_holes(2, 16, 16, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("norm", [nn.Identity, nn.BatchNorm2d, nn.InstanceNorm2d, RNB, RNL])
def test_what_is_in_the_hole_is_not_looked_at(norm: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = InpaintingUNet(CONFIG, norm=norm).eval()
    y = model(IMAGES, HOLES)
    assert y.shape == IMAGES.shape
    assert ((y > 0) & (y < 1)).all()
    assert torch.equal(model(torch.where(HOLES, 0.3, IMAGES), HOLES), y)
    assert not torch.equal(model(torch.where(HOLES, IMAGES, 0.3), HOLES), y)


def test_early_and_late_norms_differ() -> None:
    model = InpaintingUNet(CONFIG, norm=RNB, late_norm=RNL)
    assert {type(stage[1]) for stage in model.encoder} == {RNB}
    assert {type(stage[1]) for stage in [*model.middle, *model.decoder]} == {RNL}
    model(IMAGES, HOLES).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_mask_channel_shows_the_hole_where_the_colour_does_not() -> None:
    model = InpaintingUNet(InpaintingConfig(channels=1, widths=(4, 6), mask_channel=True), norm=nn.Identity)
    white = torch.ones(1, 1, 8, 8)
    holes = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    holes[..., 2:5, 2:5] = True
    assert not torch.equal(model(white, holes), model(white, ~holes))
    blind = InpaintingUNet(InpaintingConfig(channels=1, widths=(4, 6)), norm=nn.Identity)
    assert torch.equal(blind(white, holes), blind(white, ~holes))


def test_model_comes_back_from_data() -> None:
    model = InpaintingUNet(CONFIG, norm=RNB, late_norm=RNL)
    again = InpaintingUNet.from_dict(json.loads(json.dumps(model.to_dict())))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(IMAGES, HOLES), model(IMAGES, HOLES))


def test_bad_images_and_holes_are_refused() -> None:
    model = InpaintingUNet(CONFIG)
    with pytest.raises(
        InputError, match=r"\(batch, 1, height, width\) with sides that 4 divides, got \(2, 1, 16, 18\)"
    ):
        model(torch.zeros(2, 1, 16, 18), HOLES)
    with pytest.raises(InputError, match=r"boolean holes shaped \(2, 1, 16, 16\), .* got torch.float32"):
        model(IMAGES, HOLES.float())
    with pytest.raises(InputError, match="channels and widths of at least 1"):
        InpaintingConfig(widths=())
