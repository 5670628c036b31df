"""Holes in images: strokes of a broad brush, as they are used to train and judge inpainting."""

from __future__ import annotations

from math import pi

import torch
from jaxtyping import Bool
from torch import Tensor

from setpoint.errors import InputError

STROKES = 40
"""The most strokes in one mask."""


def free_form_holes(
    count: int,
    height: int,
    width: int,
    numbers: torch.Generator,
    share: tuple[float, float] = (0.1, 0.5),
    brush: tuple[float, float] = (0.04, 0.12),
) -> Bool[Tensor, "count 1 height width"]:
    """Masks of one random brush line each, with as many strokes as it takes to cover a random share of the image.

    Args:
        count: Number of masks.
        height, width: In pixels.
        numbers: Source of randomness.
        share: Least and largest share to be covered; the last stroke goes beyond what was drawn, and a line that does
            not get there in 40 strokes falls short.
        brush: Least and largest half width of a stroke, as a share of the shorter side.

    Returns:
        True in the holes.

    Raises:
        InputError: Shares that are not between 0 and 1, or the wrong way round.

    Example:
        >>> holes = free_form_holes(2, 32, 32, torch.Generator().manual_seed(0))
        >>> holes.shape, bool(holes.flatten(1).any(1).all()), bool(holes.flatten(1).all(1).any())
        (torch.Size([2, 1, 32, 32]), True, False)
    """
    if not 0 < share[0] <= share[1] < 1:
        raise InputError(f"expected share as two numbers between 0 and 1, the lesser first, got {share!r}")

    def drawn(least: float, most: float, *shape: int) -> Tensor:
        return least + (most - least) * torch.rand(shape, generator=numbers)

    side = min(height, width)
    size = torch.tensor([height, width], dtype=torch.float32)
    # A walk by turns of at most 60 degrees, thrown back by the walls.
    start = torch.rand(count, 1, 2, generator=numbers) * size
    angles = drawn(0, 2 * pi, count, 1) + drawn(-pi / 3, pi / 3, count, STROKES).cumsum(1)
    steps = torch.stack([angles.sin(), angles.cos()], -1) * drawn(0.15 * side, 0.5 * side, count, STROKES, 1)
    points = [start[:, 0]]
    for step in steps.unbind(1):
        ahead = (points[-1] + step).abs()
        points.append(size - (size - ahead).abs())
    corners = torch.stack(points, 1)
    half = drawn(brush[0] * side, brush[1] * side, count, STROKES, 1, 1)

    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    pixels = torch.stack([rows, columns], -1)
    first, second = (t[:, :, None, None] for t in (corners[:, :-1], corners[:, 1:]))
    along = second - first
    place = ((pixels - first) * along).sum(-1, keepdim=True) / along.square().sum(-1, keepdim=True).clamp_min(1e-6)
    distance = (pixels - first - place.clamp(0, 1) * along).norm(dim=-1)
    covered = (distance <= half).cummax(1).values  # after each stroke
    wanted = drawn(*share, count, 1)
    enough = covered.flatten(2).float().mean(2) >= wanted
    last = torch.where(enough.any(1), enough.float().argmax(1), STROKES - 1)
    chosen: Tensor = covered[torch.arange(count), last]
    return chosen.unsqueeze(1)
