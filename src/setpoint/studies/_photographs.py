"""The setting of the studies on photographs: two that scikit-learn ships, cut from left to right into the splits."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from hashlib import sha256

import torch
from torch import Tensor, nn

from setpoint.extras import require
from setpoint.studies import Context
from setpoint.types import Series

SOURCE = "photographs of scikit-learn"
PARTS = {"train": (0.0, 0.6), "valid": (0.6, 0.8), "test": (0.8, 1.0)}
"""Where, from the left edge of each photograph to the right."""
READINGS = 10


@cache
def photographs() -> Tensor:
    """In 8-bit steps, ``(2, 3, height, width)``."""
    require("PIL", "vision", "to read a photograph")
    from sklearn.datasets import load_sample_image

    pixels = [torch.tensor(load_sample_image(name), dtype=torch.float32) for name in ("china.jpg", "flower.jpg")]
    return torch.stack(pixels).movedim(-1, 1)


@cache
def version() -> str:
    """Checksum of the data."""
    return sha256(photographs().numpy().tobytes()).hexdigest()[:12]


def part_of(images: Tensor, part: str) -> Tensor:
    """The columns of images ``(*, width)`` that belong to a split."""
    left, right = (round(share * images.shape[-1]) for share in PARTS[part])
    return images[..., left:right]


def crops(images: Tensor, count: int, side: int, numbers: torch.Generator) -> Tensor:
    """Squares ``(count, channels, side, side)`` at random places of images ``(N, channels, height, width)``."""
    windows = images.unfold(2, side, 1).unfold(3, side, 1).movedim(1, 3)
    which, row, column = (torch.randint(size, (count,), generator=numbers) for size in windows.shape[:3])
    return windows[which, row, column]


def fitted(
    model: nn.Module,
    loss: Callable[[], Tensor],
    measure: Callable[[], float],
    what: str,
    *,
    steps: int,
    lr: float,
    ctx: Context,
) -> tuple[Series, float]:
    """Train by Adam and measure ten times along the way, in evaluation mode and without gradients.

    Args:
        model: In training mode; it is trained in place.
        loss: Draws a batch and gives its loss.
        measure: What is read.
        what: Its name.
        steps: Updates.
        lr: Learning rate.
        ctx: Gives progress.

    Returns:
        What was read over the step, and at the end.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    every = max(1, steps // READINGS)
    at, readings = [], []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % every == 0:
            model.eval()
            with torch.no_grad():
                readings.append(measure())
            model.train()
            at.append(float(step))
            ctx.progress(step, steps, f"{what} {readings[-1]:.3g}")
    return Series(f"{what} over step", tuple(at), tuple(readings)), readings[-1]
