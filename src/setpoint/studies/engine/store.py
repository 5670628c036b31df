"""Every run of every study, in one SQLite file that several processes share and that no kill can hurt.

A run is claimed by inserting its row, with a lease that its process renews while it works; the result is written into
the row in one transaction the moment the run ends. Whoever is killed leaves a row whose lease runs out (at once, if the
process is seen to be gone), and the next one takes that run over: at most the run in progress is lost. Nothing is ever
deleted: when code or versions change, runs get other keys and the old rows stay as they are, stale.
"""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from setpoint.errors import InputError
from setpoint.report.codec import decode, encode
from setpoint.types.proving import Outcome

Status = Literal["running", "done", "diverged", "failed"]
LEASE = 60.0
"""Seconds that a claim holds without being renewed."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (
    key TEXT PRIMARY KEY,
    method TEXT NOT NULL, study TEXT NOT NULL, stage TEXT NOT NULL, budget TEXT NOT NULL,
    arm TEXT NOT NULL, setting TEXT NOT NULL, seed INTEGER NOT NULL,
    fingerprint TEXT NOT NULL, data TEXT NOT NULL, facts TEXT NOT NULL,
    status TEXT NOT NULL, owner TEXT NOT NULL, lease REAL NOT NULL,
    started REAL NOT NULL, finished REAL, outcome TEXT, error TEXT
);
CREATE INDEX IF NOT EXISTS by_study ON runs (method, study, budget, stage);
CREATE TABLE IF NOT EXISTS proofs (
    id INTEGER PRIMARY KEY, method TEXT NOT NULL, budget TEXT NOT NULL, fingerprint TEXT NOT NULL,
    data TEXT NOT NULL, written REAL NOT NULL, proof TEXT NOT NULL,
    UNIQUE (method, budget, fingerprint, data)
);
"""


def default_path() -> Path:
    """``$SETPOINT_CACHE/proofs.db``, or the same below the platform's cache folder."""
    from setpoint.loading.shelf import cache_folder

    return cache_folder().parent / "proofs.db"


@dataclass(frozen=True, slots=True)
class RunKey:
    """What identifies a run.

    Args:
        method, study: Whose run it is.
        stage: ``"tune"`` or ``"judge"``.
        budget: Name of the budget.
        arm, setting, seed: What is run.
        fingerprint: Hash of code, versions, threads, device and sizes.
        data: Hash of the user's data, "" for the study's own.
    """

    method: str
    study: str
    stage: str
    budget: str
    arm: str
    setting: Mapping[str, Any]
    seed: int
    fingerprint: str
    data: str = ""

    @property
    def hash(self) -> str:
        """The row's key."""
        from setpoint.studies.engine.fingerprint import digest

        return digest([getattr(self, name) for name in self.__slots__])


@dataclass(frozen=True, slots=True)
class Row:
    """A run as the store has it."""

    key: RunKey
    status: Status
    outcome: Outcome | None
    error: str
    seconds: float


class Store:
    """Runs and proofs on disk.

    Args:
        path: The file; made if it is not there.

    Raises:
        InputError: The file can't be opened or is no store.

    >>> import tempfile
    >>> store = Store(Path(tempfile.mkdtemp()) / "proofs.db")
    >>> key = RunKey("dyt", "parity", "judge", "smoke", "dyt", {"lr": 0.1}, 0, "f")
    >>> store.claim(key, {}), store.claim(key, {})
    ('mine', 'busy')
    >>> store.finish(key, "done", Outcome({"loss": 1.0}))
    >>> store.claim(key, {}), store.get(key).outcome.metrics["loss"]
    ('done', 1.0)
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{_born(os.getpid())}:{uuid.uuid4().hex[:8]}"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._connection() as db:
                db.execute("PRAGMA journal_mode=WAL")
                db.executescript(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise InputError(f"{self.path} can't hold proofs: {error}; give another file with --store") from error

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        # One short connection per action: nothing is shared between threads, and nothing is open while a run works.
        db = sqlite3.connect(self.path, timeout=60, isolation_level=None)
        try:
            db.execute("PRAGMA synchronous=FULL")
            yield db
        finally:
            db.close()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._connection() as db:
            db.execute("BEGIN IMMEDIATE")  # a deferred one can fail half-way when two processes upgrade it
            try:
                yield db
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")

    def claim(self, key: RunKey, facts: Mapping[str, Any]) -> Literal["mine", "busy", "done"]:
        """Take a run, unless it is finished or another process is at it.

        A run that failed with an error is taken again: what broke it may be mended.

        Args:
            key: The run.
            facts: Machine, versions and the like, for the record.

        Returns:
            ``"mine"`` if it is now this store's to run, ``"busy"`` if another one has it, ``"done"`` if it has ended.
        """
        now = _now()
        with self._writing() as db:
            found = db.execute("SELECT status, owner, lease FROM runs WHERE key = ?", (key.hash,)).fetchone()
            if found:
                status, owner, lease = found
                if status in ("done", "diverged"):
                    return "done"
                if status == "running" and lease > now and not _gone(owner):
                    return "busy"
            columns = [
                key.hash, key.method, key.study, key.stage, key.budget, key.arm, _json(key.setting), key.seed,
                key.fingerprint, key.data, _json(facts), "running", self.owner, now + LEASE, now, None, None, None,
            ]  # fmt: skip
            db.execute(f"INSERT OR REPLACE INTO runs VALUES ({', '.join('?' * len(columns))})", columns)
        return "mine"

    def renew(self, keys: Sequence[RunKey]) -> None:
        """Hold claims for another lease."""
        with self._writing() as db:
            db.executemany(
                "UPDATE runs SET lease = ? WHERE key = ? AND owner = ? AND status = 'running'",
                [(_now() + LEASE, key.hash, self.owner) for key in keys],
            )

    def release(self, keys: Sequence[RunKey]) -> None:
        """Give claims back unfinished, so that nobody has to wait for them."""
        with self._writing() as db:
            db.executemany(
                "DELETE FROM runs WHERE key = ? AND owner = ? AND status = 'running'",
                [(key.hash, self.owner) for key in keys],
            )

    def finish(self, key: RunKey, status: Status, outcome: Outcome | None, error: str = "") -> None:
        """Write what a run gave.

        A result is written even if the lease was lost meanwhile: the other process computes the same numbers. A
        finished row is never overwritten by a failure.
        """
        text = None if outcome is None else _json(encode(outcome))
        with self._writing() as db:
            db.execute(
                "UPDATE runs SET status = ?, finished = ?, outcome = ?, error = ?, owner = ? WHERE key = ? "
                "AND NOT (status IN ('done', 'diverged') AND ? = 'failed')",
                (status, _now(), text, error, self.owner, key.hash, status),
            )

    def get(self, key: RunKey) -> Row | None:
        """One run, None if the store has never seen it."""
        with self._connection() as db:
            found = db.execute(f"{_SELECT} WHERE key = ?", (key.hash,)).fetchone()
        return _row(found) if found else None

    def rows(self, **equal: Any) -> list[Row]:
        """Runs whose columns have the given values, oldest first.

        Args:
            equal: ``method=``, ``study=``, ``stage=``, ``budget=``, ``fingerprint=``, ``data=``, ``status=`` ….
        """
        condition = " AND ".join(f"{name} = ?" for name in equal) or "1"
        with self._connection() as db:
            found = db.execute(f"{_SELECT} WHERE {condition} ORDER BY started", tuple(equal.values())).fetchall()
        return [_row(values) for values in found]

    def save_proof(self, method: str, budget: str, fingerprint: str, data: str, text: str) -> None:
        """Keep a judged proof; one with the same fingerprint replaces the last."""
        with self._writing() as db:
            db.execute(
                "INSERT OR REPLACE INTO proofs (method, budget, fingerprint, data, written, proof) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (method, budget, fingerprint, data, _now(), text),
            )

    def proofs(self, method: str | None = None) -> list[str]:
        """Every judged proof as JSON, newest first."""
        with self._connection() as db:
            found = db.execute(
                "SELECT proof FROM proofs WHERE ? IS NULL OR method = ? ORDER BY written DESC, id DESC",
                (method, method),
            ).fetchall()
        return [str(proof) for (proof,) in found]

    def scratch(self, key: RunKey) -> Path:
        """Folder for a run's own files, the same after a kill."""
        return self.path.parent / f"{self.path.stem}-runs" / key.hash


_SELECT = (
    "SELECT method, study, stage, budget, arm, setting, seed, fingerprint, data, "
    "status, outcome, error, started, finished FROM runs"
)


def _row(values: Sequence[Any]) -> Row:
    *identity, status, outcome, error, started, finished = values
    method, study, stage, budget, arm, setting, seed, fingerprint, data = identity
    return Row(
        key=RunKey(method, study, stage, budget, arm, json.loads(setting), seed, fingerprint, data),
        status=status,
        outcome=decode(Outcome, json.loads(outcome), "the stored run") if outcome else None,
        error=error or "",
        seconds=(finished or started) - started,
    )


def _now() -> float:
    return time.time()


def _json(value: Any) -> str:
    return json.dumps(encode(value), allow_nan=False, sort_keys=True)


def _born(pid: int) -> str:
    """When a process started, as the kernel counts, so that a reused process id is not taken for the old process.

    "" for one that is not there, or is dead and only waits for its parent to notice.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        return ""


def _gone(owner: str) -> bool:
    """Whether the owner is seen to be dead; False for what can't be known (another host, no /proc)."""
    host, pid, born, _ = owner.rsplit(":", 3)
    if host != socket.gethostname() or not Path("/proc/self/stat").exists():
        return False
    return _born(int(pid)) != born
