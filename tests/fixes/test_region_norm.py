from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from setpoint import fix
from setpoint.errors import InputError
from setpoint.fixes.region_norm import RegionNorms
from setpoint.models import ResNet, ResNetConfig
from setpoint.nn import RNB, RNL, Conditioned, GhostBatchNorm, conditioned, region_norm
from setpoint.testing import check_fix

IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
HOLE = torch.zeros(3, 1, 8, 8, dtype=torch.bool)
HOLE[:, :, 2:6, 1:5] = True


def convolutional() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3, 2, padding=1),
        nn.InstanceNorm2d(5),
        nn.ReLU(),
        nn.Conv2d(5, 2, 3, padding=1),
        nn.BatchNorm2d(2, affine=False),
    )
    nn.init.normal_(model[1].weight), nn.init.normal_(model[1].bias)
    return model.eval()


def test_norms_without_masks_find_their_regions_themselves() -> None:
    fixed = fix(convolutional(), "region-norm:threshold=0.6:kernel_size=3", [IMAGES], timed=False).model
    layers = [fixed[index] for index in (1, 4, 7)]
    assert [type(layer) for layer in layers] == [RNL] * 3
    assert {(layer.threshold, layer.sa.conv1.kernel_size) for layer in layers} == {(0.6, (3, 3))}
    assert not torch.equal(layers[0].sa.conv1.weight, layers[1].sa.conv1.weight)


def masked(count: int) -> tuple[nn.Sequential, Conditioned]:
    model = convolutional()
    batch = {"input": IMAGES, "mask": HOLE}
    fixed = fix(Conditioned(model, "mask"), RegionNorms(masked=count), [batch], timed=False).model
    assert isinstance(fixed, Conditioned)
    return model, fixed


def test_first_norms_read_the_mask_and_keep_gain_and_addend() -> None:
    model, fixed = masked(2)
    assert [type(fixed.module[index]) for index in (1, 4, 7)] == [RNB, RNB, RNL]
    norm, layer, x = model[1], fixed.module[1], model[0](IMAGES)
    y = region_norm(x, HOLE) * norm.weight[:, None, None] + norm.bias[:, None, None]
    torch.testing.assert_close(layer(x, HOLE), y)


def test_fixed_model_is_called_and_trained_with_masks() -> None:
    model, fixed = masked(99)
    y = fixed(IMAGES, mask=HOLE)
    with conditioned(mask=HOLE):
        torch.testing.assert_close(fixed.module(IMAGES), y)
    other = torch.where(HOLE, 7 * IMAGES + 1, IMAGES)
    assert (fixed(other, mask=HOLE) - y).abs().max() > 0
    fixed.train()(IMAGES, mask=HOLE).square().sum().backward()
    assert all(p.grad is not None for p in fixed.module[1].parameters())
    assert isinstance(model[1], nn.BatchNorm2d)


class SeesItsHole(nn.Module):
    """Finds the hole by its colour and says so to its norms."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = convolutional()

    def forward(self, x: Tensor) -> Tensor:
        with conditioned(mask=x[:, :1] == 1):
            y: Tensor = self.layers(x)
        return y


def test_masked_form_passes_the_suite_of_fixes() -> None:
    assert check_fix(RegionNorms(masked=2), lambda: (SeesItsHole(), torch.where(HOLE, 1.0, IMAGES)))


def test_residual_network_takes_it() -> None:
    model = ResNet(ResNetConfig(depths=(1, 1), widths=(4, 8), stem_width=4)).eval()
    fixed = fix(model, RegionNorms(), [IMAGES], timed=False).model
    assert sum(isinstance(module, RNL) for module in fixed.modules()) == 6
    assert fixed(IMAGES).isfinite().all()


def test_model_without_masks_is_refused_with_what_to_do() -> None:
    with pytest.raises(InputError, match=r"1: would find no mask; .*Conditioned\(model, 'mask'\) .* masked=0"):
        fix(convolutional(), RegionNorms(masked=1), [IMAGES])


def test_other_norms_are_refused_with_the_place() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), GhostBatchNorm(4)).eval()
    with pytest.raises(InputError, match="1: is a GhostBatchNorm"):
        fix(model, RegionNorms(), [IMAGES])


def test_wrong_fields_are_refused() -> None:
    with pytest.raises(InputError, match="got -1, 7 and batch"):
        RegionNorms(masked=-1)
    with pytest.raises(InputError, match="got 0, 5 and batch"):
        RegionNorms(kernel_size=5)  # type: ignore[arg-type]
