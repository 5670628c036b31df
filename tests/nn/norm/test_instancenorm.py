"""Instance norm (Ulyanov, Vedaldi and Lempitsky, 2016)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from setpoint.errors import InputError
from setpoint.nn import GroupNorm, InstanceNorm1d, InstanceNorm2d, InstanceNorm3d

KINDS = [
    (InstanceNorm1d, nn.InstanceNorm1d, (5,)),
    (InstanceNorm2d, nn.InstanceNorm2d, (3, 4)),
    (InstanceNorm3d, nn.InstanceNorm3d, (2, 3, 2)),
]


@pytest.mark.parametrize(("own", "theirs", "positions"), KINDS)
def test_it_is_torchs_layer_in_training_and_evaluation(
    own: type[nn.Module], theirs: type[nn.Module], positions: tuple[int, ...]
) -> None:
    options = {"affine": True, "track_running_stats": True}
    mine, other, x = own(6, **options), theirs(6, **options), 2 + torch.randn(4, 6, *positions)
    nn.init.normal_(other.weight), nn.init.normal_(other.bias)
    mine.load_state_dict(other.state_dict())
    for _ in range(2):
        assert torch.equal(mine(x), other(x))
    assert torch.equal(mine.running_var, other.running_var)
    assert torch.equal(mine.eval()(x), other.eval()(x))
    assert torch.equal(mine(x[0]), other(x[0]))


@pytest.mark.parametrize(("own", "_theirs", "positions"), KINDS)
def test_it_is_group_norm_with_a_group_for_each_channel(
    own: type[nn.Module], _theirs: type[nn.Module], positions: tuple[int, ...]
) -> None:
    x = torch.randn(4, 6, *positions)
    torch.testing.assert_close(own(6)(x), GroupNorm(6, 6)(x))


def test_contrast_of_a_picture_does_not_count() -> None:
    x = torch.randn(2, 3, 8, 8)
    contrast, brightness = torch.tensor([0.5, 2.0]).view(2, 1, 1, 1), torch.randn(2, 3, 1, 1)
    layer = InstanceNorm2d(3, eps=1e-12)
    torch.testing.assert_close(layer(contrast * x + brightness), layer(x), atol=1e-4, rtol=1e-4)


def test_other_channels_are_refused_though_torch_only_warns_of_them() -> None:
    with pytest.warns(UserWarning, match="not used"):
        nn.InstanceNorm2d(3)(torch.randn(2, 4, 5, 5))
    with pytest.raises(InputError, match="InstanceNorm2d: expected 3 channels, got 4"):
        InstanceNorm2d(3)(torch.randn(2, 4, 5, 5))
    with pytest.raises(InputError, match="InstanceNorm1d: expected 3 channels, got 4"):
        InstanceNorm1d(3)(torch.randn(4, 5))


def test_bad_inputs_are_refused() -> None:
    with pytest.raises(InputError, match="expected an input with 4 axes, or 3 for one example, got 2"):
        InstanceNorm2d(3)(torch.randn(2, 3))
    with pytest.raises(InputError, match="more than one position in each channel, got shape"):
        InstanceNorm2d(3)(torch.randn(2, 3, 1, 1))
    with pytest.raises(TypeError, match="int64"):
        InstanceNorm1d(3)(torch.ones(2, 3, 4, dtype=torch.long))


def test_a_single_position_is_fine_where_running_averages_serve() -> None:
    layer = InstanceNorm2d(3, track_running_stats=True).eval()
    assert layer(torch.randn(2, 3, 1, 1)).isfinite().all()
