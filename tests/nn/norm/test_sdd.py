"""The fidelity checks of scale-distribution decoupling (Wang et al., 2025)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from setpoint.errors import InputError
from setpoint.nn import SDDLinear, weight_norm
from setpoint.optim.decay import decay_groups


def layer_and_input(eps: float = 0.0, **more: bool) -> tuple[SDDLinear, torch.Tensor]:
    layer = SDDLinear(6, 5, eps=eps, dtype=torch.float64, **more)
    with torch.no_grad():
        layer.alpha.uniform_(0.5, 2.0)
    return layer, torch.randn(4, 3, 6, dtype=torch.float64, requires_grad=True)


def test_outputs_over_alpha_have_root_mean_square_one() -> None:
    layer, x = layer_and_input()
    rms = (layer(x) / layer.alpha).square().mean(-1).sqrt()
    torch.testing.assert_close(rms, torch.ones_like(rms))


def test_with_one_alpha_every_token_has_the_same_length() -> None:
    layer = SDDLinear(6, 5, eps=0.0, alpha_init=0.7)
    torch.testing.assert_close(layer(torch.randn(9, 6)).norm(dim=-1), torch.full((9,), 0.7 * 5**0.5))


def test_size_of_matrix_and_input_does_not_count_and_gradients_shrink_with_it() -> None:
    layer, x = layer_and_input()
    g = torch.randn(4, 3, 5, dtype=torch.float64)
    y = layer(x)
    (dw,) = torch.autograd.grad(y, layer.weight, g)
    torch.testing.assert_close(layer(3 * x), y)
    with torch.no_grad():
        layer.weight.mul_(10.0)
    scaled = layer(x)
    torch.testing.assert_close(scaled, y)
    torch.testing.assert_close(torch.autograd.grad(scaled, layer.weight, g)[0], dw / 10)


def test_gradients_are_orthogonal_to_matrix_and_input() -> None:
    layer, x = layer_and_input()
    dx, dw = torch.autograd.grad(layer(x).square().mul(torch.arange(5.0)).sum(), (x, layer.weight))
    assert dx.abs().max() > 0.01
    assert (dx * x).sum(-1).abs().max() < 1e-10
    assert (dw * layer.weight).sum().abs() < 1e-10


@pytest.mark.parametrize("bias", [False, True])
def test_it_is_torchs_rms_norm_behind_torchs_linear_layer(bias: bool) -> None:
    layer, x = layer_and_input(eps=1e-6, bias=bias)
    with torch.no_grad():
        if layer.bias is not None:
            layer.bias.normal_()
    linear, norm = nn.Linear(6, 5, bias=bias).double(), nn.RMSNorm(5, eps=1e-6).double()
    authors = nn.ModuleDict({"linear": linear, "norm": norm})
    with torch.no_grad():
        linear.weight.copy_(layer.weight)
        norm.weight.copy_(layer.alpha)
        if layer.bias is not None:
            linear.bias.copy_(layer.bias)
    y, wanted = layer(x), norm(linear(x))
    torch.testing.assert_close(y, wanted, atol=1e-12, rtol=0)
    g = torch.randn_like(y)
    ours = torch.autograd.grad(y, (x, layer.weight, layer.alpha), g)
    torchs = torch.autograd.grad(wanted, (x, linear.weight, norm.weight), g)
    torch.testing.assert_close(ours, torchs, atol=1e-10, rtol=1e-10)
    fresh = SDDLinear(6, 5, bias=bias, dtype=torch.float64)
    fresh.load_state_dict(authors.state_dict())
    torch.testing.assert_close(fresh(x), y)


def test_it_is_not_weight_normalization() -> None:
    layer, x = layer_and_input()
    linear = nn.Linear(6, 5, bias=False).double()
    with torch.no_grad():
        linear.weight.copy_(layer.weight)
        weight_norm(linear).parametrizations.weight.original0.copy_(layer.alpha[:, None])
    assert (layer(x) - linear(x)).abs().max() > 0.1


def test_gradient_of_alpha_is_the_sum_over_tokens() -> None:
    layer, x = layer_and_input()
    g = torch.randn(4, 3, 5, dtype=torch.float64)
    (dalpha,) = torch.autograd.grad(layer(x), layer.alpha, g)
    z = x @ layer.weight.T
    u = z / z.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(dalpha, (g * u).sum((0, 1)))


def test_for_gaussian_inputs_it_is_close_to_a_linear_layer_of_its_own_scale() -> None:
    numbers = torch.Generator().manual_seed(0)
    layer = SDDLinear(256, 1024, eps=0.0)
    with torch.no_grad():
        layer.weight.normal_(0.0, 0.05, generator=numbers)
    x = torch.randn(64, 256, generator=numbers)
    linear = x @ layer.weight.T * (layer.alpha / (0.05 * x.norm(dim=-1, keepdim=True)))
    error = (layer(x) - linear).norm() / linear.norm()
    assert error.item() == pytest.approx(1 / (2 * 1024) ** 0.5, rel=0.3)


def test_gradients_of_a_deep_stack_do_not_depend_on_the_size_of_its_weights() -> None:
    norms = []
    for factor in (1.0, 10.0):
        torch.manual_seed(0)
        stack = nn.Sequential(*[SDDLinear(256, 256) for _ in range(32)])
        with torch.no_grad():
            for layer in stack:
                layer.weight.mul_(factor)
        x = torch.randn(8, 256, requires_grad=True)
        (stack(x) * torch.randn(8, 256)).sum().backward()
        assert x.grad is not None
        norms.append(x.grad.norm().item())
    assert 1 / 3 < norms[1] / norms[0] < 3


def test_zero_gives_zero_with_finite_gradients() -> None:
    layer, x = SDDLinear(6, 5), torch.zeros(2, 6, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.abs().max() == 0
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (x, layer.weight, layer.alpha))


def test_the_matrix_starts_small_and_is_decayed_while_alpha_is_not() -> None:
    layer = SDDLinear(400, 300)
    assert layer.weight.std().item() == pytest.approx((2.5 * 400) ** -0.5, rel=0.02)
    assert [g["names"] for g in decay_groups(layer, 0.1)] == [["weight"], ["alpha"]]


def test_bad_arguments_and_inputs_are_refused() -> None:
    with pytest.raises(InputError, match="alpha_init above 0"):
        SDDLinear(6, 5, alpha_init=0.0)
    with pytest.raises(InputError, match="widths of at least 1"):
        SDDLinear(0, 5)
    with pytest.raises(InputError, match=r"\(\*, 6\), got \(2, 7\)"):
        SDDLinear(6, 5)(torch.randn(2, 7))
