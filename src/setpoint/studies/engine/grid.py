"""The values that tuning tries, and how a range of them is carried on where a best value lies at its end."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from setpoint.studies.declare import Study

Values = tuple[Any, ...]
End = Literal["lower", "upper"]


@dataclass(frozen=True, slots=True)
class Grid:
    """What every arm tries.

    A *cell* is one combination of the values that all arms share. An arm with knobs tries each cell with every
    combination of its knobs' values.

    Args:
        shared: Values by name, the same for every arm.
        knobs: By arm, the values by name of what only this arm has.
    """

    shared: Mapping[str, Values]
    knobs: Mapping[str, Mapping[str, Values]]

    def cells(self) -> list[dict[str, Any]]:
        """Every combination of the shared values, in a fixed order."""
        return _combinations(self.shared)

    def settings(self, arm: str, cell: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What an arm tries in a cell."""
        return [{**cell, **knobs} for knobs in _combinations(self.knobs[arm])]

    def axes(self, arm: str) -> dict[str, Values]:
        """All that is tuned in an arm, by name."""
        return {**self.shared, **self.knobs[arm]}

    def with_value(self, name: str, value: Any) -> Grid:
        """The grid with one more value on an axis: for every arm that has it."""

        def more(axes: Mapping[str, Values]) -> Mapping[str, Values]:
            return {
                axis: (*values, value) if axis == name and value not in values else values
                for axis, values in axes.items()
            }

        return Grid(more(self.shared), {arm: more(axes) for arm, axes in self.knobs.items()})


def declared(study: Study) -> Grid:
    """The grid that a study declares."""
    assert study.tuning is not None
    return Grid(study.tuning.grid, {arm.name: arm.knobs for arm in study.arms})


def has_ends(values: Values) -> bool:
    """Whether an axis is one of numbers, and of at least two."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return numbers and len(set(values)) > 1


def beyond(values: Values, end: End) -> float | int | None:
    """The next value beyond an end of an axis, as far from the end as the end is from its neighbour.

    Positive values go on by the ratio of the last two, others by their difference. Whole numbers stay whole.

    Args:
        values: At least two different numbers, in any order.
        end: Which end.

    Returns:
        The value; None where there is none: zero ends an axis of positive values.

    >>> beyond((0.001, 0.002, 0.004), "upper"), beyond((1.0, 8.0, 40.0), "lower"), beyond((0, 0.1), "lower")
    (0.008, 0.125, None)
    """
    ordered = sorted(set(values), reverse=end == "lower")
    neighbour, last = ordered[-2:]
    if last > 0 and neighbour > 0:
        found = last * last / neighbour
    elif last == 0:
        return None
    else:
        found = 2 * last - neighbour
    if all(isinstance(value, int) for value in values):
        found = round(found)
        if min(values) > 0 >= found:
            return None
    else:
        found = float(f"{found:.6g}")  # 0.008, not the 0.008000000000000002 of the machine
    return found if math.isfinite(found) and found != last and (found > last) == (end == "upper") else None


def within_reach(values: Values, widen: int) -> Values:
    """The values of an axis and all those that tuning may add to it.

    >>> within_reach((0.1, 0.2), 1), within_reach(("cosine", "flat"), 1)
    ((0.1, 0.2, 0.05, 0.4), ('cosine', 'flat'))
    """
    found = values
    for end in get_args(End) if has_ends(values) else ():
        for _ in range(widen):
            following = beyond(found, end)
            found = found if following is None else (*found, following)
    return found


def _combinations(axes: Mapping[str, Values]) -> list[dict[str, Any]]:
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
