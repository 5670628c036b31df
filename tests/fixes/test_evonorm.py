from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from setpoint import fix
from setpoint.errors import InputError
from setpoint.fixes.evonorm import EvoNorms
from setpoint.models import ResNet, ResNetConfig
from setpoint.nn import EvoNorm2dB0, EvoNorm2dS0

IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def resnet(activation: type[nn.Module] | partial[nn.Module] = nn.ReLU) -> nn.Module:
    torch.manual_seed(0)
    return ResNet(ResNetConfig(depths=(1, 1), widths=(8, 16), stem_width=8), activation=activation).eval()


@pytest.mark.parametrize("activation", [nn.ReLU, partial(nn.ReLU, inplace=True), nn.SiLU])
def test_pairs_become_one_layer_and_norms_before_a_sum_gain_and_addend(activation: partial[nn.Module]) -> None:
    model = resnet(activation)
    fixed = fix(model, EvoNorms(), [IMAGES], timed=False).model
    layers = {path: m for path, m in fixed.named_modules() if isinstance(m, EvoNorm2dS0)}
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fixed.modules())
    assert {path for path, layer in layers.items() if layer.apply_act} == {
        "stem.1",
        "stages.0.0.norm1",
        "stages.1.0.norm1",
    }
    assert {layer.num_features // layer.groups for layer in layers.values()} == {8}
    for path in ("stem.2", "stages.0.0.activation1"):
        assert isinstance(fixed.get_submodule(path), nn.Identity)
    assert not isinstance(fixed.stages[0][0].activation2, nn.Identity)  # behind the sum
    assert fixed(IMAGES).isfinite().all()


def test_norm_without_activation_starts_as_it_was_in_evaluation() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)).eval()
    model[1].running_mean.normal_(), model[1].running_var.uniform_(0.5, 2)
    nn.init.normal_(model[1].weight), nn.init.normal_(model[1].bias)
    fixed = fix(model, EvoNorms(), [IMAGES], timed=False)
    torch.testing.assert_close(fixed.model(IMAGES), model(IMAGES))


def test_batch_series_starts_from_the_running_variance_and_momentum() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6, momentum=0.3), nn.ReLU()).eval()
    model[1].running_var.uniform_(0.5, 2)
    layer = fix(model, "evonorm:version=B0", [IMAGES], timed=False).model[1]
    assert isinstance(layer, EvoNorm2dB0)
    assert layer.momentum == 0.3
    torch.testing.assert_close(layer.running_var, model[1].running_var)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class Reused(Functional):
    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm(self.conv(x)))
        return self.relu(y - 1)


class ReadTwice(Functional):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return self.relu(y) + y.exp()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Functional, "has a relu behind it that is no module"),
        (Reused, "which activates elsewhere too"),
        (ReadTwice, "something else"),
    ],
)
def test_activation_that_can_not_be_taken_away_alone_is_refused(kind: type[nn.Module], reason: str) -> None:
    with pytest.raises(InputError, match=f"norm: .*{reason}"):
        fix(kind().eval(), EvoNorms(), [IMAGES])


def test_other_batch_norms_and_channels_are_refused() -> None:
    with pytest.raises(InputError, match=r"1: has 6 channels, which are no multiple of group_size=8"):
        fix(nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU()), EvoNorms(), [IMAGES])
    with pytest.raises(InputError, match="none of its batch norms is a BatchNorm2d"):
        fix(nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8)).eval(), EvoNorms(), [torch.zeros(4, 3)])
    with pytest.raises(InputError, match="expected version to be one of B0, B1"):
        EvoNorms(version="S3")  # type: ignore[arg-type]
