"""How a mask or a segmentation map reaches the norms deep inside a model.

Some layers ask for a map beside their input: where the hole is (`RegionNorm`, `RNB`), which class a pixel has
(`SPADE`). Where the code around a layer can pass it, it is an argument: ``layer(x, mask)``. Where it can't, as in a
network whose blocks call ``norm(x)``, the map is named once for the whole call, and the layer takes it by that name:

    with conditioned(mask=holes, segmap=labels):
        y = model(x)

`Conditioned` makes a module of that, whose maps are arguments of its call. That is the form for
DistributedDataParallel, `torch.export`, `setpoint.check` and `setpoint.fix`. Both work inside and around
`torch.compile`. Maps come in the size of the input, and each layer brings them to the size of its own by taking the
nearest pixel, so that labels stay labels.

A map belongs to the calls inside the ``with`` of its own thread, and to nothing else: nothing is stored in the model.
Activation checkpointing makes calls once more during the backward pass, when the ``with`` is over; there it takes
``checkpoint(block, x, use_reentrant=False, context_fn=keep_conditions)``. Without that the layer refuses, also where
``backward()`` stands inside a ``with``, since that may be another one than the call's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import local
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from setpoint.errors import InputError


@contextmanager
def conditioned(**maps: Tensor | None) -> Iterator[None]:
    """Give maps by name to the layers of whatever is called inside.

    Args:
        maps: Name -> map ``(N, *)`` or ``(N, channels, *)``; `RNB` looks for ``mask``, `SPADE` for ``segmap``, unless
            made with another name. None takes a map away that an outer ``with`` gave.

    Yields:
        Nothing. Maps given by an outer ``with`` under other names stay.

    Raises:
        TypeError: Something that is no tensor.

    Example:
        >>> from setpoint.nn import RNB, conditioned
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), RNB(8), nn.ReLU())
        >>> with conditioned(mask=torch.rand(2, 1, 16, 16) > 0.5):
        ...     y = model(torch.randn(2, 3, 16, 16))
    """
    for name, value in maps.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"conditioned: expected a tensor as {name}, got {type(value).__name__}")
    merged = {**_current(), **maps}
    with _Given({name: value for name, value in merged.items() if value is not None}):
        yield


class Conditioned(nn.Module):
    """A model whose layers' maps are keyword arguments of its call; see `conditioned`.

    Args:
        module: The model, called with all other arguments.
        names: Of the maps; each is taken out of the call's keywords.

    Raises:
        InputError: No name, or one that is no Python name; on call, a map that is not there.
        TypeError: On call, a map that is no tensor.

    Example:
        >>> from setpoint.nn import RNB, Conditioned
        >>> model = Conditioned(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), RNB(8), nn.ReLU()), "mask")
        >>> model(torch.randn(2, 3, 16, 16), mask=torch.rand(2, 1, 16, 16) > 0.5).shape
        torch.Size([2, 8, 16, 16])
    """

    def __init__(self, module: nn.Module, *names: str) -> None:
        super().__init__()
        if not names or not all(name.isidentifier() for name in names):
            raise InputError(f"Conditioned: expected the names of maps, such as 'mask', got {names!r}")
        self.module = module
        self.names = names

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns for the other arguments."""
        maps: dict[str, Tensor] = {}
        for name in self.names:
            if name not in kwargs:
                raise InputError(
                    f"Conditioned: expected the map {name!r} as a keyword, got {', '.join(kwargs) or 'none'}; call the "
                    f"model as in model(x, {name}=...)"
                )
            maps[name] = kwargs.pop(name)
        with conditioned(**maps):
            return self.module(*args, **kwargs)

    def extra_repr(self) -> str:
        """Names of the maps."""
        return ", ".join(map(repr, self.names))


def keep_conditions() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """For `torch.utils.checkpoint.checkpoint`: what is computed again finds the maps that the call found.

    Returns:
        Two contexts, for the call (it changes nothing) and for the second one.

    Example:
        >>> from torch.utils.checkpoint import checkpoint
        >>> from setpoint.nn import RNB, conditioned, keep_conditions
        >>> block, x = nn.Sequential(nn.Conv2d(3, 8, 3), RNB(8)), torch.randn(2, 3, 8, 8)
        >>> with conditioned(mask=x[:, :1] > 0):
        ...     y = checkpoint(block, x, use_reentrant=False, context_fn=keep_conditions)
        >>> y.sum().backward()
    """
    return nullcontext(), _Given(_current())


def condition(name: str, layer: str) -> Tensor:
    """The map that a layer was given by name; for layers that read one.

    Args:
        name: Of the map.
        layer: Who asks, for the message.

    Raises:
        InputError: There is none.

    Example:
        >>> with conditioned(mask=torch.zeros(1, 4, 4)):
        ...     condition("mask", "RNB").shape
        torch.Size([1, 4, 4])
    """
    maps = _current()
    found = maps.get(name)
    if found is None:
        others = f"only {', '.join(maps)}" if maps else "none"
        if _task() != -1:
            raise InputError(
                f"{layer}: expected the map {name!r}, found {others} in the backward pass, where checkpointing makes "
                "calls again; use checkpoint(..., use_reentrant=False, context_fn=setpoint.nn.keep_conditions)"
            )
        raise InputError(
            f"{layer}: expected the map {name!r}, found {others}; pass it to the layer, or call the model under `with "
            f"setpoint.nn.conditioned({name}=...)`"
        )
    return found


def nearest(values: Shaped[Tensor, "batch channels ..."], size: torch.Size) -> Shaped[Tensor, "batch channels ..."]:
    """A map brought to another size by taking the nearest pixel, as `torch.nn.functional.interpolate` chooses it.

    Args:
        values: ``(N, channels, *)`` with one to three axes of space; whole numbers up to 2**24.
        size: Of space.

    Returns:
        ``(N, channels, *size)`` in the same dtype, with no value that was not there.

    Example:
        >>> nearest(torch.tensor([[[[0, 7], [2, 1]]]]), torch.Size((4, 2))).flatten().tolist()
        [0, 7, 0, 7, 2, 1, 2, 1]
    """
    if values.shape[2:] == size:
        return values
    if values.is_floating_point():
        return F.interpolate(values, size, mode="nearest")
    return F.interpolate(values.float(), size, mode="nearest").to(values.dtype)


class _Here(local):
    """The maps of a thread, and the backward pass they were given in, -1 outside of one.

    Plain attributes of the thread and no `contextvars.ContextVar`, which `torch.compile` can't trace.
    """

    def __init__(self) -> None:
        self.maps: Mapping[str, Tensor] = {}
        self.task = -1


_here = _Here()


class _Given(AbstractContextManager[None]):
    """Has maps in place; may be entered again, as a graph that is kept goes backward again."""

    def __init__(self, maps: Mapping[str, Tensor]) -> None:
        self.maps = maps
        self.before: list[tuple[Mapping[str, Tensor], int]] = []

    def __enter__(self) -> None:
        self.before.append((_here.maps, _here.task))
        _here.maps, _here.task = self.maps, _task()

    def __exit__(self, *_: object) -> None:
        _here.maps, _here.task = self.before.pop()


def _current() -> Mapping[str, Tensor]:
    """The maps that a call made now may use."""
    return _here.maps if _here.task == _task() else {}


def _task() -> int:
    """Number of the backward pass that is running in this thread, -1 if none is."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()
