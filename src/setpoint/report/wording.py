"""Words and numbers that the terminal, the page and the notebook share."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from setpoint.types import SEVERITIES, Finding, Remedy, Trace
from setpoint.words import amount, listed, number, plural, range_words

if TYPE_CHECKING:
    from setpoint.report.report import Report

__all__ = [
    "PAPER_ONLY",
    "amount",
    "arxiv",
    "by_time",
    "counts",
    "facts",
    "mark",
    "name_of",
    "not_measured",
    "nothing_found",
    "number",
    "papers_only",
    "plural",
    "title",
    "where",
]

PAPER_ONLY = "*"
"""Stands behind the key of a method that `setpoint show` can't show."""

_ARXIV = re.compile(r"arXiv[:\s]*(\d{4}\.\d{4,5}|[a-z-]+/\d{7})", re.IGNORECASE)


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
    if trace.sequences:
        found.append(_inputs(trace))
    data = report.settings.get("data")
    if data:
        found.append(f"data: {data}")
    if trace.loss is not None:
        found.append(f"loss {number(trace.loss)}" + (" nats" if trace.task == "language-model" else ""))
    return found


def _inputs(trace: Trace) -> str:
    """How much was run. Positions of feature maps are no tokens, and a network of single vectors has none."""
    if trace.task in ("image-features", "image-classification"):
        return plural(trace.sequences, "image")
    spatial = "convolution" in trace.structure and "attention" not in trace.structure
    if spatial or trace.tokens == trace.sequences:
        return plural(trace.sequences, "example")
    return f"{plural(trace.tokens, 'token')} in {plural(trace.sequences, 'sequence')}"


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
    """What to say when there are no findings; `not_measured` says what was not looked at."""
    sites = len(report.trace.records) + len(report.trace.attention)
    if not sites:
        return "Nothing was measured."
    return f"Nothing found: {plural(sites, 'site')} measured, every signal within its threshold."


def not_measured(report: Report) -> str:
    """What the check could say nothing about, and why; "" when it looked at everything."""
    lacking: Mapping[str, str] = report.settings.get("not_measured") or {}
    reasons = dict.fromkeys(lacking.values())
    groups = [f"{listed((code for code in lacking if lacking[code] == why), 20)} ({why})" for why in reasons]
    return f"Not measured: {'; '.join(groups)}." if groups else ""


def papers_only(findings: Sequence[Finding]) -> str:
    """What the mark behind a remedy means, "" when none has it."""
    if all(remedy.available for finding in findings for remedy in finding.remedies):
        return ""
    return f"{PAPER_ONLY} known from its paper only: this version does not carry the method."


def mark(remedy: Remedy) -> str:
    """A remedy's key, marked where this version of setpoint does not carry the method.

    >>> mark(Remedy("dyt", "", "training", "")), mark(Remedy("dyt", "", "training", "", available=True))
    ('dyt*', 'dyt')
    """
    return remedy.key + ("" if remedy.available else PAPER_ONLY)


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
        return f"{roles.pop()} of {range_words(blocks)}"
    return f"{finding.sites[0]} and {len(finding.sites) - 1} more"


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
