"""EvoNorm (Liu, Brock, Simonyan and Le, 2020)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.nn import EvoNorm2dB0, EvoNorm2dB1, EvoNorm2dB2, EvoNorm2dS0, EvoNorm2dS1, EvoNorm2dS2
from setpoint.testing.layer_case import Case, pattern
from setpoint.testing.pair import gradients_on_two

BATCH = (EvoNorm2dB0, EvoNorm2dB1, EvoNorm2dB2)
SAMPLE = (EvoNorm2dS0, EvoNorm2dS1, EvoNorm2dS2)


def plain(kind: type[nn.Module], x: Tensor, v: Tensor, groups: int, eps: float) -> Tensor:
    """The definitions, in words of their own: one statistic after the other."""
    slope = v[:, None, None]
    batch = (x.var((0, 2, 3), correction=0) + eps).sqrt()[:, None, None]
    own = (x.var((2, 3), correction=0, keepdim=True) + eps).sqrt()
    own_rms = (x.square().mean((2, 3), keepdim=True) + eps).sqrt()
    grouped = x.reshape(len(x), groups, -1)
    spread = (grouped.var(-1, correction=0) + eps).sqrt()
    size = (grouped.square().mean(-1) + eps).sqrt()
    spread, size = (t.repeat_interleave(x.shape[1] // groups, 1)[..., None, None] for t in (spread, size))
    return {
        EvoNorm2dB0: lambda: x / torch.max(batch, slope * x + own),
        EvoNorm2dB1: lambda: x / torch.max(batch, (x + 1) * own_rms),
        EvoNorm2dB2: lambda: x / torch.max(batch, own_rms - x),
        EvoNorm2dS0: lambda: x * torch.sigmoid(slope * x) / spread,
        EvoNorm2dS1: lambda: x * torch.sigmoid(x) / spread,
        EvoNorm2dS2: lambda: x * torch.sigmoid(x) / size,
    }[kind]()


def numbers(*shape: int) -> Tensor:
    return 0.5 + 2 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def made(kind: type[nn.Module], channels: int, **options: object) -> nn.Module:
    """In float64, with a gain, an addend and slopes that differ from channel to channel."""
    layer = kind(channels, dtype=torch.float64, **(options if kind in BATCH else {"groups": 2, **options}))
    with torch.no_grad():
        for index, parameter in enumerate(layer.parameters()):
            parameter.add_(0.3 * torch.cos(torch.arange(channels) + index))
    return layer


@pytest.mark.parametrize("eps", [1e-5, 1e-3])
@pytest.mark.parametrize("kind", [*BATCH, *SAMPLE])
def test_outputs_and_gradients_are_those_of_the_definition(kind: type[nn.Module], eps: float) -> None:
    layer, x = made(kind, 4, eps=eps), numbers(3, 4, 2, 5).requires_grad_()
    v = layer.v if layer.v is not None else x.new_ones(4)
    wanted = plain(kind, x, v, 2, eps) * layer.weight[:, None, None] + layer.bias[:, None, None]
    g, inputs = torch.randn_like(wanted), [x, *layer.parameters()]
    torch.testing.assert_close(layer(x), wanted)
    torch.testing.assert_close(torch.autograd.grad(layer(x), inputs, g), torch.autograd.grad(wanted, inputs, g))


def test_s0_without_slope_is_half_the_input_over_its_deviation_and_with_a_steep_one_rectifies() -> None:
    layer, x = EvoNorm2dS0(4, groups=1, eps=0.0, dtype=torch.float64), numbers(2, 4, 3, 3)
    deviation = x.flatten(1).std(1, correction=0)[:, None, None, None]
    nn.init.zeros_(layer.v)
    torch.testing.assert_close(layer(x), x / (2 * deviation))
    nn.init.constant_(layer.v, 1e6)
    torch.testing.assert_close(layer(x), x.relu() / deviation)


@pytest.mark.parametrize("kind", SAMPLE)
def test_the_s_series_normalizes_each_image_by_itself(kind: type[nn.Module]) -> None:
    layer, x = made(kind, 4), numbers(3, 4, 3, 3)
    torch.testing.assert_close(layer(x)[:1], layer(x[:1]))
    torch.testing.assert_close(layer(x), layer.eval()(x))
    assert not list(layer.buffers())


def test_b0_of_one_image_without_slope_is_the_input_over_its_deviation() -> None:
    layer, x = EvoNorm2dB0(3, dtype=torch.float64), numbers(1, 3, 4, 4)
    nn.init.zeros_(layer.v)
    torch.testing.assert_close(layer(x), x / (x.var((0, 2, 3), correction=0) + 1e-5).sqrt()[:, None, None])


def test_b0_is_bounded_by_its_gain_over_its_slope() -> None:
    layer = EvoNorm2dB0(1, eps=0.0).eval()  # both deviations are 1
    x = torch.tensor([[[[-1.0, 1.0]]]])
    torch.testing.assert_close(layer(x).flatten(), torch.tensor([-1.0, 0.5]))
    nn.init.constant_(layer.v, 2.0)
    spike = torch.zeros(1, 1, 1, 10001)
    spike[..., 0] = 1e6
    assert 0.4 < layer(spike).max() < 0.5


def test_moments_of_a_standard_normal_input_are_as_integrated() -> None:
    x = torch.randn(4, 1, 500, 500, generator=torch.Generator().manual_seed(0))
    s0, b0 = EvoNorm2dS0(1, groups=1)(x), EvoNorm2dB0(1)(x)
    got = torch.stack([s0.mean(), s0.square().mean(), b0.mean(), b0.square().mean()])
    torch.testing.assert_close(got, torch.tensor([0.2066, 0.3558, -0.2064, 0.5915]), rtol=1e-2, atol=0)


@pytest.mark.parametrize("kind", [*BATCH, *SAMPLE])
def test_without_activation_only_gain_and_addend_are_left(kind: type[nn.Module]) -> None:
    layer, x = made(kind, 4, apply_act=False), numbers(3, 4, 2, 2)
    assert torch.equal(layer(x), torch.addcmul(layer.bias[:, None, None], x, layer.weight[:, None, None]))
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    if kind in BATCH:
        assert torch.equal(layer.running_var, torch.ones(4, dtype=torch.float64))


def test_s0_forgets_the_scale_of_its_input_only_without_slope() -> None:
    layer, x = EvoNorm2dS0(4, groups=2, dtype=torch.float64), numbers(2, 4, 3, 3)
    assert not torch.allclose(layer(5 * x), layer(x), rtol=1e-2)
    nn.init.zeros_(layer.v)
    torch.testing.assert_close(layer(5 * x), layer(x), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", BATCH)
def test_running_variance_averages_unbiased_variances_and_serves_in_evaluation(kind: type[nn.Module]) -> None:
    layer, x = kind(3, dtype=torch.float64), numbers(4, 3, 2, 5)
    layer(x)
    torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * x.var((0, 2, 3)))
    kept = layer.running_var.clone()
    y = layer.eval()(x)
    assert torch.equal(layer.running_var, kept)
    torch.testing.assert_close(layer(x[:1]), y[:1])


def test_running_variance_stays_in_float32_when_the_layer_goes_to_half_precision() -> None:
    assert EvoNorm2dB0(3).half().running_var.dtype == torch.float32


def test_the_batch_variance_is_that_of_both_processes() -> None:
    """Seen in the gain's gradient, of which the two processes hold the mean."""
    x = torch.randn(4, 3, 2, 2) * torch.tensor([1.0, 1.0, 6.0, 6.0])[:, None, None, None]
    layer = Case(lambda: EvoNorm2dB0(3), (x,)).layer()
    normalized = (layer(x) - layer.bias[:, None, None]) / layer.weight[:, None, None]
    wanted = sum((pattern(half) * half).sum((0, 2, 3)) for half in normalized.detach().split(2)) / 2
    for outcome, problem in gradients_on_two(layer, [(x[:2],), (x[2:],)]):
        assert outcome is not None, problem
        torch.testing.assert_close(outcome["weight"], wanted)


def test_an_empty_batch_leaves_the_running_variance() -> None:
    layer = EvoNorm2dB0(3)
    assert layer(torch.zeros(0, 3, 2, 2)).shape == (0, 3, 2, 2)
    assert torch.equal(layer.running_var, torch.ones(3))


@pytest.mark.parametrize("kind", [*BATCH, *SAMPLE])
def test_maps_of_one_pixel_are_finite(kind: type[nn.Module]) -> None:
    assert made(kind, 4)(numbers(3, 4, 1, 1)).isfinite().all()


def test_group_size_sets_the_groups() -> None:
    assert EvoNorm2dS0(24, group_size=8).groups == 3


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(InputError, match="24 channels to divide into equal groups, got groups=32; group_size=8"):
        EvoNorm2dS0(24)
    with pytest.raises(InputError, match="got group_size=7"):
        EvoNorm2dS1(24, group_size=7)
    with pytest.raises(InputError, match="more than one value per channel"):
        EvoNorm2dB0(3)(torch.zeros(1, 3, 1, 1))
    assert EvoNorm2dB0(3).eval()(torch.zeros(1, 3, 1, 1)).isfinite().all()
    with pytest.raises(InputError, match=r"\(N, 3, \*\), got \(2, 4, 3, 3\)"):
        EvoNorm2dB0(3)(torch.zeros(2, 4, 3, 3))
    with pytest.raises(InputError, match="4 axes, got 3"):
        EvoNorm2dS2(4, 2)(torch.zeros(2, 4, 3))
    with pytest.raises(TypeError, match="floating-point"):
        EvoNorm2dB0(3)(torch.zeros(2, 3, 3, 3, dtype=torch.long))
