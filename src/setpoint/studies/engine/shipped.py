"""The results that the package carries: one JSON file per method, without curves."""

from __future__ import annotations

from pathlib import Path

from setpoint.errors import InputError
from setpoint.report.files import write_text
from setpoint.report.proof import Proof
from setpoint.studies.declare import Study
from setpoint.studies.registry import find_studies
from setpoint.types.proving import StudyResult

FOLDER = Path(__file__).parents[2] / "catalog" / "results"


def shipped(method: str, folder: Path = FOLDER) -> Proof | None:
    """The result that the package carries for a method; None if its proof was never stored.

    >>> shipped("no-such-method") is None
    True
    """
    path = folder / f"{method}.json"
    return Proof.from_json(path) if path.is_file() else None


def store_result(proof: Proof, folder: Path = FOLDER) -> Path:
    """Write a proof into the catalogue; for those who maintain setpoint.

    Args:
        proof: What to write. Its curves are left out.
        folder: The catalogue's results.

    Returns:
        The file.

    Raises:
        InputError: It is less than what its studies declare: a smoke run, fewer replicates than the budget has, runs
            that broke, settings that were not tuned; or it ran on a corpus of the user's.
    """
    if proof.budget == "smoke":
        raise InputError("a smoke run says nothing and is not stored as a result; run --budget laptop or full")
    if proof.data:
        raise InputError("the catalogue holds results on a study's own data, and this one ran on a corpus of yours")
    results = {result.name: result for result in proof.studies}
    for study in find_studies(proof.source or proof.method):
        if study.name not in results:
            raise InputError(f"this result lacks the study {study.name}; run `setpoint prove {study.key}` again")
        _check_whole(study, results[study.name], proof.budget)
    return write_text(folder / f"{proof.method}.json", proof.to_json(curves=False, indent=1) + "\n")


def _check_whole(study: Study, result: StudyResult, budget: str) -> None:
    wanted, got = study.budgets[budget].seeds, len(result.replicates)
    if got < wanted:
        raise InputError(f"a stored result of {study.name} has {wanted} replicates, this one {got}; leave out --seeds")
    for arm in result.arms:
        if arm.failed:
            raise InputError(f"{arm.failed} of {arm.runs} runs of {arm.name} in {study.name} broke; prove it again")
        if arm.runs < got:
            raise InputError(f"{got - arm.runs} runs of {arm.name} in {study.name} are missing; prove it again")
        if study.tuning and not arm.trials:
            raise InputError(f"{arm.name} in {study.name} was not tuned; prove it again with --tune")
