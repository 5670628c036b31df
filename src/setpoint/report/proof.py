"""The result of a proof: what was claimed, what the runs say, and all that is needed to judge and repeat it.

A `Proof` is data, like a `setpoint.report.Report`: it prints in a terminal, writes one self-contained page, and goes to
JSON and back.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.jupyter import JupyterMixin

from setpoint.errors import InputError
from setpoint.report.codec import decode, encode
from setpoint.report.files import write_text
from setpoint.report.plain import as_text
from setpoint.types.proving import Judgement, StudyResult, Verdict

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

SCHEMA_VERSION = 1
"""Goes up when a reader of the JSON form would have to change."""


@dataclass(frozen=True, slots=True, eq=False)
class Proof(JupyterMixin):
    """What `setpoint.prove` found.

    Args:
        method: Key of the method, or name of the user's file.
        budget: ``"smoke"``, ``"laptop"`` or ``"full"``.
        studies: One result per study of the method.
        source: What it was found by: the key, or the path of the file.
        date: When it was judged, ISO 8601.
        seconds: What the judged runs took, added up.
        minutes: What the budget allows for them.
        threads: Threads each run had.
        device: Where the runs were done.
        data: The user's corpus, "" for the study's own data.
        machine, versions: Where and with what the runs were done.
        fingerprint: Hash of all that the runs depend on.
        sources: Hashes of the code that the runs depend on, by file.
        command: How to run it again.

    >>> proof = Proof("dyt", "smoke", ())
    >>> proof.verdict, Proof.from_json(proof.to_json()).method
    ('undecided', 'dyt')
    """

    method: str
    budget: str
    studies: tuple[StudyResult, ...]
    source: str = ""
    date: str = ""
    seconds: float = 0.0
    minutes: float = 0.0
    threads: int = 1
    device: str = "cpu"
    data: str = ""
    machine: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    fingerprint: str = ""
    sources: Mapping[str, str] = field(default_factory=dict)
    command: str = ""

    @property
    def judgements(self) -> tuple[Judgement, ...]:
        """All claims in the order of their studies."""
        return tuple(judgement for study in self.studies for judgement in study.judgements)

    @property
    def verdict(self) -> Verdict:
        """The verdict on the first claim of the first study, the method's headline.

        A smoke run shows only that a study runs from end to end: its verdict is always ``undecided``.
        """
        if self.budget == "smoke" or not self.judgements:
            return "undecided"
        return self.judgements[0].verdict

    def to_json(self, *, curves: bool = True, indent: int | None = None) -> str:
        """The proof as one JSON object.

        Args:
            curves: Whether to keep the learning curves, by far the largest part.
            indent: Spaces per level, None for one line.

        Returns:
            Strict JSON; numbers that are not finite are the strings ``"nan"``, ``"inf"`` and ``"-inf"``.
        """
        studies = self.studies
        if not curves:
            studies = tuple(replace(s, arms=tuple(replace(arm, curves=()) for arm in s.arms)) for s in studies)
        data = {"schema_version": SCHEMA_VERSION, **encode(replace(self, studies=studies))}
        return json.dumps(data, indent=indent, allow_nan=False, ensure_ascii=False)

    @classmethod
    def from_json(cls, source: str | os.PathLike[str] | Mapping[str, Any]) -> Proof:
        """Read a proof back.

        Args:
            source: The text that `to_json` gave, the path of a file with it, or what such a text decodes to.

        Raises:
            InputError: It can't be read, or is no proof of this version.
        """
        if isinstance(source, Mapping):
            return cls._from_data(source, "the proof")
        if isinstance(source, str) and source.lstrip().startswith("{"):
            text, name = source, "the proof"
        else:
            name = str(source)
            try:
                text = Path(source).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"can't read the proof {name}: {error}") from error
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{name} is not valid JSON ({error.msg}, line {error.lineno})") from error
        return cls._from_data(data, name)

    @classmethod
    def _from_data(cls, data: Any, name: str) -> Proof:
        version = data.get("schema_version") if isinstance(data, Mapping) else None
        if version != SCHEMA_VERSION:
            raise InputError(
                f"{name} has schema version {version}, this setpoint reads {SCHEMA_VERSION}; prove it again"
            )
        found: Proof = decode(cls, dict(data), name)
        return found

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write one self-contained page with charts: no network, opens from disk.

        Args:
            path: Where to write; an existing file is replaced in one step.

        Returns:
            The path.

        Raises:
            InputError: The path is a folder or can't be written.
        """
        from setpoint.report.proof_page import render

        return write_text(path, render(self))

    def __repr__(self) -> str:
        verdicts = ", ".join(judgement.verdict for judgement in self.judgements)
        return f"Proof({self.method}, {self.budget}: {verdicts or 'nothing judged'})"

    def __str__(self) -> str:
        """What a terminal shows."""
        return as_text(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from setpoint.report.proof_terminal import proof_lines

        yield from proof_lines(self)
