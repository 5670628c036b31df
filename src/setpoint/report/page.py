"""The report as one HTML page that needs nothing else: scripts, styles, data and charts are inside.

The page forbids itself every connection (a content security policy with ``default-src 'none'``), and carries the
report's JSON without the per-channel arrays, so that a saved page can be read back and compared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import altair as alt
import jinja2
import vl_convert
from markupsafe import Markup

import setpoint
from setpoint.errors import InputError
from setpoint.report import wording
from setpoint.report.charts import Figure, draw
from setpoint.report.codec import encode
from setpoint.report.profiles import largest, profiles
from setpoint.types import Finding, Record
from setpoint.words import number

if TYPE_CHECKING:
    from setpoint.report.report import Report

_EMBEDDED = re.compile(r'<script type="application/json" id="report">(.*?)</script>', re.DOTALL)

_APART = ("version", "command", "unread", "not_measured")
"""Settings that have a place of their own in the page."""

COLUMNS = {
    "rms": "rms",
    "mean": "mean",
    "median": "median |h|",
    "largest": "largest |h|",
    "kurtosis": "kurtosis",
    "zeros": "zeros",
    "cosine": "cosine",
    "angle": "angle °",
    "step_ratio": "step",
    "gradient_rms": "gradient",
    "non_finite": "non-finite",
}
"""Columns of the table of sites; one that is empty everywhere is left out."""


def render(report: Report) -> str:
    """The page as text."""
    findings = [(finding, _chart_of(finding, i)) for i, finding in enumerate(report.ranked)]
    groups: dict[str, list[Figure]] = {}
    for i, profile in enumerate(profiles(report.trace)):
        groups.setdefault(profile.group, []).append(draw(profile.chart, f"profile-{i}", profile.labels))
    drawn = [figure for _, figure in findings if figure] + [figure for group in groups.values() for figure in group]
    settings = {key: value for key, value in report.settings.items() if key not in _APART}
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            findings=findings,
            told=_earlier([(finding.code, finding.explanation) for finding in report.ranked]),
            treated=_earlier([finding.remedies for finding in report.ranked]),
            groups=groups,
            specs=script({figure.id: figure.spec for figure in drawn}),
            data=script(json.loads(report.to_json(channels=False))),
            library=library(),
            columns=_columns(report),
            rows=_rows(report),
            settings={key: _setting(value) for key, value in settings.items()},
            words=wording,
            version=setpoint.__version__,
        )
    )


def render_notebook(report: Report) -> str:
    """A table without scripts, for a notebook's output cell."""
    return environment().get_template("notebook.html.j2").render(report=report, words=wording)


def embedded(text: str, name: str) -> str:
    """The JSON inside a page that `render` made.

    Raises:
        InputError: ``text`` is some other page.
    """
    match = _EMBEDDED.search(text)
    if match is None:
        raise InputError(f"{name} is not a page that setpoint wrote, or is not complete; give a .json or .html report")
    return match.group(1)


def _chart_of(finding: Finding, index: int) -> Figure | None:
    chart = finding.chart
    if chart is None or not any(y is not None for series in chart.series for y in series.y):
        return None
    return draw(chart, f"finding-{index}")


def _earlier(values: Sequence[Hashable]) -> list[int | None]:
    """For each value where the same came first, None for the first itself."""
    first: dict[Hashable, int] = {}
    return [None if (at := first.setdefault(value, i)) == i else at for i, value in enumerate(values)]


def _columns(report: Report) -> dict[str, str]:
    records = report.trace.records.values()
    return {key: name for key, name in COLUMNS.items() if any(_value(r, key) not in (None, 0) for r in records)}


def _rows(report: Report) -> list[tuple[Record, list[float | None]]]:
    keys = _columns(report)
    return [(record, [_value(record, key) for key in keys]) for record in report.trace.records.values()]


def _value(record: Record, key: str) -> float | None:
    return largest(record) if key == "largest" else getattr(record, key)


def _setting(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def script(data: Any) -> Markup:
    """JSON that can't end the script element it stands in."""
    text = json.dumps(encode(data), separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


@cache
def library() -> Markup:
    """The scripts that draw, as one module that sets ``window.vegaEmbed``."""
    names = "Object.assign(window, { vegaEmbed });"
    version = ".".join(alt.SCHEMA_VERSION.lstrip("v").split(".")[:2])
    return Markup(vl_convert.javascript_bundle(names, version).replace("</script", "<\\/script"))


@cache
def environment() -> jinja2.Environment:
    """Where the templates are, with the filter ``number``."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("setpoint.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    return environment
