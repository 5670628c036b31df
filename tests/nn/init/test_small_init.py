"""SmallInit (Nguyen and Salazar, 2019)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from setpoint.errors import InputError
from setpoint.nn import small_init_


def test_deviation_at_width_512_is_the_papers() -> None:
    layer = small_init_(nn.Linear(512, 512), generator=torch.Generator().manual_seed(0))
    assert layer.weight.std().item() == pytest.approx(0.02795, rel=0.01)
    assert layer.bias.abs().max() == 0


def test_all_four_matrices_of_an_attention_are_drawn() -> None:
    attention = small_init_(nn.MultiheadAttention(128, 4))
    for weight in (attention.in_proj_weight, attention.out_proj.weight):
        assert weight.std().item() == pytest.approx((2 / (5 * 128)) ** 0.5, rel=0.03)
    assert attention.in_proj_bias.abs().max() == 0


def test_the_width_of_the_model_can_be_given() -> None:
    layer = small_init_(nn.Linear(64, 512), d=512)
    assert layer.weight.std().item() == pytest.approx(0.02795, rel=0.03)


def test_what_has_no_matrix_is_refused() -> None:
    with pytest.raises(InputError, match="no matrix"):
        small_init_(nn.LayerNorm(4))
    with pytest.raises(InputError, match="at least 1"):
        small_init_(nn.Linear(2, 2), d=0)
