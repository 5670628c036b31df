"""Words and numbers that the terminal, the page and the notebook share."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from setpoint.types import SEVERITIES, Finding, Remedy, Trace
from setpoint.words import amount, listed, number, plural, range_words

if TYPE_CHECKING:
    from setpoint.report.report import Report

__all__ = [
    "amount",
    "arxiv",
    "counts",
    "facts",
    "name_of",
    "not_measured",
    "nothing_found",
    "number",
    "papers_only",
    "placeholders",
    "plural",
    "remedy_groups",
    "steps",
    "title",
    "where",
]

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
    """What it means that a method is known from papers, "" when none is."""
    if all(remedy.available for finding in findings for remedy in finding.remedies):
        return ""
    return "Known from papers: this version does not carry the method; setpoint show KEY names the paper."


@dataclass(frozen=True, slots=True)
class Step:
    """Something to do about findings.

    Args:
        use: The line at a shell, or the lines of Python.
        codes: The findings that it treats.
        proof: The line that proves the method, "" for none.
    """

    use: str
    codes: tuple[str, ...]
    proof: str


def steps(report: Report) -> list[Step]:
    """What to do next: a step for each carried method that treats a finding, in the order of the findings."""
    codes: dict[Remedy, dict[str, None]] = {}
    for finding in report.ranked:
        for remedy in finding.remedies:
            if remedy.available and (remedy.shell or remedy.python):
                codes.setdefault(remedy, {})[finding.code] = None
    return [
        Step(_use(remedy, report), tuple(treated), f"setpoint prove {remedy.proof}" if remedy.proof else "")
        for remedy, treated in codes.items()
    ]


def placeholders(found: Sequence[Step]) -> str:
    """What stands for what in the lines of steps, "" when nothing does."""
    lines = " ".join(step.use for step in found)
    words = {
        " DATA": "DATA is a text, a folder of images or a name of `setpoint data list`",
        " OUT": "OUT is the folder to write",
    }
    said = [meaning for word, meaning in words.items() if word in lines]
    return "; ".join(said) + "." if said else ""


def _use(remedy: Remedy, report: Report) -> str:
    """For the shell if that is where the model came from: one that was given as a module has its class as source."""
    source = report.model.source
    at_shell = bool(remedy.shell) and source not in ("", report.model.name)
    return remedy.shell.replace("MODEL", shlex.quote(source)) if at_shell else remedy.python


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


def remedy_groups(finding: Finding) -> dict[str, list[Remedy]]:
    """The remedies by what can be done with them, without groups that are empty."""
    carried = [remedy for remedy in finding.remedies if remedy.available]
    groups = {
        "apply now": [remedy for remedy in carried if remedy.when == "now"],
        "when you train": [remedy for remedy in carried if remedy.when == "training"],
        "known from papers": [remedy for remedy in finding.remedies if not remedy.available],
    }
    return {label: group for label, group in groups.items() if group}


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
