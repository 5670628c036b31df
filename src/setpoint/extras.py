"""Optional dependencies: imported when needed, and a clear line when they are not there."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from setpoint.errors import InputError


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional dependency, or say in one line how to get it.

    Args:
        module: Name to import.
        extra: The extra of setpoint that brings it.
        purpose: What it is needed for, as the end of "is needed …".

    Returns:
        The module.

    Raises:
        InputError: It is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        # A broken installation (its own dependency is missing) must not be mistaken for "not installed".
        missing = error.name or module
        raise InputError(
            f"{missing} is needed {purpose} and is not installed; install it with: pip install 'setpoint[{extra}]'"
        ) from error
