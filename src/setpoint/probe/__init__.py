"""Measurements: one streaming recorder, and pure functions from what it recorded to findings.

The names here load on first use: the probes themselves need no tensor library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from setpoint.probe.recorder import CHEAP, Recorder, record

__all__ = ["CHEAP", "Recorder", "record"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("setpoint.probe.recorder"), name)
    raise AttributeError(f"module 'setpoint.probe' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
