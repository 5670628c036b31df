"""Where a model runs and in which type, and batches that go along with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.running import map_tensors


def device_named(name: str | torch.device) -> torch.device:
    """A device that can be used here.

    Raises:
        InputError: There is none of that name, or it can't be used.

    >>> device_named("cpu")
    device(type='cpu')
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).splitlines()[0]
        raise InputError(f"device {str(name)!r} can't be used here ({first}); give cpu, cuda or mps") from None
    return device


def dtype_named(name: str | torch.dtype) -> torch.dtype:
    """A floating-point type by its name in torch.

    Raises:
        InputError: There is none of that name.

    >>> dtype_named("bfloat16")
    torch.bfloat16
    """
    kind = name if isinstance(name, torch.dtype) else getattr(torch, name, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise InputError(
            f"dtype {name!r} is not a floating-point type of torch; give float32, bfloat16, float16 or float64"
        )
    return kind


def as_batches(given: Any) -> list[Any]:
    """What a user gives as batches, as a list of them; a bare tensor or mapping is one batch.

    Raises:
        InputError: There is none, or it is nothing that batches could come from.

    >>> [batch.shape for batch in as_batches(torch.zeros(8, 3))]
    [torch.Size([8, 3])]
    """
    if isinstance(given, Tensor | Mapping):
        return [given]
    if not isinstance(given, Iterable) or isinstance(given, str | bytes):
        raise InputError(
            f"expected batches as a list of tensors, tuples or dicts (or one tensor or dict), "
            f"got {type(given).__name__}"
        )
    batches = list(given)
    if not batches:
        raise InputError("There is nothing to run: batches is empty. Give at least one batch.")
    return batches


def follow(batch: Any, model: nn.Module) -> Any:
    """A batch on the model's device; floating-point tensors in its type, if all its parameters have one type.

    >>> follow({"x": torch.zeros(2), "ids": torch.zeros(2, dtype=torch.long)}, nn.Linear(2, 2).bfloat16())["x"].dtype
    torch.bfloat16
    """
    parameters = list(model.parameters())
    types = {parameter.dtype for parameter in parameters if parameter.is_floating_point()}
    floating = types.pop() if len(types) == 1 else None

    def place(tensor: Tensor) -> Tensor:
        return tensor.to(parameters[0].device, floating if floating and tensor.is_floating_point() else tensor.dtype)

    return map_tensors(place, batch) if parameters else batch
