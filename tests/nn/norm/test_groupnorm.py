"""Group norm (Wu and He, 2018)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from setpoint.errors import InputError
from setpoint.models import ResNet, ResNetConfig
from setpoint.nn import GroupNorm, LayerNormCHW


def test_each_group_of_channels_of_each_example_has_mean_zero_and_variance_one() -> None:
    y = GroupNorm(2, 6, eps=0.0, dtype=torch.float64)(3 + 5 * torch.randn(4, 6, 7).double())
    groups = y.unflatten(1, (2, 3)).flatten(2)
    torch.testing.assert_close(groups.mean(-1), torch.zeros(4, 2).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(groups.square().mean(-1), torch.ones(4, 2).double())


def test_it_is_torchs_layer_and_shares_its_checkpoints() -> None:
    own, theirs, x = GroupNorm(2, 6), nn.GroupNorm(2, 6), torch.randn(4, 6, 3, 3)
    nn.init.normal_(theirs.weight), nn.init.normal_(theirs.bias)
    own.load_state_dict(theirs.state_dict())
    assert torch.equal(own(x), theirs(x))


def test_one_group_is_layer_norm_over_channels_and_positions() -> None:
    x = torch.randn(4, 6, 3, 3)
    torch.testing.assert_close(GroupNorm(1, 6)(x), LayerNormCHW(6)(x))


def test_it_serves_a_residual_network() -> None:
    config = ResNetConfig(depths=(1,), widths=(8,), stem_width=8)
    model = ResNet(config, norm=lambda channels: GroupNorm(4, channels))
    alone, together = torch.randn(1, 3, 8, 8), torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(model(torch.cat([alone, together]))[:1], model(alone), atol=1e-5, rtol=1e-5)


def test_bad_arguments_and_inputs_are_refused() -> None:
    for groups, channels in ((4, 6), (0, 4), (2, 0)):
        with pytest.raises(InputError, match=f"multiple of num_groups, got {channels} channels in {groups} groups"):
            GroupNorm(groups, channels)
    with pytest.raises(InputError, match=r"\(N, 4, \*\), got \(2, 6, 3\)"):
        GroupNorm(2, 4)(torch.randn(2, 6, 3))
    with pytest.raises(TypeError, match="int64"):
        GroupNorm(2, 4)(torch.ones(2, 4, 3, dtype=torch.long))
