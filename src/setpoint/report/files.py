"""Writing a file whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from setpoint.errors import InputError


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write ``text`` to ``path`` as UTF-8, replacing what is there in one step.

    A reader sees the old file or the new one, never half of it, and an interrupted run leaves the old one in place.

    Args:
        path: Where to write; its folder must exist.
        text: What to write.

    Returns:
        The path.

    Raises:
        InputError: The path is a folder, its folder is missing, or the place can't be written to.

    >>> import tempfile
    >>> write_text(Path(tempfile.mkdtemp()) / "note.txt", "hello").read_text()
    'hello'
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of a file, for example {path / 'report.html'}")
    target = path.resolve()  # a symbolic link keeps pointing where it points
    if not target.parent.is_dir():
        raise InputError(f"can't write {path}: the folder {target.parent} does not exist; create it first")
    try:
        if target.exists() and not target.is_file():  # a terminal or a pipe has no old contents to protect
            target.write_text(text, encoding="utf-8")
        else:
            _replace(target, text)
    except OSError as error:
        raise InputError(f"can't write {path}: {error.strerror or error}; choose another place") from error
    return path


def _replace(target: Path, text: str) -> None:
    mode = target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask()
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with open(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.chmod(name, mode)  # mkstemp makes files that only the owner can read
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
