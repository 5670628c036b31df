"""Many runs, each done once by somebody: claim, run, store, and wait for those that other processes are at."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from setpoint.studies.engine.execute import Task
from setpoint.studies.engine.executors import Executor
from setpoint.studies.engine.store import LEASE, Row, RunKey, Store


@dataclass(frozen=True, slots=True)
class Event:
    """Something to show while a proof runs.

    Args:
        stage: What is being done: ``"tuning …"`` or ``"running …"``.
        finished, runs: Runs that have ended, and runs in all, of this stage.
        run: Name of the run that this is about; "" for none.
        done, total: Steps within that run; 0 and 0 when not known.
        text: A few words.
        status: How the run ended, "" while it goes on.
    """

    stage: str
    finished: int
    runs: int
    run: str = ""
    done: int = 0
    total: int = 0
    text: str = ""
    status: str = ""


Progress = Callable[[Event], None]


def run_all(
    tasks: Sequence[Task],
    store: Store,
    executor: Executor,
    *,
    stage: str,
    facts: Mapping[str, Any],
    progress: Progress,
    deadline: float | None = None,
) -> dict[str, Row]:
    """Bring every task to an end, or find that it already is.

    Args:
        tasks: The runs, in the order in which they should start.
        store: Where they are claimed and written.
        executor: Who does them.
        stage: A few words for the progress.
        facts: For the record: machine and versions.
        progress: Told about starts, steps and ends.
        deadline: `time.monotonic` after which no further run is started; None for never.

    Returns:
        The stored rows by key; a run that was not reached before the deadline is missing.
    """
    rows: dict[str, Row] = {}
    held: dict[str, RunKey] = {}
    open_ = {task.key.hash: task for task in tasks}

    def tell(**about: Any) -> None:
        progress(Event(stage, len(rows), len(tasks), **about))

    def watch(task: Task, done: int, total: int, text: str) -> None:
        tell(run=task.label, done=done, total=total, text=text)

    def claimed() -> Iterator[Task]:
        for task in list(open_.values()):
            if deadline is not None and time.monotonic() > deadline:
                return
            state = store.claim(task.key, facts)
            if state == "mine":
                held[task.key.hash] = open_.pop(task.key.hash).key
                tell(run=task.label, text="starting")
                yield task
            elif state == "done":
                keep(task, fresh=False)

    def keep(task: Task, *, fresh: bool) -> None:
        row = store.get(task.key)
        assert row is not None
        open_.pop(task.key.hash, None)
        held.pop(task.key.hash, None)
        rows[task.key.hash] = row
        tell(run=task.label, status=row.status, text="" if fresh else "stored")

    tell()
    with _heartbeat(store, held):
        try:
            while open_ and (deadline is None or time.monotonic() <= deadline):
                waiting = len(open_)
                for task, finished in executor.run(claimed(), watch):
                    store.finish(task.key, finished.status, finished.outcome, finished.error)
                    keep(task, fresh=True)
                if len(open_) == waiting:
                    tell(text="waiting for another process")
                    time.sleep(0.5)
        finally:
            store.release(list(held.values()))
    return rows


@contextmanager
def _heartbeat(store: Store, held: Mapping[str, RunKey]) -> Iterator[None]:
    """Renews the claims that are held, from a thread of its own: the runs may keep this one busy for long."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(LEASE / 4):
            store.renew(list(held.values()))

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
