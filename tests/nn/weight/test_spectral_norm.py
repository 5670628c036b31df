"""Spectral norm (Miyato, Kataoka, Koyama and Yoshida, 2018)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from setpoint.errors import InputError
from setpoint.nn import fold_weights, spectral_norm, weight_norm


def test_spectral_norm_brings_the_largest_singular_value_to_one_and_folds() -> None:
    layer, x = spectral_norm(nn.Linear(6, 5), n_power_iterations=100).eval(), torch.randn(3, 6)
    assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(1.0, abs=1e-4)
    before = layer(x)
    folded = fold_weights(layer)
    assert type(folded) is nn.Linear
    torch.testing.assert_close(folded(x), before)


def test_a_transposed_convolution_is_a_matrix_of_its_output_units() -> None:
    layer = spectral_norm(nn.ConvTranspose1d(3, 5, 2), n_power_iterations=100).eval()
    matrix = layer.weight.transpose(0, 1).flatten(1)
    assert torch.linalg.matrix_norm(matrix, 2).item() == pytest.approx(1.0, abs=1e-4)


def test_what_already_has_a_scale_is_refused_in_words() -> None:
    with pytest.raises(InputError, match="has a SpectralNorm already"):
        spectral_norm(spectral_norm(nn.Linear(3, 2)))
    with pytest.raises(InputError, match="has a WeightNorm already"):
        spectral_norm(weight_norm(nn.Linear(3, 2)))
    with pytest.raises(InputError, match="no parameter 'kernel'"):
        spectral_norm(nn.Linear(3, 2), "kernel")
