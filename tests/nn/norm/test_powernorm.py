"""The fidelity checks of power normalization (Shen, Yao, Gholami, Mahoney and Keutzer, 2020)."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.nn import GroupScaling, PowerNorm, PowerNormV

Double = torch.float64


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=Double) * torch.linspace(0.5, 3, shape[-1], dtype=Double) + 0.7


def made(dim: int = 4, kind: type[PowerNorm] = PowerNorm, **more: object) -> PowerNorm:
    layer = kind(dim, dtype=Double, **{"group_num": None, **more})  # type: ignore[arg-type]
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 2, dim))
        layer.bias.copy_(torch.linspace(-1, 1, dim))
    return layer


# forward -------------------------------------------------------------------------------------------------------------


def test_while_it_warms_up_channels_have_unit_quadratic_mean_and_keep_their_mean() -> None:
    layer, x = PowerNorm(4, group_num=None, dtype=Double), tokens(3, 5, 4)
    padded = torch.arange(5) >= torch.tensor([5, 2, 4])[:, None]
    z, q = layer(x, padded)[~padded], x[~padded].square().mean(0)
    torch.testing.assert_close(z.square().mean(0), q / (q + 1e-5))
    torch.testing.assert_close(z.mean(0), x[~padded].mean(0) / torch.sqrt(q + 1e-5))


def test_after_the_warm_up_the_average_before_the_call_divides() -> None:
    layer, x = made(warmup_iters=0), tokens(6, 4)
    layer.running_phi.fill_(9.0)
    torch.testing.assert_close(layer(x), layer.weight * x / (9 + 1e-5) ** 0.5 + layer.bias)
    torch.testing.assert_close(layer.running_phi, 0.9 * 9 + 0.1 * x.square().mean(0))


def test_last_call_of_the_warm_up_moves_the_average_once_and_earlier_ones_twice() -> None:
    x = tokens(6, 4)
    q = x.square().mean(0)
    once, twice = made(warmup_iters=1), made(warmup_iters=2)
    once(x), twice(x)
    assert torch.equal(once.running_phi, 0.9 + (1 - 0.9) * q)
    torch.testing.assert_close(twice.running_phi, q, atol=0, rtol=1e-15)


def test_average_over_a_warm_up_is_the_written_recursion() -> None:
    layer, phi = made(warmup_iters=3), torch.ones(4, dtype=Double)
    for i in range(1, 6):
        x = tokens(6, 4)
        q = x.square().mean(0)
        if i < 3:
            phi = phi * (i - 1) / i + q / i
        phi = 0.9 * phi + 0.1 * q
        layer(x)
        torch.testing.assert_close(layer.running_phi, phi, atol=1e-14, rtol=0)
    assert layer.iters == 5


@pytest.mark.parametrize("kind", [PowerNorm, PowerNormV])
def test_evaluation_is_its_closed_form_and_writes_nothing(kind: type[PowerNorm]) -> None:
    layer = made(kind=kind)
    layer(tokens(6, 4))
    before, x = deepcopy(layer.eval().state_dict()), tokens(2, 3, 4)
    wanted = layer.weight * x / torch.sqrt(layer.running_phi + 1e-5) + layer.bias
    torch.testing.assert_close(layer(x), wanted, atol=1e-13, rtol=0)
    torch.testing.assert_close(layer.state_dict(), before, atol=0, rtol=0)


def test_group_scaling_gives_every_group_of_a_token_unit_size_and_forgets_its_scale() -> None:
    layer, x = GroupScaling(6, 3, eps=0.0), tokens(2, 5, 6)
    sizes = layer(x).unflatten(-1, (3, 2)).square().mean(-1)
    torch.testing.assert_close(sizes, torch.ones_like(sizes))
    torch.testing.assert_close(layer(10 * x), layer(x))
    assert torch.autograd.gradcheck(GroupScaling(6, 3).double(), x[0, :2].requires_grad_())


def test_group_scaling_stands_in_front() -> None:
    whole, behind, x = made(6, group_num=2), made(6), tokens(2, 5, 6)
    torch.testing.assert_close(whole(x), behind(GroupScaling(6, 2)(x)))
    torch.testing.assert_close(
        whole(x), whole(torch.where(torch.arange(5)[:, None] < 3, 10.0, 1.0) * x), atol=1e-4, rtol=0
    )


# backward ------------------------------------------------------------------------------------------------------------


def backward(layer: PowerNorm, x: Tensor, g: Tensor, pad: Tensor | None = None) -> tuple[Tensor, ...]:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(layer(x, pad), (x, layer.weight, layer.bias), g)


def test_two_backward_passes_are_the_recursion_by_hand() -> None:
    layer, ema = made(alpha_bkw=0.8), torch.zeros(4, dtype=Double)
    for _ in range(2):
        x, g = tokens(6, 4), torch.randn(6, 4, dtype=Double)
        dx, dweight, dbias = backward(layer, x, g)
        root = torch.sqrt(x.square().mean(0) + 1e-5)
        z = x / root
        a = g * layer.weight - 0.2 * ema * z
        ema = ema + (a * z).mean(0)
        torch.testing.assert_close(dx, a / root, atol=1e-13, rtol=0)
        torch.testing.assert_close(layer.ema_gz, ema, atol=1e-13, rtol=0)
        torch.testing.assert_close(dweight, (g * z).sum(0), atol=1e-12, rtol=0)
        torch.testing.assert_close(dbias, g.sum(0), atol=1e-12, rtol=0)


@pytest.mark.parametrize("exact", [False, True])
def test_gradient_is_divided_by_the_batchs_own_value_unless_the_papers_is_asked_for(exact: bool) -> None:
    layer, x, g = made(warmup_iters=0, exact_backward_scale=exact), tokens(6, 4), torch.randn(6, 4, dtype=Double)
    layer.running_phi.fill_(9.0)
    divisor = torch.full((4,), 9.0, dtype=Double) if exact else x.square().mean(0)
    torch.testing.assert_close(backward(layer, x, g)[0], g * layer.weight / torch.sqrt(divisor + 1e-5))


def test_without_correction_the_gradient_is_only_scaled() -> None:
    layer, x, g = made(alpha_bkw=1.0), tokens(6, 4), torch.randn(6, 4, dtype=Double)
    for _ in range(3):
        dx = backward(layer, x, g)[0]
    torch.testing.assert_close(dx, g * layer.weight / torch.sqrt(x.square().mean(0) + 1e-5))


def test_correction_settles_at_the_exact_gradient_of_quadratic_mean_batch_norm() -> None:
    layer, x, g = made(eps=1e-300), tokens(6, 4), torch.randn(6, 4, dtype=Double)
    gaps = []
    for _ in range(200):
        before = layer.ema_gz.clone()
        dx = backward(layer, x, g)[0]
        gaps.append((layer.ema_gz - before).abs().max())  # mean(a z)
    ratios = torch.stack(gaps)[1:20] / torch.stack(gaps)[:19]
    torch.testing.assert_close(ratios, torch.full_like(ratios, 0.9))  # 1 - (1 - alpha_bkw) * mean(z²)
    torch.testing.assert_close(dx, backward(made(kind=PowerNormV, eps=1e-300), x, g)[0], atol=1e-6, rtol=0)


def test_pn_v_has_the_exact_gradient() -> None:
    layer = made(kind=PowerNormV, group_num=2)
    assert torch.autograd.gradcheck(lambda x: layer(x), tokens(5, 4).requires_grad_())
    x = tokens(5, 4)
    layer.running_phi.fill_(99.0)
    layer.iters.fill_(10**6)
    z = GroupScaling(4, 2)(x)
    torch.testing.assert_close(layer(x), layer.weight * z / torch.sqrt(z.square().mean(0) + 1e-5) + layer.bias)


# padding -------------------------------------------------------------------------------------------------------------

PADDING = torch.tensor([[False, False, True], [False, True, True]])


def test_padding_does_not_reach_statistics_or_other_outputs() -> None:
    x = tokens(2, 3, 4)
    odd = torch.where(PADDING[..., None], 1e6, x)
    one, other = made(), made()
    torch.testing.assert_close(one(x, PADDING)[~PADDING], other(odd, PADDING)[~PADDING], atol=0, rtol=0)
    torch.testing.assert_close(one.state_dict(), other.state_dict(), atol=0, rtol=0)


def test_padding_stays_out_of_the_gradients_average_unless_asked_for() -> None:
    x, g = tokens(2, 3, 4), torch.randn(2, 3, 4, dtype=Double)
    own, official = made(), made(official_padding=True)
    backward(own, x, g, PADDING), backward(official, x, g, PADDING)
    z = x / torch.sqrt(x[~PADDING].square().mean(0) + 1e-5)
    torch.testing.assert_close(own.ema_gz, (g * own.weight * z)[~PADDING].mean(0))
    torch.testing.assert_close(official.ema_gz, (g * own.weight * z).mean((0, 1)))


@pytest.mark.parametrize("kind", [PowerNorm, PowerNormV])
def test_batch_of_padding_alone_leaves_the_state(kind: type[PowerNorm]) -> None:
    layer = made(kind=kind)
    layer(tokens(6, 4))
    before, x = deepcopy(layer.state_dict()), tokens(2, 3, 4)
    y = layer(x, torch.ones(2, 3, dtype=torch.bool))
    torch.testing.assert_close(layer.state_dict(), before, atol=0, rtol=0)
    torch.testing.assert_close(y, layer.eval()(x))


# folding, loading, bad input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_folded_linear_is_norm_then_linear(bias: bool) -> None:
    layer, linear = made(6, group_num=2), nn.Linear(6, 3, bias=bias, dtype=Double)
    layer(tokens(8, 6))
    layer.eval()
    x = tokens(2, 5, 6)
    folded = layer.fold_into(linear)
    torch.testing.assert_close(folded(layer.scaling(x)), linear(layer(x)), atol=1e-13, rtol=0)
    assert folded is not linear


def test_official_checkpoint_with_its_axes_of_one_loads() -> None:
    state = {
        "weight": torch.ones(4),
        "bias": torch.zeros(4),
        "running_phi": torch.arange(4.0).view(1, 4, 1, 1),
        "ema_gz": torch.zeros(1, 4, 1, 1),
        "iters": torch.tensor([7]),
    }
    layer = PowerNorm(4)
    layer.load_state_dict(state)
    assert layer.running_phi.tolist() == [0, 1, 2, 3]
    assert layer.iters == 7


def test_overflowing_squares_leave_the_state_and_are_divided_by_the_average() -> None:
    layer = PowerNorm(2, group_num=None)
    layer(torch.ones(3, 2))
    phi = layer.running_phi.clone()
    y = layer(torch.tensor([[1e30, 1.0], [1.0, 1.0]]))
    assert y.isfinite().all()
    assert layer.running_phi[0] == phi[0]


def test_wrong_inputs_are_refused_in_words() -> None:
    with pytest.raises(InputError, match="num_features to divide into group_num equal groups, got 6 and 4"):
        PowerNorm(6, group_num=4)
    with pytest.raises(InputError, match="alpha_bkw between 0 and 1"):
        PowerNorm(6, alpha_bkw=1.5)
    with pytest.raises(InputError, match="num_features to be a positive whole number, got 0"):
        PowerNorm(0)
    layer, x = made(), tokens(2, 3, 4)
    with pytest.raises(InputError, match=r"expected an input of shape \(\*, 4\), got \(2, 3, 5\)"):
        layer(tokens(2, 3, 5))
    with pytest.raises(InputError, match="add an axis for it in front"):
        layer(tokens(4))
    with pytest.raises(InputError, match=r"pad_mask of shape \(2, 3\) .* got \(3, 2\)"):
        layer(x, torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"boolean pad_mask, true at padding, got torch\.float32"):
        layer(x, torch.ones(2, 3))
    with pytest.raises(InputError, match="a linear layer that reads 4 features, got one that reads 5"):
        layer.fold_into(nn.Linear(5, 2))
