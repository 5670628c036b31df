"""Where observations go: a file with one JSON object a line, TensorBoard, or any callable."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from setpoint.errors import InputError
from setpoint.extras import require
from setpoint.watching.observation import Observation

Sink = Callable[[Observation], None]
_HEAD = '{"step": '
"""How each line of `JsonLines` begins."""


class JsonLines:
    """One JSON object a line: ``{"step": …, "scalars": {…}, "findings": […]}``.

    Lines of the same or later steps, left by a run that went back to a checkpoint or by an earlier run, are removed
    before the first line is written, and so is a last line that the kill of a process cut off.

    Args:
        path: The file; its folder is made.

    Raises:
        InputError: On the first observation, if the file holds anything else; it stays as it is.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._begun = False

    def __call__(self, seen: Observation) -> None:
        """Write one."""
        try:
            if not self._begun:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._forget_from(seen.step)
                self._begun = True
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(seen.to_dict(), allow_nan=False) + "\n")
        except OSError as error:
            raise InputError(f"cannot write observations to {self.path}: {error.strerror or error}") from error

    def _forget_from(self, step: int) -> None:
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        steps = [_step_of(line) for line in lines]
        if lines and _is_cut_off(lines[-1]):
            del lines[-1], steps[-1]
        if None in steps:
            raise InputError(
                f"{self.path} holds something else than observations (line {steps.index(None) + 1}) and was left as it "
                "is; give another file to watch on"
            )
        kept = [line + "\n" for line, found in zip(lines, steps, strict=True) if found is not None and found < step]
        staging = self.path.with_name(f".{self.path.name}.writing")
        staging.write_text("".join(kept), encoding="utf-8")
        os.replace(staging, self.path)


def _step_of(line: str) -> int | None:
    """The step of an observation's line, None for any other line."""
    try:
        seen = json.loads(line)
        return int(seen["step"]) if {"scalars", "findings"} <= seen.keys() else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _is_cut_off(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return line[: len(_HEAD)] == _HEAD[: len(line)]
    return False


class TensorBoard:
    """Curves and, as text, each finding.

    Args:
        folder: Where TensorBoard looks; or a ``SummaryWriter`` that is used and left open.
    """

    def __init__(self, folder: str | Path | Any) -> None:
        if isinstance(folder, str | Path):
            require("tensorboard", "watch", "to write for TensorBoard")
            from torch.utils.tensorboard import SummaryWriter

            self.writer: Any = SummaryWriter(str(folder))
        else:
            self.writer = folder

    def __call__(self, seen: Observation) -> None:
        """Write one."""
        for name, value in seen.scalars().items():
            self.writer.add_scalar(name, value, seen.step)
        for finding in seen.findings:
            if finding.severity != "info":
                self.writer.add_text(finding.id, f"**{finding.severity}** {finding.evidence}", seen.step)
        self.writer.flush()


def sinks_for(on: str | Path | Sink | Iterable[str | Path | Sink] | None) -> tuple[Sink, ...]:
    """Sinks from what a user writes: a ``.jsonl`` file, a folder for TensorBoard, a callable, or several of these.

    Raises:
        InputError: Something else.
    """
    if on is None:
        return ()
    if isinstance(on, str | Path):
        if Path(on).suffix in {".jsonl", ".ndjson"}:
            return (JsonLines(on),)
        if Path(on).suffix:
            raise InputError(f"expected a .jsonl file or a folder for TensorBoard to watch on, got {on}")
        return (TensorBoard(on),)
    if callable(on):
        return (on,)
    if isinstance(on, Iterable):
        return tuple(sink for part in on for sink in sinks_for(part))
    raise InputError(f"expected a .jsonl file, a folder, a callable or several to watch on, got {type(on).__name__}")
