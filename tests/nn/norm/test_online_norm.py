"""The fidelity checks of online normalization (Chiley et al., 2019)."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.nn import OnlineNorm1d, OnlineNorm2d, OnlineNorm3d

Double = torch.float64
STATE = ("m", "var", "u", "v")


def bare(dim: int = 3, **more: object) -> OnlineNorm2d:
    return OnlineNorm2d(dim, dtype=Double, **{"affine": False, "ecm": None, **more})  # type: ignore[arg-type]


def loop(layer: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Outputs, input gradients and last state, one sample after the other as the paper writes it."""
    a, b = layer.alpha_fwd, layer.alpha_bkw
    m, var, u, v = (getattr(layer, name).clone()[:, None, None] for name in STATE)
    ys, roots, gradients = [], [], []
    for sample in x:
        roots.append(torch.sqrt(var + layer.eps))
        ys.append((sample - m) / roots[-1])
        mu = sample.mean((1, 2), keepdim=True)
        spread = (sample - mu).square().mean((1, 2), keepdim=True)
        var = a * var + (1 - a) * spread + a * (1 - a) * (mu - m) ** 2
        m = m + (1 - a) * (mu - m)
    for y, root, gradient in zip(ys, roots, g, strict=True):
        controlled = gradient - (1 - b) * v * y
        v = v + (controlled * y).mean((1, 2), keepdim=True)
        gradients.append(controlled / root - (1 - b) * u)
        u = u + gradients[-1].mean((1, 2), keepdim=True)
    return torch.stack(ys), torch.stack(gradients), dict(zip(STATE, (s.flatten() for s in (m, var, u, v)), strict=True))


def both(layer: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    return y.detach(), torch.autograd.grad(y, x, g)[0]


def state_of(layer: nn.Module) -> dict[str, Tensor]:
    return {name: getattr(layer, name).clone() for name in STATE}


def test_one_three_two_is_the_definitions_example() -> None:
    layer = OnlineNorm1d(1, alpha_fwd=0.9, eps=0.0, affine=False, ecm=None, dtype=Double)
    seen = []
    for value in (1.0, 3.0, 2.0):
        y = layer(torch.tensor([[value]], dtype=Double))
        seen.append([float(y), float(layer.m), float(layer.var)])
    wanted = [[1.0, 0.1, 0.99], [2.914610, 0.39, 1.6479], [1.254182, 0.551, 1.716399]]
    torch.testing.assert_close(torch.tensor(seen), torch.tensor(wanted), atol=1e-6, rtol=0)


@pytest.mark.parametrize("samples", [1, 2, 3, 8, 13])
def test_vectorized_path_is_the_loop(samples: int) -> None:
    layer = bare(alpha_fwd=0.9, alpha_bkw=0.8)
    for _ in range(3):
        x, g = 2 * torch.randn(samples, 3, 2, 4, dtype=Double) + 1, torch.randn(samples, 3, 2, 4, dtype=Double)
        y, dx, state = loop(layer, x, g)
        torch.testing.assert_close(both(layer, x, g), (y, dx), atol=1e-12, rtol=0)
        torch.testing.assert_close(state_of(layer), state, atol=1e-12, rtol=0)


def test_vectorized_path_is_the_loop_in_single_precision() -> None:
    layer = OnlineNorm2d(3, affine=False, ecm=None)
    x, g = torch.randn(64, 3, 4, 4), torch.randn(64, 3, 4, 4)
    y, dx, _ = loop(layer, x, g)
    torch.testing.assert_close(both(layer, x, g), (y, dx), atol=1e-6, rtol=1e-6)


def test_one_batch_of_eight_is_eight_batches_of_one() -> None:
    whole = bare(alpha_fwd=0.9, alpha_bkw=0.8)
    parts, x, g = deepcopy(whole), torch.randn(8, 3, 2, 2, dtype=Double), torch.randn(8, 3, 2, 2, dtype=Double)
    y, dx = both(whole, x, g)
    pieces = [both(parts, x[i : i + 1], g[i : i + 1]) for i in range(8)]
    torch.testing.assert_close((y, dx), tuple(map(torch.cat, zip(*pieces, strict=True))), atol=1e-12, rtol=0)
    torch.testing.assert_close(state_of(whole), state_of(parts), atol=1e-12, rtol=0)


def test_statistics_of_a_stationary_input_are_found() -> None:
    layer, numbers = OnlineNorm1d(1, ecm=None), torch.Generator().manual_seed(0)
    for _ in range(20):
        layer(3 + 2 * torch.randn(1000, 1, generator=numbers))
    assert abs(float(layer.m) - 3) < 0.2
    assert abs(float(layer.var) - 4) < 0.6


def test_variance_is_the_exponentially_weighted_one_of_all_samples_and_the_prior() -> None:
    a, layer, x = 0.9, OnlineNorm1d(1, alpha_fwd=0.9, ecm=None, dtype=Double), torch.randn(30, 1, dtype=Double) + 2
    layer(x)
    weights = torch.tensor([a**30] + [(1 - a) * a ** (29 - k) for k in range(30)], dtype=Double)
    values = torch.cat([torch.zeros(1, dtype=Double), x.flatten()])  # the prior has mean 0 and variance 1
    mean = (weights * values).sum()
    variance = (weights * (values - mean).square()).sum() + weights[0]
    torch.testing.assert_close(layer.m, mean.reshape(1), atol=1e-10, rtol=0)
    torch.testing.assert_close(layer.var, variance.reshape(1), atol=1e-10, rtol=0)


def test_control_makes_the_gradient_orthogonal_to_output_and_ones_on_average() -> None:
    layer, numbers = bare(1), torch.Generator().manual_seed(0)
    with torch.no_grad():
        layer.m.fill_(1.0)
    x = 1 + torch.randn(2000, 1, 4, 4, generator=numbers, dtype=Double)
    y = (x - 1).detach()
    g = 1.0 + 0.5 * y + torch.randn(2000, 1, 4, 4, generator=numbers, dtype=Double)  # neither by itself
    assert (g * y).mean() > 0.3
    both(layer, x, g)
    v, u = layer.v.clone(), layer.u.clone()
    both(layer, x, g)
    # v and u add up mean(g' y) and mean(dx), so that their change over the number of samples is the average
    assert float((layer.v - v).abs() / 2000) < 0.02 * g.abs().mean()
    assert float((layer.u - u).abs() / 2000) < 0.02 * g.abs().mean()


def test_without_control_the_gradient_is_only_scaled() -> None:
    layer, x, g = (
        bare(alpha_bkw=1.0, alpha_fwd=1.0),
        torch.randn(5, 3, 2, 2, dtype=Double),
        torch.randn(5, 3, 2, 2, dtype=Double),
    )
    with torch.no_grad():
        layer.var.copy_(torch.tensor([1.0, 2.0, 3.0]))
    for _ in range(2):
        torch.testing.assert_close(both(layer, x, g)[1], g / torch.sqrt(layer.var + 1e-5)[:, None, None])


def test_whole_layer_with_the_state_at_rest_has_autograds_gradient() -> None:
    layer = OnlineNorm2d(3, alpha_fwd=1.0, alpha_bkw=1.0, dtype=Double)
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    x, g = torch.randn(4, 3, 2, 2, dtype=Double).requires_grad_(), torch.randn(4, 3, 2, 2, dtype=Double)
    at_rest = deepcopy(layer).eval()
    got = torch.autograd.grad(layer(x), (x, *layer.parameters()), g)
    wanted = torch.autograd.grad(at_rest(x), (x, *at_rest.parameters()), g)
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(at_rest, x)


def test_layer_scaling_gives_every_example_unit_size() -> None:
    layer = OnlineNorm2d(3)
    y = layer(5 * torch.randn(4, 3, 6, 6) + 2)
    torch.testing.assert_close(y.square().mean((1, 2, 3)).sqrt(), torch.ones(4), atol=1e-3, rtol=0)


def test_clamped_output_stays_within_its_bounds_in_evaluation_too() -> None:
    layer, x = OnlineNorm2d(3, ecm="ac"), 100 * torch.randn(4, 3, 6, 6)
    assert layer(x).abs().max() == 5.0
    layer.reset_state()
    assert layer.eval()(x).abs().max() == 5.0


def test_evaluation_uses_the_state_and_leaves_it() -> None:
    layer = bare()
    layer(torch.randn(4, 3, 2, 2, dtype=Double))
    before, x = state_of(layer.eval()), torch.randn(2, 3, 2, 2, dtype=Double)
    wanted = (x - layer.m[:, None, None]) / torch.sqrt(layer.var + 1e-5)[:, None, None]
    torch.testing.assert_close(layer(x), wanted, atol=1e-13, rtol=0)
    torch.testing.assert_close(state_of(layer), before, atol=0, rtol=0)


def test_before_any_training_it_only_scales() -> None:
    x = torch.randn(2, 3)
    y = OnlineNorm1d(3, ecm=None).eval()(x)
    torch.testing.assert_close(y, x / (1 + 1e-5) ** 0.5)


def test_all_dimensions_agree() -> None:
    x = torch.randn(4, 3, 1, 1, 6)
    y = OnlineNorm3d(3)(x)
    torch.testing.assert_close(OnlineNorm2d(3)(x[:, :, 0]), y[:, :, 0])
    torch.testing.assert_close(OnlineNorm1d(3)(x[:, :, 0, 0]), y[:, :, 0, 0])
    torch.testing.assert_close(OnlineNorm1d(3)(x[..., 0, 0, 0]), OnlineNorm1d(3)(x[..., 0, 0, :1])[..., 0])


def test_sample_that_overflows_leaves_the_statistics() -> None:
    one, other, x = OnlineNorm1d(2, ecm=None), OnlineNorm1d(2, ecm=None), torch.randn(5, 2)
    odd = torch.cat([x[:2], torch.full((1, 2), float("inf")), x[2:]])
    one(x), other(odd)
    torch.testing.assert_close(state_of(one), state_of(other))


def test_control_that_overflows_starts_again_instead_of_turning_into_nan() -> None:
    layer, x = OnlineNorm1d(2, ecm=None), torch.randn(64, 2) * 1e15
    _, dx = both(layer, x, torch.randn(64, 2))
    assert not dx.isnan().any()
    assert all(value.isfinite().all() for value in state_of(layer).values())


def test_memory_format_and_gaps_do_not_matter() -> None:
    x, g = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    wanted = both(OnlineNorm2d(3), x, g)
    for change in (
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: torch.stack([t, t], -1)[..., 0],
    ):
        torch.testing.assert_close(both(OnlineNorm2d(3), change(x), g), wanted)


def test_official_checkpoint_loads() -> None:
    layer = OnlineNorm2d(3)
    state = {"weight": torch.ones(3), "bias": torch.zeros(3)}
    layer.load_state_dict(state | {f"norm.{name}": torch.arange(3.0) + i for i, name in enumerate(STATE)})
    assert layer.var.tolist() == [1, 2, 3]


def test_wrong_inputs_are_refused_in_words() -> None:
    with pytest.raises(InputError, match=r"ecm to be 'ls'.*'ac'.*got 'xx'"):
        OnlineNorm1d(3, ecm="xx")
    with pytest.raises(InputError, match="alpha_fwd between 0 and 1"):
        OnlineNorm1d(3, alpha_fwd=1.1)
    with pytest.raises(InputError, match="expected an input with 4 axes, got 2"):
        OnlineNorm2d(3)(torch.randn(2, 3))
    with pytest.raises(InputError, match=r"expected an input of shape \(N, 3, \*\), got \(2, 4\)"):
        OnlineNorm1d(3)(torch.randn(2, 4))
