"""setpoint finds what is wrong with the signals inside a deep network, fixes it, and proves that the fix worked.

The names here load on first use, so that ``import setpoint`` costs nothing and the shell answers at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:
    from setpoint.catalog import methods
    from setpoint.checkup import check
    from setpoint.fixing import fix
    from setpoint.loading import load
    from setpoint.proving import prove, results
    from setpoint.report import Report, diff
    from setpoint.report.proof import Proof
    from setpoint.watching import watch

__all__ = ["Proof", "Report", "__version__", "check", "diff", "fix", "load", "methods", "prove", "results", "watch"]

_HOME = {
    "check": "setpoint.checkup",
    "fix": "setpoint.fixing",
    "load": "setpoint.loading",
    "methods": "setpoint.catalog",
    "prove": "setpoint.proving",
    "results": "setpoint.proving",
    "Proof": "setpoint.report.proof",
    "Report": "setpoint.report",
    "diff": "setpoint.report",
    "watch": "setpoint.watching",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'setpoint' has no attribute {name!r}; it has {', '.join(sorted(_HOME))}")


def __dir__() -> list[str]:
    return sorted(__all__)
