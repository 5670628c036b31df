"""Where runs are done: in this process, in several local ones, or on a Ray cluster.

An executor pulls its next task only when it has a worker free for it, so that runs are claimed one at a time and
processes that share a store share the work.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

from setpoint.errors import InputError
from setpoint.extras import require
from setpoint.studies.declare import Context
from setpoint.studies.engine.execute import Finished, Task, execute

Watch = Callable[[Task, int, int, str], None]
"""Called with a run, steps done, steps in all and a few words."""


class Executor(Protocol):
    """Does tasks, in any order."""

    def run(self, tasks: Iterator[Task], watch: Watch) -> Iterator[tuple[Task, Finished]]:
        """Yield each task with how it ended, the moment it ended."""

    def close(self) -> None:
        """Stop the workers."""


def make_executor(name: str, jobs: int) -> Executor:
    """An executor by name.

    Args:
        name: ``"local"`` or ``"ray"``.
        jobs: Runs at a time; one local run is done in this process.

    Raises:
        InputError: There is none of this name, ``jobs`` is below 1, or Ray is not installed.

    >>> type(make_executor("local", 1)).__name__
    'Inline'
    """
    if jobs < 1:
        raise InputError(f"expected at least one job, got {jobs}")
    if name not in _EXECUTORS:
        raise InputError(f"no executor is called {name!r}; there are {', '.join(_EXECUTORS)}")
    return _EXECUTORS[name](jobs)


@dataclass
class Executors:
    """The executors of one proof, started when first used and kept for its next study.

    Args:
        name: ``"local"`` or ``"ray"``.
    """

    name: str
    started: dict[int, Executor] = field(default_factory=dict)

    def of(self, jobs: int) -> Executor:
        """The executor that does this many runs at a time."""
        if jobs not in self.started:
            self.started[jobs] = make_executor(self.name, jobs)
        return self.started[jobs]

    def close(self) -> None:
        """Stop them all."""
        for executor in self.started.values():
            executor.close()


class Inline:
    """One run after the other, in this process."""

    def run(self, tasks: Iterator[Task], watch: Watch) -> Iterator[tuple[Task, Finished]]:
        """Yield each task with how it ended."""
        for task in tasks:
            yield task, execute(task, lambda *progress, task=task: watch(task, *progress))

    def close(self) -> None:
        """Nothing to stop."""


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    task: Task | None = None


@dataclass
class Local:
    """Several processes on this machine, each doing one run at a time.

    A process that dies (killed for memory, say) fails the run it was at; a new one takes its place.

    Args:
        jobs: How many.
    """

    jobs: int
    workers: list[_Worker] = field(default_factory=list)

    def run(self, tasks: Iterator[Task], watch: Watch) -> Iterator[tuple[Task, Finished]]:
        """Yield each task with how it ended, the moment it ended."""
        more = True
        while True:
            while more and self._free():
                task = next(tasks, None)
                if task is None:
                    more = False
                else:
                    self._give(task)
            busy = [worker for worker in self.workers if worker.task is not None]
            if not busy:
                return
            ready = wait([worker.pipe for worker in busy])
            for worker in busy:
                if worker.pipe in ready and (finished := self._hear(worker, watch)) is not None:
                    task, worker.task = worker.task, None
                    assert task is not None
                    yield task, finished

    def close(self) -> None:
        """Stop all processes, whatever they are at."""
        for worker in self.workers:
            worker.process.terminate()
        for worker in self.workers:
            worker.process.join()
            worker.pipe.close()
        self.workers.clear()

    def _free(self) -> bool:
        return len(self.workers) < self.jobs or any(worker.task is None for worker in self.workers)

    def _start(self) -> _Worker:
        context = get_context("spawn")  # a forked child of a process with torch's threads can hang
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        worker = _Worker(process, ours)
        self.workers.append(worker)
        return worker

    def _give(self, task: Task) -> None:
        worker = next((worker for worker in self.workers if worker.task is None), None) or self._start()
        worker.task = task
        with suppress(OSError):  # it is dead, which is heard when its pipe is read
            worker.pipe.send(task)

    def _hear(self, worker: _Worker, watch: Watch) -> Finished | None:
        """One message of a worker: how its run ended, or None for mere progress."""
        assert worker.task is not None
        try:
            message = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join()
            self.workers.remove(worker)
            worker.pipe.close()
            code = worker.process.exitcode
            return Finished("failed", error=f"the process of this run ended with exit code {code}; was memory short?")
        if isinstance(message, Finished):
            return message
        watch(worker.task, *message)
        return None


def _serve(pipe: Connection) -> None:
    """What a worker process does until its parent is gone."""
    parent = parent_process()
    assert parent is not None
    # A killed parent can't say goodbye: without this a long run would go on for nobody.
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent stops its workers
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        pipe.send(execute(task, lambda *progress: pipe.send(progress)))


def _follow(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


@dataclass
class Ray:
    """Runs as tasks of a Ray cluster: the one that ``RAY_ADDRESS`` names, else one on this machine.

    The results come back here and are stored here; the cluster needs no access to the store.

    Args:
        jobs: Runs in flight.
    """

    jobs: int

    def __post_init__(self) -> None:
        self._ray: Any = require("ray", "scale", "for --executor ray")
        self._started = not self._ray.is_initialized()
        if self._started:
            local = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": self.jobs, "include_dashboard": False}
            self._ray.init(log_to_driver=False, logging_level="ERROR", **local)
        self._remote = self._ray.remote(num_cpus=1)(_on_cluster)

    def run(self, tasks: Iterator[Task], watch: Watch) -> Iterator[tuple[Task, Finished]]:
        """Yield each task with how it ended, the moment it ended."""
        flying: dict[Any, Task] = {}
        more = True
        while True:
            while more and len(flying) < self.jobs:
                task = next(tasks, None)
                if task is None:
                    more = False
                else:
                    watch(task, 0, 0, "on the cluster")
                    flying[self._remote.remote(task)] = task
            if not flying:
                return
            [ready], _ = self._ray.wait(list(flying), num_returns=1)
            task = flying.pop(ready)
            try:
                finished = self._ray.get(ready)
            except self._ray.exceptions.RayError as error:
                finished = Finished("failed", error=f"Ray lost this run: {error}")
            yield task, finished

    def close(self) -> None:
        """Leave the cluster, if this executor joined it."""
        if self._started:
            self._ray.shutdown()


def _on_cluster(task: Task) -> Finished:
    return execute(task, Context().progress)  # nobody listens on the way


_EXECUTORS: Mapping[str, Callable[[int], Executor]] = {
    "local": lambda jobs: Inline() if jobs == 1 else Local(jobs),
    "ray": Ray,
}
