"""What fixes did to a module, carried by the module itself, so that a bare model can be fixed and saved again."""

from __future__ import annotations

from torch import nn

from setpoint.types import Made

_ATTRIBUTE = "_setpoint_made"


def remember(model: nn.Module, made: Made) -> None:
    """Let a module carry how it is built; copies of it carry that too."""
    setattr(model, _ATTRIBUTE, made)


def remembered(model: nn.Module) -> Made:
    """How a module is built: as its class makes it, unless fixes changed it."""
    made = getattr(model, _ATTRIBUTE, None)
    return made if isinstance(made, Made) else Made()
