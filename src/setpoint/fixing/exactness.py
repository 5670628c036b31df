"""Holding a fix to the promise that nothing changed.

Rounding hides errors, so the promise is judged where there is hardly any: the fix is planned and made on a copy in
float64, which must agree with the original in float64 to 1e-9 of the largest output. (Many models cast to float32
inside; those casts are lifted.) In the model's own type, where changed weights are rounded, outputs may then move by
four times what the original itself is off from float64, and no more. All of that on real inputs, in eval mode, without
gradients and with them, since some fused code runs in only one of the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from setpoint.fixing.base import NotExact
from setpoint.running import Forward
from setpoint.surgery.comparing import all_finite, distance, double, lifted, outputs

FLOAT64 = 1e-9
"""Largest relative difference in float64."""
NATIVE = 4.0
"""Largest difference in the model's own type, over the original's own distance from float64."""


def judge(
    name: str,
    wide: tuple[nn.Module, nn.Module],
    native: tuple[nn.Module, nn.Module],
    batches: Sequence[Any],
    forward: Forward,
) -> tuple[float, float]:
    """Compare models that must compute the same.

    Args:
        name: Of the fix, for the message.
        wide: The model before and after, both planned and made in float64.
        native: The same in the model's own type.
        batches: Real inputs; the first is judged in float64 (an identity does not depend on the data), all of them in
            the model's own type.
        forward: How to run one.

    Returns:
        ``(float64, native)``: the largest relative differences seen.

    Raises:
        NotExact: They differ by more than their type explains, or the model's outputs are not finite, so that
            nothing can be compared.
    """
    with lifted():
        truth, changed = (outputs(model, double(batches[0]), forward) for model in wide)
    _expect_finite(name, truth)
    gap = distance(changed, truth)
    if not gap <= FLOAT64:
        raise NotExact(
            f"{name} promises the same outputs, but in float64 they moved by {gap:.1e} of the largest one (allowed "
            f"{FLOAT64:.0e}); the change was undone"
        )
    own = seen = 0.0
    for index, batch in enumerate(batches):
        for grad in (False, True) if index == 0 else (False,):
            old, new = (outputs(model, batch, forward, grad=grad) for model in native)
            _expect_finite(name, old)
            if index == 0:  # later batches are held to the rounding seen on the first
                own = max(own, distance(old, truth), *(torch.finfo(t.dtype).eps for t in old))
            moved = distance(new, old)
            seen = max(seen, moved)
            allowed = max(NATIVE * own, FLOAT64 if old[0].dtype == torch.float64 else 0.0)
            if not moved <= allowed:
                mode = "with gradients" if grad else "without gradients"
                raise NotExact(
                    f"{name} promises the same outputs, but in {str(old[0].dtype).removeprefix('torch.')} ({mode}) "
                    f"they moved by {moved:.1e} of the largest one, more than {allowed:.1e}, which rounding "
                    "explains; the change was undone"
                )
    return gap, seen


def _expect_finite(name: str, given: Sequence[Tensor]) -> None:
    if not all_finite(given):
        raise NotExact(
            f"{name} promises the same outputs, but those before it are not finite, so nothing can be compared; the "
            "change was undone"
        )
