"""Means with intervals, and fits of simple forms to curves.

The Student t interval over paired differences is the one that decides. The percentile bootstrap stands beside it as a
second view that assumes no normality; with the three to ten replicates of a proof it is known to be too narrow, which
is why it decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from setpoint.errors import InputError
from setpoint.types.proving import Form, Interval

CONFIDENCE = 0.95
RESAMPLES = 10_000


def interval(values: Sequence[float], *, seed: int = 0) -> Interval:
    """Mean of independent values with its 95 % intervals.

    Args:
        values: One finite number per replicate, at least two.
        seed: For the bootstrap.

    Returns:
        The mean, the Student t interval and the percentile bootstrap interval. Equal values give an interval of no
        width.

    Raises:
        InputError: Fewer than two values, or one that is not finite.

    >>> found = interval([0.9, 1.0, 1.1])
    >>> round(found.low, 3), round(found.estimate, 3), round(found.high, 3)
    (0.752, 1.0, 1.248)
    """
    from scipy.special import stdtrit  # type: ignore[import-untyped]  # scikit-learn brings it; slow to import

    x = np.asarray(values, dtype=np.float64)
    if x.size < 2 or not np.isfinite(x).all():
        raise InputError(f"an interval needs at least two finite values, got {list(values)}")
    mean = float(x.mean())
    spread = float(x.std(ddof=1))
    # The sum of equal numbers rounds: without this, identical replicates get a width of some 1e-17.
    half = 0.0 if np.ptp(x) == 0 else float(stdtrit(x.size - 1, (1 + CONFIDENCE) / 2)) * spread / np.sqrt(x.size)
    mean = float(x[0]) if np.ptp(x) == 0 else mean
    drawn = np.random.default_rng(seed).integers(0, x.size, (RESAMPLES, x.size))
    tails = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    low, high = (float(q) for q in np.quantile(x[drawn].mean(axis=1), tails))
    return Interval(mean, float(mean - half), float(mean + half), low, high, int(x.size))


def fit(form: Form, x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Least squares of a form on a curve.

    Args:
        form: ``linear`` (y = a + b·x), ``exponential`` (y = a·exp(b·x), fitted to log y) or ``power`` (y = a·x^b,
            fitted to log y over log x).
        x, y: The curve, at least three points.

    Returns:
        ``(b, R²)``, R² on the axes of the fit.

    Raises:
        InputError: Too few points, one that is not finite, or not positive where a logarithm is taken.

    >>> b, r2 = fit("power", [1, 2, 4, 8], [3, 6, 12, 24])
    >>> round(b, 9), round(r2, 9)
    (1.0, 1.0)
    """
    u, v = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if u.size < 3 or u.size != v.size or not (np.isfinite(u).all() and np.isfinite(v).all()):
        raise InputError(f"a {form} fit needs at least three finite points, got {u.size} x and {v.size} y")
    u, v = _AXES[form](u, v)
    if not (np.isfinite(u).all() and np.isfinite(v).all()):
        raise InputError(f"a {form} fit takes logarithms and needs positive values")
    slope, offset = np.polyfit(u, v, 1)
    total = float(((v - v.mean()) ** 2).sum())
    left = float(((v - offset - slope * u) ** 2).sum())
    return float(slope), 1.0 if total == 0 else 1 - left / total


_Axes = Callable[[NDArray[np.float64], NDArray[np.float64]], tuple[NDArray[np.float64], NDArray[np.float64]]]


def _log(values: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(divide="ignore", invalid="ignore"):
        logs: NDArray[np.float64] = np.log(values)
    return logs


_AXES: Mapping[Form, _Axes] = {
    "linear": lambda x, y: (x, y),
    "exponential": lambda x, y: (x, _log(y)),
    "power": lambda x, y: (_log(x), _log(y)),
}
