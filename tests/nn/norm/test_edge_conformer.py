"""The fidelity checks of the pre-normalizer (Xu, Jin et al., 2023), in float64 and in float16 arithmetic."""

from __future__ import annotations

from itertools import product
from math import pi

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from setpoint.errors import InputError
from setpoint.nn import LpNorm, lp_norm, prenormalize
from setpoint.nn.norm.lpnorm import _spread

Double = torch.float64
Half = torch.float16
KINDS = ("mad", "max", "guaranteed")


def spike(n: int, size: float, dtype: torch.dtype = Half) -> Tensor:
    x = torch.zeros(1, n, dtype=dtype)
    x[0, 1] = size
    return x


def off(y: Tensor, x: Tensor, *, center: bool = True) -> float:
    """The largest error of a normalized vector beside the one that float64 gives."""
    u = x.double() - x.double().mean(-1, keepdim=True) if center else x.double()
    return float((y.double() - u / u.square().mean(-1, keepdim=True).sqrt()).abs().max().nan_to_num(torch.inf))


# the same function ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("kind", KINDS)
def test_every_pre_normalizer_gives_layer_norm_and_its_gradients(kind: str, scale: float) -> None:
    x = (scale * torch.randn(4, 3, 8, dtype=Double)).requires_grad_()
    weight, bias, upstream = torch.randn(8).double(), torch.randn(8).double(), torch.randn(4, 3, 8).double()
    y, wanted = lp_norm(x, 8, weight, bias, prenorm=kind), F.layer_norm(x, (8,), weight, bias)  # type: ignore[arg-type]
    torch.testing.assert_close(y, wanted, atol=1e-12, rtol=0)
    own, theirs = (torch.autograd.grad(out, x, upstream)[0] for out in (y, wanted))
    torch.testing.assert_close(own, theirs, atol=1e-10 / scale, rtol=1e-10)


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_without_centring_it_is_rms_norm(kind: str | None) -> None:
    x = torch.randn(4, 8, dtype=Double, requires_grad=True)
    y = lp_norm(x, 8, center=False, prenorm=kind)  # type: ignore[arg-type]
    wanted = F.rms_norm(x, (8,), eps=1e-5)
    torch.testing.assert_close(y, wanted, atol=1e-12, rtol=0)
    upstream = torch.randn_like(x)
    torch.testing.assert_close(*(torch.autograd.grad(out, x, upstream) for out in (y, wanted)), atol=1e-10, rtol=0)


def test_several_axes_are_normalized_together() -> None:
    x = torch.randn(4, 2, 3, dtype=Double)
    torch.testing.assert_close(LpNorm((2, 3), dtype=Double)(x), F.layer_norm(x, (2, 3)), atol=1e-12, rtol=0)


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0])
def test_mean_of_the_powers_is_one_and_length_does_not_count(p: float) -> None:
    x = torch.randn(4, 8, dtype=Double)
    y = lp_norm(x, 8, p=p, eps=0.0)
    torch.testing.assert_close(y.abs().pow(p).mean(-1), torch.ones(4, dtype=Double))
    torch.testing.assert_close(lp_norm(7 * x, 8, p=p, eps=1e-9, eps_mode="fixed"), y, atol=1e-8, rtol=0)


@pytest.mark.parametrize("p", [1.0, 1.5, 3.0])
def test_pre_normalizers_change_nothing_at_any_power(p: float) -> None:
    x = torch.randn(4, 8, dtype=Double)
    plain = lp_norm(x, 8, p=p, prenorm=None)
    for kind in KINDS:
        torch.testing.assert_close(lp_norm(x, 8, p=p, prenorm=kind), plain, atol=1e-12, rtol=0)  # type: ignore[arg-type]


def test_a_large_power_brings_the_largest_entry_to_one() -> None:
    y = lp_norm(torch.randn(4, 8, dtype=Double), 8, p=200.0, eps=0.0, prenorm="max")
    torch.testing.assert_close(y.abs().amax(-1), torch.ones(4, dtype=Double), atol=0.02, rtol=0)


def test_gradients_of_every_form_are_those_of_finite_differences() -> None:
    x = torch.randn(3, 6, dtype=Double, requires_grad=True)
    for kind, mode, p in product(KINDS, ("scaled", "fixed"), (2.0, 3.0)):
        torch.autograd.gradcheck(
            lambda t, k=kind, m=mode, p=p: lp_norm(t, 6, p=p, eps=0.1, prenorm=k, eps_mode=m), (x,), fast_mode=True
        )


# the pre-normalizer --------------------------------------------------------------------------------------------------


def test_mean_deviation_is_one_afterwards_and_the_mean_square_of_a_gaussian_half_pi() -> None:
    v = prenormalize(torch.randn(4, 100_000, dtype=Double))
    torch.testing.assert_close(v.abs().mean(-1), torch.ones(4, dtype=Double))
    torch.testing.assert_close(v.square().mean(-1), torch.full((4,), pi / 2, dtype=Double), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("n", "largest", "mean", "total"), [(512, 256.0, 128.25, 65664.0), (256, 128.0, 64.25, 16448.0)]
)
def test_a_centred_spike_attains_the_bound(n: int, largest: float, mean: float, total: float) -> None:
    x = spike(n, 1.0, Double)
    v = prenormalize(x - x.mean())
    assert v.abs().max().item() == pytest.approx(largest)
    assert v.square().mean().item() == pytest.approx(mean, abs=0.01)
    assert v.square().sum().item() == pytest.approx(total, abs=1.0)


def test_the_guarantee_costs_nothing_where_none_is_needed() -> None:
    assert _spread(361, 2.0, Half, centred=True) == 1.0 < _spread(363, 2.0, Half, centred=True)
    assert _spread(180, 2.0, Half, centred=False) == 1.0 < _spread(182, 2.0, Half, centred=False)
    assert _spread(1 << 20, 2.0, torch.float32, centred=False) == 1.0


def test_other_axes_and_zeros() -> None:
    x = torch.randn(4, 8)
    torch.testing.assert_close(prenormalize(x.T, dim=0), prenormalize(x).T)
    for kind in KINDS:
        assert prenormalize(torch.zeros(2, 4), kind).abs().max() == 0  # type: ignore[arg-type]


# float16 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [1e-4, 1e-3, 1.0, 1e2, 1e4])
def test_in_float16_the_plain_form_fails_where_the_pre_normalized_one_holds(sigma: float) -> None:
    x = (sigma * torch.randn(8, 512)).to(Half)
    assert off(lp_norm(x, 512, eps=0.0), x) < 0.02
    plain = off(lp_norm(x, 512, eps=0.0, prenorm=None), x)
    assert plain < 0.02 if sigma == 1.0 else plain > 2.0


def test_a_spike_overflows_the_mean_deviation_beyond_its_width_and_never_the_guarantee() -> None:
    for n in (128, 256, 512, 4096):
        x = (1.7 * torch.randn(4, n)).to(Half)
        x[:, 5] = 2.3e4
        largest = off(torch.zeros_like(x), x, center=False)
        assert (off(lp_norm(x, n, eps=0.0, center=False), x, center=False) > 0.5 * largest) is (n >= 512)
        assert off(lp_norm(x, n, eps=0.0, center=False, prenorm="guaranteed"), x, center=False) < 2e-3 * largest


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("n", [2, 64, 512, 4096])
def test_the_guarantee_holds_for_the_largest_and_smallest_numbers(n: int, center: bool) -> None:
    largest = torch.finfo(Half).max
    ends = torch.where(torch.arange(n) % 2 == 0, largest, -largest).to(Half)[None]
    against = torch.full((1, n), -largest, dtype=Half)
    against[0, 1] = largest
    for x in (ends, against, spike(n, largest), spike(n, -largest), torch.full((1, n), largest, dtype=Half)):
        y = lp_norm(x, n, center=center, prenorm="guaranteed")
        wanted = lp_norm(x.double(), n, center=center, prenorm=None)
        assert (y.double() - wanted).abs().max() <= 0.01 * wanted.abs().max() + 1e-3
    assert lp_norm(spike(n, 6e-8), n, center=center, prenorm="guaranteed").isfinite().all()


def test_every_float16_there_is_gives_finite_outputs_and_gradients() -> None:
    bits = torch.randint(-(1 << 15), 1 << 15, (512, 300), dtype=torch.int32).to(torch.int16).view(Half)
    x = torch.where(bits.isfinite(), bits, 0.0).requires_grad_()
    for kind, mode in product(KINDS, ("scaled", "fixed")):
        y = lp_norm(x, 300, prenorm=kind, eps_mode=mode)  # type: ignore[arg-type]
        assert y.isfinite().all()
        assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()


def test_all_equal_entries_give_zeros_with_finite_gradients_even_without_eps() -> None:
    for kind, eps, p in product((None, *KINDS), (0.0, 1e-3), (1.0, 2.0, 3.0)):
        x = torch.full((2, 8), 3.0, dtype=Half, requires_grad=True)
        y = lp_norm(x, 8, p=p, eps=eps, prenorm=kind)  # type: ignore[arg-type]
        assert y.abs().max() == 0
        assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()


def test_small_vectors_meet_eps_as_in_a_layer_norm() -> None:
    x = (1e-4 * torch.randn(4, 64)).to(Half)
    torch.testing.assert_close(lp_norm(x, 64).double(), F.layer_norm(x.double(), (64,)), atol=2e-3, rtol=0)


# refusals ------------------------------------------------------------------------------------------------------------


def test_bad_arguments_and_inputs_are_refused() -> None:
    for keywords in ({"p": 0.5}, {"eps": -1.0}, {"p": float("nan")}):
        with pytest.raises(InputError, match="p of at least 1 and eps of at least 0"):
            LpNorm(4, **keywords)
    with pytest.raises(InputError, match="out of mad, max, guaranteed, got 'median'"):
        LpNorm(4, prenorm="median")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="lp_norm: expected a pre-normalizer out of mad, max, guaranteed"):
        lp_norm(torch.randn(2, 4), 4, prenorm="median")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="'scaled' or 'fixed', got 'none'"):
        LpNorm(4, eps_mode="none")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"\(\*, 4\), got \(2, 5\)"):
        LpNorm(4)(torch.randn(2, 5))
    with pytest.raises(TypeError, match="int64"):
        LpNorm(4)(torch.ones(2, 4, dtype=torch.long))
    with pytest.raises(TypeError, match="int64"):
        prenormalize(torch.ones(2, 4, dtype=torch.long))
