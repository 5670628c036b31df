"""The fidelity checks of weight normalization (Salimans and Kingma, 2016)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations as theirs

from setpoint.errors import InputError
from setpoint.nn import (
    WeightNorm,
    apply_weight_norm,
    fold_weights,
    remove_weight_norm,
    spectral_norm,
    weight_norm,
)
from setpoint.optim.decay import decay_groups
from setpoint.testing import check_layer

UNPICKLABLE = {
    "copying": "torch refuses to pickle parametrized modules; deepcopy is tested below",
    "reset_parameters": "torch's layers reset a weight that is computed; data_dependent_init starts it anew",
    "ddp": "starts two processes; what it checks holds for any parameters",
}


def originals(layer: nn.Module, name: str = "weight") -> tuple[Tensor, Tensor]:
    parametrizations: Any = layer.parametrizations
    return parametrizations[name].original0, parametrizations[name].original1


def layers() -> list[tuple[nn.Module, tuple[int, ...], int]]:
    """Layers with the shape of an input and the axis of their output units."""
    return [
        (nn.Linear(5, 4), (3, 5), 0),
        (nn.Conv1d(4, 6, 3), (2, 4, 7), 0),
        (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5), 0),
        (nn.ConvTranspose2d(4, 6, 3), (2, 4, 5, 5), 1),
    ]


IDS = ["Linear", "Conv1d", "Conv2d", "ConvTranspose2d"]


def test_length_two_of_three_four_is_the_definitions_example() -> None:
    weight = WeightNorm()(torch.tensor([[2.0]], dtype=torch.float64), torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    torch.testing.assert_close(weight, torch.tensor([[1.2, 1.6]], dtype=torch.float64), atol=1e-15, rtol=0)


@pytest.mark.parametrize("index", range(4), ids=IDS)
def test_putting_it_on_and_folding_it_keep_the_outputs(index: int) -> None:
    layer, shape, _ = layers()[index]
    x = torch.randn(shape)
    before = layer(x)
    assert (weight_norm(layer)(x) - before).abs().max() < 1e-6
    assert type(layer) is not type(layers()[index][0])
    assert (remove_weight_norm(layer)(x) - before).abs().max() < 1e-6
    assert type(layer) is type(layers()[index][0])
    assert {name for name, _ in layer.named_parameters()} == {"weight", "bias"}


@pytest.mark.parametrize("index", range(4), ids=IDS)
def test_it_is_torchs_with_the_right_axis_forward_and_backward(index: int) -> None:
    layer, shape, dim = layers()[index]
    layer.double()
    ours, torchs = weight_norm(copy.deepcopy(layer)), theirs.weight_norm(copy.deepcopy(layer), dim=dim)
    x = torch.randn(shape, dtype=torch.float64)
    for mine, its in zip(originals(ours), originals(torchs), strict=True):
        assert mine.shape == its.shape
        torch.testing.assert_close(mine, its, atol=1e-12, rtol=0)
        with torch.no_grad():
            noise = torch.rand_like(mine)
            mine.add_(noise)
            its.add_(noise)
    torch.testing.assert_close(ours(x), torchs(x), atol=1e-12, rtol=1e-12)
    ours(x).square().sum().backward()
    torchs(x).square().sum().backward()
    for mine, its in zip(originals(ours), originals(torchs), strict=True):
        torch.testing.assert_close(mine.grad, its.grad, atol=1e-11, rtol=1e-12)


@pytest.mark.parametrize("dim", [0, 1, None])
def test_an_axis_that_is_given_means_what_it_means_to_torch(dim: int | None) -> None:
    layer = nn.Linear(5, 4).double()
    ours, torchs = weight_norm(copy.deepcopy(layer), dim=dim), theirs.weight_norm(copy.deepcopy(layer), dim=dim)
    assert originals(ours)[0].shape == originals(torchs)[0].shape
    ours.load_state_dict(torchs.state_dict())
    torch.testing.assert_close(ours.weight, torchs.weight, atol=1e-12, rtol=0)


def test_units_of_a_grouped_transposed_convolution_have_lengths_of_their_own() -> None:
    layer = weight_norm(nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False))
    x = torch.randn(1, 4, 5, 5)
    before = layer(x).detach()
    with torch.no_grad():
        originals(layer)[0][1, 2] *= 3.0  # group 1, its third unit: channel 5
    ratio = layer(x) / before
    torch.testing.assert_close(ratio[:, :5], torch.ones_like(ratio[:, :5]), atol=1e-3, rtol=0)
    torch.testing.assert_close(ratio[:, 5], torch.full_like(ratio[:, 5], 3.0), atol=1e-3, rtol=0)


def test_gradient_of_the_direction_is_orthogonal_to_it() -> None:
    layer = weight_norm(nn.Linear(5, 4).double())
    layer(torch.randn(3, 5, dtype=torch.float64)).square().sum().backward()
    _, v = originals(layer)
    assert v.grad is not None
    assert v.grad.abs().max() > 0.1
    assert (v.grad * v).sum(1).abs().max() < 1e-12


def test_gradients_follow_their_formulas() -> None:
    layer, x = weight_norm(nn.Linear(5, 4, bias=False).double()), torch.randn(3, 5, dtype=torch.float64)
    g, v = originals(layer)
    with torch.no_grad():
        g.mul_(1.7)
    upstream = torch.randn(3, 4, dtype=torch.float64)
    dg, dv = torch.autograd.grad(layer(x), (g, v), upstream)
    dw, norm = upstream.T @ x, v.norm(dim=1, keepdim=True)
    torch.testing.assert_close(dg, (dw * v).sum(1, keepdim=True) / norm)
    torch.testing.assert_close(dv, g / norm * dw - g * dg / norm**2 * v)


def test_scaling_a_direction_keeps_the_output_and_divides_its_gradient() -> None:
    x, steps = torch.randn(3, 5, dtype=torch.float64), []
    layer = weight_norm(nn.Linear(5, 4).double())
    for factor in (1.0, 7.0):
        with torch.no_grad():
            originals(layer)[1].mul_(factor)
        y = layer(x)
        steps.append((y, torch.autograd.grad(y.square().sum(), originals(layer)[1])[0]))
    (y, dv), (scaled_y, scaled_dv) = steps
    torch.testing.assert_close(scaled_y, y, atol=1e-12, rtol=0)
    torch.testing.assert_close(scaled_dv, dv / 7.0)


def test_a_plain_gradient_step_lengthens_directions_by_pythagoras() -> None:
    layer = weight_norm(nn.Linear(5, 4).double())
    _, v = originals(layer)
    before = v.detach().square().sum(1)
    layer(torch.randn(3, 5, dtype=torch.float64)).square().sum().backward()
    assert v.grad is not None
    expected = before + 0.3**2 * v.grad.square().sum(1)
    torch.optim.SGD(layer.parameters(), lr=0.3).step()
    torch.testing.assert_close(v.detach().square().sum(1), expected, atol=0, rtol=1e-13)


def test_whitened_inputs_give_pre_activations_of_variance_one() -> None:
    x = torch.randn(500, 6, dtype=torch.float64)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / len(x))).T
    layer = weight_norm(nn.Linear(6, 4, bias=False).double())
    with torch.no_grad():
        originals(layer)[0].fill_(1.0)
    torch.testing.assert_close(layer(x).var(0, correction=0), torch.ones(4, dtype=torch.float64))


def test_gradcheck() -> None:
    g, v = torch.rand(4, 1).double().requires_grad_(), torch.randn(4, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(WeightNorm(), (g, v))
    assert torch.autograd.gradgradcheck(WeightNorm(), (g, v))


def test_a_unit_of_zeros_stays_zero_with_finite_gradients() -> None:
    layer = nn.Linear(5, 4)
    with torch.no_grad():
        layer.weight[2] = 0.0
    weight_norm(layer)
    layer(torch.randn(3, 5)).square().sum().backward()
    assert layer.weight[2].abs().max() == 0
    for tensor in originals(layer):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
    half = weight_norm(nn.Linear(5, 4).half())
    with torch.no_grad():
        originals(half)[1].zero_()
    half.weight.sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in originals(half))


def test_norms_of_half_precision_are_taken_in_float32() -> None:
    weight = torch.full((1, 8), 300.0, dtype=torch.float16)  # squares overflow float16
    g, v = WeightNorm().right_inverse(weight)
    torch.testing.assert_close(WeightNorm()(g, v), weight, atol=0, rtol=1e-3)


def test_old_and_new_checkpoints_of_torch_load() -> None:
    ours = nn.Sequential(weight_norm(nn.Linear(5, 4)))
    g, v = torch.rand(4, 1), torch.randn(4, 5)
    ours.load_state_dict({"0.weight_g": g, "0.weight_v": v, "0.bias": torch.zeros(4)})
    torch.testing.assert_close(ours[0].weight, torch._weight_norm(v, g, 0))
    torchs = nn.Sequential(theirs.weight_norm(nn.Linear(5, 4)))
    ours.load_state_dict(torchs.state_dict())
    torch.testing.assert_close(ours[0].weight, torchs[0].weight)


def test_a_recurrent_weight_is_normalized_by_gate_unit_and_trains() -> None:
    lstm, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    before = lstm(x)[0]
    weight_norm(lstm, "weight_ih_l0")
    torch.testing.assert_close(lstm(x)[0], before)
    g, _ = originals(lstm, "weight_ih_l0")
    assert g.shape == (16, 1)
    for _ in range(2):  # the weight is computed anew at every call
        before = lstm(x)[0]
        before.sum().backward()
        with torch.no_grad():
            g -= 0.1 * g.grad
        assert (lstm(x)[0] - before).abs().max() > 1e-4


def test_gpt2s_transposed_linear_layer_has_units_on_axis_one() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(6, 4)
    assert originals(weight_norm(conv1d))[0].shape == (1, 6)


def test_shared_weights_stay_shared_through_putting_on_and_folding() -> None:
    model = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 7, bias=False))
    model[1].weight = model[0].weight
    tokens = torch.tensor([1, 2])
    before = model(tokens)
    apply_weight_norm(model)
    assert originals(model[0])[1] is originals(model[1])[1]
    assert len(list(model.parameters())) == 2
    torch.testing.assert_close(model(tokens), before)
    fold_weights(model)
    assert model[0].weight is model[1].weight
    torch.testing.assert_close(model(tokens), before)


def test_a_weight_that_is_shared_in_another_layout_is_refused_and_left() -> None:
    model = nn.Sequential(nn.ConvTranspose1d(4, 4, 3), nn.Conv1d(4, 4, 3))
    model[1].weight = model[0].weight
    with pytest.raises(InputError, match="in another form"):
        apply_weight_norm(model)
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias", "1.bias"]


def test_folding_a_copy_leaves_the_original() -> None:
    layer, x = weight_norm(nn.Linear(5, 4)), torch.randn(3, 5)
    fold_weights(copy.deepcopy(layer))
    assert layer(x).shape == (3, 4)
    assert originals(layer)[0].shape == (4, 1)
    twin = copy.deepcopy(layer)
    fold_weights(layer)
    torch.testing.assert_close(twin(x), layer(x))


def test_folding_keeps_buffers_and_frozen_parameters_what_they_are() -> None:
    layer = weight_norm(nn.Linear(5, 4).requires_grad_(False))
    assert not fold_weights(layer).weight.requires_grad
    assert fold_weights(weight_norm(nn.Linear(5, 4))).weight.requires_grad


def test_lengths_are_not_decayed_and_directions_are() -> None:
    groups = decay_groups(nn.Sequential(weight_norm(nn.Linear(5, 4))), 0.1)
    assert groups[0]["names"] == ["0.parametrizations.weight.original1"]
    assert set(groups[1]["names"]) == {"0.bias", "0.parametrizations.weight.original0"}


def test_what_cannot_be_normalized_is_refused_in_words() -> None:
    with pytest.raises(InputError, match="no parameter 'wight'; it has weight"):
        weight_norm(nn.Linear(5, 4), "wight")
    with pytest.raises(InputError, match="two axes or more"):
        weight_norm(nn.LayerNorm(5))
    with pytest.raises(InputError, match="has no shape yet"):
        weight_norm(nn.LazyLinear(4))
    with pytest.raises(InputError, match="already"):
        weight_norm(weight_norm(nn.Linear(5, 4)))
    with pytest.raises(InputError, match="spectral norm"):
        weight_norm(spectral_norm(nn.Linear(5, 4)))
    with pytest.raises(InputError, match="axis of a weight of shape"):
        weight_norm(nn.Linear(5, 4), dim=2)
    with pytest.raises(InputError, match="none that was chosen"):
        apply_weight_norm(nn.Sequential(nn.ReLU()))
    with pytest.raises(InputError, match="not under weight normalization"):
        remove_weight_norm(nn.Linear(5, 4))
    with pytest.raises(InputError, match="nothing to fold"):
        fold_weights(nn.Linear(5, 4))


def test_a_model_is_as_it_was_when_one_layer_is_refused() -> None:
    model = nn.Sequential(nn.Linear(5, 4), spectral_norm(nn.Linear(4, 4)))
    with pytest.raises(InputError, match="spectral norm"):
        apply_weight_norm(model)
    assert type(model[0]) is nn.Linear


def test_a_layer_under_weight_norm_passes_the_suite() -> None:
    check_layer(lambda: weight_norm(nn.Linear(5, 4)), torch.randn(4, 5), feature_axis=None, except_=UNPICKLABLE)
