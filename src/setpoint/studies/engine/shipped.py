"""The results that the package carries: one JSON file per method, without curves."""

from __future__ import annotations

from pathlib import Path

from setpoint.errors import InputError
from setpoint.report.files import write_text
from setpoint.report.proof import Proof

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
        InputError: It is a smoke run, or ran on a corpus of the user's.
    """
    if proof.budget == "smoke":
        raise InputError("a smoke run says nothing and is not stored as a result; run --budget laptop or full")
    if proof.data:
        raise InputError("the catalogue holds results on a study's own data, and this one ran on a corpus of yours")
    return write_text(folder / f"{proof.method}.json", proof.to_json(curves=False, indent=1) + "\n")
