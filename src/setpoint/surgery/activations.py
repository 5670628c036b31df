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
from setpoint.surgery.ops import ACTIVATIONS
from setpoint.surgery.tape import Call, Node, Value

_SAME = 2e-5


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
            found.append((_name(node), node.outputs[0], node.inputs[0]))
    return found


def activation_behind(graph: Graph, value: Value) -> tuple[str, Value] | None:
    """The activation that reads a value, if that is all that reads it: its name and its result."""
    readers = graph.readers[value.index]
    if not readers:
        return None
    call = _composed(readers[0].call)
    if call is not None and call.inputs[0] is value and all(node.call is call for node in readers):
        return (_behaves_as(call), call.outputs[0]) if any(n.op in ACTIVATIONS for n in call.nodes) else None
    if len(readers) == 1 and readers[0].outputs and readers[0].op in ACTIVATIONS:
        return _name(readers[0]), readers[0].outputs[0]
    return None


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
    for name, function in _known_activations().items():
        if isinstance(y, Tensor) and torch.allclose(y, function(x), rtol=0, atol=_SAME):
            return name
    return type(module).__name__
