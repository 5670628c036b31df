"""Words and numbers that the terminal, the page and the notebook share."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from setpoint.types import SEVERITIES, Finding, Remedy, Trace

if TYPE_CHECKING:
    from setpoint.report.report import Report

_ARXIV = re.compile(r"arXiv[:\s]*(\d{4}\.\d{4,5}|[a-z-]+/\d{7})", re.IGNORECASE)


def number(value: float | int | None) -> str:
    """A number with four significant digits, as a person writes it.

    >>> number(0.000123456), number(21634.2), number(576), number(None), number(float("inf"))
    ('1.235e-04', '21634', '576', '–', 'inf')
    """
    if value is None:
        return "–"
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-3:
        return f"{value:.3e}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def amount(value: float) -> str:
    """A large count in three digits.

    >>> amount(134515008), amount(2048), amount(7)
    ('135M', '2.05k', '7')
    """
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.0f}"


def plural(count: int, word: str) -> str:
    """A count with its noun.

    >>> plural(1, "token"), plural(2048, "token")
    ('1 token', '2,048 tokens')
    """
    return f"{count:,} {word}" + ("" if count == 1 else "s")


def name_of(report: Report) -> str:
    """What the user asked for, else the model's own name."""
    return report.model.source or report.model.name or "model"


def facts(report: Report) -> list[str]:
    """One short phrase per fact: class, parameters, dtype, blocks, what was run, on which data."""
    model, trace = report.model, report.trace
    found = [model.name] if model.name and model.name != name_of(report) else []
    if model.task != "other":
        found.append(model.task.replace("-", " "))
    if model.parameters:
        found.append(f"{amount(model.parameters)} parameters" + (f" in {model.dtype}" if model.dtype else ""))
    if trace.blocks:
        found.append(plural(trace.blocks, "block"))
    found.append(f"{plural(trace.tokens, 'token')} in {plural(trace.sequences, 'sequence')}")
    data = report.settings.get("data")
    if data:
        found.append(f"data: {data}")
    if trace.loss is not None:
        found.append(f"loss {number(trace.loss)} nats")
    return found


def counts(findings: Sequence[Finding]) -> str:
    """How many findings there are of each severity.

    >>> counts([])
    'no findings'
    """
    found = [
        f"{n} {severity}" if severity == "info" else plural(n, severity)
        for severity in reversed(SEVERITIES)
        if (n := sum(f.severity == severity for f in findings))
    ]
    return ", ".join(found) or "no findings"


def nothing_found(report: Report) -> str:
    """What to say when there are no findings."""
    return f"Nothing found: {plural(len(report.trace.records), 'site')} measured, every signal within its threshold."


def where(finding: Finding, trace: Trace) -> str:
    """The place of a finding in few words: one site by name, several by their role and blocks."""
    if not finding.sites:
        return "whole model"
    if len(finding.sites) == 1:
        return finding.sites[0]
    known = [r.site for name in finding.sites if (r := trace.records.get(name) or trace.attention.get(name))]
    roles = {site.role for site in known}
    blocks = sorted({site.block for site in known if site.block is not None})
    if len(known) == len(finding.sites) and len(roles) == 1 and len(blocks) > 1:
        return f"{roles.pop()} of {spans(blocks)}"
    return f"{finding.sites[0]} and {len(finding.sites) - 1} more"


def spans(blocks: Sequence[int]) -> str:
    """Block numbers as ranges.

    >>> spans([1, 2, 3, 7, 9, 10]), spans([4])
    ('blocks 1–3, 7, 9–10', 'block 4')
    """
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    shown = [f"{run[0]}" if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs]
    if len(shown) > 4:
        shown = [*shown[:3], f"… {shown[-1]}"]
    return ("block " if len(blocks) == 1 else "blocks ") + ", ".join(shown)


def by_time(finding: Finding) -> tuple[list[Remedy], list[Remedy]]:
    """Remedies to apply now, and remedies for the next training."""
    return [r for r in finding.remedies if r.when == "now"], [r for r in finding.remedies if r.when == "training"]


def arxiv(reference: str) -> tuple[str, str, str]:
    """A reference as the text before its arXiv number, the number ("" if there is none), and the text after.

    >>> arxiv("Sun et al., 2024 · arXiv 2402.17762, table 1"), arxiv("IEEE 754")
    (('Sun et al., 2024 · ', '2402.17762', ', table 1'), ('IEEE 754', '', ''))
    """
    match = _ARXIV.search(reference)
    return (reference[: match.start()], match.group(1), reference[match.end() :]) if match else (reference, "", "")


def title(code: str) -> str:
    """A finding's code as a heading.

    >>> title("massive-activation"), title("non-finite")
    ('Massive activation', 'Non-finite')
    """
    return code[:1].upper() + code[1:].replace("-", " ") if code != "non-finite" else "Non-finite"
