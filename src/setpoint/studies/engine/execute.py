"""One run: seed, call the study's function, measure, and put into words what went wrong.

A run that raises `Diverged` (any `FloatingPointError`, and `setpoint.train.NonFiniteLoss`), or whose metrics are not
all finite, diverged: that is a result. Any other error is a fault of the code or the machine, and never counts for or
against a claim.
"""

from __future__ import annotations

import math
import os
import random
import shutil
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from setpoint.errors import InputError
from setpoint.progress import Progress
from setpoint.studies.declare import Arm, Budget, Context, Study
from setpoint.studies.engine.store import RunKey, Status
from setpoint.studies.registry import find_studies
from setpoint.types.proving import Outcome

EVERY = 0.1
"""Seconds between two reports of progress."""


@dataclass(frozen=True, slots=True)
class Task:
    """A run that a worker can do knowing nothing else.

    Args:
        source: Key or file that the study is found by.
        key: The run.
        data: The user's corpus, None for the study's own.
        device: Where to run.
        threads: Threads that torch may use.
        scratch: Folder for the run's own files.
    """

    source: str
    key: RunKey
    data: Path | None
    device: str
    threads: int
    scratch: Path

    @property
    def label(self) -> str:
        """The run in a few words."""
        setting = " ".join(f"{name}={value}" for name, value in self.key.setting.items())
        return f"{self.key.arm}{' ' + setting if setting else ''} · {self.key.seed}"


@dataclass(frozen=True, slots=True)
class Finished:
    """How a run ended."""

    status: Status
    outcome: Outcome | None = None
    error: str = ""


def execute(task: Task, report: Progress) -> Finished:
    """Do one run in this process.

    Args:
        task: What to run.
        report: Called with steps done, steps in all, and a few words.

    Returns:
        How it ended. Errors of the study are returned, not raised.
    """
    try:
        study = study_of(task)
        budget = budget_of(study, task.key)
        task.scratch.mkdir(parents=True, exist_ok=True)
        ctx = Context(
            split="valid" if task.key.stage == "tune" else "test",
            device=task.device,
            data=task.data,
            folder=task.scratch,
            progress=_seldom(report),
        )
        finished = run_once(study, study.arm(task.key.arm), task.key.setting, task.key.seed, budget, ctx, task.threads)
    except Exception as error:
        return Finished("failed", error=_words(error))
    shutil.rmtree(task.scratch, ignore_errors=True)
    return finished


def _seldom(report: Progress) -> Progress:
    """Progress at most every so often: a run may tell each of a million steps, and each telling crosses a pipe."""
    last = -math.inf

    def tell(done: int, total: int, text: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= EVERY or done == total:
            last = now
            report(done, total, text)

    return tell


def study_of(task: Task) -> Study:
    """The declared study of a task."""
    return next(study for study in find_studies(task.source) if study.name == task.key.study)


def budget_of(study: Study, key: RunKey) -> Budget:
    """The budget of a run; tuning may set sizes of its own."""
    budget = study.budgets[key.budget]
    if key.stage == "tune" and study.tuning:
        return replace(budget, options={**budget.options, **study.tuning.options})
    return budget


def run_once(
    study: Study, arm: Arm, setting: Mapping[str, Any], seed: int, budget: Budget, ctx: Context, threads: int = 1
) -> Finished:
    """Seed everything, run one arm, and measure time and memory.

    Args:
        study, arm, setting, seed, budget, ctx: What is run.
        threads: Threads that torch may use.

    Returns:
        ``done`` or ``diverged``; any other error is raised.
    """
    with _seeded(seed, threads):
        _reset_peak(ctx.device)
        start = time.perf_counter()
        try:
            outcome = study(arm, setting, seed, budget, ctx)
        except Exception as error:
            if not _diverged(error):
                raise
            cost = {"seconds": time.perf_counter() - start}
            return Finished("diverged", Outcome({}, cost=cost), str(error) or type(error).__name__)
        seconds = time.perf_counter() - start
    _check(study, outcome)
    cost = {"seconds": seconds, "memory": float(_peak(ctx.device)), **outcome.cost}
    outcome = replace(outcome, cost=cost)
    lost = [name for name, value in outcome.metrics.items() if not abs(value) < float("inf")]
    return Finished("diverged" if lost else "done", outcome, f"not finite: {', '.join(lost)}" if lost else "")


def _diverged(error: Exception) -> bool:
    """Whether an error says that numbers stopped being finite, in the study's words or those of the training loop."""
    loop = sys.modules.get("setpoint.train.failure")  # where it was never imported, it raised nothing
    return isinstance(error, FloatingPointError) or (loop is not None and isinstance(error, loop.NonFiniteLoss))


def _check(study: Study, outcome: Outcome) -> None:
    if not isinstance(outcome, Outcome):
        raise InputError(f"study {study.name!r} should return an Outcome, not a {type(outcome).__name__}")
    for name, value in outcome.metrics.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"study {study.name!r}: metric {name!r} should be a Python number, not {value!r}")


@contextmanager
def _seeded(seed: int, threads: int) -> Iterator[None]:
    """Fresh generators and a fixed thread count inside; outside everything is as it was."""
    import numpy as np
    import torch

    python, arrays, before = random.getstate(), np.random.get_state(), torch.get_num_threads()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        if threads != before:
            torch.set_num_threads(threads)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)
            if torch.get_num_threads() != before:
                torch.set_num_threads(before)


def _reset_peak(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # Linux forgets the high-water mark of a process when a 5 is written here
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak(device: str) -> int:
    """Most memory held at once during the run, in bytes: of the process, or of the GPU."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if os.uname().sysname == "Darwin" else 1024)


def _words(error: Exception) -> str:
    """The last place and the message; the whole traceback for what is no plain error of input."""
    if isinstance(error, InputError):
        return str(error)
    return "".join(traceback.format_exception(error)).strip()
