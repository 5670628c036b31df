"""What a proof claims."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Claim:
    """What a proof claims about the difference method minus baseline (positive is better).

    Args:
        kind: ``better``: at least ``bound``; ``not_worse``: no more than ``bound`` below; ``equal``: within
            ``bound``; ``shape``: a fitted form.
        bound: delta, margin or tolerance, in the metric's unit.
    """

    kind: Literal["better", "not_worse", "equal", "shape"]
    bound: float
