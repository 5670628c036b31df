"""Generalized divisive normalization (Ballé, Laparra and Simoncelli, 2016)."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from setpoint.errors import InputError
from setpoint.nn import GDN, GDN1
from setpoint.nn.norm.gdn import lower_bound
from setpoint.optim import decay_groups


def random(channels: int, inverse: bool = False, alpha: float = 2.0, epsilon: float = 0.5) -> GDN:
    """A layer in float64 with parameters away from their bounds, mostly on the diagonal."""
    layer = GDN(channels, inverse, alpha, epsilon, dtype=torch.float64)
    numbers = torch.Generator().manual_seed(1)
    spread = torch.rand(channels, channels, dtype=torch.float64, generator=numbers)
    layer.assign(0.5 + spread[0], 0.02 * spread + 0.2 * torch.eye(channels))
    return layer


def inputs(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def test_without_pool_it_is_the_identity() -> None:
    layer, x = GDN(3, dtype=torch.float64), inputs(2, 3, 4)
    layer.assign(torch.ones(3), torch.zeros(3, 3))
    torch.testing.assert_close(layer(x), x)
    assert layer.gamma.abs().max() == 0


def test_one_channel_saturates_at_one_over_the_root_of_gamma() -> None:
    y = GDN(1)(torch.tensor([[1.0], [3.0], [100.0], [1e6]])).flatten()
    torch.testing.assert_close(y, torch.tensor([0.9535, 2.1764, 3.1607, 3.1623]), atol=1e-4, rtol=0)


def test_igdn_is_one_step_of_the_inversion_and_invert_goes_all_the_way() -> None:
    forward, back = GDN(1, dtype=torch.float64), GDN(1, inverse=True, dtype=torch.float64)
    y = forward(torch.tensor([[3.0]], dtype=torch.float64))
    assert back(y).item() == pytest.approx(2.6421, abs=1e-4)
    assert forward.invert(y, tol=1e-12).item() == pytest.approx(3.0, abs=1e-8)


def test_inverse_of_one_channel_is_the_closed_form() -> None:
    layer, y = GDN(1, dtype=torch.float64), torch.tensor([[0.5], [-2.0]], dtype=torch.float64)
    torch.testing.assert_close(layer.invert(y, tol=1e-12), y / (1 - 0.1 * y.square()).sqrt(), rtol=1e-7, atol=0)


@pytest.mark.parametrize("shape", [(5, 8), (3, 8, 2, 2)])
@pytest.mark.parametrize(
    ("inverse", "alpha", "epsilon"), [(False, 2, 0.5), (False, 1, 1), (False, 1.5, 0.8), (True, 2, 0.5)]
)
def test_invert_undoes_the_layer(shape: tuple[int, ...], inverse: bool, alpha: float, epsilon: float) -> None:
    layer, z = random(8, inverse, alpha, epsilon), inputs(*shape)
    torch.testing.assert_close(layer.invert(layer(z), tol=1e-10), z, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("inverse", "alpha", "epsilon"), [(False, 2, 0.5), (False, 1, 1), (False, 1.5, 0.8), (True, 2, 0.5)]
)
def test_jacobian_and_log_determinant_are_those_of_autograd(inverse: bool, alpha: float, epsilon: float) -> None:
    layer, z = random(5, inverse, alpha, epsilon), inputs(1, 5)
    wanted = torch.autograd.functional.jacobian(lambda row: layer(row[None])[0], z[0])
    torch.testing.assert_close(layer.jacobian(z)[0], wanted, rtol=0, atol=1e-10)
    torch.testing.assert_close(layer.log_abs_det_jacobian(z)[0], torch.linalg.slogdet(wanted).logabsdet)


def test_every_position_is_normalized_by_itself() -> None:
    layer, z = random(4), inputs(2, 4, 3, 5)
    y = layer(z)
    torch.testing.assert_close(y[:, :, 1, 2], layer(z[:, :, 1, 2]))
    torch.testing.assert_close(layer.log_abs_det_jacobian(z)[:, 1, 2], layer.log_abs_det_jacobian(z[:, :, 1, 2]))


@pytest.mark.parametrize(("alpha", "epsilon"), [(2, 0.5), (1, 1)])
@pytest.mark.parametrize("inverse", [False, True])
def test_outputs_and_gradients_are_those_of_a_convolution_of_magnitudes(
    inverse: bool, alpha: float, epsilon: float
) -> None:
    layer, z = random(4, inverse, alpha, epsilon), inputs(2, 4, 3, 3).requires_grad_()
    pool = F.conv2d(z.abs() ** alpha, layer.gamma[:, :, None, None], layer.beta)
    wanted = z * pool**epsilon if inverse else z / pool**epsilon
    g, leaves = torch.randn_like(z), [z, layer.raw_beta, layer.raw_gamma]
    torch.testing.assert_close(layer(z), wanted)
    torch.testing.assert_close(torch.autograd.grad(layer(z), leaves, g), torch.autograd.grad(wanted, leaves, g))


@pytest.mark.parametrize(("alpha", "epsilon"), [(2.0, 0.5), (1.5, 0.8)])
def test_gradients_above_the_bounds_are_right(alpha: float, epsilon: float) -> None:
    layer = GDN(3, False, alpha, epsilon, learn_alpha=True, learn_epsilon=True, dtype=torch.float64)
    layer.assign(torch.ones(3), torch.full((3, 3), 0.2))
    names = [name for name, _ in layer.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    leaves = [t.detach().clone().requires_grad_() for t in (inputs(4, 3), *layer.parameters())]
    leaves[1 + names.index("raw_alpha")].data.clamp_min_(1.1)
    assert torch.autograd.gradcheck(call, leaves)


def test_it_is_odd_and_does_not_care_for_the_order_of_channels() -> None:
    layer, z, order = random(4), inputs(2, 4, 3), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(layer(-z), -layer(z))
    turned = GDN(4, dtype=torch.float64)
    turned.assign(layer.beta[order], layer.gamma[order][:, order])
    torch.testing.assert_close(turned(z[:, order]), layer(z)[:, order])


def test_below_the_bound_only_a_gradient_that_raises_passes() -> None:
    x = torch.tensor([0.0, 0.0, 1.0, 2.0, 2.0], requires_grad=True)
    y = lower_bound(x, 1.0)
    assert y.tolist() == [1.0, 1.0, 1.0, 2.0, 2.0]
    (gradient,) = torch.autograd.grad(y, x, torch.tensor([3.0, -3.0, 3.0, 3.0, -3.0]))
    assert gradient.tolist() == [0.0, -3.0, 3.0, 3.0, -3.0]


def test_roots_start_and_are_bounded_as_published() -> None:
    layer = GDN(2)
    torch.testing.assert_close(layer.beta, torch.ones(2))
    torch.testing.assert_close(layer.gamma, 0.1 * torch.eye(2))
    assert layer.raw_gamma[0, 1].item() == 2.0**-18
    with torch.no_grad():
        layer.raw_beta.fill_(-1.0), layer.raw_gamma.fill_(-1.0)
    assert layer.beta.tolist() == pytest.approx([1e-6] * 2, rel=1e-4)
    assert layer.gamma.abs().max() == 0
    assert sqrt(1e-6 + 2.0**-36) == pytest.approx(0.00100000728, rel=1e-8)


def test_checkpoint_of_compressai_loads() -> None:
    theirs = {"beta": torch.tensor([2.0, 3.0]), "gamma": torch.tensor([[0.5, 0.1], [0.2, 0.4]])}
    for name in ("beta", "gamma"):
        theirs[f"{name}_reparam.pedestal"] = torch.tensor([2.0**-36])
        theirs[f"{name}_reparam.lower_bound.bound"] = torch.tensor([0.001])
    model = nn.Sequential(GDN(2))
    model.load_state_dict({f"0.{key}": value for key, value in theirs.items()})
    torch.testing.assert_close(model[0].beta, theirs["beta"].square())
    torch.testing.assert_close(model[0].gamma, theirs["gamma"].square())


def test_weight_decay_leaves_the_roots_alone() -> None:
    groups = decay_groups(nn.Sequential(nn.Linear(2, 2), GDN(2)), 0.1)
    assert groups[0]["names"] == ["0.weight"]


def test_gdn1_has_both_exponents_one() -> None:
    layer, z = GDN1(2), torch.randn(3, 2)
    torch.testing.assert_close(layer(z), z / (1 + 0.1 * z.abs()))


def test_equal_pools_make_heavy_tailed_elliptic_data_nearly_gaussian() -> None:
    numbers, nu = torch.Generator().manual_seed(0), 5
    normal = torch.randn(400_000, 16, generator=numbers)
    chi = torch.randn(400_000, nu, generator=numbers).square().sum(1, keepdim=True)
    t = normal / (chi / nu).sqrt()
    layer = GDN(16)
    layer.assign(torch.ones(16), torch.full((16, 16), 1 / nu))
    y = layer(t).detach()

    def excess(x: Tensor) -> float:
        return float((x[:, 0].pow(4).mean() / x[:, 0].square().mean() ** 2) - 3)

    def dependence(x: Tensor) -> float:
        return float(torch.corrcoef(x[:, :2].abs().T)[0, 1])

    assert excess(t) > 3
    assert excess(y) == pytest.approx(-0.26, abs=0.03)
    assert dependence(t) == pytest.approx(0.21, abs=0.03)
    assert dependence(y) == pytest.approx(-0.04, abs=0.01)


def test_the_pool_is_taken_in_full_precision() -> None:
    x = torch.full((1, 2), 300.0, dtype=torch.float16)  # its square overflows float16
    assert GDN(2).half()(x).flatten().tolist() == pytest.approx([sqrt(10)] * 2, rel=1e-3)
    layer, z = random(8).float(), torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(layer(z), layer.double()(z.double()).float(), rtol=1e-6, atol=1e-6)


def test_what_can_not_be_reached_is_refused_with_the_residual() -> None:
    with pytest.raises(InputError, match=r"does not reach: after 1000 steps the residual is"):
        GDN(1).invert(torch.tensor([[4.0]]))


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(InputError, match="alpha of at least 1"):
        GDN(3, alpha=0.5)
    with pytest.raises(InputError, match="epsilon above 0"):
        GDN(3, epsilon=0.0)
    with pytest.raises(InputError, match=r"\(N, 3, \*\), got \(2, 4\)"):
        GDN(3)(torch.zeros(2, 4))
    with pytest.raises(TypeError, match="floating-point"):
        GDN(3)(torch.zeros(2, 3, dtype=torch.long))
