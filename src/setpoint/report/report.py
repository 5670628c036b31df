"""The result of a check: facts about the model, the findings, and the measurements behind them.

A `Report` is data. It prints as a table in a terminal, shows as a table in a notebook, writes one self-contained HTML
page, and goes to JSON and back; two of them can be compared with `setpoint.diff`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from setpoint.errors import InputError
from setpoint.report.codec import decode, encode
from setpoint.report.files import write_text
from setpoint.report.plain import as_text
from setpoint.types import SEVERITIES, Finding, Severity, Task, Trace

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

SCHEMA_VERSION = 1
"""Goes up when a reader of the JSON form would have to change."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What was checked.

    Args:
        name: Short name for headings.
        source: What the user asked for, as typed.
        task: What its outputs mean.
        parameters: How many numbers it holds, shared ones once.
        dtype: Of its parameters, e.g. ``"float32"``.
        notes: Facts that a reader must know to judge the numbers.
    """

    name: str
    source: str = ""
    task: Task = "other"
    parameters: int = 0
    dtype: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Report:
    """What `setpoint.check` found.

    Args:
        model: What was checked.
        findings: What is wrong or worth knowing.
        trace: The measurements.
        settings: How it was checked, by name; ``"data"``, ``"version"`` and ``"command"`` have a place of their own
            in the page, anything else is listed.

    >>> from setpoint.types import Trace
    >>> trace = Trace({}, {}, {}, blocks=2, task="other", sequences=1, tokens=8)
    >>> report = Report(ModelInfo("tiny"), (), trace)
    >>> report.worst is None, report.exceeds("info")
    (True, False)
    >>> Report.from_json(report.to_json()).model.name
    'tiny'
    """

    model: ModelInfo
    findings: tuple[Finding, ...]
    trace: Trace
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        codes = ", ".join(finding.code for finding in self.ranked) or "no findings"
        return f"Report({self.model.name}: {codes})"

    def __str__(self) -> str:
        """The table that a terminal shows."""
        return as_text(self)

    @property
    def ranked(self) -> tuple[Finding, ...]:
        """The findings, worst severity first; those of one severity keep their order."""
        return tuple(sorted(self.findings, key=lambda finding: -SEVERITIES.index(finding.severity)))

    @property
    def worst(self) -> Severity | None:
        """The highest severity among the findings, None when there are none."""
        return max((f.severity for f in self.findings), key=SEVERITIES.index, default=None)

    def exceeds(self, severity: Severity) -> bool:
        """Whether a finding is as severe as ``severity`` or worse.

        Raises:
            InputError: ``severity`` is not one of info, warning, error.
        """
        if severity not in SEVERITIES:
            raise InputError(f"severity should be one of {', '.join(SEVERITIES)}, not {severity!r}")
        return self.worst is not None and SEVERITIES.index(self.worst) >= SEVERITIES.index(severity)

    def to_json(self, *, channels: bool = True, indent: int | None = None) -> str:
        """The report as one JSON object: schema_version, model, findings, settings, trace.

        Args:
            channels: Whether to keep the per-channel arrays, by far the largest part.
            indent: Spaces per level, None for one line.

        Returns:
            Strict JSON; numbers that are not finite are the strings ``"nan"``, ``"inf"`` and ``"-inf"``.
        """
        data = {
            "schema_version": SCHEMA_VERSION,
            "model": encode(self.model),
            "findings": encode(self.ranked),
            "settings": encode(self.settings),
            "trace": encode(self.trace, arrays=channels),
        }
        return json.dumps(data, indent=indent, allow_nan=False, ensure_ascii=False)

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> Report:
        """Read a report back.

        Args:
            source: The text that `to_json` gave, or the path of a file with it, or of a page that `to_html` wrote
                (which carries the numbers per site, not those per channel).

        Raises:
            InputError: The file can't be read, or is not a report of this version.
        """
        if isinstance(source, str) and source.lstrip().startswith("{"):
            return cls._from_text(source, "the report")
        path = Path(source)
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(f"can't read the report {path}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path} is not a report: it is not text; give a .json or .html that setpoint wrote"
            ) from error
        if text.lstrip()[:1] == "<":
            from setpoint.report.page import embedded

            text = embedded(text, str(path))
        return cls._from_text(text, str(path))

    @classmethod
    def _from_text(cls, text: str, name: str) -> Report:
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{name} is not valid JSON ({error.msg}, line {error.lineno}); is the file complete?"
            ) from error
        if not isinstance(data, dict) or "schema_version" not in data:
            raise InputError(f"{name} is not a setpoint report: it has no schema_version")
        if data["schema_version"] != SCHEMA_VERSION:
            raise InputError(
                f"{name} has schema version {data['schema_version']}, this setpoint reads {SCHEMA_VERSION}; "
                "run the check again"
            )
        missing = [key for key in ("model", "findings", "trace") if key not in data]
        if missing:
            raise InputError(f"{name} has no {missing[0]!r}; the report is damaged or was not written by setpoint")
        return cls(
            model=decode(ModelInfo, data["model"], f"{name}: model"),
            findings=decode(tuple[Finding, ...], data["findings"], f"{name}: findings"),
            trace=decode(Trace, data["trace"], f"{name}: trace"),
            settings=decode(Mapping[str, Any], data.get("settings", {}), f"{name}: settings"),
        )

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write one self-contained page with charts: no network, opens from disk.

        Args:
            path: Where to write; an existing file is replaced in one step.

        Returns:
            The path.

        Raises:
            InputError: The path is a folder or can't be written.
        """
        from setpoint.report.page import render

        return write_text(path, render(self))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from setpoint.report.terminal import report_lines

        yield from report_lines(self, options)

    def _repr_html_(self) -> str:
        from setpoint.report.page import render_notebook

        return render_notebook(self)
