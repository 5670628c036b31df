"""Which parts of a model normalize, and what they do to their input.

Norms are known by op (``layer_norm``, ``batch_norm``, ...) and, where a module computes one from plain arithmetic, by
behaviour: its output does not change when the input is scaled, f(c·x) = f(x). The same experiment tells the axes and
whether the mean is removed, and gives the *effective* gain and shift, whatever the module stores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from setpoint.running import tensors_of
from setpoint.surgery.graph import Graph, bit
from setpoint.surgery.indices import read_channels
from setpoint.surgery.ops import ACTIVATIONS, ELEMENTWISE, MOVES, NORMS, REDUCTIONS
from setpoint.surgery.tape import Call, Node, Value
from setpoint.types import NormKind, NormSite, Use

_REDUCING = REDUCTIONS - {"rms_norm"}
_EPSILONS = ("eps", "variance_epsilon", "epsilon", "layer_norm_eps")
_CLOSE = 2e-2


@dataclass(slots=True, eq=False)
class NormRead:
    """A norm in the graph: one entry per call."""

    name: str
    kind: NormKind
    call: Call
    input: Value
    output: Value
    axes: tuple[int, ...]
    eps: float | None
    centred: bool
    gain: Tensor | None = None
    shift: Tensor | None = None
    gain_parameter: str = ""
    shift_parameter: str = ""


def find_norms(graph: Graph) -> list[NormRead]:
    """Every call of every norm, in order of execution."""
    found: list[NormRead] = []
    for call in graph.tape.calls:
        read = _by_behaviour(graph, call)
        if read is not None:
            found.append(read)
    inside = {id(read.call) for read in found}
    counts: dict[str, int] = {}
    for node in graph.tape.nodes:
        if node.op in NORMS and not any(id(call) in inside for call in node.call.ancestors()):
            found.append(_by_op(graph, node, counts))
    found.sort(key=lambda read: read.output.index)
    return found


def _argument(node: Node, name: str, position: int, default: Any = None) -> Any:
    return node.kwargs[name] if name in node.kwargs else node.args[position] if len(node.args) > position else default


def _by_op(graph: Graph, node: Node, counts: dict[str, int]) -> NormRead:
    kind: NormKind = NORMS[node.op]  # type: ignore[assignment]
    call = node.call
    name = call.name
    if sum(other.op in NORMS for other in call.nodes) > 1 or call.children:
        counts[name] = counts.get(name, -1) + 1
        name = f"{name}#{counts[name]}"
    x = node.inputs[0]
    dim = x.tensor.dim()
    if kind in ("layer", "rms"):
        axes = tuple(range(-len(_argument(node, "normalized_shape", 1)), 0))
        eps = _argument(node, "eps", 4 if kind == "layer" else 3)
    else:
        axes = tuple(axis - dim for axis in range(dim) if axis != 1)
        eps = _argument(node, "eps", {"batch": 7, "instance": 7, "group": 4}[kind])
    parameters = [value for value in map(graph.root, node.inputs[1:]) if value.kind == "parameter"]
    gain = parameters[0] if parameters else None
    shift = parameters[1] if len(parameters) > 1 else None
    return NormRead(
        name,
        kind,
        call,
        x,
        node.outputs[0],
        axes,
        float(eps) if isinstance(eps, float) else None,
        kind != "rms",
        gain.tensor.detach() if gain else None,
        shift.tensor.detach() if shift else None,
        gain.name if gain else "",
        shift.name if shift else "",
    )


def _nodes(call: Call) -> list[Node]:
    return [*call.nodes, *(node for child in call.children for node in _nodes(child))]


def _by_behaviour(graph: Graph, call: Call) -> NormRead | None:
    """A norm if the call is plain arithmetic around a reduction and its module ignores the scale of its input."""
    inputs = [value for value in call.inputs if value.floating]
    if call.module is None or call.children or len(inputs) != 1 or len(call.outputs) != 1:
        return None
    nodes, x, y = call.nodes, inputs[0], call.outputs[0]
    if x.tensor.dim() < 2 or y.tensor.shape != x.tensor.shape or y is x:
        return None
    if not any(node.op in _REDUCING for node in nodes):
        return None
    allowed = ELEMENTWISE | REDUCTIONS | MOVES.keys()
    if not all(node.op in allowed or node.op in NORMS or node.op in ("amax", "max") for node in nodes):
        return None
    parameters = {
        value.name: value for node in nodes for value in map(graph.root, node.inputs) if value.kind == "parameter"
    }
    if len(parameters) > 2 or any(value.tensor.dim() > 1 for value in parameters.values()):
        return None
    axes = next((a for a in ((-1,), (1 - x.tensor.dim(),)) if _ignores_scale(call, x.tensor, a)), None)
    if axes is None:
        return None
    return _measured(call, x, y, axes, parameters)


def _run(call: Call, x: Tensor) -> Tensor:
    assert call.module is not None
    args = tuple(x if isinstance(a, Tensor) and a.is_floating_point() else a for a in call.args)
    kwargs = {k: x if isinstance(a, Tensor) and a.is_floating_point() else a for k, a in call.kwargs.items()}
    return tensors_of(call.module.forward(*args, **kwargs))[0].float()


def _factors(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Positive factors that are constant along ``axes`` and differ elsewhere; from a pattern, not from chance."""
    shape = [1 if axis - x.dim() in axes else size for axis, size in enumerate(x.shape)]
    count = int(torch.tensor(shape).prod())
    return (1.0 + torch.arange(count, device=x.device).remainder(7) / 3.0).reshape(shape).to(x.dtype)


def _probe_input(x: Tensor) -> Tensor:
    """An input like the real one in shape, large enough for any epsilon to vanish beside it."""
    pattern = torch.sin(torch.arange(x.numel(), device=x.device, dtype=torch.float32) * 1.7 + 0.3)
    return (pattern.reshape(x.shape) * 64.0 + 8.0).to(x.dtype)


def _far(a: Tensor, b: Tensor) -> bool:
    scale = float(b.abs().max()) or 1.0
    return not bool(torch.isfinite(a).all()) or float((a - b).abs().max()) > _CLOSE * scale


def _ignores_scale(call: Call, x: Tensor, axes: tuple[int, ...]) -> bool:
    probe = _probe_input(x)
    try:
        plain = _run(call, probe)
        return float(plain.abs().max()) > 0 and not _far(_run(call, probe * _factors(x, axes)), plain)
    except (RuntimeError, TypeError, IndexError, ValueError):
        return False


def _measured(call: Call, x: Value, y: Value, axes: tuple[int, ...], parameters: dict[str, Value]) -> NormRead:
    probe = _probe_input(x.tensor)
    plain = _run(call, probe)
    centred = not _far(_run(call, probe + 16.0 * _factors(x.tensor, axes)), plain)
    shift = _run(call, torch.zeros_like(probe))
    unit = probe.float() - (probe.float().mean(axes, keepdim=True) if centred else 0.0)
    unit = unit * torch.rsqrt(unit.square().mean(axes, keepdim=True))
    others = [axis for axis in range(x.tensor.dim()) if axis - x.tensor.dim() not in axes]
    gain = ((plain - shift) * unit).sum(others) / unit.square().sum(others)
    shift = shift.amax(others)
    module: Any = call.module
    eps = next((float(getattr(module, n)) for n in _EPSILONS if isinstance(getattr(module, n, None), float)), None)
    read = NormRead(
        call.name,
        "layer" if centred else "rms",
        call,
        x,
        y,
        axes,
        eps,
        centred,
        gain,
        None if not shift.any() else shift,
    )
    for name, value in parameters.items():
        stored = value.tensor.detach().float()
        if stored.shape == gain.shape and not _far(gain, stored + 1.0) and _far(gain, stored):
            read.gain, read.gain_parameter = value.tensor.detach() + 1.0, name
        elif stored.shape == gain.shape and not read.gain_parameter and not _far(gain, stored):
            read.gain, read.gain_parameter = value.tensor.detach(), name
        elif stored.shape == shift.shape:
            read.shift, read.shift_parameter = value.tensor.detach(), name
    return read


def find_uses(graph: Graph, read: NormRead, norms: list[NormRead]) -> list[Use]:
    """Every reader of a norm's output, followed through ops that only move values."""
    by_input: dict[int, list[NormRead]] = {}
    for norm in norms:
        by_input.setdefault(norm.input.index, []).append(norm)
    uses: list[Use] = []
    ahead: list[tuple[Value, tuple[str, ...]]] = [(read.output, ())]
    seen = {read.output.index}
    while ahead:
        value, via = ahead.pop(0)
        readers = graph.readers[value.index]
        for norm in by_input.get(value.index, []):
            uses.append(Use(norm.name, via=via, call_index=norm.call.ordinal, op=f"{norm.kind}_norm"))
        if any(value is output for output in graph.tape.outputs):  # what the caller gets must not change in a fold
            uses.append(Use("", via=via, op="output"))
        normed = {id(norm.call) for norm in by_input.get(value.index, [])}
        for node in readers:
            if any(id(call) in normed for call in node.call.ancestors()) and node.op != "add":
                continue
            weight = next((graph.weights[o.index] for o in node.outputs if o.index in graph.weights), None)
            if weight is not None:
                module, ordinal = node.call.name, node.call.ordinal
                reading = read_channels(graph, read.output, channel_axes(read), weight)
                passed = (*via, "merge") if reading.merged else via
                uses.append(Use(module, weight.parameter.name, reading.input_axis, reading.channels, ordinal, passed))
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


def site(read: NormRead, uses: list[Use], calls: int) -> NormSite:
    """As the contract type."""
    return NormSite(
        read.name,
        read.kind,
        read.axes,
        read.eps,
        read.centred,
        read.gain,
        read.shift,
        read.gain_parameter,
        read.shift_parameter,
        tuple(uses),
        calls,
    )


def reaches(graph: Graph, start: Value, end: Value) -> bool:
    """Whether ``start`` is ``end`` or comes before it with no weight between."""
    return start is end or bool(graph.light.get(end.index, 0) & bit(start))
