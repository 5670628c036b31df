"""Copies of a model: one that shares its weights, and one in float64 to judge others by. And the way back home."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.running import unwrap


def share(model: nn.Module) -> nn.Module:
    """A copy whose modules are its own and whose parameters are the model's own tensors.

    Only memory for modules is needed, and a tensor that stands at two places still does. Whoever trains the copy
    trains the original; an edit *replaces* a tensor and so changes the copy alone. Buffers are copied: a forward pass
    may write into them.

    Args:
        model: Any module.

    Returns:
        The copy, in the same modes.

    Raises:
        InputError: The model holds something that can't be copied.

    >>> from torch import nn
    >>> model = nn.Linear(2, 2)
    >>> twin = share(model)
    >>> twin is model, twin.weight is model.weight
    (False, True)
    """
    return _copied(model, {id(p): p for p in model.parameters()})


def in_float64(model: nn.Module) -> nn.Module:
    """A copy with every floating-point parameter and buffer in float64; ties survive.

    Args:
        model: Any module.

    Returns:
        The copy, in the same modes; its parameters take no gradient.
    """

    def double(tensor: Tensor) -> Tensor:
        return tensor.detach().double() if tensor.is_floating_point() else tensor.detach().clone()

    memo: dict[int, Any] = {id(p): nn.Parameter(double(p), requires_grad=False) for p in model.parameters()}
    memo |= {id(b): double(b) for b in model.buffers()}
    return _copied(model, memo)


def whole(model: nn.Module) -> nn.Module:
    """A copy that shares nothing, for a model that will be trained."""
    return _copied(model, {})


@contextmanager
def at_home(model: nn.Module) -> Iterator[None]:
    """Every tensor of a model is afterwards on the device that it was on, whoever moved it meanwhile.

    Args:
        model: Its parts may be on several devices.
    """
    places: list[tuple[dict[str, Any], str, Tensor, torch.device]] = [
        (table, name, tensor, tensor.device)
        for module in model.modules()
        for table in (module._parameters, module._buffers)
        for name, tensor in table.items()
        if tensor is not None
    ]
    try:
        yield
    finally:
        for table, name, tensor, home in places:
            now = table.get(name)
            if now is None or now.device == home:
                continue
            if now is tensor:  # a parameter that was moved stays the same object on most devices, a buffer never
                tensor.data = tensor.data.to(home)
            else:
                tensor.data.copy_(now.detach())
                table[name] = tensor
            tensor.grad = None  # it is of the other device


def editable(model: nn.Module) -> nn.Module:
    """The module that can be edited inside of a wrapper.

    Args:
        model: A module; `torch.compile` and data-parallel wrappers are looked through.

    Raises:
        InputError: The weights are sharded, or the model is a TorchScript program.
    """
    inner = unwrap(model)
    for name, module in inner.named_modules():
        kind = type(module).__name__
        if "FullyShardedDataParallel" in kind or kind.startswith("FSDP"):
            raise InputError(
                f"expected a plain module, got weights that are sharded over processes ({name or 'the model'} is "
                f"{kind}); fix the model before it is sharded"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(
                f"{name or 'the model'} is a TorchScript program, whose modules can't be replaced; fix the model it "
                "was made from"
            )
    return inner


def _copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    try:
        return copy.deepcopy(model, memo)
    except (TypeError, RuntimeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{type(model).__name__} can't be copied ({reason}); give inplace=True to change the model itself"
        ) from error
