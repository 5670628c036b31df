"""Weights with what follows them directly: convolution -> norm -> activation, and the same behind a linear."""

from __future__ import annotations

from dataclasses import dataclass

from setpoint.surgery.activations import activation_behind
from setpoint.surgery.behaviour import NormRead
from setpoint.surgery.branches import Addition
from setpoint.surgery.graph import Graph, Weight
from setpoint.surgery.norms import reaches
from setpoint.surgery.ops import CONVOLUTIONS, MOVES, POOLS
from setpoint.surgery.tape import Value
from setpoint.types import Chain


@dataclass(slots=True, eq=False)
class _ChainRead:
    weight: Weight
    norm: str
    activation: str
    output: Value


def find_chains(graph: Graph, norms: list[NormRead]) -> tuple[Chain, ...]:
    """Convolutions with the norm and the activation behind them, in order of execution."""
    weights = [weight for weight in graph.weights.values() if weight.node.op in CONVOLUTIONS]
    return tuple(_chain(graph, _follow(graph, weight, norms)) for weight in weights)


def find_layers(graph: Graph, norms: list[NormRead], additions: list[Addition]) -> tuple[Chain, ...]:
    """Linears outside residual branches that an activation follows: a plain network, a head with a hidden layer."""
    weights = [weight for weight in graph.weights.values() if weight.node.op not in CONVOLUTIONS]
    reads = [_follow(graph, weight, norms) for weight in weights if not _in_branch(graph, weight, additions)]
    return tuple(_chain(graph, read) for read in reads if read.activation)


def _in_branch(graph: Graph, weight: Weight, additions: list[Addition]) -> bool:
    made = weight.node.outputs[0]
    return any(graph.descends(a.branch, made) and graph.descends(made, a.source) for a in additions)


def _follow(graph: Graph, weight: Weight, norms: list[NormRead]) -> _ChainRead:
    by_input = {norm.input.index: norm for norm in norms}
    value, norm, activation = weight.node.outputs[0], "", ""
    while True:
        following = by_input.get(value.index)
        behind = None if activation else activation_behind(graph, value)
        readers = graph.readers[value.index]
        if following is not None and not norm and not activation:
            value, norm = following.output, following.name
        elif behind is not None:
            activation, value = behind
        elif len(readers) == 1 and readers[0].outputs and MOVES.get(readers[0].op) in ("dropout", "clone"):
            value = readers[0].outputs[0]
        else:
            return _ChainRead(weight, norm, activation, value)


def _chain(graph: Graph, read: _ChainRead) -> Chain:
    following = [
        weight.node.call.name
        for weight in graph.weights.values()
        if weight.source is not None and reaches(graph, read.output, weight.source)
    ]
    tap, value = graph.tap(read.output), read.output
    while tap is None:  # a function's result that only a pooling reads can be caught behind the pooling
        readers = graph.readers[value.index]
        if len(readers) != 1 or not readers[0].outputs or readers[0].op not in POOLS:
            break
        value = readers[0].outputs[0]
        tap = graph.tap(value)
    return Chain(read.weight.projection(), read.norm, read.activation, tap, tuple(following[:8]))
