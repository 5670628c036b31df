"""Everything that is added to the residual stream.

The stream is walked backwards from its additions, through sums and whatever leaves a vector's direction alone, down to
what wrote it: weights with their biases, rows of tables, and bare parameters such as a class token or learned
positions. A fix that moves the mean out of the stream has to treat each of them; what no parameter writes (the model's
own input, positions computed on the fly) is listed apart, so that such a fix can refuse.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from setpoint.surgery.behaviour import NormRead
from setpoint.surgery.branches import Addition, scaled_operand
from setpoint.surgery.graph import Graph, Weight, bit
from setpoint.surgery.indices import output_rows
from setpoint.surgery.ops import CONVOLUTIONS, ELEMENTWISE, MOVES, RESAMPLES
from setpoint.surgery.tape import Node, Value
from setpoint.types import BranchRole, Projection, Unread, Writer

Role = BranchRole | Literal["embedding"]


@dataclass(frozen=True, slots=True)
class _Path:
    """What lies between a value and the sum it ends in; ``via`` runs backwards until `_Walk` is done with it."""

    reader: str = ""
    via: tuple[str, ...] = ()
    scale: str = ""
    norms: tuple[str, ...] = ()

    def behind(self, node: Node, label: str, **changes: object) -> _Path:
        return replace(self, reader=node.call.name, via=(label, *self.via), **changes)  # type: ignore[arg-type]


_START = _Path()


def find_writers(
    graph: Graph, additions: list[Addition], norms: list[NormRead]
) -> tuple[tuple[Writer, ...], tuple[Unread, ...]]:
    """Writers of every residual stream, those that it starts from first, and what no parameter writes."""
    walk = _Walk(graph, norms)
    starts: list[Writer] = []
    inside: list[Writer] = []
    for addition in additions:
        starts += walk.writers(addition.source, None, "embedding")
        walk.passed.add(addition.output.index)
        convolved = any(weight.node.op in CONVOLUTIONS for weight in walk.weights_of(addition.stream))
        inside += walk.writers(addition.stream, addition.block, "convolution" if convolved else "other")
        for branch, part in zip(addition.branches, addition.parts, strict=True):
            path = _Path(via=("scale",) if addition.scaled else ())
            inside += walk.writers(part, addition.block, branch.role, bit(addition.source), path)
    return tuple(dict.fromkeys(starts + inside)), tuple(dict.fromkeys(walk.unwritten))


class _Walk:
    """Walks a stream backwards; a value that was passed once is not walked again."""

    def __init__(self, graph: Graph, norms: list[NormRead]) -> None:
        self.graph = graph
        self.norms = {norm.output.index: norm for norm in norms}
        self.passed: set[int] = set()
        self.unwritten: list[Unread] = []
        self._found: list[Writer] = []
        self._below = 0
        self._block: int | None = None
        self._role: Role = "embedding"
        self._end: Value | None = None

    def weights_of(self, value: Value) -> list[Weight]:
        """The weight a value comes from, unless its writers are known."""
        weight = None if value.index in self.passed else self.graph.last_weight(value)
        return [] if weight is None else [weight]

    def writers(
        self, value: Value, block: int | None, role: Role, below: int = 0, path: _Path = _START
    ) -> list[Writer]:
        """What wrote ``value``, as far as it was not passed before; ``below`` is where its branch left the stream."""
        self._found, self._end = [], value
        self._block, self._role, self._below = block, role, below
        self._follow(value, path)
        return self._found

    def _follow(self, value: Value, path: _Path) -> None:
        if value.index in self.passed:
            return
        node = value.producer
        if node is not None:  # a parameter may be added in several places
            self.passed.add(value.index)
        weight = self.graph.weights.get(value.index)
        norm = self.norms.get(value.index)
        if weight is not None:
            self._enter(self._projection(weight), path)
        elif value.index in self.graph.lookups and node is not None:
            table = self.graph.root(node.inputs[self.graph.lookups[value.index]])
            self._enter(Projection(node.call.name, table.name, "", table.tensor.dim() - 1), path)
        elif norm is not None:
            self._follow(
                norm.input, replace(path, via=(f"{norm.kind}_norm", *path.via), norms=(norm.name, *path.norms))
            )
        elif node is None:
            self._leaf(value, path)
        elif node.op in MOVES:
            for above in node.inputs:
                if above.floating:
                    self._follow(above, path.behind(node, MOVES[node.op]))
        elif node.op in ("add", "sub"):
            self._sum(node, path)
        elif node.op in ("mul", "div"):
            self._product(node, value, path)
        elif node.op in RESAMPLES:
            for above in node.inputs:
                if above.floating:
                    self._follow(above, path.behind(node, "resample"))
        elif node.op in ("neg", "negative", "positive"):
            self._follow(node.inputs[0], path.behind(node, "scale"))
        elif node.op in ELEMENTWISE:
            for above in node.inputs:
                if above.floating and above.tensor.shape == value.tensor.shape:
                    self._follow(above, path.behind(node, node.op))
        else:
            self._mixed(node, value, path)

    def _enter(self, projection: Projection, path: _Path) -> None:
        self._found.append(Writer(projection, self._block, self._role, path.via, path.scale, path.norms))

    def _projection(self, weight: Weight) -> Projection:
        assert self._end is not None
        return weight.projection(output_rows(self.graph, weight, self._end))

    def _leaf(self, value: Value, path: _Path) -> None:
        """A parameter or buffer added as it is, or something that has no name."""
        if value.kind in ("parameter", "buffer"):
            shape = value.tensor.shape
            # a vector per channel for feature maps is stored as (..., channels, 1, 1)
            axis = len(shape) - 3 if len(shape) >= 3 and shape[-1] == shape[-2] == 1 else max(len(shape) - 1, 0)
            self._enter(Projection(path.reader, value.name, "", axis), path)
        elif value.kind == "input":
            self.unwritten.append(Unread(path.reader, "the stream starts from the model's input"))
        else:
            self.unwritten.append(Unread(path.reader, "a tensor made in the forward is added to the stream"))

    def _sum(self, node: Node, path: _Path) -> None:
        numbers = [a for a in node.args if isinstance(a, int | float) and a != 0]
        if numbers:
            self.unwritten.append(Unread(node.call.name, "a number is added to the stream"))
        scaled = scaled_operand(node)
        for above in dict.fromkeys(node.inputs):
            if above.floating:
                via = ("scale", *path.via) if above is scaled else path.via
                self._follow(above, replace(path, reader=node.call.name, via=via))

    def _product(self, node: Node, value: Value, path: _Path) -> None:
        """Through a product with fixed factors; one that varies by channel and input keeps its name in ``via``."""
        scale, label, factors = path.scale, "scale", []
        for above in dict.fromkeys(node.inputs):
            root = self.graph.root(above)
            if root.kind == "parameter" and node.op == "mul" and not scale:
                scale = root.name
            elif not _is_scalar(above, value):
                factors.append(above)
        if len(factors) > 1:
            label = node.op
            factors = [f for f in factors if self.graph.heavy.get(f.index, 0) & self._below] or factors
        for above in factors[:1]:
            self._follow(above, path.behind(node, label, scale=scale))

    def _mixed(self, node: Node, value: Value, path: _Path) -> None:
        """Behind an op that mixes values, the last weight stands for what is added."""
        weight = self.graph.last_weight(value, self._below)
        if weight is not None:
            self.passed.add(weight.node.outputs[0].index)
            self._enter(self._projection(weight), path.behind(node, node.op))
        elif not self.graph.signal & bit(value):
            self._leaf(value, path)
        else:
            what = "code that can't be seen" if node.op == "opaque" else f"the op {node.op}"
            self.unwritten.append(Unread(node.call.name, f"the stream comes from {what}"))


def _is_scalar(factor: Value, product: Value) -> bool:
    """Whether a factor is one number, or one per token or picture: the same for all channels of a vector."""
    shape, whole = factor.tensor.shape, product.tensor.shape
    if factor.tensor.numel() == 1:
        return True
    if len(whole) >= 4 and len(shape) == len(whole):
        return shape[1] == shape[-1] == 1
    return bool(shape) and shape[-1] == 1 != whole[-1]
