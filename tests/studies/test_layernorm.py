"""Where the norm stands decides what of the weights' scale is left."""

from __future__ import annotations

import pytest

from setpoint.studies.layernorm import first_gradient

SIZES = {"steps": 20, "width": 16, "seed": 0}


def test_norm_on_the_sum_takes_the_scale_out_of_all_weights_together() -> None:
    small, large = (first_gradient("sum", scale, scale, **SIZES) for scale in (0.5, 2.0))
    assert small == pytest.approx(large, abs=0.01)


def test_norm_on_the_sum_leaves_that_of_the_recurrent_weights_alone() -> None:
    small, large = (first_gradient("sum", scale, 1.0, **SIZES) for scale in (0.5, 2.0))
    assert abs(small - large) > 1


def test_norm_on_the_recurrent_product_takes_out_that_of_the_recurrent_weights() -> None:
    small, large = (first_gradient("recurrent", scale, 1.0, **SIZES) for scale in (0.5, 2.0))
    assert small == pytest.approx(large, abs=0.01)


@pytest.mark.parametrize("inward", [1.0, 2.0])
def test_without_a_norm_the_gradient_hangs_on_the_scale(inward: float) -> None:
    small, large = first_gradient("nothing", 0.5, 1.0, **SIZES), first_gradient("nothing", 2.0, inward, **SIZES)
    assert abs(small - large) > 1
