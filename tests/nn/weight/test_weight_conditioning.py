"""The fidelity checks of weight conditioning (Saratchandran, Wang and Lucey, 2024)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations as theirs

from setpoint.errors import InputError
from setpoint.nn import (
    WeightConditioning,
    condition_model,
    condition_number,
    condition_weight,
    fold_weights,
)
from setpoint.testing import check_layer


def gaussian(seed: int = 0, size: int = 128) -> Tensor:
    return torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def conditioned(weight: Tensor, **options: str) -> Tensor:
    return WeightConditioning(**options)(weight)  # type: ignore[arg-type]


def test_rows_have_length_one() -> None:
    torch.testing.assert_close(conditioned(torch.randn(7, 5)).norm(dim=1), torch.ones(7), atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", ["column", "both"])
def test_columns_have_length_one(mode: str) -> None:
    torch.testing.assert_close(conditioned(torch.randn(7, 5), mode=mode).norm(dim=0), torch.ones(5), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "weight", [torch.tensor([[1.0, 0.0], [0.0, 100.0]]), torch.tensor([[1.0, 1.0], [100.0, -100.0]])]
)
def test_a_condition_number_of_a_hundred_becomes_one(weight: Tensor) -> None:
    assert condition_number(weight) == pytest.approx(100.0, rel=1e-5)
    assert condition_number(conditioned(weight)) == pytest.approx(1.0, rel=1e-5)


def test_rows_of_different_sizes_are_repaired_by_an_order_of_magnitude() -> None:
    weight = torch.logspace(-2, 0, 128, dtype=torch.float64)[:, None] * gaussian()
    assert condition_number(weight) > 10 * condition_number(conditioned(weight))


def test_columns_of_different_sizes_are_repaired_by_the_column_form_alone() -> None:
    weight = gaussian() * torch.logspace(-2, 0, 128, dtype=torch.float64)
    assert condition_number(conditioned(weight)) == pytest.approx(condition_number(weight), rel=0.2)
    assert condition_number(weight) > 5 * condition_number(conditioned(weight, mode="column"))


def test_at_a_standard_start_there_is_little_to_condition() -> None:
    for seed in range(3):
        before = condition_number(gaussian(seed))
        assert condition_number(conditioned(gaussian(seed))) == pytest.approx(before, rel=0.1)


def test_no_scaling_of_rows_is_better_by_more_than_the_bound_of_van_der_sluis() -> None:
    weight, numbers = gaussian(size=16), torch.Generator().manual_seed(1)
    equilibrated = condition_number(conditioned(weight))
    for _ in range(100):
        scale = torch.exp(2 * torch.randn(16, 1, generator=numbers, dtype=torch.float64))
        assert equilibrated <= 4 * condition_number(scale * weight)


def test_gradient_is_orthogonal_to_each_row_and_follows_its_formula() -> None:
    weight, g = torch.randn(4, 5).double().requires_grad_(), torch.randn(4, 5).double()
    (dw,) = torch.autograd.grad(conditioned(weight), weight, g)
    assert dw.abs().max() > 0.1
    assert (dw * weight).sum(1).abs().max() < 1e-12
    w, norm = weight / weight.norm(dim=1, keepdim=True), weight.norm(dim=1, keepdim=True)
    torch.testing.assert_close(dw, (g - w * (w * g).sum(1, keepdim=True)) / norm)


def test_with_a_detached_preconditioner_the_gradient_is_scaled_and_nothing_more() -> None:
    weight, g = torch.randn(4, 5).double().requires_grad_(), torch.randn(4, 5).double()
    (dw,) = torch.autograd.grad(WeightConditioning(detach_preconditioner=True)(weight), weight, g)
    torch.testing.assert_close(dw, g / weight.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("mode", ["row", "column", "both"])
def test_gradcheck(mode: str) -> None:
    weight = torch.randn(4, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: conditioned(w, mode=mode), weight)
    assert torch.autograd.gradgradcheck(lambda w: conditioned(w, mode=mode), weight)


@pytest.mark.parametrize("mode", ["row", "both"])
def test_scaling_rows_changes_nothing(mode: str) -> None:
    weight, scale = torch.randn(4, 5).double(), torch.rand(4, 1).double() + 0.1
    torch.testing.assert_close(conditioned(scale * weight, mode=mode), conditioned(weight, mode=mode))


def test_it_is_torchs_weight_norm_with_lengths_of_one() -> None:
    layer = nn.Linear(5, 4).double()
    ours, torchs = condition_weight(copy.deepcopy(layer)), theirs.weight_norm(copy.deepcopy(layer))
    with torch.no_grad():
        torchs.parametrizations.weight.original0.fill_(1.0)
    torch.testing.assert_close(ours.weight, torchs.weight, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(5, 4), (3, 5)),
        (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    ],
    ids=["Linear", "grouped Conv2d", "grouped ConvTranspose2d"],
)
def test_folding_keeps_outputs(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    before = condition_weight(layer)(x)
    folded = fold_weights(layer)
    assert not hasattr(folded, "parametrizations")
    torch.testing.assert_close(folded(x), before, atol=1e-6, rtol=0)


def test_a_unit_of_a_transposed_convolution_answers_to_its_own_row() -> None:
    layer = condition_weight(nn.ConvTranspose2d(4, 6, 1, groups=2, bias=False))
    impulses = torch.eye(4)[:, :, None, None]  # one input channel at a time
    columns = layer(impulses)[:, :, 0, 0]
    torch.testing.assert_close(columns.norm(dim=0), torch.ones(6), atol=1e-6, rtol=0)


def test_columns_of_a_grouped_convolution_are_those_of_its_groups() -> None:
    layer = condition_weight(nn.Conv2d(4, 6, 1, groups=2, bias=False), mode="column")
    columns = layer(torch.eye(4)[:, :, None, None])[:, :, 0, 0]
    torch.testing.assert_close(columns.norm(dim=1), torch.ones(4), atol=1e-6, rtol=0)


def test_a_row_of_zeros_stays_zero_with_a_finite_gradient() -> None:
    layer = nn.Linear(5, 4)
    with torch.no_grad():
        layer.weight[1] = 0.0
    condition_weight(layer)(torch.randn(3, 5)).square().sum().backward()
    gradient = layer.parametrizations.weight.original.grad
    assert layer.weight[1].abs().max() == 0
    assert gradient.isfinite().all()
    assert gradient[0].abs().max() > 0


def test_the_last_layer_is_left_alone_unless_chosen() -> None:
    def made() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 2))

    assert [hasattr(m, "parametrizations") for m in condition_model(made())] == [True, False, True, False]
    chosen = condition_model(made(), lambda name, _: name == "3")
    assert [hasattr(m, "parametrizations") for m in chosen] == [False, False, False, True]


def test_the_condition_number_of_a_matrix_with_a_dead_row_is_that_of_the_others() -> None:
    weight = torch.diag(torch.tensor([4.0, 2.0, 0.0]))
    assert condition_number(weight) == pytest.approx(2.0)
    assert condition_number(weight, rank=1) == pytest.approx(1.0)
    with pytest.raises(InputError, match="numerical rank 2"):
        condition_number(weight, rank=3)
    with pytest.raises(InputError, match="all zero"):
        condition_number(torch.zeros(2, 2))
    with pytest.raises(InputError, match="two axes"):
        condition_number(torch.ones(2))


def test_what_cannot_be_conditioned_is_refused_in_words() -> None:
    with pytest.raises(InputError, match="FixNormEmbedding"):
        condition_weight(nn.Embedding(5, 4))
    with pytest.raises(InputError, match="two axes or more"):
        condition_weight(nn.LayerNorm(4))
    with pytest.raises(InputError, match="no parameter 'kernel'"):
        condition_weight(nn.Linear(5, 4), "kernel")
    with pytest.raises(InputError, match="row, column, both, got 'rows'"):
        condition_weight(nn.Linear(5, 4), mode="rows")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="already"):
        condition_weight(condition_weight(nn.Linear(5, 4)))
    with pytest.raises(InputError, match="eps above 0"):
        WeightConditioning(eps=0.0)


def test_a_conditioned_layer_passes_the_suite() -> None:
    check_layer(
        lambda: condition_weight(nn.Linear(5, 4)),
        torch.randn(4, 5),
        feature_axis=None,
        except_={
            "copying": "torch refuses to pickle parametrized modules",
            "reset_parameters": "torch's layers reset a weight that is computed",
            "ddp": "starts two processes; what it checks holds for any parameters",
        },
    )


def test_embeddings_can_be_conditioned_by_hand() -> None:
    table = nn.Embedding(5, 4)
    nn.utils.parametrize.register_parametrization(table, "weight", WeightConditioning())
    torch.testing.assert_close(table(torch.tensor([3])).norm(), torch.tensor(1.0))
