"""What fixes ask of the numbers that they are given."""

from __future__ import annotations

import math

from setpoint.errors import InputError


def expect_positive(**values: float | None) -> None:
    """Numbers above 0 that are finite; None where a field may be left out.

    Args:
        values: By the names of the fields.

    Raises:
        InputError: Another; the message names the field.

    >>> expect_positive(eps=1e-5, alpha=None)
    """
    for name, value in values.items():
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"expected {name} above 0 and finite, got {value}")
