"""Where data lives on this machine, and how a folder gets there: whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from setpoint.errors import InputError
from setpoint.loading.shelf import cache_folder as models_folder
from setpoint.staging import begin, remove


def cache_folder() -> Path:
    """The folder for data sets and tokens: ``$SETPOINT_CACHE/data``, or the platform's cache folder."""
    return models_folder().parent / "data"


def publish(target: Path, fill: Callable[[Path], None]) -> Path:
    """Make a folder that appears under its name only when everything in it is written.

    Args:
        target: The folder to make. If another process is quicker, its folder stays and this one is thrown away.
        fill: Writes the contents into the folder it is given.

    Returns:
        ``target``.

    Raises:
        InputError: The cache can't be written to.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = begin(target)
    except OSError as error:
        raise InputError(
            f"cannot write to {target.parent}: {error.strerror or error}; set SETPOINT_CACHE to a folder that is yours"
        ) from error
    try:
        fill(staging)
        staging.chmod(0o755)
        try:
            os.rename(staging, target)
        except OSError as error:
            if not target.is_dir():
                raise InputError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        remove(staging)
    return target
