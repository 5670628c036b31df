"""The fidelity checks of Dynamic Tanh (Zhu, Chen, He, LeCun and Liu, 2025)."""

from __future__ import annotations

import pytest
import torch

from setpoint.errors import InputError
from setpoint.nn import DyT


def random_layer(dim: int = 6, **more: bool) -> DyT:
    layer = DyT(dim, dtype=torch.float64, **more)
    with torch.no_grad():
        for parameter in (layer.weight, layer.bias):
            if parameter is not None:
                parameter.normal_()
    return layer


def test_one_two_four_is_the_definitions_example() -> None:
    torch.testing.assert_close(
        DyT(3)(torch.tensor([1.0, 2.0, 4.0])), torch.tensor([0.4621, 0.7616, 0.9640]), atol=1e-4, rtol=0
    )


def test_output_is_bounded_by_gain_and_bias() -> None:
    layer = random_layer()
    bound = layer.weight.abs() + layer.bias.abs()
    for value in (0.0, 1e30, -1e30, float("inf"), float("-inf")):
        y = layer(torch.full((2, 6), value, dtype=torch.float64))
        assert (y.abs() <= bound + 1e-12).all()


def test_nan_stays_where_it_is() -> None:
    x = torch.zeros(2, 6)
    x[0, 3] = float("nan")
    assert torch.equal(DyT(6)(x).isnan(), x.isnan())


def test_it_is_odd_around_its_bias() -> None:
    layer, x = random_layer(), torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(-x) - layer.bias, -(layer(x) - layer.bias), atol=1e-12, rtol=0)


@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-3])
def test_small_input_sees_a_linear_map(size: float) -> None:
    layer = random_layer(bias=False)
    slope = layer(torch.full((6,), size, dtype=torch.float64)) / size
    wanted = layer.alpha * layer.weight
    assert ((slope / wanted - 1).abs() < 0.5**2 * size**2 / 3).all()


def test_one_element_changes_one_element() -> None:
    layer, x = random_layer(), torch.randn(4, 6, dtype=torch.float64)
    moved = x.clone()
    moved[2, 3] += 1.0
    changed = layer(moved) != layer(x)
    assert changed.sum() == 1
    assert changed[2, 3]


def test_it_is_not_scale_invariant() -> None:
    layer, x = random_layer(), torch.randn(4, 6, dtype=torch.float64)
    assert (layer(2 * x) - layer(x)).abs().max() > 0.05


@pytest.mark.parametrize(("alpha", "moment"), [(0.2, 0.0371), (0.5, 0.1735), (0.8, 0.3150), (1.0, 0.3943)])
def test_fresh_layer_does_not_give_unit_variance(alpha: float, moment: float) -> None:
    x = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(1))
    assert float(DyT(1000, alpha)(x).detach().square().mean()) == pytest.approx(moment, rel=1e-2)


@pytest.mark.parametrize("rows", [3, 256])
def test_gradients_follow_their_formulas(rows: int) -> None:
    layer, x = random_layer(), torch.randn(rows, 6, dtype=torch.float64, requires_grad=True)
    g = torch.randn(rows, 6, dtype=torch.float64)
    dx, dalpha, dweight, dbias = torch.autograd.grad(layer(x), (x, layer.alpha, layer.weight, layer.bias), g)
    t = torch.tanh(layer.alpha * x)
    torch.testing.assert_close(dx, g * layer.weight * layer.alpha * (1 - t**2))
    torch.testing.assert_close(dalpha, (g * layer.weight * x * (1 - t**2)).sum().reshape(1))
    torch.testing.assert_close(dweight, (g * t).sum(0))
    torch.testing.assert_close(dbias, g.sum(0))


def test_channels_first_is_channels_last_turned() -> None:
    first, last = random_layer(channels_last=False), random_layer()
    last.load_state_dict(first.state_dict())
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(first(x), last(x.movedim(1, -1)).movedim(-1, 1))


def test_several_normalized_axes_have_a_gain_each() -> None:
    layer = DyT((2, 3))
    assert layer.weight.shape == (2, 3)
    with torch.no_grad():
        layer.weight[1, 2] = 0.0
    assert torch.equal(layer(torch.ones(4, 2, 3))[:, 1, 2], torch.zeros(4))


def test_parameters_are_one_scalar_and_two_per_channel() -> None:
    def count(layer: DyT) -> int:
        return sum(p.numel() for p in layer.parameters())

    assert count(DyT(6)) == 2 * 6 + 1
    assert count(DyT(6, bias=False)) == 6 + 1
    assert count(DyT(6, elementwise_affine=False)) == 1
    assert all(p.dim() == 1 for p in DyT(6).parameters())
    assert DyT(6).state_dict().keys() == {"alpha", "weight", "bias"}
    assert DyT(6).alpha.shape == (1,)


def test_compiled_layer_agrees_over_the_whole_range() -> None:
    """Compiled code for a CPU takes a rational tanh; here are both its ends and what is between."""
    layer = DyT(7)
    sizes = torch.tensor([0.0, 1e-30, 1e-3, 0.59, 0.6, 0.61, 3.0, 15.5, 15.7, 20.0, 1e4, 1e30, float("inf")])
    x = torch.cat([sizes, -sizes])[:, None].expand(-1, 7).contiguous().requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x), atol=0, rtol=1e-6)
    finite = x[torch.isfinite(x[:, 0])].detach().requires_grad_()
    arguments = (finite, layer.alpha, layer.weight, layer.bias)
    own, wanted = (torch.autograd.grad(call(finite).sum(), arguments) for call in (compiled, layer))
    torch.testing.assert_close(own, wanted, atol=1e-5, rtol=1e-5)


def test_training_and_evaluation_are_the_same() -> None:
    layer, x = DyT(6), torch.randn(4, 6)
    assert torch.equal(layer.train()(x), layer.eval()(x))


def test_alpha_stays_wide_under_half_inputs() -> None:
    layer, x = DyT(6), torch.randn(4, 6).bfloat16()
    assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x), layer(x.float()).bfloat16())


def test_alpha_takes_small_steps_under_autocast_and_none_in_pure_bfloat16() -> None:
    def stepped(layer: DyT, x: torch.Tensor) -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(x).float().sum().backward()
        torch.optim.AdamW(layer.parameters(), lr=1e-4, weight_decay=0.0).step()
        return layer.alpha.item()

    x = torch.ones(4, 6)
    assert stepped(DyT(6), x) == pytest.approx(0.5 - 1e-4, abs=1e-6)
    assert stepped(DyT(6).bfloat16(), x.bfloat16()) == 0.5


def test_a_bfloat16_layer_is_of_one_dtype_as_sharding_wants_it() -> None:
    for layer in (DyT(6).bfloat16(), DyT(6, dtype=torch.bfloat16)):
        assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}


def test_wrong_inputs_are_refused_in_words() -> None:
    with pytest.raises(InputError, match="alpha_init_value above 0, got 0"):
        DyT(6, 0.0)
    with pytest.raises(InputError, match="alpha_init_value above 0, got nan"):
        DyT(6, float("nan"))
    with pytest.raises(InputError, match=r"DyT: expected an input of shape \(\*, 6\), got \(4, 5\)"):
        DyT(6)(torch.randn(4, 5))
    with pytest.raises(InputError, match=r"DyT: expected an input of shape \(N, 6, \*\), got \(4, 5, 6\)"):
        DyT(6, channels_last=False)(torch.randn(4, 5, 6))
    with pytest.raises(InputError, match="one size of the channel axis with channels_last=False"):
        DyT((6, 2), channels_last=False)
