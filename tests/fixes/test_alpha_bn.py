from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from setpoint import fix
from setpoint.errors import InputError
from setpoint.fixes.alpha_bn import AlphaBatchNorms
from setpoint.models import ResNet, ResNetConfig
from setpoint.nn import AlphaBatchNorm, adapt_batchnorm


def model() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    made = ResNet(ResNetConfig(depths=(1, 1), widths=(4, 8), stem_width=4)).eval()
    return made, 2 + torch.randn(6, 3, 8, 8)


def test_every_batch_norm_is_wrapped_and_computes_what_adapting_by_hand_computes() -> None:
    net, x = model()
    fixed = fix(net, "alpha-bn:source_weight=0.4", [x], timed=False)
    wrapped = [m for m in fixed.model.modules() if isinstance(m, AlphaBatchNorm)]
    assert len(wrapped) == sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) > 4
    assert {layer.source_weight for layer in wrapped} == {0.4}
    torch.testing.assert_close(fixed.model(x), adapt_batchnorm(net, 0.4)(x))
    assert fixed.change.relative > 0


def test_all_weight_on_the_source_changes_nothing() -> None:
    net, x = model()
    assert fix(net, AlphaBatchNorms(1.0), [x], timed=False).change.difference == 0


def test_prior_goes_to_every_layer() -> None:
    net, x = model()
    fixed = fix(net, AlphaBatchNorms(prior=16), [x], timed=False).model
    assert {m.prior for m in fixed.modules() if isinstance(m, AlphaBatchNorm)} == {16}


def test_models_without_batch_norm_are_refused() -> None:
    with pytest.raises(InputError, match="no batch norm"):
        fix(nn.Sequential(nn.Linear(2, 2)), AlphaBatchNorms(), [torch.zeros(3, 2)], timed=False)


def test_weight_outside_0_to_1_is_refused() -> None:
    with pytest.raises(InputError, match="between 0 and 1"):
        AlphaBatchNorms(2.0)
