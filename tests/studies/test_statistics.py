from __future__ import annotations

import math

import numpy as np
import pytest

from setpoint.errors import InputError
from setpoint.studies.engine.statistics import fit, interval


def test_student_interval_of_three_values_by_hand() -> None:
    found = interval([1.0, 2.0, 4.0])
    half = 4.302652729749462 * math.sqrt(7 / 3) / math.sqrt(3)  # t(0.975, 2) · s / √n
    assert found.estimate == pytest.approx(7 / 3)
    assert (found.low, found.high) == pytest.approx((7 / 3 - half, 7 / 3 + half))


def test_two_replicates_need_a_factor_of_twelve() -> None:
    found = interval([0.0, 1.0])
    assert found.high - found.estimate == pytest.approx(12.7062047 * 0.5)


def test_equal_values_give_an_interval_of_no_width() -> None:
    found = interval([0.1, 0.1, 0.1])
    assert (found.low, found.estimate, found.high, found.bootstrap_low) == (0.1, 0.1, 0.1, pytest.approx(0.1))


def test_bootstrap_stays_within_the_values_and_is_repeatable() -> None:
    found = interval([1.0, 2.0, 4.0])
    assert 1.0 <= found.bootstrap_low < found.estimate < found.bootstrap_high <= 4.0
    assert found == interval([1.0, 2.0, 4.0])


def test_student_interval_covers_the_mean_in_ninety_five_of_a_hundred() -> None:
    draws = np.random.default_rng(0).normal(size=(2000, 5))
    half = 2.7764451 * draws.std(axis=1, ddof=1) / math.sqrt(5)
    ours = [interval(row.tolist()) for row in draws[:5]]
    assert [i.high - i.estimate for i in ours] == pytest.approx(half[:5].tolist())
    assert np.mean(np.abs(draws.mean(axis=1)) < half) == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, math.nan], [1.0, math.inf]])
def test_too_few_or_unusable_values_are_refused(values: list[float]) -> None:
    with pytest.raises(InputError, match="at least two finite values"):
        interval(values)


@pytest.mark.parametrize(
    ("form", "curve", "slope"),
    [
        ("linear", lambda x: 2 + 3 * x, 3.0),
        ("exponential", lambda x: 2 * math.exp(-0.5 * x), -0.5),
        ("power", lambda x: 5 * x**-0.7, -0.7),
    ],
)
def test_a_fit_finds_the_parameter_of_its_own_form(form: str, curve: object, slope: float) -> None:
    x = [1.0, 2.0, 3.0, 5.0, 8.0]
    found, r2 = fit(form, x, [curve(v) for v in x])
    assert (found, r2) == (pytest.approx(slope), pytest.approx(1.0))


def test_a_straight_line_is_no_good_fit_of_a_parabola_around_its_top() -> None:
    x = [-2.0, -1.0, 0.0, 1.0, 2.0]
    assert fit("linear", x, [v * v for v in x])[1] == pytest.approx(0.0)


def test_a_logarithm_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="positive"):
        fit("power", [1.0, 2.0, 3.0], [1.0, 0.0, 1.0])
