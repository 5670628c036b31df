"""`setpoint.prove`: run a method's studies and say what came out. `setpoint.results`: what was proved before."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from setpoint.data.corpora import corpus as read_corpus
from setpoint.errors import InputError
from setpoint.report.proof import Proof
from setpoint.studies.declare import BUDGETS, TUNING_SEED, BudgetName, Study
from setpoint.studies.engine.conduct import Circumstances, Conduct, fingerprint
from setpoint.studies.engine.executors import Executors
from setpoint.studies.engine.fingerprint import code_digest, data_digest, digest, sources
from setpoint.studies.engine.machine import machine, versions
from setpoint.studies.engine.schedule import Event, Progress
from setpoint.studies.engine.store import Store, default_path
from setpoint.studies.registry import find_studies, source_file


def _unseen(event: Event) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True, slots=True)
class StoredProof:
    """A proof in a store.

    Args:
        proof: What was found.
        stale: Whether code, versions or sizes have changed since; a new `prove` would run it again.
    """

    proof: Proof
    stale: bool


def prove(
    method: str,
    *,
    budget: BudgetName = "laptop",
    seeds: int | None = None,
    data: str | os.PathLike[str] | None = None,
    jobs: int | None = None,
    executor: str = "local",
    tune: bool = False,
    threads: int = 1,
    device: str = "cpu",
    store: str | os.PathLike[str] | None = None,
    progress: Progress = _unseen,
) -> Proof:
    """Run a method's studies, baseline against method, and judge its claims.

    Every run is stored the moment it ends; what is stored already is not run again, so a call that was stopped goes on
    where it was. Settings come from the tuning stage, which is run first if neither the store nor the package has them.

    Args:
        method: A method's key, as in ``setpoint list``, or the path of a Python file that declares studies.
        budget: ``"smoke"`` (seconds, shows that it runs), ``"laptop"`` (at most 10 minutes on two cores at the tuned
            setting) or ``"full"``.
        seeds: Replicates of each arm; None for what the budget says.
        data: A corpus of your own for studies that take one, a UTF-8 text file or a folder of them; None for each
            study's own data.
        jobs: Runs at a time; None for one per core, or for one where runs are timed. One is done in this process.
        executor: ``"local"`` or ``"ray"``.
        tune: Run the tuning stage here even if settings are known from the package.
        threads: Threads each run may use. It is part of what a result depends on.
        device: Where to run, as torch names it.
        store: File of the store; None for the one in the cache folder.
        progress: Told about every start, step and end.

    Returns:
        The proof. Its verdicts may be ``holds``, ``reversed``, ``no effect`` or ``undecided``.

    Raises:
        InputError: Something that was given can't be used, or a study contradicts itself.

    Example:
        >>> import tempfile
        >>> where = tempfile.mkdtemp() + "/proofs.db"
        >>> proof = prove("batchnorm", budget="smoke", jobs=1, store=where)
        >>> proof.judgements[0].claim.method
        'batchnorm'
    """
    if method.endswith(".py"):
        method = str(Path(method).resolve())  # so that it is found again from anywhere
    studies = find_studies(method)
    corpus = Path(data) if data is not None else None
    _check(studies, method, budget, seeds, corpus, jobs, threads)
    code = sources(source_file(method))
    under = Circumstances(
        source=method,
        budget=budget,
        code=code_digest(code),
        data=corpus,
        corpus=data_digest(corpus),
        seeds=seeds,
        jobs=jobs,
        executors=Executors(executor),
        tune=tune,
        threads=threads,
        device=device,
        store=Store(Path(store) if store is not None else default_path()),
        progress=progress,
    )
    with closing(under.executors):
        found = [Conduct(study, under).run() for study in studies]
    proof = Proof(
        method=studies[0].key,
        source=method,
        budget=budget,
        studies=tuple(result for result, _ in found),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=sum(seconds for _, seconds in found),
        minutes=sum(study.budgets[budget].minutes for study in studies),
        threads=threads,
        device=device,
        data=corpus.name if corpus is not None else "",
        machine=machine(),
        versions=versions(),
        fingerprint=_fingerprint(studies, budget, under.code, threads, device),
        sources=code,
        command=_command(under),
    )
    under.store.save_proof(proof.method, proof.budget, proof.fingerprint, under.corpus, proof.to_json())
    return proof


def results(method: str | None = None, *, store: str | os.PathLike[str] | None = None) -> list[StoredProof]:
    """What was proved before, newest first; nothing is run.

    Args:
        method: Only this method's; None for all.
        store: File of the store; None for the one in the cache folder.

    Returns:
        Each stored proof and whether it is stale.

    Raises:
        InputError: There is no such store, or the file is none.

    >>> import tempfile
    >>> where = tempfile.mkdtemp() + "/proofs.db"
    >>> _ = prove("batchnorm", budget="smoke", jobs=1, store=where)
    >>> [entry.proof.method for entry in results(store=where)]
    ['batchnorm']
    """
    path = Path(store) if store is not None else default_path()
    if not path.exists():
        if store is None:  # nothing was proved yet
            return []
        raise InputError(f"there is no store {path}; `setpoint prove KEY --store {path}` makes one")
    held = Store(path)
    found = []
    for text in held.proofs(method):
        try:
            proof = Proof.from_json(text)
        except InputError:  # written by a version with another form: it stays in the store and is not shown
            continue
        found.append(StoredProof(proof, _is_stale(proof)))
    return found


def _check(
    studies: Sequence[Study],
    method: str,
    budget: str,
    seeds: int | None,
    data: Path | None,
    jobs: int | None,
    threads: int,
) -> None:
    if budget not in BUDGETS:
        raise InputError(f"budget should be one of {', '.join(BUDGETS)}, not {budget!r}")
    if seeds is not None and seeds < 2:
        raise InputError(f"expected at least 2 seeds, since an interval needs two, got {seeds}")
    if seeds is not None and seeds > TUNING_SEED:
        raise InputError(f"expected at most {TUNING_SEED} seeds, since tuning counts its own from there, got {seeds}")
    if jobs is not None and jobs < 1:
        raise InputError(f"expected at least one job, got {jobs}")
    if threads < 1:
        raise InputError(f"expected at least one thread, got {threads}")
    if data is None:
        return
    if not data.exists():
        raise InputError(f"{data} does not exist; give a file to run on")
    read_corpus(data)  # what can't be read would break every run of every study
    without = [study.name for study in studies if not study.takes_data]
    if without:
        raise InputError(f"{method} runs on its own data only ({', '.join(without)} takes no other); leave out --data")


def _command(under: Circumstances) -> str:
    """The call at a shell that gives the same runs."""
    parts = [f"setpoint prove {under.source} --budget {under.budget}"]
    parts += [f"--seeds {under.seeds}"] if under.seeds is not None else []
    parts += [f"--data {under.data}"] if under.data is not None else []
    parts += [f"--threads {under.threads}"] if under.threads != 1 else []
    parts += [f"--device {under.device}"] if under.device != "cpu" else []
    return " ".join([*parts, *(["--tune"] if under.tune else [])])


def _fingerprint(studies: Sequence[Study], budget: str, code: str, threads: int, device: str) -> str:
    return digest([fingerprint(study, "judge", budget, code, threads, device) for study in studies])


def _is_stale(proof: Proof) -> bool:
    """Whether the same call would run anew, because code, versions or sizes have changed since."""
    try:
        studies = find_studies(proof.source)
        code = code_digest(sources(source_file(proof.source)))
    except InputError:  # the study is gone
        return True
    return _fingerprint(studies, proof.budget, code, proof.threads, proof.device) != proof.fingerprint
