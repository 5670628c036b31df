"""Questions about a tape: what comes from what, with or without a weight between, and where a tensor can be caught.

Ancestors are kept as bit sets over value numbers. Two sets matter. The *light* ancestors of a value reach it without
meeting a weight matrix, a convolution or an attention core; the *heavy* ones reach it through at least one weight. A
residual addition is an ``a + b`` where a light ancestor of ``a`` (or ``a`` itself) is a heavy ancestor of ``b``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from setpoint.running import tensors_of
from setpoint.surgery.ops import CONTRACTIONS, CONVOLUTIONS, MOVES
from setpoint.surgery.tape import Call, Node, Tape, Value
from setpoint.types import Projection, Tap


@dataclass(slots=True, eq=False)
class Weight:
    """A contraction with a parameter: the node, the parameter, and which of its axes meets which of the input's.

    ``seen`` is the parameter as the op gets it (transposed, or a part of it), ``seen_axis`` its axis of outputs.
    ``input_axis`` is None where no single axis of the parameter meets the channels (a grouped convolution).
    """

    node: Node
    parameter: Value
    source_axis: int
    input_axis: int | None
    output_axis: int
    bias: str
    source: Value | None
    seen: Value
    seen_axis: int

    @property
    def is_convolution(self) -> bool:
        """Whether it is a convolution with a window."""
        return self.node.op in CONVOLUTIONS and any(size > 1 for size in self.parameter.tensor.shape[2:])

    def projection(self, rows: range | tuple[int, ...] | None = None) -> Projection:
        """As the contract type."""
        return Projection(self.node.call.name, self.parameter.name, self.bias, self.output_axis, rows)


class Graph:
    """A tape with its ancestors, weights and taps worked out."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self.readers: dict[int, list[Node]] = defaultdict(list)
        self.weights: dict[int, Weight] = {}  # by the number of the output value
        self.ancestors: dict[int, int] = {}
        self.light: dict[int, int] = {}
        self.heavy: dict[int, int] = {}
        self.signal = 0  # values that depend on what the model is fed, unlike rotary tables and masks
        self.cores: list[Node] = []
        self.computed: list[Node] = []  # contractions with a weight that is no parameter
        self.lookups: dict[int, int] = {}  # output value of a lookup -> which of its node's inputs is the table
        self.adapters: set[int] = set()  # output values of low-rank adapters: B of W·x + B·(A·x)
        self._compressions: set[int] = set()  # their A
        self._inputs = sum(bit(value) for value in tape.values if value.kind == "input")
        for node in tape.nodes:
            for value in dict.fromkeys(node.inputs):
                self.readers[value.index].append(node)
        for node in tape.nodes:
            self._enter(node)
        self._taps: dict[int, list[tuple[Call, Tap]]] = defaultdict(list)
        for call in tape.calls:
            for index, value in enumerate(call.outputs):
                self._taps[id(value.tensor)].append((call, Tap(call.name, "output", index, call.ordinal)))
        for call in tape.calls:
            for index, value in enumerate(call.inputs):
                self._taps[id(value.tensor)].append((call, Tap(call.name, "input", index, call.ordinal)))

    def _enter(self, node: Node) -> None:
        weight = self._weight(node)
        core = self.is_core(node)
        if core:
            self.cores.append(node)
        table = self._table(node)
        if table is not None and node.outputs:
            self.lookups[node.outputs[0].index] = table
        # code that can't be seen and has a matrix of its own is taken for a layer
        hidden = node.op == "opaque" and any(v.kind == "parameter" and v.tensor.dim() > 1 for v in node.inputs)
        fed = any(v.floating and (v.kind == "input" or self.signal & bit(v)) for v in node.inputs)
        if weight is None and fed and any(self._is_computed(v) for v in _matrices(node)):
            self.computed.append(node)
            hidden = True
        opaque = weight is not None or core or node.op in CONTRACTIONS or table is not None or hidden
        ancestors = light = heavy = 0
        for value in node.inputs:
            if value.kind in ("parameter", "buffer"):
                continue
            own = 1 << value.index
            above = self.ancestors.get(value.index, 0) | own
            ancestors |= above
            heavy |= above if weight is not None or hidden else self.heavy.get(value.index, 0)
            if not opaque and value.floating:
                light |= self.light.get(value.index, 0) | own
        for value in node.outputs:
            if value.floating and (fed or table is not None or (weight is not None and ancestors & self._inputs)):
                self.signal |= bit(value)
            self.ancestors[value.index] = ancestors
            self.light[value.index] = light
            self.heavy[value.index] = heavy
            if weight is not None:
                self.weights[value.index] = weight
        if node.op == "add":
            self._note_adapter(node)

    def _table(self, node: Node) -> int | None:
        """Which input of a lookup is the table: ``F.embedding``, or a parameter indexed by integers that are fed."""
        if node.op.startswith("embedding"):
            return next((i for i, v in enumerate(node.inputs) if self.root(v).kind == "parameter"), 0)
        if node.op not in ("getitem", "index", "index_select") or not node.inputs:
            return None
        table, *indices = node.inputs
        root = self.root(table)
        if root.kind != "parameter" or table.tensor.dim() != 2 or not table.floating:
            return None
        # an index that comes from a weight is a router's choice of an expert
        fed = [v for v in indices if not v.floating and v.tensor.dim() and not self.heavy.get(v.index, 0)]
        return 0 if any(v.tensor.dtype != torch.bool for v in fed) else None

    # weights ---------------------------------------------------------------------------------------------------------

    def root(self, value: Value) -> Value:
        """The parameter behind a view or cast of it, or the value itself."""
        while value.kind == "op" and value.producer is not None and value.producer.op in MOVES:
            if not value.producer.inputs or value.index in self.lookups or self._joins(value.producer):
                break
            value = value.producer.inputs[0]
        return value

    def _is_computed(self, value: Value) -> bool:
        """Whether a matrix is a buffer, or computed from parameters alone as weight and spectral norm do."""
        if value.kind in ("parameter", "buffer"):
            return value.floating
        maker = value.producer
        if maker is None or not value.floating or value.tensor.dim() < 2 or self.signal & bit(value):
            return False
        return any(self._is_computed(above) for above in maker.inputs if above.kind != "constant")

    def _joins(self, node: Node) -> bool:
        """Whether a node puts something else beside a parameter, as a class token is put before patches."""
        return MOVES[node.op] == "concat" and any(
            self.root(value).kind != "parameter" for value in node.inputs if value.floating
        )

    def _weight(self, node: Node) -> Weight | None:
        if node.op not in CONTRACTIONS:
            return None
        found = [(seen, self.root(seen)) for seen in node.inputs]
        matrices = [(seen, root) for seen, root in found if root.kind == "parameter" and root.tensor.dim() >= 2]
        sources = [seen for seen, root in found if root.kind != "parameter" and seen.floating]
        if not sources and node.op == "linear" and len(matrices) > 1:  # a learned query is projected
            sources, matrices = [matrices[0][0]], matrices[1:]
        if not matrices or not sources:
            return None
        (seen, root), source = matrices[0], sources[0]
        axes = _axes(node, seen.tensor, source.tensor, node.inputs.index(seen) < node.inputs.index(source))
        output = self._axis(seen, root, axes.output % seen.tensor.dim())
        into = None if axes.input is None else self._axis(seen, root, axes.input % seen.tensor.dim())
        if axes.input is not None and (into is None or root.tensor.shape[into] != seen.tensor.shape[axes.input]):
            into = None
        biases = [r.name for _, r in found if r.kind == "parameter" and r.tensor.dim() == 1]
        return Weight(node, root, axes.source, into, output, biases[0] if biases else "", source, seen, axes.output)

    def _axis(self, seen: Value, root: Value, axis: int) -> int:
        """Carry an axis of a view back to its parameter, through transposes and indexing of leading axes."""
        value = seen
        while value is not root and value.producer is not None:
            above = value.producer.inputs[0]
            if value.producer.op in ("t", "T", "mT", "transpose", "mH", "H", "adjoint"):
                dim = value.tensor.dim()
                if axis >= dim - 2:
                    axis = 2 * dim - 3 - axis
            axis += above.tensor.dim() - value.tensor.dim()
            value = above
        return axis

    # low-rank adapters ----------------------------------------------------------------------------------------------

    def _note_adapter(self, node: Node) -> None:
        """Note B of a sum W·x + B·(A·x): both ways start from one x, with nothing but a scale on the way."""
        operands = [v for v in node.inputs if v.floating]
        if len(operands) != 2:
            return
        for main, side in (operands, operands[::-1]):
            weight, expansion = self.last_weight(main), self.last_weight(side)
            if weight is None or expansion is None or weight is expansion or expansion.source is None:
                continue
            compressed = self._plain(expansion.source)
            compression = self.weights.get(compressed.index)
            if compression is None or compression.source is None or weight.source is None:
                continue
            if self._plain(compression.source) is self._plain(weight.source):
                self.adapters.add(expansion.node.outputs[0].index)
                self._compressions.add(compressed.index)
                return

    def _plain(self, value: Value) -> Value:
        """What a value is without casts, dropout, reshapes and scalar factors."""
        while value.producer is not None and value.index not in self.weights:
            node = value.producer
            above = [v for v in node.inputs if v.floating and v.tensor.numel() > 1]
            if len(above) != 1 or not (node.op in MOVES or node.op in ("mul", "div")):
                break
            value = above[0]
        return value

    def is_core(self, node: Node) -> bool:
        """Whether a node is where an attention attends: fused, or a softmax whose rows then weigh the values."""
        if node.op == "scaled_dot_product_attention":
            return True
        if node.op != "softmax" or not node.outputs or node.outputs[0].tensor.dim() < 3:
            return False
        weighed = [node.outputs[0]]
        while weighed:
            value = weighed.pop()
            for reader in self.readers[value.index]:
                if reader.op in ("matmul", "einsum", "baddbmm") and self._weight(reader) is None:
                    return True
                if reader.op in MOVES or reader.op == "mul":
                    weighed.extend(reader.outputs)
        return False

    def descends(self, value: Value, origin: Value) -> bool:
        """Whether a value is another, or comes from it in any way."""
        return value is origin or bool(self.ancestors.get(value.index, 0) & bit(origin))

    def last_weight(self, value: Value, below: int = 0) -> Weight | None:
        """The latest weight that a value comes from with no other weight or core between; descends from ``below``.

        Of a weight and its low-rank adapter, the weight.
        """
        reach = self.light.get(value.index, 0) | 1 << value.index
        adapter = None
        for index in reversed(self.weights):  # entered in order of execution
            if index <= value.index and reach >> index & 1 and (not below or self.ancestors[index] & below):
                if index not in self.adapters and (not self.signal & bit(value) or self.signal >> index & 1):
                    return self.weights[index]
                adapter = adapter or self.weights[index]
        return adapter

    def next_weight(self, value: Value) -> Weight | None:
        """The first weight that reads a value, with no weight or core between."""
        ahead, seen = [value], {value.index}
        while ahead:
            current = ahead.pop(0)
            for node in self.readers[current.index]:
                for output in node.outputs:
                    if output.index in self.weights:
                        if output.index not in self._compressions:
                            return self.weights[output.index]
                    elif output.index not in seen and node not in self.cores:
                        seen.add(output.index)
                        ahead.append(output)
        return None

    # taps ------------------------------------------------------------------------------------------------------------

    def taps(self, value: Value) -> Iterator[tuple[Call, Tap]]:
        """Where hooks can catch a value: outputs before inputs, the outermost module last."""
        seen = self._taps.get(id(value.tensor), [])
        yield from (found for found in seen if found[1].side == "output")
        yield from (found for found in seen if found[1].side == "input")

    def tapped(self, tap: Tap) -> Value | None:
        """The value that a hook at a tap catches."""
        for call in self.tape.calls:
            if (call.name, call.ordinal) == (tap.module, tap.call):
                values = call.outputs if tap.side == "output" else call.inputs
                return values[tap.index] if tap.index < len(values) else None
        return None

    def tap(self, value: Value | None, inside: str | None = None) -> Tap | None:
        """The first tap of a value; with ``inside``, that of the module of this name if it has one."""
        if value is None:
            return None
        found = list(self.taps(value))
        for call, tap in found:
            if inside is not None and call.name == inside:
                return tap
        for reader in self.readers[value.index] if not found else ():
            if reader.op in MOVES and reader.outputs:
                for _, tap in self.taps(reader.outputs[0]):
                    return tap
        maker = value.producer
        if not found and maker is not None and MOVES.get(maker.op) in ("view", "clone") and maker.inputs:
            above = maker.inputs[0]  # the same numbers in another shape, if the channels stay the last axis
            if above.tensor.shape[-1:] == value.tensor.shape[-1:]:
                found = list(self.taps(above))
        return found[0][1] if found else None


def _matrices(node: Node) -> list[Value]:
    """The inputs of a contraction that can be a layer's weight."""
    if node.op not in CONTRACTIONS:
        return []
    return [value for value in node.inputs if value.tensor.dim() == 2 or node.op in CONVOLUTIONS]


class Axes(NamedTuple):
    """Axes of a contraction: the source's and the parameter's that are summed over, and the parameter's outputs."""

    source: int
    input: int | None
    output: int


def _axes(node: Node, weight: Tensor, source: Tensor, weight_first: bool) -> Axes:
    if node.op in CONVOLUTIONS:
        return _convolution_axes(node, weight, source)
    if node.op == "einsum":
        return _einsum_axes(node, weight, source)
    if node.op in ("linear", "bilinear"):
        return Axes(-1, 1, 0)
    return Axes(-2, -1, -2) if weight_first else Axes(-1, -2, -1)


def _convolution_axes(node: Node, weight: Tensor, source: Tensor) -> Axes:
    channels = 1 - weight.dim()
    generic = node.op == "conv"
    transposed = node.op.startswith("conv_transpose") or (generic and bool(node.args[6]))
    place = 8 if generic else 6
    groups = node.kwargs.get("groups", node.args[place] if len(node.args) > place else 1)
    if transposed:
        return Axes(channels, 0, 1)
    if groups == 1:
        return Axes(channels, 1, 0)
    depthwise = groups == source.shape[channels] == weight.shape[0]
    return Axes(channels, 0 if depthwise else None, 0)


def _einsum_axes(node: Node, weight: Tensor, source: Tensor) -> Axes:
    """From the letters; with several letters summed over, no single axis of the weight meets the channels."""
    terms, _, result = str(node.args[0]).replace(" ", "").partition("->")
    operands = dict(zip(map(id, tensors_of(node.args[1:])), terms.split(","), strict=False))
    letters, other = operands.get(id(weight), ""), operands.get(id(source), "")
    summed = [letter for letter in letters if letter in other and letter not in result]
    kept = [letter for letter in letters if letter in result and letter not in other]
    output = letters.index(kept[-1]) if kept else 0
    if len(summed) != 1 or "." in letters:
        return Axes(-1, None, output)
    return Axes(other.index(summed[0]) - len(other), letters.index(summed[0]), output)


def bit(value: Value) -> int:
    """The bit set that holds one value."""
    return 1 << value.index


def members(bits: int) -> Iterator[int]:
    """Numbers in a bit set, ascending.

    >>> list(members(0b1011))
    [0, 1, 3]
    """
    while bits:
        low = bits & -bits
        yield low.bit_length() - 1
        bits ^= low
