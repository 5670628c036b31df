"""A piece of a forward pass, cut out of the tape and run again on another input."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from setpoint.running import tensors_of
from setpoint.surgery.tape import Node, Value


def replay(nodes: Iterable[Node], start: Value, end: Value, x: Tensor) -> Tensor:
    """What ``end`` becomes when ``start`` is ``x``; ``nodes`` lead from one to the other, in order of execution."""
    made: dict[int, Tensor] = {id(start.tensor): x.clone()}

    def put(tree: Any) -> Any:
        if isinstance(tree, Tensor):
            return made.get(id(tree), tree)
        return type(tree)(map(put, tree)) if type(tree) in (list, tuple) else tree

    for node in nodes:
        result = node.func(*put(node.args), **{name: put(a) for name, a in node.kwargs.items()})
        for output, tensor in zip(node.outputs, tensors_of(result), strict=False):
            made[id(output.tensor)] = tensor
    return made[id(end.tensor)]
