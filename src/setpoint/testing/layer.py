"""The list that every layer must pass, setpoint's own and a stranger's.

A layer meets more than the call it was written for: other dtypes, autocast, a batch of one or none, views with odd
strides, a compiler, a second process, checkpoints. Each check here is one such meeting. What a layer can't do by its
nature is waived by name with a reason, which is where a reader learns of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

from torch import nn

from setpoint.errors import InputError, nearest
from setpoint.testing.layer_case import Broken, Case
from setpoint.testing.layer_checks import CHECKS, SLOW_CHECKS
from setpoint.testing.probe import ConformanceError

LAYER_CHECKS: tuple[str, ...] = (*CHECKS, *SLOW_CHECKS)
"""Names of all checks, in the order in which they run; `check_layer`'s ``except_`` takes them."""


def check_layer(
    layer: nn.Module | Callable[[], nn.Module],
    inputs: Any,
    *,
    batch_axis: int | None = 0,
    feature_axis: int | None = -1,
    except_: Mapping[str, str] | None = None,
    slow: bool = False,
) -> None:
    """Hold a layer to what setpoint asks of every layer.

    In float64, bfloat16, float16 and under autocast it gives finite results near its own float32 ones; large, constant
    and zero inputs give no NaN; first and second derivatives are right, in reverse and in forward mode; a batch of one
    and an empty batch work, and so do strided and channels-last inputs; it can be saved, loaded, copied, pickled and
    made on the meta device; compiled code needs one graph and gives the same numbers, and so do `torch.func` and
    checkpointing; two processes train it with DistributedDataParallel; a wrong shape is refused with the expected and
    the given size; it prints its arguments, can be reset, keeps no state outside its buffers and leaves its inputs
    alone.

    Args:
        layer: Makes a fresh layer, or a layer to copy. A function lets more be checked: on the meta device it makes the
            layer there.
        inputs: Example arguments of its call in float32: a tensor, or a tuple of tensors, None and tuples of them.
            Integer and boolean tensors stay as they are in every check. Small ones: derivatives are taken entry by
            entry. At least two examples, for two processes share them.
        batch_axis: The axis of every input tensor that counts examples, None if there is none.
        feature_axis: The axis of the first input whose size the layer insists on, None if any size will do.
        except_: Check -> why this layer can't pass it. Names are those of ``LAYER_CHECKS``.
        slow: Take the checks of the second tier too (``inductor``, ``export``).

    Raises:
        ConformanceError: (an `AssertionError`) at the first check that fails, with its name and what to do.
        InputError: ``except_`` names a check that does not exist, or gives no reason.

    Example:
        >>> import torch
        >>> from setpoint.nn import RMSNorm
        >>> check_layer(lambda: RMSNorm(6), torch.randn(4, 6), except_={"ddp": "starts two processes"})
    """
    waived = _waivers(except_ or {})
    make = (lambda: deepcopy(layer)) if isinstance(layer, nn.Module) else layer
    case = Case(make, inputs if isinstance(inputs, tuple) else (inputs,), batch_axis, feature_axis)
    name = type(case.layer()).__name__
    for check, run in {**CHECKS, **(SLOW_CHECKS if slow else {})}.items():
        if check in waived:
            continue
        try:
            run(case)
        except Broken as broken:
            raise ConformanceError(f"{name} fails the check {check!r}: {broken}") from broken.__cause__
        except Exception as error:
            raise ConformanceError(
                f"{name} fails the check {check!r} with {type(error).__name__}: {_first_line(error)}"
            ) from error


def _waivers(except_: Mapping[str, str]) -> Mapping[str, str]:
    for check, reason in except_.items():
        if check not in LAYER_CHECKS:
            raise InputError(
                f"no check is called {check!r}; did you mean {nearest(check, LAYER_CHECKS, 1)[0]!r}? There are "
                f"{', '.join(LAYER_CHECKS)}"
            )
        if not isinstance(reason, str) or not reason.strip():
            raise InputError(
                f"expected a reason for leaving out {check!r}, got {reason!r}; say why the layer can't do it"
            )
    return except_


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"
