"""Global response normalization (Woo et al., 2023)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.nn import GRN
from setpoint.optim.decay import decay_groups


def random(dim: int = 4, channels_last: bool = True) -> GRN:
    layer = GRN(dim, channels_last=channels_last, dtype=torch.float64)
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    return layer


def by_definition(x: Tensor, layer: GRN) -> Tensor:
    """Written out for ``(N, H, W, C)``."""
    response = x.square().sum((1, 2), keepdim=True).sqrt()
    return layer.weight * (x * response / (response.mean(-1, keepdim=True) + layer.eps)) + layer.bias + x


def test_it_is_its_definition() -> None:
    layer, x = random(), torch.randn(2, 3, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x), by_definition(x, layer), atol=1e-12, rtol=0)


def test_channels_may_stand_on_axis_1_and_positions_on_any_number_of_axes() -> None:
    last, first = random(), random(channels_last=False)
    first.load_state_dict(last.state_dict())
    for positions in ((5,), (3, 5), (2, 3, 2)):
        x = torch.randn(2, *positions, 4, dtype=torch.float64)
        torch.testing.assert_close(first(x.movedim(-1, 1)).movedim(1, -1), last(x), atol=1e-12, rtol=0)
        torch.testing.assert_close(last(x.flatten(1, -2)), last(x).flatten(1, -2), atol=1e-12, rtol=0)


def test_it_starts_as_the_identity_and_its_parameters_are_not_decayed() -> None:
    layer, x = GRN(4), torch.randn(2, 3, 4)
    assert torch.equal(layer(x), x)
    groups = decay_groups(nn.Sequential(nn.Linear(4, 4), layer), 0.1)
    assert {"1.weight", "1.bias"} <= set(groups[1]["names"])


def test_a_silent_channel_stays_silent_with_a_finite_gradient() -> None:
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    x[..., 1] = 0
    x.requires_grad_()
    layer = random()
    y = layer(x)
    torch.testing.assert_close(y[..., 1], layer.bias[1].expand(2, 5))
    assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()


def test_responses_of_float16_do_not_overflow() -> None:
    layer, x = GRN(4, dtype=torch.float16), torch.full((1, 4096, 4), 100.0, dtype=torch.float16)
    nn.init.ones_(layer.weight)
    torch.testing.assert_close(layer(x), 2 * x)


def test_checkpoints_of_the_authors_load() -> None:
    model = nn.Sequential(GRN(3))
    model.load_state_dict({"0.gamma": torch.ones(1, 1, 1, 3), "0.beta": torch.arange(3.0).view(1, 1, 1, 3)})
    assert model[0].weight.tolist() == [1.0] * 3
    assert model[0].bias.tolist() == [0.0, 1.0, 2.0]


def test_bad_arguments_and_inputs_are_refused() -> None:
    for arguments in ((0,), (4, 0.0)):
        with pytest.raises(InputError, match="dim of at least 1 and eps above 0"):
            GRN(*arguments)
    with pytest.raises(InputError, match=r"\(\*, 4\), got \(2, 3, 5\)"):
        GRN(4)(torch.randn(2, 3, 5))
    with pytest.raises(InputError, match=r"\(N, 4, \*\), got \(2, 3, 4\)"):
        GRN(4, channels_last=False)(torch.randn(2, 3, 4))
    with pytest.raises(InputError, match=r"examples, positions and channels, got shape \(2, 4\)"):
        GRN(4)(torch.randn(2, 4))
