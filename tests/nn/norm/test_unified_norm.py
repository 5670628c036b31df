"""The fidelity checks of unified normalization (Yang, Zhang, Lan, Yang, Li, Tan, Xiao and Pu, 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from math import log

import pytest
import torch
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.nn import UnifiedNorm

Double = torch.float64


def made(dim: int = 4, **more: object) -> UnifiedNorm:
    layer = UnifiedNorm(dim, dtype=Double, **more)  # type: ignore[arg-type]
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 2, dim))
        layer.bias.copy_(torch.linspace(-1, 1, dim))
    return layer


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=Double) * torch.linspace(0.5, 3, shape[-1], dtype=Double) + 0.7


def of_size(x2: float, dim: int = 1) -> Tensor:
    """Two tokens whose quadratic mean is ``x2`` in every channel."""
    return torch.tensor([[x2**0.5], [-(x2**0.5)]], dtype=Double).expand(2, dim)


def divisor(layer: UnifiedNorm, x: Tensor) -> Tensor:
    """What a training call divides by, squared and less eps, seen from outside."""
    return ((layer.weight * x / (layer(x) - layer.bias))[0].square() - layer.eps).detach()


# forward -------------------------------------------------------------------------------------------------------------


def test_window_of_one_is_autograd_of_quadratic_mean_normalization() -> None:
    layer = made(window_size=1, warmup_iters=0)
    for _ in range(3):
        x, g = tokens(3, 5, 4).requires_grad_(), torch.randn(3, 5, 4, dtype=Double)
        parameters = (x, layer.weight, layer.bias)
        plain = x / torch.sqrt(x.square().mean((0, 1)) + 1e-5) * layer.weight + layer.bias
        y = layer(x)
        torch.testing.assert_close(y, plain, atol=1e-12, rtol=0)
        wanted = torch.autograd.grad(plain, parameters, g)
        torch.testing.assert_close(torch.autograd.grad(y, parameters, g), wanted, atol=1e-10, rtol=0)


def test_first_call_divides_by_its_own_quadratic_mean_and_moves_the_average() -> None:
    layer, x = UnifiedNorm(4, dtype=Double), tokens(6, 4)
    x2 = x.square().mean(0)
    torch.testing.assert_close(layer(x).square().mean(0), x2 / (x2 + 1e-5))
    torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * x2)


def test_window_is_smoothed_by_the_geometric_mean() -> None:
    layer = made(1, warmup_iters=0)
    for x2 in (9.0, 1.0, 1.0, 4.0):
        layer(of_size(x2))
    torch.testing.assert_close(divisor(layer, of_size(4.0)), torch.tensor([2.0], dtype=Double), atol=1e-9, rtol=0)


def test_nothing_is_smoothed_while_it_warms_up() -> None:
    layer = made(1, warmup_iters=100)
    for x2 in (9.0, 1.0, 1.0, 4.0):
        layer(of_size(x2))
    torch.testing.assert_close(divisor(layer, of_size(4.0)), torch.tensor([4.0], dtype=Double), atol=1e-9, rtol=0)


def test_outlier_is_not_smoothed_and_not_kept() -> None:
    layer = made(1, warmup_iters=5, outlier_filtration=True)
    for _ in range(4):
        layer(of_size(1.0))
    assert layer.skip_counter == 0
    average = layer.running_var.clone()
    torch.testing.assert_close(divisor(layer, of_size(100.0)), torch.tensor([100.0], dtype=Double), atol=1e-6, rtol=0)
    assert layer.skip_counter == 1
    assert torch.equal(layer.buffer_x2[5 % 4], average)


def test_without_the_filter_an_outlier_is_smoothed() -> None:
    layer = made(1, warmup_iters=0)
    for _ in range(4):
        layer(of_size(1.0))
    wanted = torch.tensor([100**0.25], dtype=Double)
    torch.testing.assert_close(divisor(layer, of_size(100.0)), wanted, atol=1e-9, rtol=0)


def test_evaluation_is_an_affine_map_that_writes_nothing() -> None:
    layer = made()
    layer(tokens(6, 4))
    before, x = deepcopy(layer.eval().state_dict()), tokens(2, 3, 4)
    wanted = layer.weight * x / torch.sqrt(layer.running_var + 1e-5) + layer.bias
    torch.testing.assert_close(layer(x), wanted, atol=1e-13, rtol=0)
    torch.testing.assert_close(layer.state_dict(), before, atol=0, rtol=0)


# backward ------------------------------------------------------------------------------------------------------------


def gain_gradient(layer: UnifiedNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of the gain, as it is and as it would be with r = 1."""
    y = layer(x)
    plain = ((y - layer.bias) / layer.weight).sum(0).detach()
    return torch.autograd.grad(y.sum(), layer.weight)[0], plain


def test_r_is_one_for_a_thousand_calls_and_bounded_after() -> None:
    x = tokens(6, 4)
    layer = made(warmup_iters=0)
    layer(x)
    layer.running_var.fill_(1e-4)
    torch.testing.assert_close(*gain_gradient(layer, x))
    for average, factor in ((1e-4, 5.0), (1e4, 1 / 5)):
        layer.iters.fill_(1000)
        layer.buffer_x2.copy_(x.square().mean(0).expand(4, 4))
        layer.running_var.fill_(average)
        got, plain = gain_gradient(layer, x)
        assert (got / plain).log().abs().max() <= log(5) + 1e-9
        torch.testing.assert_close(got, factor * plain)


def recursion(
    steps: Sequence[tuple[Tensor, Tensor]], weight: Tensor, bias: Tensor, warmup: int, window: int
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The layer as it is written down, with plain loops; warm enough that r is 1."""
    dim, eps = weight.numel(), 1e-5
    average, ema = torch.ones(dim, dtype=Double), torch.zeros(dim, dtype=Double)
    ring, gradients = (torch.zeros(window, dim, dtype=Double) for _ in range(2))
    out = []
    for i, (x, g) in enumerate(steps, start=1):
        x2 = (x * x).mean(0)
        ring[i % window] = x2
        smooth = not (i <= window or i < warmup)
        s = ring.prod(0) ** (1 / window) if smooth else x2
        z = x / (s + eps).sqrt()
        average = 0.9 * average + 0.1 * s
        gz = (g * weight * z).mean(0)
        gradients[i % window] = gz
        ema = 0.9 * ema + 0.1 * (gradients.mean(0) if smooth else gz)
        out += [weight * z + bias, (g * weight - z * ema) / (s + eps).sqrt(), (g * z).sum(0), g.sum(0)]
    return out, {"running_var": average, "ema_gz": ema, "buffer_x2": ring, "buffer_gz": gradients}


def test_eight_calls_are_the_written_recursion() -> None:
    layer = made(warmup_iters=3)
    steps = [(tokens(6, 4), torch.randn(6, 4, dtype=Double)) for _ in range(8)]
    got = []
    for x, g in steps:
        x = x.requires_grad_()
        y = layer(x)
        got += [y, *torch.autograd.grad(y, (x, layer.weight, layer.bias), g)]
    with torch.no_grad():
        wanted, state = recursion(steps, layer.weight, layer.bias, warmup=3, window=4)
    torch.testing.assert_close(got, wanted, atol=1e-10, rtol=0)
    torch.testing.assert_close({name: getattr(layer, name) for name in state}, state, atol=1e-10, rtol=0)


def test_windows_of_both_passes_can_differ() -> None:
    layer = made(window_size=(2, 3))
    assert layer.buffer_x2.shape == (2, 4)
    assert layer.buffer_gz.shape == (3, 4)


# padding, folding, bad input -----------------------------------------------------------------------------------------


def test_padding_does_not_reach_the_statistics() -> None:
    x, pad = tokens(2, 3, 4), torch.tensor([[False, False, True], [False, True, True]])
    one, other = made(), made()
    y, moved = one(x, pad), other(torch.where(pad[..., None], float("nan"), x), pad)
    torch.testing.assert_close(y[~pad], moved[~pad], atol=0, rtol=0)
    torch.testing.assert_close(one.state_dict(), other.state_dict(), atol=0, rtol=0)
    torch.testing.assert_close(one.buffer_x2[1], x[~pad].square().mean(0))


def test_batch_of_padding_alone_leaves_the_state() -> None:
    layer = made()
    layer(tokens(6, 4)).sum().backward()
    before, x = deepcopy(layer.state_dict()), tokens(2, 3, 4)
    y = layer(x, torch.ones(2, 3, dtype=torch.bool))
    (0 * y).sum().backward()
    torch.testing.assert_close(layer.state_dict(), before, atol=0, rtol=0)
    torch.testing.assert_close(y, layer.eval()(x))


def test_overflowing_squares_leave_the_state() -> None:
    layer = UnifiedNorm(2)
    layer(torch.ones(3, 2))
    before = deepcopy(layer.state_dict())
    assert layer(torch.tensor([[1e30, 1.0], [1.0, 1.0]])).isfinite().all()
    torch.testing.assert_close(layer.state_dict(), before, atol=0, rtol=0)


def test_dead_channel_stays_finite() -> None:
    layer = UnifiedNorm(2, warmup_iters=0, outlier_filtration=True)
    for _ in range(7):
        x = torch.randn(6, 2) * torch.tensor([1.0, 0.0])
        x.requires_grad_()
        y = layer(x)
        y.sum().backward()
        assert y.isfinite().all()
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("bias", [True, False])
def test_folded_linear_is_norm_then_linear(bias: bool) -> None:
    layer, linear, x = UnifiedNorm(16), nn.Linear(16, 8, bias=bias), torch.randn(4, 5, 16)
    for _ in range(3):
        layer(torch.randn(20, 16))
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    layer.eval()
    torch.testing.assert_close(layer.fold_into(linear)(x), linear(layer(x)), atol=1e-5, rtol=0)


def test_warm_up_can_run_again_with_the_averages_kept() -> None:
    layer = made()
    layer(tokens(6, 4))
    average = layer.running_var.clone()
    layer.reset_warmup()
    assert layer.iters == 0
    assert torch.equal(layer.running_var, average)


def test_official_checkpoint_loads() -> None:
    layer, state = UnifiedNorm(4), UnifiedNorm(4).state_dict()
    layer.load_state_dict(state | {"iters": torch.tensor([9]), "skip_counter": torch.tensor([2])})
    assert (int(layer.iters), int(layer.skip_counter)) == (9, 2)


def test_wrong_inputs_are_refused_in_words() -> None:
    for window in (0, (4, 0), (4,), (1, 2, 3)):
        with pytest.raises(InputError, match="window_size to be a positive whole number or a pair"):
            UnifiedNorm(4, window_size=window)
    with pytest.raises(InputError, match="momentum between 0 and 1"):
        UnifiedNorm(4, momentum=-0.1)
    with pytest.raises(InputError, match=r"expected an input of shape \(\*, 4\), got \(2, 5\)"):
        UnifiedNorm(4)(torch.randn(2, 5))
    with pytest.raises(InputError, match=r"pad_mask of shape \(2, 3\) .* got \(2, 4\)"):
        UnifiedNorm(4)(torch.randn(2, 3, 4), torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"torch\.nn\.Linear that reads the norm, got Conv1d"):
        UnifiedNorm(4).fold_into(nn.Conv1d(4, 2, 1))
