"""Which parts of a model normalize, and what reads them.

Norms are known by op (``layer_norm``, ``batch_norm``, ...) and, where one is plain arithmetic, by behaviour
(`setpoint.surgery.behaviour`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from setpoint.surgery.behaviour import NormRead, norm_of_call, norms_inline
from setpoint.surgery.graph import Graph, bit
from setpoint.surgery.indices import Indices, read_channels, used_rows
from setpoint.surgery.ops import ACTIVATIONS, MOVES, NORMS
from setpoint.surgery.tape import Call, Node, Value
from setpoint.types import NormKind, NormSite, Use


def find_norms(graph: Graph) -> list[NormRead]:
    """Every call of every norm, in order of execution; those in a bigger forward are numbered within it."""
    found = [read for call in graph.tape.calls if (read := norm_of_call(graph, call)) is not None]
    inside = {id(node) for read in found for node in read.nodes}
    found += [_by_op(graph, node) for node in graph.tape.nodes if node.op in NORMS and id(node) not in inside]
    inside = {id(node) for read in found for node in read.nodes}
    found += norms_inline(graph, inside)
    found.sort(key=lambda read: read.output.index)
    counts: dict[int, int] = {}
    for read in found:
        if not read.name:
            place = counts[id(read.call)] = counts.get(id(read.call), -1) + 1
            read.name = f"{read.call.name}#{place}"
    return found


def _argument(node: Node, name: str, position: int, default: Any = None) -> Any:
    return node.kwargs[name] if name in node.kwargs else node.args[position] if len(node.args) > position else default


def _by_op(graph: Graph, node: Node) -> NormRead:
    kind: NormKind = NORMS[node.op]  # type: ignore[assignment]
    call = node.call
    alone = sum(other.op in NORMS for other in call.nodes) == 1 and not call.children
    x = node.inputs[0]
    dim = x.tensor.dim()
    groups = 1
    if kind in ("layer", "rms"):
        axes = tuple(range(-len(_argument(node, "normalized_shape", 1)), 0))
        eps = _argument(node, "eps", 4 if kind == "layer" else 3)
        if eps is None:  # what torch's RMS norm takes then
            eps = torch.finfo(x.tensor.dtype).eps
    else:
        kept = {"batch": (1,), "instance": (0, 1), "group": (0,)}[kind]
        axes = tuple(axis - dim for axis in range(dim) if axis not in kept)
        eps = _argument(node, "eps", {"batch": 7, "instance": 7, "group": 4}[kind])
        groups = int(_argument(node, "num_groups", 1, 1)) if kind == "group" else 1
    parameters = [value for value in map(graph.root, node.inputs[1:]) if value.kind == "parameter"]
    gain = parameters[0] if parameters else None
    shift = parameters[1] if len(parameters) > 1 else None
    return NormRead(
        call.name if alone else "",
        kind,
        call,
        x,
        node.outputs[0],
        axes,
        float(eps) if isinstance(eps, int | float) else None,
        kind != "rms",
        gain.tensor.detach() if gain else None,
        shift.tensor.detach() if shift else None,
        gain.name if gain else "",
        shift.name if shift else "",
        groups,
        _is_given(call, x, len(axes)),
        [node],
    )


def _is_given(call: Call, value: Value, trailing: int) -> bool:
    """Whether a value is an input of a module, moved at most, with its last ``trailing`` axes where they were."""
    while all(value is not given for given in call.inputs):
        maker = value.producer
        move = MOVES.get(maker.op) if maker is not None else None
        if maker is None or move not in ("view", "transpose", "cast", "clone", "to"):
            return False
        after, value = value.tensor, maker.inputs[0]
        before = value.tensor
        if after.shape[-trailing:] != before.shape[-trailing:]:
            return False
        if move == "transpose" and after.stride()[-trailing:] != before.stride()[-trailing:]:
            return False
    return True


@dataclass(frozen=True, slots=True)
class Product:
    """One product with a weight in the pass.

    Args:
        norms: Names of the norms whose output it was multiplied by; none where something else came in.
        rows: Output indices of the weight that took part; None for all.
    """

    norms: frozenset[str]
    rows: Indices | None


Readings = dict[int, set[str]]
"""Number of a product's output -> names of the norms that were read."""


def find_uses(graph: Graph, read: NormRead, norms: list[NormRead], readings: Readings) -> list[Use]:
    """Every reader of a norm's output, followed through ops that only move values; ``readings`` is added to."""
    by_input: dict[int, list[NormRead]] = {}
    for norm in norms:
        by_input.setdefault(norm.input.index, []).append(norm)
    uses: list[Use] = []
    ahead: list[tuple[Value, tuple[str, ...]]] = [(read.output, ())]
    seen = {read.output.index}
    while ahead:
        value, via = ahead.pop(0)
        following = by_input.get(value.index, [])
        for norm in following:
            uses.append(Use(norm.name, via=via, call_index=norm.call.ordinal, op=f"{norm.kind}_norm"))
        if any(value is output for output in graph.tape.outputs):  # what the caller gets must not change in a fold
            uses.append(Use("", via=via, op="output"))
        inside = {id(node) for norm in following for node in norm.nodes}
        for node in graph.readers[value.index]:
            if id(node) in inside:
                continue
            weight = next((graph.weights[o.index] for o in node.outputs if o.index in graph.weights), None)
            if weight is not None:
                readings.setdefault(weight.node.outputs[0].index, set()).add(read.name)
                reading = read_channels(graph, read.output, channel_axes(read), weight)
                passed = (*via, "merge") if reading.merged else via
                uses.append(
                    Use(
                        node.call.name,
                        weight.parameter.name,
                        reading.input_axis,
                        reading.channels,
                        node.call.ordinal,
                        passed,
                        output_axis=weight.output_axis,
                        bias=weight.bias,
                        rows=used_rows(graph, weight),
                    )
                )
            elif node.op in MOVES or node.op in ACTIVATIONS:
                label = MOVES.get(node.op, node.op)
                for output in node.outputs:
                    if output.index not in seen:
                        seen.add(output.index)
                        ahead.append((output, (*via, label)))
            elif node.op != "alias_write":
                uses.append(Use(node.call.name, call_index=node.call.ordinal, via=via, op=node.op))
    return list(dict.fromkeys(uses))


def channel_axes(read: NormRead) -> tuple[int, ...]:
    """The axes that a norm's gain and shift run along, negative."""
    return read.axes if read.kind in ("layer", "rms") else (1 - read.input.tensor.dim(),)


def norm_sites(graph: Graph, reads: list[NormRead]) -> tuple[dict[str, NormSite], dict[str, tuple[Product, ...]]]:
    """Norms as the contract type, by name, and every product with a weight, by the weight's name.

    The calls of one norm are one entry with the uses of all.
    """
    readings: Readings = {}
    calls: dict[str, list[NormRead]] = {}
    for read in reads:
        calls.setdefault(read.name, []).append(read)
    sites = {
        name: NormSite(
            name,
            own[0].kind,
            own[0].axes,
            own[0].eps,
            own[0].centred,
            own[0].gain,
            own[0].shift,
            own[0].gain_parameter,
            own[0].shift_parameter,
            tuple(use for read in own for use in find_uses(graph, read, reads, readings)),
            len(own),
            own[0].groups,
            all(read.as_given for read in own),
        )
        for name, own in calls.items()
    }
    products: dict[str, tuple[Product, ...]] = {}
    for made, weight in graph.weights.items():
        product = Product(frozenset(readings.get(made, ())), used_rows(graph, weight))
        products[weight.parameter.name] = (*products.get(weight.parameter.name, ()), product)
    return sites, products


def reaches(graph: Graph, start: Value, end: Value) -> bool:
    """Whether ``start`` is ``end`` or comes before it with no weight between."""
    return start is end or bool(graph.light.get(end.index, 0) & bit(start))
