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


class JsonLines:
    """One JSON object a line: ``{"step": …, "scalars": {…}, "findings": […]}``.

    Lines of the same or later steps, left by a run that went back to a checkpoint or by an earlier run, are removed
    before the first line is written.

    Args:
        path: The file; its folder is made.
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
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] < step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue  # the half line of a process that was killed
        staging = self.path.with_name(f".{self.path.name}.writing")
        staging.write_text("".join(kept), encoding="utf-8")
        os.replace(staging, self.path)


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
        if Path(on).suffix in {".jsonl", ".ndjson", ".json"}:
            return (JsonLines(on),)
        if Path(on).suffix:
            raise InputError(f"expected a .jsonl file or a folder for TensorBoard to watch on, got {on}")
        return (TensorBoard(on),)
    if callable(on):
        return (on,)
    if isinstance(on, Iterable):
        return tuple(sink for part in on for sink in sinks_for(part))
    raise InputError(f"expected a .jsonl file, a folder, a callable or several to watch on, got {type(on).__name__}")
