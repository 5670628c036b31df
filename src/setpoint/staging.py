"""Files and folders that are whole or absent: written beside their place under a hidden name, and renamed at the end.

A kill can come at any point. What it leaves, the next writer to the same folder puts right: a half-written folder is
removed, and one that was moved away to make room, with nothing in its place yet, comes back. Hidden names hold the
machine and the process that wrote, so that a writer that is still at work is left alone.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
from contextlib import suppress
from pathlib import Path
from typing import Literal

_HIDDEN = re.compile(r"\.(?P<name>.+)\.(?P<state>writing|replaced)-(?P<host>.+)-(?P<pid>\d+)-[0-9a-f]{8}")


def begin(target: Path) -> Path:
    """A new hidden folder beside ``target`` to write into.

    Raises:
        OSError: The parent can't be written to.
    """
    recover(target.parent)
    staging = _hidden(target, "writing")
    staging.mkdir()
    return staging


def finish(whole: Path, target: Path) -> None:
    """Have the disk hold ``whole``, then give it the name ``target``, in the place of what has that name.

    Raises:
        OSError: It can't be renamed; the old one is in its place then.
    """
    _settle(whole)
    if not target.exists():
        whole.rename(target)
        return
    old = _hidden(target, "replaced")
    target.rename(old)
    try:
        whole.rename(target)
    except OSError:
        old.rename(target)
        raise
    remove(old)


def recover(folder: Path) -> None:
    """Put right what killed writers left in a folder."""
    for path in folder.glob(".*"):
        found = _HIDDEN.fullmatch(path.name)
        if found is None or found["host"] != socket.gethostname() or _runs(int(found["pid"])):
            continue
        target = folder / found["name"]
        if found["state"] == "replaced" and not target.exists():
            with suppress(OSError):  # the folder is another user's; then it stays
                path.rename(target)
        else:
            remove(path)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _hidden(target: Path, state: Literal["writing", "replaced"]) -> Path:
    return target.with_name(f".{target.name}.{state}-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}")


def _runs(process: int) -> bool:
    if os.name != "posix":  # elsewhere asking ends the process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _settle(path: Path) -> None:
    """Have the disk hold it before its name says that it is whole."""
    for file in path.rglob("*") if path.is_dir() else (path,):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
