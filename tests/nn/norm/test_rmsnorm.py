"""RMSNorm, and the form of it that leaves one entry out (Jiang, Gu, Zhu and Pan, 2023)."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from setpoint.errors import InputError
from setpoint.nn import CRMSNorm, RMSNorm, crms_norm, rms_norm

Double = torch.float64


def random_layer(dim: int, bias: bool = True, dtype: torch.dtype = Double) -> RMSNorm:
    layer = RMSNorm(dim, bias=bias, dtype=dtype)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
    return layer


@pytest.mark.parametrize(("dtype", "tolerance"), [(Double, 1e-12), (torch.float32, 3e-5)])
@pytest.mark.parametrize("rows", [5, 256])
def test_forward_and_gradients_are_torchs(dtype: torch.dtype, tolerance: float, rows: int) -> None:
    layer = random_layer(24, bias=False, dtype=dtype)
    x, g = torch.randn(rows, 24, dtype=dtype, requires_grad=True), torch.randn(rows, 24, dtype=dtype)
    y = F.rms_norm(x, (24,), layer.weight, 1e-5)
    torch.testing.assert_close(layer(x), y, atol=tolerance, rtol=0)
    own = torch.autograd.grad(layer(x), (x, layer.weight), g)
    for a, b in zip(own, torch.autograd.grad(y, (x, layer.weight), g), strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def test_backward_for_second_derivatives_is_the_backward() -> None:
    """The kernel that serves the first derivative, and the formula that serves where it is differentiated again."""
    layer, x, g = random_layer(24), torch.randn(5, 24, dtype=Double, requires_grad=True), torch.randn(5, 24).double()
    arguments = (x, layer.weight, layer.bias)
    by_kernel = torch.autograd.grad(layer(x), arguments, g)
    by_formula = torch.autograd.grad(layer(x), arguments, g, create_graph=True)
    torch.testing.assert_close(by_kernel, by_formula, atol=1e-12, rtol=0)


def test_second_derivative_at_zero_is_that_of_the_formula() -> None:
    x = torch.zeros(1, 4, dtype=Double)

    def plain(t: torch.Tensor) -> torch.Tensor:
        return (t / torch.sqrt(t.square().mean(-1, keepdim=True) + 1e-5) * torch.arange(4.0)).sum() ** 2

    def own(t: torch.Tensor) -> torch.Tensor:
        return (rms_norm(t, 4, eps=1e-5) * torch.arange(4.0)).sum() ** 2

    hessian = torch.autograd.functional.hessian
    torch.testing.assert_close(hessian(own, x), hessian(plain, x))


def test_centred_input_makes_it_a_layer_norm_for_any_eps() -> None:
    x = torch.randn(5, 8, dtype=Double)
    x = x - x.mean(-1, keepdim=True)
    for eps in (0.0, 1e-5, 1.0):
        torch.testing.assert_close(rms_norm(x, 8, eps=eps), F.layer_norm(x, (8,), eps=eps), atol=1e-12, rtol=0)
    layer = random_layer(8)
    torch.testing.assert_close(layer(x), F.layer_norm(x, (8,), layer.weight, layer.bias))


def test_uncentred_input_tells_them_apart() -> None:
    x = torch.randn(5, 8) + 1.0
    assert (rms_norm(x, 8) - F.layer_norm(x, (8,))).abs().max() > 0.1


def test_eps_is_inside_the_root() -> None:
    torch.testing.assert_close(rms_norm(torch.tensor([3.0, 4.0]), 2, eps=3.5), torch.tensor([3.0, 4.0]) / 4.0)


def test_several_axes_are_normalized_together() -> None:
    x = torch.randn(5, 2, 3, dtype=Double)
    layer = RMSNorm((2, 3), bias=True, dtype=Double)
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    wanted = x / torch.sqrt(x.square().mean((-1, -2), keepdim=True) + 1e-5) * layer.weight + layer.bias
    torch.testing.assert_close(layer(x), wanted)


def test_half_precision_takes_its_statistics_in_float32() -> None:
    x = (300 + torch.randn(2, 4096)).half()
    torch.testing.assert_close(rms_norm(x, 4096).float(), rms_norm(x.float(), 4096), atol=1e-3, rtol=1e-3)


def test_state_fits_torchs_layer() -> None:
    RMSNorm(8).load_state_dict(torch.nn.RMSNorm(8).state_dict())
    assert RMSNorm(8, bias=True).state_dict().keys() == {"weight", "bias"}
    assert not RMSNorm(8, elementwise_affine=False, bias=True).state_dict()


def test_compressed_form_of_one_two_minus_three_is_the_definitions_example() -> None:
    wanted = torch.tensor([0.4629, 0.9258])
    torch.testing.assert_close(crms_norm(torch.tensor([1.0, 2.0]), eps=0.0), wanted, atol=1e-4, rtol=0)
    full = F.layer_norm(torch.tensor([1.0, 2.0, -3.0]), (3,), eps=0.0)
    torch.testing.assert_close(full[:2], wanted, atol=1e-4, rtol=0)


def test_compressed_form_is_the_full_one_without_its_last_entry() -> None:
    c = torch.randn(5, 7, dtype=Double, requires_grad=True)
    g = torch.randn(5, 7, dtype=Double)
    full = rms_norm(torch.cat([c, -c.sum(-1, keepdim=True)], -1), 8)[..., :-1]
    own = CRMSNorm(7)(c)
    torch.testing.assert_close(own, full, atol=1e-12, rtol=0)
    torch.testing.assert_close(torch.autograd.grad(own, c, g), torch.autograd.grad(full, c, g), atol=1e-12, rtol=0)


def test_wrong_inputs_are_refused_in_words() -> None:
    with pytest.raises(InputError, match=r"RMSNorm: expected an input of shape \(\*, 8\), got \(2, 7\)"):
        RMSNorm(8)(torch.randn(2, 7))
    with pytest.raises(InputError, match=r"rms_norm: expected an input of shape \(\*, 2, 3\), got \(4, 3, 2\)"):
        rms_norm(torch.randn(4, 3, 2), (2, 3))
    with pytest.raises(InputError, match=r"CRMSNorm: expected an input of shape \(\*, 7\), got \(2, 8\)"):
        CRMSNorm(7)(torch.randn(2, 8))
    with pytest.raises(InputError, match="CRMSNorm: expected dim to be a positive whole number, got 0"):
        CRMSNorm(0)
    with pytest.raises(TypeError, match=r"expected a floating-point input, got torch\.int64"):
        RMSNorm(8)(torch.ones(2, 8, dtype=torch.long))
