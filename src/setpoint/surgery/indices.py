"""Which channel ends up where.

Each channel of a tensor is replaced by its number, and the ops behind it that only move values are run again on the
numbers. What arrives tells which outputs of a fused weight are the queries (contiguous, interleaved per head, grouped),
and which channels of a norm a weight reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from setpoint.running import tensors_of
from setpoint.surgery.graph import Graph, Weight
from setpoint.surgery.ops import CONVOLUTIONS, ELEMENTWISE, MOVES, NORMS
from setpoint.surgery.tape import Node, Value

Indices = range | tuple[int, ...]
FOREIGN = -1
"""The number of whatever does not come from the numbered tensor."""
_IDENTITY = frozenset({"dropout", "to", "float", "half", "bfloat16", "double", "type", "type_as", "detach"})


def output_rows(graph: Graph, weight: Weight, value: Value) -> Indices | None:
    """Output indices of a weight that end up in ``value``; None for all of them, or where it can't be followed."""
    total = weight.parameter.tensor.shape[weight.output_axis]
    used = used_rows(graph, weight) or range(total)
    made = weight.node.outputs[0]
    axis = weight.source_axis if weight.node.op in CONVOLUTIONS else -1
    if made.tensor.shape[axis] != len(used):
        return None
    numbers = _Numbers(graph, made, _along(made.tensor, (axis,)).contiguous()).of(value)
    if numbers is None:
        return None
    arrived = torch.zeros(len(used) + 1, dtype=torch.bool, device=numbers.device)
    arrived[numbers.flatten() + 1] = True  # FOREIGN falls on the first place
    rows = sorted(used[row] for row in arrived[1:].nonzero().flatten().tolist())
    return None if len(rows) == total else _indices(rows)


def used_rows(graph: Graph, weight: Weight) -> Indices | None:
    """Output indices of the parameter that take part in the product, in order; None for all."""
    parameter = weight.parameter
    if weight.seen is parameter:
        return None
    axis = weight.output_axis - parameter.tensor.dim()
    numbers = _Numbers(graph, parameter, _along(parameter.tensor, (axis,))).of(weight.seen)
    if numbers is None:
        return None
    numbers = numbers.movedim(weight.seen_axis, 0)
    while numbers.dim() > 1:
        numbers = numbers[:, 0]
    rows: list[int] = numbers.tolist()
    return None if rows == list(range(parameter.tensor.shape[axis])) else _indices(rows)


@dataclass(frozen=True, slots=True)
class Reading:
    """How a weight reads a norm: the parameter's axis, the channels it meets, and whether they are merged with more."""

    input_axis: int | None
    channels: Indices | None = None
    merged: bool = False


def read_channels(graph: Graph, start: Value, axes: tuple[int, ...], weight: Weight) -> Reading:
    """Which channels of ``start`` (counted along ``axes``, negative) meet which index of a weight's input axis."""
    if weight.input_axis is None or weight.source is None:
        return Reading(None)
    shape = start.tensor.shape
    total = 1
    for axis in axes:
        total *= shape[axis]
    numbers = _Numbers(graph, start, _along(start.tensor, axes).contiguous()).of(weight.source)
    if numbers is None:  # behind an op that mixes channels: no channel of the norm is met as such
        return Reading(None)
    met = numbers.movedim(weight.source_axis, -1)
    met = met.reshape(-1, met.shape[-1])
    if not met.numel() or not bool((met == met[0]).all()):
        return Reading(None)
    channels = met[0].tolist()
    if channels == list(range(total)):
        return Reading(weight.input_axis)
    merged = FOREIGN in channels or len(set(channels)) < len(channels)
    return Reading(weight.input_axis, _indices(channels), merged)


def carried_axis(graph: Graph, start: Value, axis: int, end: Value) -> int | None:
    """The axis of ``end`` along which the numbers of ``start`` along ``axis`` run; None unless there is just one."""
    along = _along(start.tensor, (axis % start.tensor.dim() - start.tensor.dim(),))
    numbers = _Numbers(graph, start, along).of(end)
    if numbers is None:  # a view that would need memory of its own
        numbers = _Numbers(graph, start, along.contiguous()).of(end)
    if numbers is None:
        return None
    for place, stride in enumerate(numbers.stride()):  # what is repeated without memory does not vary
        numbers = numbers.narrow(place, 0, 1) if stride == 0 else numbers
    varying = [
        place
        for place, size in enumerate(numbers.shape)
        if size > 1 and bool((numbers != numbers.narrow(place, 0, 1)).any())
    ]
    return varying[0] if len(varying) == 1 else None


def _indices(numbers: list[int]) -> Indices:
    contiguous = bool(numbers) and numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    return range(numbers[0], numbers[-1] + 1) if contiguous else tuple(numbers)


def _along(tensor: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Numbers that count along ``axes`` and are the same elsewhere, in a tensor's shape but without its memory."""
    sizes = [size if axis - tensor.dim() in axes else 1 for axis, size in enumerate(tensor.shape)]
    count = int(torch.tensor(sizes).prod())
    return torch.arange(count, device=tensor.device).reshape(sizes).expand(tensor.shape)


class _Numbers:
    """Numbers of the values behind a numbered one, worked out backwards on demand."""

    def __init__(self, graph: Graph, start: Value, numbers: Tensor) -> None:
        self.graph = graph
        self.start = start
        self.known: dict[int, Tensor | None] = {start.index: numbers}

    def of(self, value: Value) -> Tensor | None:
        """The numbers that ``value`` holds in place of the start's channels, None where they can't be followed."""
        if value.index not in self.known:
            self.known[value.index] = None
            # views of a parameter are few and have no ancestors on the tape
            behind = self.start.kind == "parameter" or self.graph.descends(value, self.start)
            node = value.producer
            if behind and node is not None and node.func is not None:
                if node.op in MOVES:
                    self.known[value.index] = self._replay(node, value)
                elif node.op in ELEMENTWISE or node.op in NORMS:
                    same = (self.of(above) for above in node.inputs if above.tensor.shape == value.tensor.shape)
                    self.known[value.index] = next((numbers for numbers in same if numbers is not None), None)
        return self.known[value.index]

    def _replay(self, node: Node, value: Value) -> Tensor | None:
        by_tensor = {id(above.tensor): self.of(above) for above in node.inputs}
        found = [numbers for numbers in by_tensor.values() if numbers is not None]
        if not found or node.op in _IDENTITY:
            return found[0] if found else None

        def put(tree: Any) -> Any:
            if isinstance(tree, Tensor):
                numbers = by_tensor.get(id(tree))
                if numbers is None and (tree.is_floating_point() or tree.is_complex()):
                    return torch.full(tree.shape, FOREIGN, device=tree.device)
                return tree if numbers is None else numbers
            return type(tree)(map(put, tree)) if type(tree) in (list, tuple) else tree

        try:
            made = tensors_of(node.func(*put(node.args), **{name: put(a) for name, a in node.kwargs.items()}))
        except (RuntimeError, TypeError, IndexError, ValueError):
            return None
        place = [output.index for output in node.outputs].index(value.index)
        return made[place] if place < len(made) else None
