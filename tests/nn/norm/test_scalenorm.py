"""The fidelity checks of ScaleNorm (Nguyen and Salazar, 2019)."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from setpoint.errors import InputError
from setpoint.nn import ScaleNorm, scale_norm
from setpoint.optim.decay import decay_groups


def test_three_four_at_the_start_is_the_definitions_example() -> None:
    torch.testing.assert_close(
        ScaleNorm(2)(torch.tensor([3.0, 4.0])), torch.tensor([0.8485, 1.1314]), atol=1e-4, rtol=0
    )


def test_every_token_has_the_learned_length() -> None:
    layer, x = ScaleNorm(6, scale=2.5, dtype=torch.float64), torch.randn(4, 3, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x).norm(dim=-1), torch.full((4, 3), 2.5, dtype=torch.float64))


def test_length_of_the_input_does_not_count_and_its_sign_does() -> None:
    layer, x = ScaleNorm(6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(7 * x), layer(x), atol=1e-12, rtol=0)
    torch.testing.assert_close(layer(-x), -layer(x), atol=0, rtol=0)


def test_at_the_start_it_is_rms_norm_without_a_weight() -> None:
    x = torch.randn(4, 6)
    assert (ScaleNorm(6)(x) - x / x.square().mean(-1, keepdim=True).sqrt()).abs().max() < 1e-6


def test_on_inputs_of_mean_zero_it_is_layer_norm() -> None:
    x = torch.randn(4, 6, dtype=torch.float64)
    x = x - x.mean(-1, keepdim=True)
    torch.testing.assert_close(ScaleNorm(6, dtype=torch.float64)(x), F.layer_norm(x, (6,), eps=0.0))


def test_gradients_follow_their_formulas() -> None:
    layer, x = ScaleNorm(6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(4, 6, dtype=torch.float64)
    dx, dg = torch.autograd.grad(layer(x), (x, layer.scale), upstream)
    norm = x.norm(dim=-1, keepdim=True)
    u = x / norm
    torch.testing.assert_close(dx, layer.scale / norm * (upstream - u * (u * upstream).sum(-1, keepdim=True)))
    torch.testing.assert_close(dg, (u * upstream).sum().reshape(1))
    assert (dx * x).sum(-1).abs().max() < 1e-10


def test_below_the_bound_the_layer_is_linear() -> None:
    x = torch.full((6,), 1e-7, dtype=torch.float64, requires_grad=True)
    layer = ScaleNorm(6, dtype=torch.float64)
    y = layer(x)
    torch.testing.assert_close(y, layer.scale * x / 1e-5)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, layer.scale.expand(6) / 1e-5)


def test_zero_gives_zero_with_a_finite_gradient() -> None:
    x = torch.zeros(2, 6, requires_grad=True)
    y = ScaleNorm(6)(x)
    y.sum().backward()
    assert y.abs().max() == 0
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_it_has_one_parameter_which_is_not_decayed() -> None:
    layer = ScaleNorm(512)
    assert sum(p.numel() for p in layer.parameters()) == 1
    groups = decay_groups(nn.Sequential(nn.Linear(4, 4), layer), 0.1)
    assert "1.scale" in groups[1]["names"]


def test_a_fixed_length_is_a_buffer_that_is_saved() -> None:
    layer = ScaleNorm(16, learnable=False)
    assert not list(layer.parameters())
    assert layer.state_dict()["scale"].tolist() == [4.0]


def test_the_squares_of_float16_do_not_overflow() -> None:
    x = torch.full((1, 512), 256.0, dtype=torch.float16)
    torch.testing.assert_close(ScaleNorm(512, dtype=torch.float16)(x), torch.ones_like(x), atol=2e-3, rtol=0)


def test_checkpoints_of_the_authors_and_of_x_transformers_load() -> None:
    model = nn.Sequential(ScaleNorm(16))
    model.load_state_dict({"0.scale": torch.tensor(3.0)})
    assert model[0].scale.tolist() == [3.0]
    model.load_state_dict({"0.g": torch.tensor([1.5])})
    assert model[0].scale.tolist() == [1.5 * sqrt(16)]


def test_the_function_takes_a_plain_number() -> None:
    assert scale_norm(torch.tensor([3.0, 4.0]), 5.0).tolist() == pytest.approx([3.0, 4.0])


def test_bad_arguments_and_inputs_are_refused() -> None:
    with pytest.raises(InputError, match="dim of at least 1"):
        ScaleNorm(0)
    with pytest.raises(InputError, match="above 0"):
        ScaleNorm(4, scale=0.0)
    with pytest.raises(InputError, match=r"\(\*, 4\), got \(2, 5\)"):
        ScaleNorm(4)(torch.randn(2, 5))
    with pytest.raises(TypeError, match="int64"):
        ScaleNorm(4)(torch.ones(2, 4, dtype=torch.long))
