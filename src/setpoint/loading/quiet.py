"""Other libraries, imported when needed, kept silent, and put back as they were."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers (warnings, advice, progress bars) and restore its settings afterwards.

    What its warnings would say about a checkpoint is not lost: loading checks the same facts and raises.
    """
    from transformers.utils import logging as hf_logging

    verbosity = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hub = logging.getLogger("huggingface_hub")
    hub_level = hub.level
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    hub.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hub.setLevel(hub_level)
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()
