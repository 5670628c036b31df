"""Catching and replacing tensors during a forward pass, by `setpoint.types.Tap`.

Forward hooks and pre-hooks only; they are gone when the context ends, also when the pass fails. A tensor is never
written into: what a hook hands on is a new structure with one tensor exchanged.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from setpoint.errors import InputError, nearest
from setpoint.types import Tap

TensorEdit = Callable[[Tensor], Tensor]


def module_at(model: nn.Module, name: str) -> nn.Module:
    """The submodule of that qualified name ("" is the model).

    Raises:
        InputError: No module of that name; the message lists the nearest.
    """
    try:
        return model.get_submodule(name)
    except AttributeError:
        known = [n for n, _ in model.named_modules() if n]
        raise InputError(
            f"There is no module {name!r} in {type(model).__name__}; the nearest are {', '.join(nearest(name, known))}."
        ) from None


def exchange(tree: Any, index: int, edit: TensorEdit) -> Any:
    """A structure like ``tree`` in which the tensor number ``index``, counted in order, went through ``edit``.

    Args:
        tree: Nested tuples, lists, mappings and dataclasses with tensors in them.
        index: Which tensor.
        edit: Given the tensor, returns the one that takes its place.

    Returns:
        The new structure; tensors and parts that don't hold the one are shared.

    Example:
        >>> import torch
        >>> exchange((torch.ones(1), {"a": torch.ones(1)}), 1, lambda t: 2 * t)
        (tensor([1.]), {'a': tensor([2.])})
    """
    seen = 0

    def visit(node: Any) -> Any:
        nonlocal seen
        if isinstance(node, Tensor):
            seen += 1
            return edit(node) if seen == index + 1 else node
        if isinstance(node, tuple) and hasattr(node, "_fields"):
            return type(node)(*(visit(part) for part in node))
        if isinstance(node, (tuple, list)):
            return type(node)(visit(part) for part in node)
        if isinstance(node, Mapping):
            values = {key: visit(value) for key, value in node.items()}
            if all(values[key] is node[key] for key in values):
                return node
            if type(node) is dict:
                return values
            changed: Any = copy.copy(node)
            for key, value in values.items():
                changed[key] = value
            return changed
        if dataclasses.is_dataclass(node) and not isinstance(node, type):
            parts = {field.name: visit(getattr(node, field.name)) for field in dataclasses.fields(node)}
            if all(parts[name] is getattr(node, name) for name in parts):
                return node
            twin: Any = copy.copy(node)
            for name, part in parts.items():
                object.__setattr__(twin, name, part)
            return twin
        return node

    return visit(tree)


@contextmanager
def edited(model: nn.Module, edits: Mapping[Tap, TensorEdit]) -> Iterator[None]:
    """For one forward pass, exchange the tensor at each tap for what its edit returns.

    Calls of a module are counted from the start of the context, so enter it anew for each pass.

    Args:
        model: The network.
        edits: Tap to edit.
    """
    with ExitStack() as stack:
        for (name, side), taps in _by_place(edits).items():
            module = module_at(model, name)
            hook = _Hook(taps, edits)
            if side == "input":
                handle = module.register_forward_pre_hook(hook.before, with_kwargs=True)
            else:
                handle = module.register_forward_hook(hook.after)
            stack.callback(handle.remove)
        yield


@contextmanager
def caught(model: nn.Module, taps: Sequence[Tap]) -> Iterator[dict[Tap, Tensor]]:
    """For one forward pass, keep the tensors at the taps; the dictionary fills as the pass runs.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 3)
        >>> with caught(layer, [Tap("", "output")]) as tensors:
        ...     _ = layer(torch.ones(1, 2))
        >>> tensors[Tap("", "output")].shape
        torch.Size([1, 3])
    """
    found: dict[Tap, Tensor] = {}

    def keeper(tap: Tap) -> TensorEdit:
        def keep(tensor: Tensor) -> Tensor:
            found[tap] = tensor
            return tensor

        return keep

    with edited(model, {tap: keeper(tap) for tap in taps}):
        yield found


def _by_place(edits: Mapping[Tap, TensorEdit]) -> dict[tuple[str, str], list[Tap]]:
    places: dict[tuple[str, str], list[Tap]] = {}
    for tap in edits:
        places.setdefault((tap.module, tap.side), []).append(tap)
    return places


class _Hook:
    """One side of one module: counts its calls and applies the edits that are due."""

    def __init__(self, taps: Sequence[Tap], edits: Mapping[Tap, TensorEdit]) -> None:
        self.taps = taps
        self.edits = edits
        self.calls = 0

    def _due(self) -> list[Tap]:
        call, self.calls = self.calls, self.calls + 1
        return [tap for tap in self.taps if tap.call == call]

    def before(self, _module: nn.Module, args: Any, kwargs: Any) -> Any:
        tree = (args, kwargs)
        for tap in self._due():
            tree = exchange(tree, tap.index, self.edits[tap])
        return tree

    def after(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        for tap in self._due():
            output = exchange(output, tap.index, self.edits[tap])
        return output
