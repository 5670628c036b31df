"""Which axis of a tensor holds its channels, for each tensor apart.

One model may keep channels on several axes: a Mixer turns tokens into channels in every other branch, a U-Net attends
over feature maps, MobileViT goes from maps to tokens and back. What reads and writes a tensor tells: a layer norm has
channels on the last axis; a batch norm, a group norm, a convolution or a pooling right before the positions; a gain
with one entry per channel wherever it is not broadcast. What lies in between is run again on numbers
(`setpoint.surgery.indices`), so that an axis is followed through transposes and reshapes.

Norms and gains are believed before weights: a linear that mixes tokens writes to a stream as well, behind a transpose.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from setpoint.surgery.behaviour import NormRead
from setpoint.surgery.branches import Addition
from setpoint.surgery.graph import Graph, Weight, bit
from setpoint.surgery.indices import carried_axis
from setpoint.surgery.norms import channel_axes
from setpoint.surgery.ops import ELEMENTWISE, MOVES, POOLS
from setpoint.surgery.tape import Node, Value
from setpoint.types import Block, Chain, Projection, Tap

_FAR = 64
"""Values passed around a tensor before the search for what reads or writes it is given up."""
_VOTES = 8
"""Weights that are heard on each side."""


@dataclass(frozen=True, slots=True)
class _Evidence:
    """A tensor whose channel axis is known; ``sure`` if from a norm or a gain, not from a weight alone."""

    value: Value
    axis: int
    sure: bool = True


def find_channel_axes(
    graph: Graph,
    norms: list[NormRead],
    additions: list[Addition],
    blocks: tuple[Block, ...],
    chains: tuple[Chain, ...],
    head: tuple[Projection | None, Tap | None],
) -> dict[Tap, int]:
    """The axis of channels wherever a site may be: -1 for the last, others counted from the front.

    Args:
        graph: The graph.
        norms: Every call of every norm.
        additions: Residual additions, with their blocks entered.
        blocks: Units of depth.
        chains: Convolutions and linears with what follows them.
        head: The last weight, and where its output can be caught.
    """
    axes = _Axes(graph, norms)
    for norm in norms:
        axes.enter(Tap(norm.name, "output", 0, norm.call.ordinal), axes.of_norm(norm))
    for chain in chains:
        axes.enter(chain.output, axes.of_output(chain.convolution))
    axes.enter(head[1], axes.of_output(head[0]))
    for block in blocks:
        own = [addition for addition in additions if addition.block == block.index]
        left = [addition.source for addition in own]
        axes.enter(block.input, beside=left)
        axes.enter(block.output, beside=left)
        for addition in own:
            stream = _Evidence(addition.output, axes.look(addition.output, left))
            for branch in addition.branches:
                axes.enter(branch.writes, [stream])
                if branch.feed_forward is not None:
                    axes.enter(branch.feed_forward.hidden, axes.of_input(branch.feed_forward.down))
    return axes.found


@dataclass(slots=True)
class _Axes:
    graph: Graph
    norms: list[NormRead]
    found: dict[Tap, int] = field(default_factory=dict)
    _weights: dict[tuple[str, str], list[Weight]] = field(default_factory=lambda: defaultdict(list))
    _read_by: dict[int, NormRead] = field(default_factory=dict)
    _written_by: dict[int, NormRead] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for weight in self.graph.weights.values():
            self._weights[weight.node.call.name, weight.parameter.name].append(weight)
        for norm in self.norms:
            self._read_by.setdefault(norm.input.index, norm)
            self._written_by.setdefault(norm.output.index, norm)

    def enter(self, tap: Tap | None, known: Iterable[_Evidence] = (), beside: Iterable[Value] = ()) -> None:
        """Note the axis at a place: carried over from what is known, else from what reads and writes it."""
        value = self.graph.tapped(tap) if tap is not None else None
        if tap is None or value is None or tap in self.found:
            return
        carried = (self.carry(evidence, value) for evidence in known)
        axis = next((axis for axis in carried if axis is not None), None)
        axis = self.look(value, beside) if axis is None else axis
        last = value.tensor.dim() - 1
        self.found[tap] = -1 if axis % max(last + 1, 1) == last else axis % (last + 1)

    # what is known beforehand ----------------------------------------------------------------------------------------

    def of_norm(self, norm: NormRead) -> list[_Evidence]:
        """A norm's output, unless it normalizes over several axes with a gain for each entry."""
        axes = channel_axes(norm)
        return [_Evidence(norm.output, axes[0])] if len(axes) == 1 else []

    def of_output(self, projection: Projection | None) -> list[_Evidence]:
        """The products with a weight, one per call."""
        weights = self._weights[projection.module, projection.parameter] if projection is not None else []
        return [_Evidence(w.node.outputs[0], w.source_axis, False) for w in weights if w.node.op != "einsum"]

    def of_input(self, projection: Projection | None) -> list[_Evidence]:
        """What a weight reads, one per call."""
        weights = self._weights[projection.module, projection.parameter] if projection is not None else []
        return [_Evidence(w.source, w.source_axis, False) for w in weights if w.source is not None]

    # looking around --------------------------------------------------------------------------------------------------

    def carry(self, evidence: _Evidence, value: Value) -> int | None:
        """The axis of ``value`` that is the known one of another, before or behind it; None if they are not linked."""
        known, dim = evidence.value, evidence.value.tensor.dim()
        axis = evidence.axis % dim
        if value is known:
            return axis
        if self.graph.descends(value, known):
            return carried_axis(self.graph, known, axis, value)
        if not self.graph.descends(known, value):
            return None
        own = value.tensor.dim()
        likely = sorted(range(own), key=lambda place: place - own != axis - dim)  # most often it stays where it is
        return next((place for place in likely if carried_axis(self.graph, value, place, known) == axis), None)

    def look(self, value: Value, beside: Iterable[Value] = ()) -> int:
        """The axis by what reads and writes a value; ``beside`` are values of the same stream, whose readers count."""
        dim = value.tensor.dim()
        if dim <= 2:
            return dim - 1
        around = [self._seen(value, self._ahead)]
        around += [self._at(other, value) for other in beside if other.tensor.dim() == dim]
        around.append(self._seen(value, self._behind))
        votes: Counter[int] = Counter()
        for seen in around:
            for axis, sure in seen:
                if sure:
                    return axis
                votes[axis] += 1
        return votes.most_common(1)[0][0] if votes else 1 if dim > 3 else dim - 1

    def _seen(self, value: Value, way: Callable[[Value], Iterator[_Evidence]]) -> list[tuple[int, bool]]:
        """Axes of a value with whether they are sure, nearest first; nothing behind the first sure one."""
        found: list[tuple[int, bool]] = []
        for evidence in islice(way(value), _VOTES):
            axis = self.carry(evidence, value)
            if axis is not None:
                found.append((axis, evidence.sure))
                if evidence.sure:
                    break
        return found

    def _at(self, other: Value, value: Value) -> list[tuple[int, bool]]:
        """What reads another value of a stream, told for ``value``."""
        if other is value:
            return []
        found = [(self.carry(_Evidence(other, axis), value), sure) for axis, sure in self._seen(other, self._ahead)]
        return [(axis, sure) for axis, sure in found if axis is not None]

    def _ahead(self, value: Value) -> Iterator[_Evidence]:
        """What reads a value, through moves and element-wise functions."""
        ahead, passed = [value], {value.index}
        while ahead and len(passed) < _FAR:
            current = ahead.pop(0)
            norm = self._read_by.get(current.index)
            if norm is not None and len(channel_axes(norm)) == 1:
                yield _Evidence(norm.input, channel_axes(norm)[0])
            for node in self.graph.readers[current.index]:
                weight = next(
                    (self.graph.weights[o.index] for o in node.outputs if o.index in self.graph.weights), None
                )
                if weight is not None:
                    if weight.source is current:
                        yield _Evidence(current, weight.source_axis, False)
                elif node.op in POOLS and node.op[-2:] in ("1d", "2d", "3d"):
                    yield _Evidence(current, -int(node.op[-2]) - 1, False)
                else:
                    yield from self._gain(node)
                    ahead += self._next(node, node.outputs, passed)

    def _behind(self, value: Value) -> Iterator[_Evidence]:
        """What wrote a value, through moves and element-wise functions."""
        behind, passed = [value], {value.index}
        while behind and len(passed) < _FAR:
            current = behind.pop(0)
            norm, weight = self._written_by.get(current.index), self.graph.weights.get(current.index)
            if norm is not None:
                yield from self.of_norm(norm)
            elif weight is not None:
                if weight.node.op != "einsum":
                    yield _Evidence(current, weight.source_axis, False)
            elif current.index in self.graph.lookups:
                yield _Evidence(current, -1, False)
            elif current.producer is not None:
                yield from self._gain(current.producer)
                behind += self._next(current.producer, current.producer.inputs, passed)

    def _next(self, node: Node, values: list[Value], passed: set[int]) -> list[Value]:
        """Those of a node's inputs or outputs to go on with."""
        if node.op not in MOVES and node.op not in ELEMENTWISE:
            return []
        fresh = [v for v in values if v.index not in passed and v.floating and self.graph.signal & bit(v)]
        passed.update(v.index for v in fresh)
        return fresh

    def _gain(self, node: Node) -> Iterator[_Evidence]:
        """A product or sum with a parameter that has one entry per channel."""
        if node.op not in ("mul", "add") or not node.outputs:
            return
        made = node.outputs[0]
        for factor in node.inputs:
            wide = [axis - factor.tensor.dim() for axis, size in enumerate(factor.tensor.shape) if size > 1]
            if len(wide) == 1 and self.graph.root(factor).kind == "parameter":
                yield _Evidence(made, wide[0])
