"""Element-wise non-linearities: one op, or a module that writes one out in plain arithmetic.

The latter is named by what it does to a line of numbers, so that every spelling of a function goes by one name; the two
forms of GELU differ by up to 5e-4 and keep their own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from setpoint.surgery.graph import Graph
from setpoint.surgery.ops import ACTIVATIONS, ELEMENTWISE
from setpoint.surgery.replay import replay
from setpoint.surgery.tape import Call, Node, Value

_SAME = 2e-5
_LONGEST = 12  # ops that an activation is written in


def activations(graph: Graph, here: set[int]) -> list[tuple[str, Value, Value]]:
    """Activations whose results are in ``here``, last first: name, result, argument."""
    found: list[tuple[str, Value, Value]] = []
    seen: set[int] = set()
    for node in reversed(graph.tape.nodes):
        if not node.outputs or node.outputs[0].index not in here or node.op not in ACTIVATIONS:
            continue
        call = _composed(node.call)
        if call is not None:
            if id(call) not in seen:
                seen.add(id(call))
                found.append((_behaves_as(call), call.outputs[0], call.inputs[0]))
        elif node.inputs:
            start = _start(node)
            name, result = _written_out(graph, start) or (_name(node), node.outputs[0])
            if result.index in here:
                found.append((name, result, start if result is not node.outputs[0] else node.inputs[0]))
    return found


def activation_behind(graph: Graph, value: Value) -> tuple[str, Value] | None:
    """The activation that reads a value, if that is all that reads it: its name and its result."""
    readers = graph.readers[value.index]
    if not readers:
        return None
    call = _composed(readers[0].call)
    if call is not None and call.inputs[0] is value and all(node.call is call for node in readers):
        return (_behaves_as(call), call.outputs[0]) if any(n.op in ACTIVATIONS for n in call.nodes) else None
    written = _written_out(graph, value)
    if written is not None and all(graph.descends(written[1], node.outputs[0]) for node in readers if node.outputs):
        return written
    if len(readers) == 1 and readers[0].outputs and readers[0].op in ACTIVATIONS:
        return _name(readers[0]), readers[0].outputs[0]
    return None


def _start(node: Node) -> Value:
    """Where the element-wise arithmetic around an activation starts from."""
    value = node.inputs[0]
    while value.producer is not None and value.producer.op in ELEMENTWISE:
        above = [v for v in value.producer.inputs if v.floating and v.tensor.numel() > 1]
        if not above or any(v.kind != "op" for v in above):
            break
        value = above[0]
    return value


def _written_out(graph: Graph, start: Value) -> tuple[str, Value] | None:
    """The last value that is a known function of ``start`` alone, element by element: ``x * sigmoid(1.702 * x)``."""
    nodes: list[Node] = []
    inside = {start.index}
    ahead = [start]
    while ahead and len(nodes) < _LONGEST:
        value = ahead.pop(0)
        for node in graph.readers[value.index]:
            signals = [v for v in node.inputs if v.floating and v.tensor.numel() > 1]
            own = all(v.index in inside for v in signals) and node.op in ELEMENTWISE and node.func is not None
            if own and not node.in_place and node.outputs and node.outputs[0].index not in inside:
                nodes.append(node)
                inside.add(node.outputs[0].index)
                ahead.append(node.outputs[0])
    nodes.sort(key=lambda node: node.outputs[0].index)
    x = torch.linspace(-4.0, 4.0, start.tensor.numel(), device=start.tensor.device).reshape(start.tensor.shape)
    for count in range(len(nodes), 1, -1):
        end = nodes[count - 1].outputs[0]
        name = _named(replay(nodes[:count], start, end, x.to(start.tensor.dtype)), x.to(start.tensor.dtype))
        if name:
            return name, end
    return None


def _named(y: Tensor, x: Tensor) -> str:
    """The known function that y is of x, "" if none; equal up to the rounding of their dtype."""
    tolerance = max(_SAME, 4.0 * torch.finfo(x.dtype).eps)
    for name, function in _known_activations().items():
        if y.shape == x.shape and torch.allclose(y.float(), function(x.float()), rtol=0, atol=tolerance):
            return name
    return ""


def _name(node: Node) -> str:
    approximate = node.kwargs.get("approximate", node.args[1] if node.op == "gelu" and len(node.args) > 1 else "none")
    return "gelu_tanh" if node.op == "gelu" and approximate == "tanh" else node.op


def _composed(call: Call) -> Call | None:
    """The call, if its module is an activation written out in plain arithmetic."""
    module = call.module
    if module is None or call.children or len(call.nodes) < 2 or len(call.outputs) != 1 or len(call.inputs) != 1:
        return None
    return call if not any(True for _ in module.parameters()) and call.name else None


@cache
def _known_activations() -> dict[str, Callable[[Tensor], Tensor]]:
    return {
        "gelu": functional.gelu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
        "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
        "silu": functional.silu,
        "mish": functional.mish,
        "relu2": lambda x: functional.relu(x).square(),
        "relu": functional.relu,
        "tanh": torch.tanh,
    }


def _behaves_as(call: Call) -> str:
    module: nn.Module | None = call.module
    assert module is not None
    x = torch.linspace(-4.0, 4.0, 65)
    try:
        y = module.forward(x)
    except (RuntimeError, TypeError, ValueError):
        return type(module).__name__
    return (_named(y, x) if isinstance(y, Tensor) else "") or type(module).__name__
