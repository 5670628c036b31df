"""What changed between two reports: findings that came, went or moved, and statistics that differ.

Findings are matched by their id, sites by their name, so two states of one model compare in full and two different
models as far as their names agree. A statistic counts as changed when the larger of its two values is more than
`RATIO` times the smaller; values below a statistic's floor count as the floor, so that noise in numbers near zero
stays out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich import box
from rich.jupyter import JupyterMixin
from rich.table import Table
from rich.text import Text

from setpoint.report.codec import encode
from setpoint.report.plain import as_text
from setpoint.report.report import SCHEMA_VERSION, ModelInfo, Report
from setpoint.report.terminal import STYLES
from setpoint.types import SEVERITIES, Finding, Record, Trace
from setpoint.words import number, plural

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

RATIO = 1.25
FLOORS: Mapping[str, float] = {
    "rms": 0.0,
    "largest magnitude": 0.0,
    "median": 0.0,
    "kurtosis": 1.0,  # below 1 a distribution is a Gaussian for every purpose here
    "zeros": 0.01,  # shares and cosines: below one percent
    "cosine": 0.01,
    "angle": 1.0,  # degrees
    "step_ratio": 0.01,
    "gradient_rms": 0.0,
    "non_finite": 0.0,
    "attention entropy": 0.01,
    "attention sink": 0.01,
}
"""Statistics that are compared, each with the value below which differences mean nothing."""

_SHOWN = 20


@dataclass(frozen=True, slots=True)
class FindingChange:
    """A finding that both reports have, with another value or severity."""

    before: Finding
    after: Finding


@dataclass(frozen=True, slots=True)
class StatisticChange:
    """A statistic of one site in both reports; ``ratio`` is after over before, infinite when it appeared."""

    site: str
    statistic: str
    before: float
    after: float
    ratio: float


@dataclass(frozen=True, slots=True)
class ReportDiff(JupyterMixin):
    """What changed from report ``a`` to report ``b``.

    Args:
        a, b: The two models.
        new: Findings that only ``b`` has.
        gone: Findings that only ``a`` has.
        changed: Findings of both whose severity differs or whose value moved beyond `RATIO`.
        statistics: Per site, those beyond `RATIO`, worst first.
        common: How many sites both have.
        only_a, only_b: Names of sites that only one has.
    """

    a: ModelInfo
    b: ModelInfo
    new: tuple[Finding, ...]
    gone: tuple[Finding, ...]
    changed: tuple[FindingChange, ...]
    statistics: tuple[StatisticChange, ...]
    common: int
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()

    def __repr__(self) -> str:
        counts = f"{len(self.new)} new, {len(self.gone)} gone, {len(self.changed)} changed"
        return f"ReportDiff({_name(self.a)} → {_name(self.b)}: {counts})"

    def __str__(self) -> str:
        """What a terminal shows."""
        return as_text(self)

    @property
    def empty(self) -> bool:
        """Whether nothing changed."""
        return not (self.new or self.gone or self.changed or self.statistics or self.only_a or self.only_b)

    def to_json(self, *, indent: int | None = None) -> str:
        """The difference as one JSON object."""
        return json.dumps({"schema_version": SCHEMA_VERSION, **encode(self)}, indent=indent, allow_nan=False)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        yield Text.assemble(
            (_name(self.a), "bold"), " → ", (_name(self.b), "bold"), (f"  {plural(self.common, 'site')} in both", "dim")
        )
        for only, info in ((self.only_a, self.a), (self.only_b, self.b)):
            if only:
                yield Text(f"  {plural(len(only), 'site')} only in {_name(info)}: {_some(only)}", style="dim")
        if self.empty:
            yield Text("Nothing changed.", style="green")
            return
        if self.new or self.gone or self.changed:
            yield Text()
            yield _findings(self)
        else:
            yield Text("The findings are the same.")
        if self.statistics:
            yield Text()
            yield _statistics(self)
            if len(self.statistics) > _SHOWN:
                yield Text(
                    f"and {len(self.statistics) - _SHOWN} more beyond {RATIO} × (all are in the JSON form)", style="dim"
                )


def diff(a: Report, b: Report) -> ReportDiff:
    """Compare two reports.

    Args:
        a: The one before.
        b: The one after.

    Returns:
        What changed from ``a`` to ``b``; it prints as tables.

    >>> from setpoint.types import Trace
    >>> report = Report(ModelInfo("tiny"), (), Trace({}, {}, {}, blocks=1, task="other", sequences=1, tokens=4))
    >>> diff(report, report).empty
    True
    """
    before, after = ({f.id: f for f in report.ranked} for report in (a, b))
    left, right = _statistics_of(a.trace), _statistics_of(b.trace)
    changes = [
        StatisticChange(site, name, old, new, ratio)
        for site in left
        if site in right
        for name, old in left[site].items()
        if (new := right[site].get(name)) is not None and _beyond(ratio := _ratio(old, new, FLOORS[name]))
    ]
    return ReportDiff(
        a=a.model,
        b=b.model,
        new=tuple(f for key, f in after.items() if key not in before),
        gone=tuple(f for key, f in before.items() if key not in after),
        changed=tuple(
            FindingChange(old, now) for key, old in before.items() if (now := after.get(key)) and _moved(old, now)
        ),
        statistics=tuple(sorted(changes, key=lambda change: -_distance(change.ratio))),
        common=len(left.keys() & right.keys()),
        only_a=tuple(site for site in left if site not in right),
        only_b=tuple(site for site in right if site not in left),
    )


def _statistics_of(trace: Trace) -> dict[str, dict[str, float]]:
    found = {name: _of_record(record) for name, record in trace.records.items()}
    for name, attention in trace.attention.items():
        means = {"attention entropy": attention.entropy, "attention sink": attention.sink}
        found.setdefault(name, {}).update({key: float(heads.mean()) for key, heads in means.items() if heads.size})
    return found


def _of_record(record: Record) -> dict[str, float]:
    extremes = [abs(x) for x in (record.minimum, record.maximum) if x is not None]
    values: dict[str, float | None] = {name: getattr(record, name, None) for name in FLOORS}
    values["largest magnitude"] = max(extremes) if extremes else None
    return {name: float(value) for name, value in values.items() if value is not None}


def _ratio(before: float, after: float, floor: float) -> float:
    if before == after or (math.isnan(before) and math.isnan(after)):
        return 1.0
    if not (math.isfinite(before) and math.isfinite(after)):
        return 0.0 if math.isfinite(after) else math.inf
    low, high = max(before, floor), max(after, floor)
    return high / low if low else math.inf if high else 1.0


def _distance(ratio: float) -> float:
    return abs(math.log(ratio)) if 0 < ratio < math.inf else math.inf


def _beyond(ratio: float) -> bool:
    return _distance(ratio) > math.log(RATIO)


def _moved(before: Finding, after: Finding) -> bool:
    return before.severity != after.severity or _beyond(_ratio(abs(before.value), abs(after.value), 0.0))


def _findings(change: ReportDiff) -> Table:
    table = Table(box=box.HORIZONTALS, pad_edge=False, header_style="dim", border_style="dim", show_lines=True)
    for column in ("change", "severity", "finding", "before → after"):
        table.add_column(column, overflow="fold", no_wrap=column == "change")
    for finding in change.new:
        table.add_row(Text("new", style="red"), _severity(finding), Text(finding.id), Text(finding.evidence))
    for pair in change.changed:
        severity = _severity(pair.after)
        if pair.before.severity != pair.after.severity:
            severity = Text.assemble(_severity(pair.before), " →\n", severity)
        values = f"{number(pair.before.value)} → {number(pair.after.value)} {pair.after.unit}"
        worse = SEVERITIES.index(pair.after.severity) - SEVERITIES.index(pair.before.severity)
        style = "red" if worse > 0 else "green" if worse < 0 else ""
        table.add_row(Text("changed", style=style), severity, Text(pair.after.id), Text(values.rstrip()))
    for finding in change.gone:
        table.add_row(Text("gone", style="green"), _severity(finding), Text(finding.id), Text(finding.evidence))
    return table


def _statistics(change: ReportDiff) -> Table:
    table = Table(box=box.HORIZONTALS, pad_edge=False, header_style="dim", border_style="dim")
    table.add_column("site", overflow="fold")
    table.add_column("statistic")
    for column in ("before", "after", "ratio"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in change.statistics[:_SHOWN]:
        ratio = "appeared" if row.ratio == math.inf else f"{number(row.ratio)} ×" if row.ratio else "vanished"
        table.add_row(Text(row.site), row.statistic.replace("_", " "), number(row.before), number(row.after), ratio)
    return table


def _severity(finding: Finding) -> Text:
    return Text(finding.severity, style=STYLES[finding.severity])


def _name(info: ModelInfo) -> str:
    return info.source or info.name or "model"


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
