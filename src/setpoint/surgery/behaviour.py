"""Norms written out in plain arithmetic, known by what they do: f(c·x) = f(x).

A module of its own is run again on inputs of another scale; arithmetic in the middle of a bigger forward is cut out of
the tape, from the value that is reduced to the product with the inverse root, and replayed. The same experiment tells
the axes and whether the mean is removed, and gives the *effective* gain and shift, whatever the model stores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from setpoint.running import tensors_of
from setpoint.surgery.graph import Graph, bit
from setpoint.surgery.ops import ELEMENTWISE, MOVES, NORMS, REDUCTIONS
from setpoint.surgery.replay import replay
from setpoint.surgery.tape import Call, Node, Value
from setpoint.types import NormKind

_REDUCING = REDUCTIONS - {"rms_norm"}
_MOMENTS = frozenset({"mean", "var", "std", "var_mean", "std_mean"})
_ROOTS = frozenset({"sqrt", "rsqrt", "pow"})
_CLOSE = 2e-2
Run = Callable[[Tensor], Tensor]


@dataclass(slots=True, eq=False)
class NormRead:
    """A norm in the graph: one entry per call. ``name`` is empty until one computed in a bigger forward is numbered."""

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
    groups: int = 1
    as_given: bool = True
    nodes: list[Node] = field(default_factory=list)


# modules -------------------------------------------------------------------------------------------------------------


def norm_of_call(graph: Graph, call: Call) -> NormRead | None:
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
    parameters = _parameters(graph, nodes)
    if len(parameters) > 2 or any(value.tensor.dim() > 1 for _, value in parameters.values()):
        return None

    def run(probe: Tensor) -> Tensor:
        assert call.module is not None
        args = tuple(probe if isinstance(a, Tensor) and a.is_floating_point() else a for a in call.args)
        named = {k: probe if isinstance(a, Tensor) and a.is_floating_point() else a for k, a in call.kwargs.items()}
        return tensors_of(call.module.forward(*args, **named))[0].float()

    axes = next((a for a in ((-1,), (1 - x.tensor.dim(),)) if _ignores_scale(run, x.tensor, a)), None)
    if axes is None:
        return None
    return _measured(run, NormRead(call.name, "rms", call, x, y, axes, None, False, nodes=nodes), parameters)


Role = Literal["gain", "excess", "shift"]


def _parameters(graph: Graph, nodes: Iterable[Node]) -> dict[str, tuple[Role, Value]]:
    """Parameters by name with what they do: multiply, multiply after a number was added (Gemma), or are added."""
    found: dict[str, tuple[Role, Value]] = {}
    for node in nodes:
        for place, root in enumerate(map(graph.root, node.inputs)):
            if root.kind == "parameter":
                alone = len(node.inputs) == 1
                added = node.op in ("add", "sub") or (node.op == "addcmul" and place == 0)
                role: Role = "gain" if not added else "excess" if alone else "shift"
                found.setdefault(root.name, (role, root))
    return found


# arithmetic in a bigger forward --------------------------------------------------------------------------------------


def norms_inline(graph: Graph, known: set[int]) -> list[NormRead]:
    """Norms written out in a forward that does more; nodes in ``known`` belong to norms that are found already."""
    found: list[NormRead] = []
    for node in graph.tape.nodes:
        if node.op not in ("mul", "div") or id(node) in known or not node.outputs:
            continue
        read = _inline(graph, node)
        if read is not None:
            found.append(read)
            known.update(map(id, read.nodes))
    return found


def _inline(graph: Graph, node: Node) -> NormRead | None:
    operands = [value for value in node.inputs if value.floating and value.tensor.dim() >= 2]
    if len(operands) != 2:
        return None
    for body, factor in (operands, operands[::-1]) if node.op == "mul" else (operands,):
        axes = _reduced(factor.tensor, body.tensor)
        x = _input(graph, body)
        if not axes or x is None or not graph.light.get(factor.index, 0) & bit(x) or not graph.signal & bit(x):
            continue
        y, nodes = node.outputs[0], _between(graph, x, node)
        if nodes is None or not any(made.op in _MOMENTS for made in nodes):
            continue
        y, behind = _with_affine(graph, y)
        nodes += behind

        def run(probe: Tensor, x: Value = x, y: Value = y, nodes: list[Node] = nodes) -> Tensor:
            return replay(nodes, x, y, probe).float()

        if _ignores_scale(run, x.tensor, axes):
            read = NormRead("", "rms", node.call, x, y, axes, None, False, nodes=nodes)
            read = _measured(run, read, _parameters(graph, behind))
            if read.kind != "other":
                return read
    return None


def _reduced(factor: Tensor, body: Tensor) -> tuple[int, ...]:
    """The axes along which a factor is one number while the body varies; none if the batch axis is among them."""
    if factor.dim() != body.dim():
        return ()
    axes = tuple(a - body.dim() for a in range(body.dim()) if factor.shape[a] == 1 != body.shape[a])
    same = all(factor.shape[a] == body.shape[a] for a in range(-body.dim(), 0) if a not in axes)
    return axes if same and -body.dim() not in axes else ()


def _input(graph: Graph, body: Value) -> Value | None:
    """What is normalized: the body before casts and before its mean is taken away."""
    value = _uncast(body)
    maker = value.producer
    if maker is not None and maker.op == "sub" and len(maker.inputs) == 2:
        minuend, mean = maker.inputs
        if graph.light.get(mean.index, 0) & bit(minuend) and _reduced(mean.tensor, minuend.tensor):
            value = _uncast(minuend)
    return value


def _uncast(value: Value) -> Value:
    while value.producer is not None and MOVES.get(value.producer.op) in ("cast", "clone"):
        value = value.producer.inputs[0]
    return value


def _between(graph: Graph, x: Value, last: Node) -> list[Node] | None:
    """The nodes that lead from ``x`` to ``last``; None unless all are plain arithmetic without a parameter."""
    nodes: dict[int, Node] = {}
    ahead = [last]
    while ahead:
        node = ahead.pop()
        if id(node) in nodes:
            continue
        if not (node.op in ELEMENTWISE or node.op in REDUCTIONS or node.op in MOVES) or node.func is None:
            return None
        nodes[id(node)] = node
        for value in node.inputs:
            if value.kind == "parameter":
                return None
            if value is not x and value.producer is not None and graph.ancestors.get(value.index, 0) & bit(x):
                ahead.append(value.producer)
    return sorted(nodes.values(), key=lambda node: node.outputs[0].index)


def _with_affine(graph: Graph, y: Value) -> tuple[Value, list[Node]]:
    """The result with the casts, the gain and the shift behind it, as long as nothing else reads in between."""
    nodes: list[Node] = []
    wanted = ["mul", "add"]
    while len(graph.readers[y.index]) == 1:
        node = graph.readers[y.index][0]
        others = [value for value in node.inputs if value is not y]
        cast = MOVES.get(node.op) in ("cast", "clone")
        affine = node.op in wanted and len(others) == 1 and _is_vector(graph, others[0], y.tensor.shape[-1])
        if not node.outputs or not (cast or affine) or node.outputs[0].tensor.shape != y.tensor.shape:
            break
        if affine:
            wanted = wanted[wanted.index(node.op) + 1 :]
            maker = others[0].producer
            nodes += [maker] if maker is not None and maker.func is not None else []
        nodes.append(node)
        y = node.outputs[0]
    return y, nodes


def _is_vector(graph: Graph, value: Value, width: int) -> bool:
    """A parameter with one entry per channel, or one plus such a parameter."""
    root = graph.root(value)
    maker = value.producer
    if maker is not None and maker.op == "add" and len(maker.inputs) == 1:
        root = graph.root(maker.inputs[0])
    return root.kind == "parameter" and root.tensor.numel() == width == value.tensor.shape[-1]


# the experiment ------------------------------------------------------------------------------------------------------


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


def _ignores_scale(run: Run, x: Tensor, axes: tuple[int, ...]) -> bool:
    probe = _probe_input(x)
    try:
        plain = run(probe)
        return float(plain.abs().max()) > 0 and not _far(run(probe * _factors(x, axes)), plain)
    except (RuntimeError, TypeError, IndexError, ValueError):
        return False


def _measured(run: Run, read: NormRead, parameters: dict[str, tuple[Role, Value]]) -> NormRead:
    x, axes = read.input.tensor, read.axes
    probe = _probe_input(x)
    plain = run(probe)
    read.centred = not _far(run(probe + 16.0 * _factors(x, axes)), plain)
    read.kind = "layer" if read.centred else "rms"
    read.eps = _epsilon(read.nodes)
    shift = run(torch.zeros_like(probe))
    unit = _unit(probe, axes, read.centred)
    others = [axis for axis in range(x.dim()) if axis - x.dim() not in axes]
    gain = ((plain - shift) * unit).sum(others) / unit.square().sum(others)
    shift = shift.amax(others)
    read.gain, read.shift = gain, None if not shift.any() else shift
    shape = [size if axis not in others else 1 for axis, size in enumerate(x.shape)]
    spiked = probe * torch.where(torch.arange(probe.numel(), device=x.device).reshape(x.shape) % 5 == 0, 4, 1).to(
        x.dtype
    )
    expected = _unit(spiked, axes, read.centred) * gain.reshape(shape) + shift.reshape(shape)
    if _far(run(spiked), expected):  # it divides by something else than the root mean square
        read.kind, read.gain, read.shift = "other", None, None
        return read
    for name, (role, value) in parameters.items():
        stored = value.tensor.detach()
        if role == "shift" and stored.shape == shift.shape:
            read.shift, read.shift_parameter = stored, name
            continue
        effective = stored + 1.0 if role == "excess" else stored
        if role != "shift" and stored.shape == gain.shape and not _far(gain, effective.float()):
            read.gain, read.gain_parameter = effective, name
    if not read.gain_parameter and not _far(gain, torch.ones_like(gain)):
        read.gain = None
    return read


def _unit(x: Tensor, axes: tuple[int, ...], centred: bool) -> Tensor:
    """x over its root mean square, without its mean if ``centred``."""
    x = x.float()
    x = x - x.mean(axes, keepdim=True) if centred else x
    return x * torch.rsqrt(x.square().mean(axes, keepdim=True))


def _epsilon(nodes: list[Node]) -> float | None:
    """The number that is added to the moment before the root is taken."""
    under = {id(value.tensor) for node in nodes if node.op in _ROOTS for value in node.inputs}
    for node in nodes:
        if node.op == "add" and any(id(output.tensor) in under for output in node.outputs):
            numbers = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, int | float)]
            numbers += [
                float(value.tensor) for value in node.inputs if value.tensor.numel() == 1 and value.producer is None
            ]
            if numbers:
                return float(numbers[0])
    return None
