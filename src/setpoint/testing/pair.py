"""Two processes that train layers together, started once and kept for the session.

Starting a process group takes seconds, most of it importing torch; a layer's check takes milliseconds. So the first
check starts a pair of workers (gloo, this machine only), later ones send their layer to the same pair, and the pair
ends with the process that started it.

    python -m setpoint.testing.pair RANK FILE     a worker; it speaks pickle over its standard streams
"""

from __future__ import annotations

import atexit
import os
import pickle
import select
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

from torch import Tensor, nn

PATIENCE = 120.0
"""Seconds to wait for a worker; a hung collective is stopped by then."""

Outcome = tuple[dict[str, Tensor] | None, str]


def gradients_on_two(layer: nn.Module, halves: Sequence[tuple[Any, ...]]) -> list[Outcome]:
    """Forward and backward of one layer under DistributedDataParallel, each process with its own inputs.

    Args:
        layer: A layer whose class the workers can import.
        halves: Inputs of process 0 and of process 1.

    Returns:
        For each process its parameters' gradients and "", or None and what went wrong.
    """
    pair = _Pair.running()
    try:
        return pair.ask([pickle.dumps((layer, half)) for half in halves])
    except (EOFError, BrokenPipeError, TimeoutError) as error:
        pair.stop()
        return [(None, f"{type(error).__name__}: {error}")] * 2


class _Pair:
    """The parent's end."""

    _current: _Pair | None = None

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        store = str(Path(self.folder.name) / "store")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
        self.workers = [
            subprocess.Popen(
                [sys.executable, "-m", "setpoint.testing.pair", str(rank), store],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
            for rank in (0, 1)
        ]
        atexit.register(self.stop)

    @classmethod
    def running(cls) -> _Pair:
        """The session's pair, started if there is none."""
        if cls._current is None or any(worker.poll() is not None for worker in cls._current.workers):
            cls._current = cls()
        return cls._current

    def ask(self, messages: Sequence[bytes]) -> list[Outcome]:
        """Send each worker its message and wait for both answers."""
        for worker, message in zip(self.workers, messages, strict=True):
            assert worker.stdin is not None
            _send(worker.stdin, message)
        answers = []
        for worker in self.workers:
            assert worker.stdout is not None
            if not select.select([worker.stdout], [], [], PATIENCE)[0]:
                raise TimeoutError(f"no answer within {PATIENCE:.0f} s, a collective call may have no partner")
            answers.append(pickle.loads(_receive(worker.stdout)))
        return answers

    def stop(self) -> None:
        """End both workers."""
        for worker in self.workers:
            worker.kill()
            worker.wait()
            for stream in (worker.stdin, worker.stdout):
                if stream is not None:
                    stream.close()
        self.folder.cleanup()
        atexit.unregister(self.stop)
        if _Pair._current is self:
            _Pair._current = None


def _send(stream: IO[bytes], message: bytes) -> None:
    stream.write(struct.pack("<Q", len(message)) + message)
    stream.flush()


def _receive(stream: IO[bytes]) -> bytes:
    def read(count: int) -> bytes:
        data = stream.read(count)
        if len(data) < count:
            raise EOFError("a worker ended before it answered")
        return data

    return read(struct.unpack("<Q", read(8))[0])


def _work(rank: int, store: str) -> None:
    """The worker's end: answer messages until the parent goes away."""
    import torch
    import torch.distributed as dist

    receiving = os.fdopen(os.dup(0), "rb")
    sending = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a layer prints must not get among the answers
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=PATIENCE / 2)
    )
    while True:
        try:
            message = _receive(receiving)
        except EOFError:
            break
        _send(sending, pickle.dumps(_answer(message)))
    os._exit(0)  # the other worker may be gone, and leaving the group would wait for it


def _answer(message: bytes) -> Outcome:
    from torch.nn.parallel import DistributedDataParallel

    from setpoint.testing.layer_case import run

    try:
        layer, inputs = pickle.loads(message)
        parallel = DistributedDataParallel(layer)
        for _ in range(2):  # a parameter without a gradient is noticed at the start of the second pass
            made = run(layer, inputs, parallel)
        return {name: g for name, g in made.parameter_gradients.items() if g is not None}, ""
    except Exception as error:
        return None, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


if __name__ == "__main__":
    _work(int(sys.argv[1]), sys.argv[2])
