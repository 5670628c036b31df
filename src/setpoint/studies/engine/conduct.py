"""One study from tuning to verdicts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from setpoint.errors import InputError
from setpoint.studies.declare import BudgetName, Study
from setpoint.studies.engine import tune as tuning
from setpoint.studies.engine.assemble import assemble
from setpoint.studies.engine.execute import Task, budget_of
from setpoint.studies.engine.executors import Executors
from setpoint.studies.engine.fingerprint import code_digest, digest
from setpoint.studies.engine.machine import machine, versions
from setpoint.studies.engine.schedule import Progress, run_all
from setpoint.studies.engine.shipped import shipped
from setpoint.studies.engine.store import Row, RunKey, Store
from setpoint.studies.engine.tune import Tuned
from setpoint.types.proving import StudyResult


@dataclass(frozen=True, slots=True)
class Circumstances:
    """Under which studies are run, as `setpoint.prove` was asked.

    Args:
        source: Key or file that the studies are found by.
        budget: Name of the budget.
        code: Hash of the studies' code.
        data, corpus: The user's corpus, and its hash.
        seeds: Replicates of each arm; None for what the budget says.
        jobs, executors: How many runs at a time, and where.
        tune: Whether to tune even if settings are known.
        threads, device: What each run may use.
        store: Where runs are kept.
        progress: Told about every start, step and end.
    """

    source: str
    budget: BudgetName
    code: str
    data: Path | None
    corpus: str
    seeds: int | None
    jobs: int | None
    executors: Executors
    tune: bool
    threads: int
    device: str
    store: Store
    progress: Progress


def fingerprint(study: Study, stage: str, budget: str, code: str, threads: int, device: str) -> str:
    """Hash of all that a run of a study depends on besides its arm, setting, seed and the user's corpus.

    Args:
        study: The study.
        stage: ``"tune"`` or ``"judge"``.
        budget: Name of the budget.
        code: From `setpoint.studies.engine.fingerprint.code_digest`.
        threads, device: What each run may use.
    """
    key = RunKey(study.key, study.name, stage, budget, "", {}, 0, "")
    return digest(
        {
            "code": code,
            "options": dict(budget_of(study, key).options),
            "data": [study.data, study.data_version() if study.data_version else ""],
            "torch": versions()["torch"],
            "threads": threads,
            "device": device,
        }
    )


@dataclass(frozen=True)
class Conduct:
    """Conducts one study.

    Args:
        study: What to run.
        under: How.
    """

    study: Study
    under: Circumstances

    def run(self) -> tuple[StudyResult, float]:
        """Tune if need be, do all judged runs, judge.

        Returns:
            The result, and the seconds that its judged runs took, added up.
        """
        study, budget = self.study, self.study.budgets[self.under.budget]
        tuned = self._tuned()
        seeds = range(self.under.seeds if self.under.seeds is not None else budget.seeds)
        tasks = [self._task("judge", a.name, tuned.settings[a.name], seed) for seed in seeds for a in study.arms]
        rows = self._do(tasks, f"running {study.name}")
        runs: dict[str, dict[int, Row]] = {arm.name: {} for arm in study.arms}
        for task in tasks:
            runs[task.key.arm][task.key.seed] = rows[task.key.hash]
        result = assemble(study, budget, tuned, runs, seeds)
        seconds = sum(row.seconds for row in rows.values())
        cores = 1 if study.alone else 2
        if self.under.budget == "laptop" and self.under.seeds is None and seconds > 60 * budget.minutes * cores:
            words = (
                f"the judged runs took {seconds / 60:.1f} core minutes, more than {budget.minutes:g} minutes on {cores}"
            )
            result = replace(result, notes=(*result.notes, words))
        return result, seconds

    def _tuned(self) -> Tuned:
        """Settings from the store, else from the package, else tuned now; a smoke run never tunes by itself."""
        study, under = self.study, self.under
        if study.tuning is None:
            return Tuned({arm.name: {} for arm in study.arms}, {}, "")
        rows = self._tuning_rows()
        waiting = self._waiting(rows)
        if waiting and not under.tune and (tuned := self._shipped()) is not None:
            return tuned
        if waiting and not under.tune and under.budget == "smoke":
            return Tuned({arm.name: study.settings(arm)[0] for arm in study.arms}, {}, "not tuned: a smoke run")
        deadline = tuning.time_left(study, list(rows.values()), self._jobs())
        while waiting:
            found = self._do(waiting, f"tuning {study.name}", deadline)
            rows |= found
            waiting = self._waiting(rows) if len(found) == len(waiting) else []
        return tuning.choose(study, self._tuning_task, rows)

    def _waiting(self, rows: Mapping[str, Row]) -> list[Task]:
        """The tuning runs that come next, given what has been run."""
        grid = tuning.grids(self.study, self._tuning_task, rows)[-1]
        return tuning.missing(self.study, grid, self._tuning_task, rows)

    def _tuning_rows(self) -> dict[str, Row]:
        """Tuning runs that are in the store; one that broke is run again."""
        found = self.under.store.rows(
            method=self.study.key,
            study=self.study.name,
            stage="tune",
            budget=self.under.budget,
            fingerprint=self._fingerprints["tune"],
            data=self.under.corpus,
        )
        return {row.key.hash: row for row in found if row.outcome}

    def _shipped(self) -> Tuned | None:
        """What the package's own result was tuned to, if it has all arms of this study, at settings of its grid."""
        study, proof = self.study, None
        if study.module.startswith("setpoint.studies."):
            proof = shipped(study.key)
        if proof is None or self.under.budget not in (proof.budget, "smoke"):
            return None
        arms = {a.name: a for result in proof.studies if result.name == study.name for a in result.arms}
        if set(arms) != {arm.name for arm in study.arms}:
            return None
        if not all(tuning.could_give(study, arm.name, arms[arm.name].setting) for arm in study.arms):
            return None
        words = f"as tuned for the stored result of {proof.date[:10]}"
        if self.under.budget != proof.budget:
            words += f" at {proof.budget} size; at the size of this run no arm is tuned"
        if proof.sources and code_digest(proof.sources) == self.under.code:
            notes: tuple[str, ...] = ()
        else:
            notes = ("the code has changed since the settings were tuned; --tune tunes them again",)
        return Tuned({n: a.setting for n, a in arms.items()}, {n: a.trials for n, a in arms.items()}, words, notes)

    def _jobs(self) -> int:
        if self.study.alone:
            if self.under.jobs not in (None, 1):
                raise InputError(f"{self.study.name} is timed, so its runs must be alone; leave out --jobs")
            return 1
        return self.under.jobs if self.under.jobs is not None else os.cpu_count() or 1

    def _tuning_task(self, arm: str, setting: Mapping[str, Any], seed: int) -> Task:
        return self._task("tune", arm, setting, seed)

    @cached_property
    def _fingerprints(self) -> Mapping[str, str]:
        """By stage; worked out once, since a study may have to read its data for it."""
        u = self.under
        return {s: fingerprint(self.study, s, u.budget, u.code, u.threads, u.device) for s in ("tune", "judge")}

    def _task(self, stage: str, arm: str, setting: Mapping[str, Any], seed: int) -> Task:
        study, under = self.study, self.under
        key = RunKey(
            method=study.key,
            study=study.name,
            stage=stage,
            budget=under.budget,
            arm=arm,
            setting=setting,
            seed=seed,
            fingerprint=self._fingerprints[stage],
            data=under.corpus,
        )
        return Task(under.source, key, under.data, under.device, under.threads, under.store.scratch(key))

    def _do(self, tasks: Sequence[Task], stage: str, deadline: float | None = None) -> dict[str, Row]:
        facts = {"machine": machine(), "versions": versions(), "threads": self.under.threads}
        return run_all(
            tasks,
            self.under.store,
            self.under.executors.of(self._jobs()),
            stage=stage,
            facts=facts,
            progress=self.under.progress,
            deadline=deadline,
        )
