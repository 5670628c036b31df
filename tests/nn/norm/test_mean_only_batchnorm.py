"""Mean-only batch normalization (Salimans and Kingma, 2016, section 4)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from setpoint.errors import InputError
from setpoint.nn import MeanOnlyBatchNorm1d, MeanOnlyBatchNorm2d, MeanOnlyBatchNorm3d
from setpoint.testing.layer_case import Case, run
from setpoint.testing.pair import gradients_on_two


def test_training_output_has_the_bias_for_mean_and_the_inputs_variance() -> None:
    layer, x = MeanOnlyBatchNorm2d(3, dtype=torch.float64), 2 + 3 * torch.randn(4, 3, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        layer.bias.normal_()
    y = layer(x)
    torch.testing.assert_close(y.mean((0, 2, 3)), layer.bias)
    torch.testing.assert_close(y.var((0, 2, 3)), x.var((0, 2, 3)))


def test_input_gradient_sums_to_zero_over_the_batch() -> None:
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    g = torch.randn(6, 3, dtype=torch.float64)
    (dx,) = torch.autograd.grad(MeanOnlyBatchNorm1d(3, dtype=torch.float64)(x), x, g)
    torch.testing.assert_close(dx, g - g.mean(0))
    assert dx.sum(0).abs().max() < 1e-12


def test_evaluation_uses_the_running_mean() -> None:
    layer, x = MeanOnlyBatchNorm1d(3, momentum=0.25), torch.randn(6, 3)
    layer(x)
    torch.testing.assert_close(layer.running_mean, 0.25 * x.mean(0))
    torch.testing.assert_close(layer.eval()(x), x - 0.25 * x.mean(0))
    assert layer.num_batches_tracked == 1


def test_without_momentum_all_batches_count_alike() -> None:
    layer, batches = MeanOnlyBatchNorm1d(2, momentum=None), torch.randn(5, 7, 2)
    for batch in batches:
        layer(batch)
    torch.testing.assert_close(layer.running_mean, batches.mean((0, 1)))


@pytest.mark.parametrize(
    ("kind", "shape"),
    [(MeanOnlyBatchNorm1d, (4, 3)), (MeanOnlyBatchNorm1d, (4, 3, 5)), (MeanOnlyBatchNorm3d, (4, 3, 2, 2, 2))],
)
def test_every_form_centres_its_channels(kind: type[MeanOnlyBatchNorm1d], shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    torch.testing.assert_close(kind(3)(x).transpose(0, 1).flatten(1).mean(1), torch.zeros(3), atol=1e-6, rtol=0)


def test_an_empty_batch_leaves_the_average() -> None:
    layer = MeanOnlyBatchNorm1d(3)
    assert layer(torch.zeros(0, 3)).shape == (0, 3)
    assert layer.num_batches_tracked == 0


def test_means_of_half_precision_are_taken_in_float32() -> None:
    x = torch.full((600, 1), 300.0, dtype=torch.float16)  # their sum overflows float16
    assert MeanOnlyBatchNorm1d(1, dtype=torch.float16)(x).abs().max() == 0


def test_other_sizes_are_refused() -> None:
    with pytest.raises(InputError, match=r"\(N, 3, \*\), got \(4, 5\)"):
        MeanOnlyBatchNorm1d(3)(torch.randn(4, 5))
    with pytest.raises(InputError, match="4 axes, got 3"):
        MeanOnlyBatchNorm2d(3)(torch.randn(4, 3, 5))
    with pytest.raises(InputError, match="at least 1"):
        MeanOnlyBatchNorm1d(0)


def test_the_mean_is_that_of_both_processes() -> None:
    """Seen in the gradient of a layer behind the norm, which is a sum over its inputs."""
    x = torch.randn(4, 3) + torch.tensor([[0.0], [0.0], [5.0], [5.0]])
    layer = Case(lambda: nn.Sequential(MeanOnlyBatchNorm1d(3), nn.Linear(3, 2)), (x,)).layer()
    centred = x - x.mean(0) + layer[0].bias.detach()
    alone = [run(layer[1], (half,)).parameter_gradients["weight"] for half in (centred[:2], centred[2:])]
    for outcome, problem in gradients_on_two(layer, [(x[:2],), (x[2:],)]):
        assert outcome is not None, problem
        torch.testing.assert_close(outcome["1.weight"], (alone[0] + alone[1]) / 2, atol=1e-5, rtol=1e-5)
