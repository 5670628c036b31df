"""Running somebody's model, and leaving it as it was.

What a batch may be, which tensors of a result are counted, what is inside a wrapper: one answer each, for everything
that runs a model.
"""

from __future__ import annotations

import dataclasses
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from setpoint.errors import InputError

Forward = Callable[[nn.Module, Any], Any]


def run_batch(model: nn.Module, batch: Any) -> Any:
    """Run one batch the usual way: a mapping as keywords, a tuple or list as positions, anything else as it is."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    return model(batch)


def tensors_of(*trees: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists, mappings and dataclasses, in order; `Tap.index` counts these.

    >>> [t.item() for t in tensors_of({"a": torch.tensor(1), "b": (torch.tensor(2), None)}, torch.tensor(3))]
    [1, 2, 3]
    """
    found: list[Tensor] = []
    for tree in trees:
        if isinstance(tree, Tensor):
            found.append(tree)
        elif isinstance(tree, tuple | list):
            found.extend(tensors_of(*tree))
        elif isinstance(tree, Mapping):
            found.extend(tensors_of(*tree.values()))
        elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
            found.extend(tensors_of(*(getattr(tree, f.name) for f in dataclasses.fields(tree))))
    return found


def map_tensors(change: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """A batch, nested as it may be, with every tensor changed; named tuples stay what they are.

    >>> map_tensors(torch.neg, {"a": (torch.tensor(1), "text")})
    {'a': (tensor(-1), 'text')}
    """
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {name: map_tensors(change, value) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        parts = [map_tensors(change, value) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


def scalar_loss(loss: Any) -> Tensor:
    """What ``loss(output, batch)`` returned, as a tensor without axes.

    Raises:
        InputError: It is no scalar tensor, or there is nothing to differentiate.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise InputError(f"loss(output, batch) must return a scalar tensor, got {found}. Average it over the batch.")
    if not loss.requires_grad:
        raise InputError("The loss does not depend on any parameter that requires a gradient.")
    return loss.reshape(())


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Train and eval mode of every module are afterwards as they were, by the flags alone: ``train`` may do more."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            if module.training != training:
                module.training = training


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    with kept_modes(model):
        for module in model.modules():
            if module.training:
                module.training = False
        yield


@contextmanager
def _buffers(model: nn.Module) -> Iterator[None]:
    """Put every buffer back, the object and its contents."""
    kept = [
        (module, key, buffer, buffer.detach().clone())
        for module in model.modules()
        for key, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, key, buffer, copy in kept:
                if module._buffers.get(key) is not buffer:
                    module._buffers[key] = buffer
                if not _same(buffer, copy):
                    buffer.copy_(copy)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


@contextmanager
def _random_state() -> Iterator[None]:
    python, numpy_state, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def plain_execution() -> Iterator[None]:
    """Modules run as they are written: no fused attention path, no compiled code, which both pass hooks by."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        if "torch._dynamo" in sys.modules:  # nothing is compiled before it is imported
            with torch.compiler.set_stance("force_eager"):
                yield
        else:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, plain execution; afterwards modes, buffers and random states are as they were."""
    with _eval_mode(model), _buffers(model), _random_state(), plain_execution(), torch.no_grad():
        yield


@contextmanager
def evaluated(model: nn.Module, *, grad: bool = False) -> Iterator[None]:
    """Eval mode as a user would run it, fused paths included; afterwards modes, buffers and random states are back.

    Args:
        model: The module.
        grad: Record gradients, which some fused paths ask before they run.
    """
    with _eval_mode(model), _buffers(model), _random_state(), torch.set_grad_enabled(grad):
        torch.manual_seed(0)
        yield


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile` and data-parallel wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(inner, nn.Module):
            model = inner
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model
