"""Checkpoints that are whole or absent, and from which a run goes on as if it had never stopped.

A checkpoint holds the weights and the optimizer, the number of steps, the history, each process's random state, the
state of callbacks, and the settings of the run. A kill at any point leaves the one before (`setpoint.staging`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from setpoint.errors import InputError
from setpoint.staging import begin, finish, remove
from setpoint.train.history import History
from setpoint.train.random import RandomState

_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where and when to save.

    Args:
        folder: Holds ``step-00001000`` and so on; one folder a run.
        every: Steps between two; the last step is always saved. None for a tenth of the run.
        keep: How many to keep, the newest.
    """

    folder: str | Path
    every: int | None = None
    keep: int = 2

    def __post_init__(self) -> None:
        if (self.every is not None and self.every < 1) or self.keep < 1:
            raise InputError(f"expected every and keep of at least 1, got every={self.every} and keep={self.keep}")

    def due(self, step: int, steps: int) -> bool:
        """Whether to save after so many steps."""
        return step == steps or step % (self.every or max(1, steps // 10)) == 0


class Shelf:
    """The checkpoints of one run.

    Args:
        plan: Where and how many.
        fabric: Saves and loads in the manner of the strategy.
        settings: What must be the same for a run to go on; a difference is an error that names it.
    """

    def __init__(self, plan: Checkpoint, fabric: Any, settings: Mapping[str, Any]) -> None:
        self.plan, self._fabric, self._settings = plan, fabric, {k: str(v) for k, v in settings.items()}
        self.folder = Path(plan.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot keep checkpoints in {self.folder}: {error.strerror or error}") from error

    def newest(self) -> Path | None:
        """The whole checkpoint with the most steps."""
        found = [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)]
        return max(found, key=lambda path: int(path.name.split("-")[1]), default=None)

    def save(self, step: int, history: History, objects: Mapping[str, Any], callbacks: Sequence[Any]) -> None:
        """Write one; every process calls it."""
        main = self._fabric.is_global_zero
        target = self.folder / f"step-{step:08d}"
        staging = ""
        if main:
            staging = str(begin(target))
        staging = self._fabric.broadcast(staging)
        content = {
            **objects,
            "random": [state.to_tensors() for state in _gather(RandomState.now())],
            "callbacks": [c.state_dict() if hasattr(c, "state_dict") else {} for c in callbacks],
            "precision": self._fabric.strategy.precision.state_dict(),
            "run": json.dumps({"step": step, "history": asdict(history), "settings": self._settings}),
        }
        try:
            self._fabric.save(Path(staging) / "state", content)
            self._fabric.barrier()
            if main:
                finish(Path(staging) / "state", target)
        finally:
            if main:
                remove(Path(staging))
        if main:
            whole = sorted(path for path in self.folder.iterdir() if _NAME.fullmatch(path.name))
            for old in whole[: -self.plan.keep]:
                remove(old)
        self._fabric.barrier()

    def load(self, path: Path, objects: dict[str, Any], callbacks: Sequence[Any]) -> tuple[int, History]:
        """Put a run back to where it was; every process calls it.

        Returns:
            Steps done, and the history up to there.

        Raises:
            InputError: The checkpoint is damaged, or is of a run with other settings.
        """
        try:
            rest = self._fabric.load(path, dict(objects), weights_only=True)
            run = json.loads(rest["run"])
            history = History(**run["history"])
        except (RuntimeError, OSError, KeyError, ValueError, TypeError, EOFError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"{path} can't be gone on with: {reason}. Remove it, give another folder, or use resume=False."
            ) from error
        for name, now in self._settings.items():
            then = run["settings"].get(name)
            if then != now:
                raise InputError(
                    f"{path} is of a run with {name} {then}, this one has {now}. "
                    f"Give another folder, or use resume=False to start over."
                )
        self._fabric.strategy.precision.load_state_dict(rest["precision"])
        RandomState.from_tensors(rest["random"][self._fabric.global_rank]).put()
        for callback, state in zip(callbacks, rest["callbacks"], strict=False):
            if hasattr(callback, "load_state_dict"):
                callback.load_state_dict(state)
        return run["step"], history

    def clear(self) -> None:
        """Remove the checkpoints of an earlier run."""
        if self._fabric.is_global_zero:
            for path in self.folder.iterdir():
                if _NAME.fullmatch(path.name):
                    remove(path)
        self._fabric.barrier()


def _gather(mine: RandomState) -> list[RandomState]:
    if not (dist.is_available() and dist.is_initialized()):
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone
