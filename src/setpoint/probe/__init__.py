"""Measurements: one streaming recorder, and pure functions from what it recorded to findings.

The names here load on first use: the probes themselves need no tensor library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from setpoint.probe.interventions.massive import attention_sink_mass, intervene, massive_activations
    from setpoint.probe.interventions.sparsity import ppl_sparsity, sparse_ffn
    from setpoint.probe.recorder import CHEAP, Recorder, record

__all__ = [
    "CHEAP",
    "Recorder",
    "attention_sink_mass",
    "intervene",
    "massive_activations",
    "ppl_sparsity",
    "record",
    "sparse_ffn",
]

_HOME = {
    "CHEAP": "recorder",
    "Recorder": "recorder",
    "record": "recorder",
    "attention_sink_mass": "interventions.massive",
    "intervene": "interventions.massive",
    "massive_activations": "interventions.massive",
    "ppl_sparsity": "interventions.sparsity",
    "sparse_ffn": "interventions.sparsity",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"setpoint.probe.{_HOME[name]}"), name)
    raise AttributeError(f"module 'setpoint.probe' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
