"""Weight standardization (Qiao, Wang, Liu, Shen and Yuille, 2019)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from setpoint.errors import InputError
from setpoint.nn import WeightStandardization, fold_weights, standardize_weights, weight_standardization
from setpoint.testing import check_layer


def test_it_is_the_unbiased_deviation_plus_eps_as_in_the_authors_code() -> None:
    weight = torch.randn(6, 3, 2, 2, dtype=torch.float64)
    rows = weight.flatten(1)
    wanted = (rows - rows.mean(1, keepdim=True)) / (rows.std(1, keepdim=True) + 1e-5)
    torch.testing.assert_close(WeightStandardization()(weight).flatten(1), wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("transposed", [False, True])
def test_scale_and_mean_of_a_unit_change_nothing(transposed: bool) -> None:
    layer = (nn.ConvTranspose2d if transposed else nn.Conv2d)(4, 6, 3, groups=2).double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    before = weight_standardization(layer, eps=1e-12)(x)
    shape = (2, 1, 3, 1, 1) if transposed else (2, 3, 1, 1, 1)
    with torch.no_grad():
        weight = layer.parametrizations.weight.original
        grouped = weight.unflatten(0, (2, -1))
        weight.copy_((grouped * (0.5 + torch.rand(shape)) + torch.randn(shape)).flatten(0, 1))
    torch.testing.assert_close(layer(x), before)


def test_equal_weights_of_a_unit_become_zero_with_a_finite_gradient() -> None:
    layer = nn.Conv1d(2, 3, 2)
    with torch.no_grad():
        layer.weight[1] = 0.25
    weight_standardization(layer)(torch.randn(2, 2, 4)).square().sum().backward()
    assert layer.weight[1].abs().max() == 0
    assert layer.parametrizations.weight.original.grad.isfinite().all()


def test_gradcheck() -> None:
    weight = torch.randn(4, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(WeightStandardization(), weight)
    assert torch.autograd.gradgradcheck(WeightStandardization(), weight)


def test_a_model_is_standardized_and_folded_again() -> None:
    model, x = (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.LazyLinear(2)),
        torch.randn(2, 3, 5, 5),
    )
    model(x)
    standardize_weights(model)
    assert [hasattr(m, "parametrizations") for m in model] == [True, False, False, False]
    before = model(x)
    torch.testing.assert_close(fold_weights(model)(x), before)


def test_what_has_no_deviation_is_refused_in_words() -> None:
    with pytest.raises(InputError, match="single weight for each output unit"):
        weight_standardization(nn.Conv1d(4, 4, 1, groups=4))
    with pytest.raises(InputError, match="none that was chosen"):
        standardize_weights(nn.Linear(3, 2))
    with pytest.raises(InputError, match="already"):
        weight_standardization(weight_standardization(nn.Conv1d(4, 4, 3)))
    with pytest.raises(InputError, match="eps above 0"):
        WeightStandardization(eps=0.0)


def test_a_standardized_convolution_passes_the_suite() -> None:
    check_layer(
        lambda: weight_standardization(nn.Conv2d(2, 3, 2)),
        torch.randn(2, 2, 3, 3),
        feature_axis=None,
        except_={
            "large": "a plain convolution with weights of deviation one overflows float16 there too",
            "copying": "torch refuses to pickle parametrized modules",
            "reset_parameters": "torch's layers reset a weight that is computed",
            "ddp": "starts two processes; what it checks holds for any parameters",
        },
    )
