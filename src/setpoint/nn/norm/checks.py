"""What every norm asks of its input, in one wording."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor

from setpoint.errors import InputError

NormalizedShape = int | Sequence[int]
"""What ``normalized_shape`` may be: the width of the last axis, or the sizes of the last few."""


def shape_of(normalized_shape: int | Sequence[int], layer: str) -> tuple[int, ...]:
    """``normalized_shape`` as a tuple of positive sizes.

    Raises:
        InputError: It is empty, or a size is below 1: there is nothing to take statistics of.

    >>> shape_of(8, "LayerNorm"), shape_of([4, 8], "LayerNorm")
    ((8,), (4, 8))
    """
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if prod(shape) < 1 or not shape or min(shape) < 1:
        raise InputError(
            f"{layer}: expected normalized_shape to hold positive sizes, got {normalized_shape!r}; give the width that "
            "the layer sees"
        )
    return shape


def expect_trailing(x: Tensor, shape: tuple[int, ...], layer: str) -> None:
    """A floating-point input whose last axes are ``shape``.

    Raises:
        TypeError: An integer or boolean input.
        InputError: Other trailing sizes; the message names both shapes.
    """
    expect_floating(x, layer)
    if tuple(x.shape[-len(shape) :]) != shape:
        wanted = ", ".join(map(str, shape))
        raise InputError(
            f"{layer}: expected an input of shape (*, {wanted}), got {tuple(x.shape)}; move the normalized axes to the "
            f"end, or make the layer with normalized_shape={_tail(x, len(shape))}"
        )


def expect_channels(x: Tensor, channels: int, layer: str, dims: tuple[int, ...] = ()) -> None:
    """A floating-point input with ``channels`` on axis 1 and, if ``dims`` is given, that many axes.

    Raises:
        TypeError: An integer or boolean input.
        InputError: Another number of channels or of axes; the message names both.
    """
    expect_floating(x, layer)
    if dims and x.dim() not in dims:
        wanted = " or ".join(map(str, dims))
        raise InputError(f"{layer}: expected an input with {wanted} axes, got {x.dim()} (shape {tuple(x.shape)})")
    if x.dim() < 2 or x.shape[1] != channels:
        raise InputError(
            f"{layer}: expected an input of shape (N, {channels}, *), got {tuple(x.shape)}; put the channels on "
            "axis 1, or make the layer with the number that comes"
        )


def expect_floating(x: Tensor, layer: str) -> None:
    """A floating-point input.

    Raises:
        TypeError: An integer or boolean input.
    """
    if not x.is_floating_point():
        raise TypeError(f"{layer}: expected a floating-point input, got {x.dtype}; convert it first, as in x.float()")


def _tail(x: Tensor, count: int) -> int | tuple[int, ...]:
    tail = tuple(x.shape[-count:])
    return tail[0] if len(tail) == 1 else tail
