"""A report in a terminal: a heading, then a table of findings, worst first.

Everything that comes from a model (names of modules, notes, evidence) is put in as plain text, never as console
markup. A wide terminal has a column for the remedies; a narrow one has them below the evidence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich import box
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from setpoint.report.wording import (
    counts,
    facts,
    name_of,
    not_measured,
    nothing_found,
    papers_only,
    placeholders,
    remedy_groups,
    steps,
    where,
)
from setpoint.types import Finding, Severity
from setpoint.words import listed

if TYPE_CHECKING:
    from rich.console import ConsoleOptions, RenderableType

    from setpoint.report.report import Report

STYLES: dict[Severity, str] = {"error": "bold red", "warning": "yellow", "info": "cyan"}
WIDE = 120
"""From this width on, remedies have a column of their own."""


def report_lines(report: Report, options: ConsoleOptions) -> Iterator[RenderableType]:
    """The parts of a report, top to bottom, laid out for the width in ``options``."""
    yield Text.assemble((name_of(report), "bold"), ("  " + " · ".join(facts(report)), "dim"))
    for note in report.model.notes:
        yield Padding(Text(note, style="dim"), (0, 0, 0, 2))
    yield Text()
    if report.findings:
        yield findings_table(report, wide=options.max_width >= WIDE)
        yield Text(counts(report.findings).capitalize() + ".", style="bold")
    else:
        yield Text(nothing_found(report), style="green" if report.trace.records or report.trace.attention else "yellow")
    for line in (not_measured(report), papers_only(report.findings)):
        if line:
            yield Text(line, style="dim")
    yield from _next(report)


def _next(report: Report) -> Iterator[RenderableType]:
    """What to type about the findings, in lines that can be copied."""
    found = steps(report)
    if not found:
        return
    yield Text("\nNext", style="bold")
    for step in found:
        yield Text(f"  for {listed(step.codes, 4)}", style="dim")
        for line in filter(None, [*step.use.splitlines(), step.proof]):
            yield Text(f"    {line}", style="green")
    if meaning := placeholders(found):
        yield Text(meaning, style="dim")


def findings_table(report: Report, *, wide: bool) -> Table:
    """One row per finding."""
    table = Table(
        box=box.HORIZONTALS, show_lines=True, pad_edge=False, expand=True, header_style="dim", border_style="dim"
    )
    table.add_column("severity", no_wrap=True)
    table.add_column("finding", ratio=3, min_width=18, overflow="fold")
    table.add_column("evidence", ratio=5, overflow="fold")
    if wide:
        table.add_column("remedies", ratio=4, overflow="fold")
    for finding in report.ranked:
        place = Text.assemble((finding.code, "bold"), "\n", (where(finding, report.trace), "dim"))
        evidence = Text(finding.evidence)
        remedies = remedy_lines(finding)
        if not wide and remedies:
            evidence = Text("\n").join([evidence, remedies])
        row = [Text(finding.severity, style=STYLES[finding.severity]), place, evidence]
        table.add_row(*row, *([remedies] if wide else []))
    return table


def remedy_lines(finding: Finding) -> Text:
    """The keys of the remedies: what to apply now, what to do when training, what only papers have."""
    lines = []
    for label, group in remedy_groups(finding).items():
        keys = Text(", ").join(Text(r.key, style="green" if r.available else "dim") for r in group)
        lines.append(Text.assemble((f"{label}: ", "dim"), keys))
    return Text("\n").join(lines)
