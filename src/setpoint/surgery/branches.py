"""The residual stream and what is added to it.

An addition writes to the stream when one operand reaches a common ancestor with no weight between (the stream) and
the other through a weight (the branch). So does the subtraction of a branch. Two convolved operands (a down-sampling
shortcut) count as well. What lies between the common ancestor and the branch operand is then read as attention,
feed-forward or convolution.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from setpoint.surgery.activations import activations
from setpoint.surgery.behaviour import NormRead
from setpoint.surgery.graph import Graph, Weight, bit, members
from setpoint.surgery.indices import output_rows
from setpoint.surgery.norms import reaches
from setpoint.surgery.ops import CONVOLUTIONS, MOVES
from setpoint.surgery.tape import Node, Value
from setpoint.types import AttentionSite, Branch, BranchRole, FeedForwardSite, Projection


@dataclass(slots=True, eq=False)
class Addition:
    """One residual addition: ``output = stream + branch``; ``source`` is where the branch leaves the stream.

    The branch may be subtracted, or scaled in the sum (``torch.add(..., alpha=...)``).
    """

    node: Node
    stream: Value
    branch: Value
    source: Value
    output: Value
    parts: list[Value] = field(default_factory=list)
    branches: list[Branch] = field(default_factory=list)
    block: int = 0

    @property
    def scaled(self) -> bool:
        """Whether the branch takes part with a sign or factor of the sum itself."""
        return scaled_operand(self.node) is self.branch


def find_additions(graph: Graph) -> list[Addition]:
    """Residual additions in order of execution."""
    found = [a for node in graph.tape.nodes if node.op in ("add", "sub") for a in _addition(graph, node)]
    branches = {a.branch.index for a in found}  # parallel branches are summed before they are added
    scores = [node.inputs[0] for node in graph.cores if node.op == "softmax"]
    kept = [a for a in found if a.output.index not in branches and not any(reaches(graph, a.output, s) for s in scores)]
    for addition in kept:
        addition.parts = parallel_parts(graph, addition)
    return kept


def scaled_operand(node: Node) -> Value | None:
    """What a sum takes with a factor of its own: what is subtracted, or times ``alpha``."""
    scales = len(node.inputs) > 1 and (node.op == "sub" or node.kwargs.get("alpha", 1) != 1)
    return node.inputs[1] if scales else None


def _operands(graph: Graph, node: Node) -> tuple[Value, Value] | None:
    values = [v for v in node.inputs if v.floating and graph.root(v).kind not in ("parameter", "buffer", "constant")]
    if len(values) != 2 or values[0].tensor.shape != values[1].tensor.shape or values[0].tensor.dim() < 2:
        return None
    return values[0], values[1]


def _is_gated(graph: Graph, stream: Value) -> bool:
    """Whether an operand is a product of two signals: the step of a recurrence, not a stream that passes."""
    while stream.producer is not None and stream.producer.op in MOVES and stream.producer.inputs:
        stream = stream.producer.inputs[0]
    maker = stream.producer
    if maker is None or maker.op != "mul":
        return False
    return sum(value.tensor.numel() > 1 and bool(graph.signal & bit(value)) for value in maker.inputs) > 1


def _goes_on(graph: Graph, difference: Value) -> bool:
    """Whether a difference is a stream that a weight reads or the model gives out, and not an error to be squared."""
    shape = difference.tensor.shape
    ends = (v for v in graph.tape.outputs if v.floating and v.tensor.shape == shape)
    return graph.next_weight(difference) is not None or any(reaches(graph, difference, end) for end in ends)


def _source(graph: Graph, common: int) -> Value | None:
    values = [graph.tape.values[i] for i in members(common)]
    values = [
        v
        for v in values
        if v.floating and v.tensor.dim() >= 2 and (v.kind == "input" or graph.signal & bit(v)) and v.kind != "constant"
    ]
    return values[-1] if values else None


def _addition(graph: Graph, node: Node) -> list[Addition]:
    operands = _operands(graph, node)
    if operands is None or not node.outputs:
        return []
    ways = [operands, operands[::-1]]
    if node.op == "sub":
        ways = ways[:1] if _goes_on(graph, node.outputs[0]) else []
    for stream, branch in ways:
        source = _source(graph, (graph.light.get(stream.index, 0) | bit(stream)) & graph.heavy.get(branch.index, 0))
        if source is not None and not _is_gated(graph, stream):
            return [Addition(node, stream, branch, source, node.outputs[0])]
    a, b = operands
    ends = graph.last_weight(a), graph.last_weight(b)
    if node.op == "add" and all(end is not None and end.node.op in CONVOLUTIONS for end in ends):
        source = _source(graph, graph.heavy[a.index] & graph.heavy[b.index])
        if source is not None:
            depth = [(graph.ancestors[v.index] & ~graph.ancestors.get(source.index, 0)).bit_count() for v in (a, b)]
            stream, branch = (a, b) if depth[0] < depth[1] else (b, a)
            return [Addition(node, stream, branch, source, node.outputs[0])]
    return []


def read_branches(graph: Graph, addition: Addition, later: Value | None, norms: list[NormRead]) -> list[Branch]:
    """What one addition adds, one branch per entry of its ``parts``.

    Args:
        graph: The graph.
        addition: The addition.
        later: Stream operand of the next addition, to see which norms stand on the stream; None behind the last.
        norms: Every norm.
    """
    after = tuple(
        norm.name
        for norm in norms
        if norm.input.index >= addition.output.index
        and norm.input.index - addition.output.index < 64
        and reaches(graph, addition.output, norm.input)
        and (later is None or reaches(graph, norm.output, later))
    )
    return [_branch(graph, addition, part, after, norms) for part in addition.parts]


def parallel_parts(graph: Graph, addition: Addition) -> list[Value]:
    """What an addition adds: one value, or two where parallel branches were summed first, in order of execution.

    A weight and its low-rank adapter are one branch, summed on the way.
    """
    maker = addition.branch.producer
    if maker is None or maker.op != "add" or scaled_operand(maker) is not None:
        return [addition.branch]
    operands = _operands(graph, maker)
    if operands is None or not all(graph.heavy.get(v.index, 0) & bit(addition.source) for v in operands):
        return [addition.branch]
    writers = [graph.last_weight(v, bit(addition.source)) for v in operands]
    made = [writer.node.outputs[0].index for writer in writers if writer is not None]
    if len(set(made)) < 2 or graph.adapters.intersection(made):
        return [addition.branch]
    return sorted(operands, key=lambda value: value.index)


def _branch(graph: Graph, addition: Addition, end: Value, after: tuple[str, ...], norms: list[NormRead]) -> Branch:
    source = bit(addition.source)
    between = (graph.ancestors.get(end.index, 0) | bit(end)) & ~graph.ancestors.get(addition.source.index, 0) & ~source
    inside = [i for i in members(between) if graph.ancestors.get(i, 0) & source]
    here = set(inside)
    weights = [graph.weights[i] for i in inside if i in graph.weights]
    cores = [node for node in graph.cores if node.outputs[0].index in here]
    writer = graph.last_weight(end, source)
    own = [norm for norm in norms if norm.output.index in here]
    inputs = tuple(n.name for n in own if reaches(graph, addition.source, n.input))
    outputs = tuple(n.name for n in own if n.name not in inputs and reaches(graph, n.output, end))
    attention = _attention(graph, cores[-1], norms) if cores else None
    feed_forward = None if cores else _feed_forward(graph, weights, writer, here)
    role: BranchRole = "other"
    if attention is not None:
        role = "attention"
        keys = cores[-1].inputs[1] if len(cores[-1].inputs) > 1 else None
        if cores[-1].op != "softmax" and keys is not None and not graph.ancestors.get(keys.index, 0) & source:
            role = "cross_attention"
    elif any(weight.is_convolution for weight in weights):
        role = "convolution"
    elif feed_forward is not None:
        role = "feed_forward"
    elif any(weight.node.op in CONVOLUTIONS for weight in weights):
        role = "convolution"
    inner = tuple(n.name for n in own if n.name not in (*inputs, *outputs))
    inside_name = writer.node.call.name if writer else None
    return Branch(
        role,
        graph.tap(addition.source),
        graph.tap(end) or graph.tap(end, inside_name),
        inputs,
        outputs,
        after,
        writer.projection() if writer else None,
        attention,
        feed_forward,
        inner,
    )


# attention -----------------------------------------------------------------------------------------------------------


def _values_of_softmax(graph: Graph, node: Node) -> tuple[Value, Value, Value] | None:
    """Queries, keys and values around a written-out softmax."""
    scores = node.inputs[0]
    product: Node | None = None
    value = scores
    while product is None and value.producer is not None:
        maker = value.producer
        if maker.op in ("matmul", "baddbmm", "einsum"):
            product = maker
            break
        above = [v for v in maker.inputs if v.floating and v.tensor.dim() >= 3 and v.kind == "op"]
        heavy = [v for v in above if graph.heavy.get(v.index, 0)]
        if not heavy:
            return None
        value = heavy[0]
    if product is None:
        return None
    q, k = product.inputs[-2:] if product.op == "baddbmm" else product.inputs[:2]
    ahead = [node.outputs[0]]
    while ahead:
        current = ahead.pop(0)
        for reader in graph.readers[current.index]:
            if reader.op in ("matmul", "einsum"):
                return q, k, next(v for v in reader.inputs if v is not current)
            ahead.extend(reader.outputs)
    return None


def _attention(graph: Graph, node: Node, norms: list[NormRead]) -> AttentionSite:
    named = [node.kwargs.get(n) for n in ("query", "key", "value")]
    if node.op == "softmax":
        triple = _values_of_softmax(graph, node)
    else:
        tensors = [
            t if t is not None else a for t, a in zip(named, [*node.args[:3], None, None, None][:3], strict=True)
        ]
        by_tensor = {id(v.tensor): v for v in node.inputs}
        found = [by_tensor.get(id(t)) for t in tensors]
        triple = (found[0], found[1], found[2]) if all(found) else None  # type: ignore[assignment]
    projections: list[Projection | None] = [None, None, None]
    widths = [0, 0, 0]
    if triple is not None:
        for place, value in enumerate(triple):
            weight = graph.last_weight(value)
            if weight is not None:
                rows = output_rows(graph, weight, value)
                projections[place] = weight.projection(rows)
                widths[place] = len(rows) if rows is not None else weight.parameter.tensor.shape[weight.output_axis]
    heads, head_dim = _heads(node, triple, widths)
    out = graph.next_weight(node.outputs[0])
    query_norm = key_norm = ""
    if triple is not None:
        query_norm, key_norm = (_between(graph, value, norms) for value in triple[:2])
    q, k, v = projections
    return AttentionSite(
        node.call.name,
        q,
        k,
        v,
        out.projection() if out else None,
        heads,
        widths[1] // head_dim if head_dim and widths[1] else heads,
        head_dim,
        _causal(node),
        node.op,
        graph.cores.index(node),
        query_norm,
        key_norm,
    )


def _heads(node: Node, triple: tuple[Value, Value, Value] | None, widths: list[int]) -> tuple[int, int]:
    if triple is None:
        return (node.outputs[0].tensor.shape[1] if node.outputs[0].tensor.dim() == 4 else 1), 0
    q = triple[0].tensor
    head_dim = q.shape[-1]
    if q.dim() == 4:
        return q.shape[1], head_dim
    return (widths[0] // head_dim if widths[0] else 1), head_dim


def _between(graph: Graph, value: Value, norms: list[NormRead]) -> str:
    """The norm between a projection and the attention core."""
    weight = graph.last_weight(value)
    if weight is None:
        return ""
    made = weight.node.outputs[0]
    names = [n.name for n in norms if reaches(graph, made, n.input) and reaches(graph, n.output, value)]
    return names[-1] if names else ""


def _causal(node: Node) -> bool:
    if node.op == "softmax":
        return _is_triangle(node.outputs[0].tensor == 0)
    if node.kwargs.get("is_causal") or (len(node.args) > 5 and node.args[5]):
        return True
    mask = node.kwargs.get("attn_mask", node.args[3] if len(node.args) > 3 else None)
    if not isinstance(mask, Tensor) or mask.dim() < 2:
        return False
    return _is_triangle(~mask if mask.dtype == torch.bool else mask < -1e3)


def _is_triangle(hidden: Tensor) -> bool:
    """Whether later keys are hidden, beside slots that stand before or behind the keys of the tokens and are seen."""
    queries, keys = hidden.shape[-2:]
    extra = keys - queries
    if queries < 2 or extra < 0:
        return False
    for own in (hidden[..., extra:], hidden[..., :queries]):
        if bool(own[..., 0, 1:].all()) and not bool(own[..., -1, 0].all()):
            return True
    return False


# feed-forward --------------------------------------------------------------------------------------------------------


def _feed_forward(graph: Graph, weights: list[Weight], down: Weight | None, here: set[int]) -> FeedForwardSite | None:
    if down is None or len(weights) < 2 or down.source is None:
        return None
    hidden = down.source
    activation = next((a for a in activations(graph, here) if reaches(graph, a[1], hidden)), None)
    if activation is None:
        return None
    name, made, before = activation
    first = graph.last_weight(before)
    if first is None or first is down or first.is_convolution or down.is_convolution:
        return None
    up, gate = first.projection(output_rows(graph, first, before)), None
    for node in graph.tape.nodes:
        if node.op != "mul" or not node.outputs or node.outputs[0].index not in here:
            continue
        factors = [v for v in node.inputs if v.index in here and v.floating]
        if len(factors) != 2 or not reaches(graph, node.outputs[0], hidden):
            continue
        for gated, plain in (factors, factors[::-1]):
            if reaches(graph, made, gated) and not reaches(graph, made, plain):
                other = graph.last_weight(plain)
                rows = output_rows(graph, other, plain) if other else None
                if other is not None and (other is not first or rows != up.rows):
                    up, gate = other.projection(rows), up
                break
        if gate is not None:
            break
    experts = down.parameter.tensor.shape[0] if down.parameter.tensor.dim() == 3 else 1
    tap = graph.tap(hidden, down.node.call.name) if experts == 1 else None
    owner = _common(up.module, down.node.call.name)
    return FeedForwardSite(owner, up, gate, down.projection(), name, tap, experts)


def _common(a: str, b: str) -> str:
    parts: list[str] = []
    for left, right in zip(a.split("."), b.split("."), strict=False):
        if left != right:
            break
        parts.append(left)
    return ".".join(parts)
