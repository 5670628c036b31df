"""The fidelity checks of layer normalization (Ba, Kiros and Hinton, 2016)."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from setpoint.errors import InputError
from setpoint.nn import LayerNorm, LayerNorm2d, LayerNormCHW


def standardized(x: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    return LayerNorm(x.shape[-1], eps=eps, elementwise_affine=False)(x)


def test_one_to_four_is_the_papers_example() -> None:
    wanted = torch.tensor([-1.3416, -0.4472, 0.4472, 1.3416])
    torch.testing.assert_close(LayerNorm(4)(torch.tensor([1.0, 2.0, 3.0, 4.0])), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_forward_and_gradients_are_those_of_the_functional(dtype: torch.dtype, tolerance: float) -> None:
    layer = LayerNorm((3, 5), dtype=dtype)
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.normal_()
    x = torch.randn(7, 3, 5, dtype=dtype, requires_grad=True)
    own = torch.autograd.grad((layer(x) ** 3).sum(), (x, layer.weight, layer.bias))
    y = F.layer_norm(x, (3, 5), layer.weight, layer.bias)
    theirs = torch.autograd.grad((y**3).sum(), (x, layer.weight, layer.bias))
    torch.testing.assert_close(layer(x), y, atol=tolerance, rtol=0)
    for a, b in zip(own, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def test_gradient_follows_the_closed_form() -> None:
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    layer = LayerNorm(6, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.normal_()
    g = torch.randn(4, 6, dtype=torch.float64)
    (dx,) = torch.autograd.grad(layer(x), x, g)
    r = torch.rsqrt(x.var(-1, correction=0, keepdim=True) + 1e-5)
    xhat, h = (x - x.mean(-1, keepdim=True)) * r, g * layer.weight
    wanted = r * (h - h.mean(-1, keepdim=True) - xhat * (h * xhat).mean(-1, keepdim=True))
    torch.testing.assert_close(dx, wanted, atol=1e-12, rtol=0)


def test_rows_have_no_mean_and_a_variance_just_below_one() -> None:
    x = torch.randn(5, 9, dtype=torch.float64) * 0.01
    y, variance = standardized(x), x.var(-1, correction=0)
    torch.testing.assert_close(y.mean(-1), torch.zeros(5, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(y.var(-1, correction=0), variance / (variance + 1e-5), atol=1e-12, rtol=0)


def test_scale_and_offset_of_the_input_vanish() -> None:
    x = torch.randn(5, 9, dtype=torch.float64)
    torch.testing.assert_close(standardized(3.0 * x + 7.0, eps=0.0), standardized(x, eps=0.0), atol=1e-12, rtol=0)
    torch.testing.assert_close(standardized(3.0 * x + 7.0), standardized(x), atol=0, rtol=1e-4)


def test_rescaled_and_recentred_weights_vanish_but_single_rows_do_not() -> None:
    weight, x = torch.randn(6, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    wanted = standardized(x @ weight.T, eps=0.0)
    moved = 2.5 * weight + torch.randn(4, dtype=torch.float64)
    torch.testing.assert_close(standardized(x @ moved.T, eps=0.0), wanted, atol=1e-12, rtol=0)
    row = weight.clone()
    row[0] *= 2.5
    assert (standardized(x @ row.T, eps=0.0) - wanted).abs().max() > 0.1


def test_gradient_is_orthogonal_to_ones_and_to_the_centred_input() -> None:
    x = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(standardized(x, eps=0.0), x, torch.randn(5, 9, dtype=torch.float64))
    assert dx.sum(-1).abs().max() < 1e-12
    assert (dx * (x - x.mean(-1, keepdim=True))).sum(-1).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_batch_is_its_rows_bit_for_bit(dtype: torch.dtype) -> None:
    layer, x = LayerNorm(33, dtype=dtype), torch.randn(7, 33, dtype=dtype)
    assert torch.equal(layer(x), torch.cat([layer(row) for row in x.split(1)]))


@pytest.mark.parametrize("value", [0.0, 1.0, 300.1, -1e6])
def test_constant_row_gives_the_bias_and_a_finite_gradient(value: float) -> None:
    layer = LayerNorm(64)
    with torch.no_grad():
        layer.bias.normal_()
    x = torch.full((2, 64), value, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, layer.bias.expand(2, 64))
    y.square().sum().backward()
    assert torch.isfinite(x.grad).all()


def test_a_single_feature_gives_the_bias_always() -> None:
    layer = LayerNorm(1)
    with torch.no_grad():
        layer.bias.fill_(2.5)
    assert torch.equal(layer(torch.randn(4, 1)), torch.full((4, 1), 2.5))


def test_half_precision_takes_its_statistics_in_float32() -> None:
    x = (300 + torch.randn(2, 4096)).half()
    y = LayerNorm(4096, dtype=torch.float16)(x)
    assert torch.isfinite(y).all()
    torch.testing.assert_close(y.float(), standardized(x.float()), atol=2e-3, rtol=2e-3)


def test_large_offset_does_not_cancel() -> None:
    x = torch.randn(3, 512)
    torch.testing.assert_close(standardized(x + 1e4), standardized((x + 1e4).double()).float(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("rows", [5, 256])
def test_compiled_training_has_torchs_gradients(rows: int) -> None:
    layer, x = LayerNorm(24), torch.randn(rows, 24, requires_grad=True)
    torch.nn.init.normal_(layer.weight)
    g = torch.randn(rows, 24)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    arguments = (x, layer.weight, layer.bias)
    own = torch.autograd.grad(compiled(x), arguments, g)
    theirs = torch.autograd.grad(F.layer_norm(x, (24,), layer.weight, layer.bias), arguments, g)
    torch.testing.assert_close(own, theirs, atol=3e-5, rtol=3e-5)


def test_training_and_evaluation_are_the_same() -> None:
    layer, x = LayerNorm(8), torch.randn(3, 8)
    assert torch.equal(layer.train()(x), layer.eval()(x))


def test_state_fits_torchs_layer_both_ways() -> None:
    theirs = torch.nn.LayerNorm(8, bias=False)
    LayerNorm(8, bias=False).load_state_dict(theirs.state_dict())
    assert LayerNorm(8).state_dict().keys() == torch.nn.LayerNorm(8).state_dict().keys() == {"weight", "bias"}
    assert isinstance(LayerNorm(8), torch.nn.LayerNorm)


def test_2d_normalizes_the_channels_of_every_pixel() -> None:
    layer, x = LayerNorm2d(3), torch.randn(2, 3, 4, 5)
    wanted = F.layer_norm(x.movedim(1, -1), (3,), eps=1e-6).movedim(-1, 1)
    torch.testing.assert_close(layer(x), wanted)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(layer(x)[:, 2], 3 * wanted[:, 2])


def test_2d_keeps_channels_last_without_a_copy() -> None:
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert LayerNorm2d(3)(x).is_contiguous(memory_format=torch.channels_last)


def test_chw_normalizes_an_image_as_a_whole() -> None:
    x = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(LayerNormCHW(3)(x), F.layer_norm(x, (3, 4, 5)))
    torch.testing.assert_close(LayerNormCHW(3)(x), F.group_norm(x, 1))


@pytest.mark.parametrize("bad", [0, (4, 0), (), -3])
def test_nothing_to_normalize_over_is_refused(bad: int | tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="LayerNorm: expected normalized_shape to hold positive sizes, got"):
        LayerNorm(bad)


def test_wrong_inputs_are_refused_in_words() -> None:
    with pytest.raises(InputError, match=r"expected an input of shape \(\*, 8\), got \(2, 7\); .*normalized_shape=7"):
        LayerNorm(8)(torch.randn(2, 7))
    with pytest.raises(TypeError, match=r"expected a floating-point input, got torch.int64; convert it first"):
        LayerNorm(8)(torch.ones(2, 8, dtype=torch.long))
    with pytest.raises(InputError, match=r"LayerNorm2d: expected an input with 4 axes, got 3"):
        LayerNorm2d(3)(torch.randn(3, 4, 5))
    with pytest.raises(InputError, match=r"LayerNormCHW: expected an input of shape \(N, 3, \*\), got \(2, 4, 5\)"):
        LayerNormCHW(3)(torch.randn(2, 4, 5))


def test_no_rows_give_no_rows() -> None:
    assert LayerNorm(8)(torch.randn(0, 8)).shape == (0, 8)
