from __future__ import annotations

import pytest
import torch

from setpoint.data.holes import free_form_holes
from setpoint.errors import InputError


def shares(share: tuple[float, float]) -> torch.Tensor:
    holes = free_form_holes(200, 32, 48, torch.Generator().manual_seed(0), share)
    assert holes.shape == (200, 1, 32, 48)
    assert holes.dtype == torch.bool
    return holes.flatten(1).float().mean(1)


def test_holes_cover_about_the_share_that_is_asked_for() -> None:
    small, large = shares((0.1, 0.2)), shares((0.4, 0.5))
    assert small.min() >= 0.1
    assert small.mean() < 0.3
    assert 0.4 <= large.mean() < 0.6
    assert large.max() < 1


def test_holes_are_drawn_from_the_generator_alone() -> None:
    first, again, other = (free_form_holes(3, 16, 16, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_line_hangs_together() -> None:
    """Each mask is one region: growing it pixel by pixel from any of its pixels reaches all of it."""
    for hole in free_form_holes(20, 24, 24, torch.Generator().manual_seed(3)):
        reached = torch.zeros_like(hole)
        reached[0].view(-1)[hole.flatten().float().argmax()] = True
        for _ in range(24 * 24):
            grown = torch.nn.functional.max_pool2d(reached.float(), 3, 1, 1).bool() & hole
            if torch.equal(grown, reached):
                break
            reached = grown
        assert torch.equal(reached, hole)


def test_shares_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match="share as two numbers between 0 and 1"):
        free_form_holes(1, 8, 8, torch.Generator(), (0.5, 0.2))
