"""The store: claims, leases, and what survives a kill."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from setpoint.errors import InputError
from setpoint.proving import prove
from setpoint.studies.engine import store as store_module
from setpoint.studies.engine.store import LEASE, RunKey, Store
from setpoint.types import Outcome

KEY = RunKey("m", "s", "judge", "laptop", "plain", {"lr": 0.1}, 0, "f")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "proofs.db")


def claim_elsewhere(path: Path) -> str:
    """A claim by another process, which then ends without a word."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=lambda: Store(path).claim(KEY, {}))
    process.start()
    process.join()
    return Store(path).get(KEY).status  # type: ignore[union-attr]


def test_a_claimed_run_is_busy_until_it_is_done(store: Store) -> None:
    other = Store(store.path)
    assert store.claim(KEY, {}) == "mine"
    assert other.claim(KEY, {}) == "busy"
    store.finish(KEY, "done", Outcome({"loss": 1.5}))
    assert other.claim(KEY, {}) == "done"
    assert other.get(KEY).outcome == Outcome({"loss": 1.5})  # type: ignore[union-attr]


def test_a_claim_of_a_process_that_is_gone_is_taken_over_at_once(store: Store) -> None:
    assert claim_elsewhere(store.path) == "running"
    assert store.claim(KEY, {}) == "mine"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The store's time, in its only entry."""
    now = [1000.0]
    monkeypatch.setattr(store_module, "_now", lambda: now[0])
    return now


def test_a_lease_that_ran_out_is_taken_over(store: Store, clock: list[float]) -> None:
    assert store.claim(KEY, {}) == "mine"
    other = Store(store.path)
    clock[0] += LEASE - 1
    assert other.claim(KEY, {}) == "busy"
    clock[0] += 2
    assert other.claim(KEY, {}) == "mine"


def test_a_renewed_lease_holds(store: Store, clock: list[float]) -> None:
    store.claim(KEY, {})
    clock[0] += LEASE - 1
    store.renew([KEY])
    clock[0] += LEASE - 1
    assert Store(store.path).claim(KEY, {}) == "busy"


def test_a_released_claim_is_free(store: Store) -> None:
    store.claim(KEY, {})
    store.release([KEY])
    assert store.get(KEY) is None
    assert Store(store.path).claim(KEY, {}) == "mine"


def test_a_run_that_broke_is_tried_again_and_one_that_diverged_is_not(store: Store) -> None:
    store.claim(KEY, {})
    store.finish(KEY, "failed", None, "boom")
    assert store.claim(KEY, {}) == "mine"
    store.finish(KEY, "diverged", Outcome({"loss": float("nan")}), "not finite: loss")
    assert store.claim(KEY, {}) == "done"
    assert store.get(KEY).error == "not finite: loss"  # type: ignore[union-attr]


def test_a_finished_run_is_never_overwritten_by_a_failure(store: Store) -> None:
    store.claim(KEY, {})
    store.finish(KEY, "done", Outcome({"loss": 1.0}))
    Store(store.path).finish(KEY, "failed", None, "late")
    assert store.get(KEY).status == "done"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"arm": "method"}, {"setting": {"lr": 0.2}}, {"fingerprint": "g"}, {"data": "x"}, {"stage": "tune"}],
)
def test_whatever_a_run_depends_on_makes_another_run(change: dict[str, object]) -> None:
    assert replace(KEY, **change).hash != KEY.hash  # type: ignore[arg-type]


def test_a_file_that_is_no_store_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "notes.db").write_text("not a database, and long enough to be read as one" * 40)
    with pytest.raises(InputError, match="can't hold proofs"):
        Store(tmp_path / "notes.db")
    with pytest.raises(InputError, match="can't hold proofs"):
        Store(tmp_path / "notes.db" / "below")


COMMAND = "import sys; from setpoint.proving import prove; prove(sys.argv[1], jobs=int(sys.argv[3]), store=sys.argv[2])"


def start(study: Path, store: Path, jobs: int = 1) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", COMMAND, str(study), str(store), str(jobs)]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "what the test waits for never came"
        time.sleep(0.02)


def test_a_kill_loses_at_most_the_run_in_progress(
    own_study: Path, tmp_path: Path, logged: Callable[[Path], list[list[str]]]
) -> None:
    """The process is killed while its seventh run waits; a second call does that run and those after it, no more."""
    path = tmp_path / "proofs.db"
    process = start(own_study, path)
    try:
        wait_for(lambda: len(logged(own_study)) >= 6)
        (own_study.parent / "hold").touch()
        # A run that began before the hold may still log; then the next one waits inside and logs nothing.
        wait_for(lambda: len(Store(path).rows(status="running")) == 1 and settled(own_study, logged))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    (own_study.parent / "hold").unlink()
    before = logged(own_study)
    done = {row.key.hash for row in Store(path).rows(status="done")}
    assert len(done) == len(before) >= 6
    prove(str(own_study), jobs=1, store=path)
    after = logged(own_study)
    assert after[: len(before)] == before
    assert len(after) == 10 + 8  # ten tuning runs and eight judged ones, each once
    assert len({tuple(line[:5]) for line in after}) == len(after)


def settled(study: Path, logged: Callable[[Path], list[list[str]]]) -> bool:
    count = len(logged(study))
    time.sleep(0.3)
    return len(logged(study)) == count


def test_workers_of_a_killed_process_end_too(own_study: Path, tmp_path: Path) -> None:
    (own_study.parent / "hold").touch()
    path = tmp_path / "proofs.db"
    process = start(own_study, path, jobs=2)
    try:
        wait_for(lambda: path.exists() and len(Store(path).rows(status="running")) == 2)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) >= 2
    finally:
        process.kill()
        process.wait()
    wait_for(lambda: not any(Path(f"/proc/{child}").exists() for child in children), 10)


def test_two_processes_share_the_work_of_one_store(
    own_study: Path, tmp_path: Path, logged: Callable[[Path], list[list[str]]]
) -> None:
    (own_study.parent / "hold").touch()  # both are at it before either can finish
    path = tmp_path / "proofs.db"
    processes = [start(own_study, path), start(own_study, path)]
    try:
        wait_for(lambda: path.exists() and len(Store(path).rows(status="running")) == 2)
        (own_study.parent / "hold").unlink()
        assert [process.wait(60) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    lines = logged(own_study)
    assert len({tuple(line[:5]) for line in lines}) == len(lines) == 18  # each run once
    assert len({line[5] for line in lines}) == 2  # and both did some
    assert len(Store(path).rows(status="done")) == 18
