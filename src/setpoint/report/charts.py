"""From a chart in data form to a Vega-Lite specification.

Colours, fonts and backgrounds are left out: the page sets them from its theme, so that one specification serves light
and dark. A value that is missing or not finite, or that a logarithmic axis can't show, leaves a gap.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import altair as alt

from setpoint.report.profiles import EMBEDDING
from setpoint.types import Chart, Series
from setpoint.words import number

HEIGHT = 220
ROW = 13
"""Height of one row of a heat map, in pixels."""
PLAIN = (
    "datum.value == 0 || inrange(abs(datum.value), [0.001, 99999]) ? format(datum.value, '~r') : "
    "format(datum.value, '~e')"
)
"""How axes and legends write a number: in full, with an exponent where that would be long; never with an SI letter."""
CELL = 32
"""Width of its cells where they are too few to fill the page."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A drawing for the page.

    Args:
        id: Unique in the page.
        title: Heading, with the unit.
        description: What the picture shows, for those who don't see it.
        spec: Vega-Lite, data included.
        wide: Whether it wants the whole width.
    """

    id: str
    title: str
    description: str
    spec: dict[str, Any]
    wide: bool


def draw(chart: Chart, name: str, labels: Mapping[float, str] | None = None) -> Figure:
    """Turn a chart into a figure.

    Args:
        chart: What to draw.
        name: The figure's id.
        labels: Name of the site at each x, for the tooltip.

    Returns:
        The figure, as wide as its container.

    >>> from setpoint.types import Series
    >>> figure = draw(Chart("profile", "rms", "block", "rms", (Series("rms", (0, 1), (0.5, None)),)), "f0")
    >>> figure.description
    'Line chart, rms over block. rms: 0.5 at 0.'
    """
    # Vega puts axis titles into expressions, where a line separator is a syntax error.
    chart = replace(chart, x=" ".join(chart.x.split()), y=" ".join(chart.y.split()))
    heat = chart.kind == "heatmap"
    if heat:
        names = short_names([series.name for series in chart.series])
        chart = replace(chart, series=tuple(replace(s, name=n) for s, n in zip(chart.series, names, strict=True)))
    else:  # a line without a value would only stand in the legend
        shown = tuple(s for s in chart.series if any(_shown(y, chart) is not None for y in s.y))
        chart = replace(chart, series=shown)
    rows = _rows(chart, labels or {})
    picture = _heatmap(chart) if heat else _profile(chart, labelled=bool(labels))
    width = alt.Step(CELL) if heat and _across(chart) <= 10 else "container"
    spec = picture.properties(data=alt.NamedData(name), width=width).to_dict()
    for key in ("$schema", "config"):  # the page knows the version and has its own theme
        spec.pop(key, None)
    spec["datasets"] = {name: rows}
    spec["description"] = describe(chart)
    return Figure(name, chart.title, spec["description"], spec, wide=heat and _across(chart) > 20)


def describe(chart: Chart) -> str:
    """A chart in words: its axes, and each series with where it starts, ends and peaks."""
    if chart.kind == "heatmap":
        cells = [
            (y, x, s.name) for s in chart.series for x, y in zip(s.x, s.y, strict=True) if _shown(y, chart) is not None
        ]
        text = f"Heat map, {chart.x} across and {chart.y} down."
        if cells:
            top, x, row = max(cells, key=lambda cell: cell[0] or 0)
            text += f" Highest {number(top)} at {chart.x} {x:g}, {chart.y} {row}."
        return text
    parts = [words for s in chart.series[:8] if (words := _describe(s, chart))]
    return " ".join([f"Line chart, {chart.y} over {chart.x}.", *parts])


def short_names(names: Sequence[str]) -> list[str]:
    """Names of sites without the words that all of them begin or end with.

    >>> short_names(["model.layers.3 residual", "model.layers.12 residual"])
    ['3', '12']
    """
    words = [re.findall(r"[^. ]+[. ]?", name) for name in names]
    shortest = min(map(len, words), default=0) - 1
    head = next((i for i in range(max(shortest, 0)) if len({w[i] for w in words}) > 1), max(shortest, 0))
    tail = next((i for i in range(shortest - head) if len({w[-1 - i] for w in words}) > 1), max(shortest - head, 0))
    return ["".join(w[head : len(w) - tail]).rstrip(". ") for w in words]


def _describe(series: Series, chart: Chart) -> str:
    points = [(x, y) for x, y in zip(series.x, series.y, strict=True) if _shown(y, chart) is not None and y is not None]
    if not points:
        return ""
    (x0, y0), (x1, y1) = points[0], points[-1]
    if len(points) == 1:
        return f"{series.name}: {number(y0)} at {x0:g}."
    top = max(points, key=lambda point: point[1])
    return f"{series.name}: {number(y0)} at {x0:g} to {number(y1)} at {x1:g}, highest {number(top[1])} at {top[0]:g}."


def _rows(chart: Chart, labels: Mapping[float, str]) -> list[dict[str, Any]]:
    rows = []
    for series in chart.series:
        for x, y in zip(series.x, series.y, strict=True):
            row: dict[str, Any] = {"x": int(x) if float(x).is_integer() else x, "y": _shown(y, chart), "s": series.name}
            if x in labels:
                row["at"] = labels[x]
            rows.append(row)
    return rows


def _shown(value: float | None, chart: Chart) -> float | None:
    if value is None or not math.isfinite(value) or (chart.log and value <= 0):
        return None
    return float(f"{value:.5g}")


def _profile(chart: Chart, *, labelled: bool) -> alt.LayerChart:
    several = len(chart.series) > 1
    threshold = None if chart.threshold is None else _shown(chart.threshold, chart)
    colour = alt.Color("s:N", title=None, sort=None, legend=alt.Legend(orient="top")) if several else alt.Undefined
    base = alt.Chart().encode(x=_depth_axis(chart), y=_value_axis(chart, threshold), color=colour)
    tooltip = [alt.Tooltip("x:Q", title=chart.x), alt.Tooltip("y:Q", title=chart.y, format=".4~g")]
    tooltip += [alt.Tooltip("s:N", title="line")] if several else []
    tooltip += [alt.Tooltip("at:N", title="site")] if labelled else []
    # Not `nearest=True`: Vega-Lite 6.4 then leaves the names in the tooltip undefined.
    hover = alt.selection_point(name="hover", on="pointerover", clear="pointerout", empty=False)
    layers = [
        base.mark_line(),
        base.mark_point(filled=True, size=14, opacity=0.9),  # also what is left of a value between two gaps
        base.mark_point(filled=True, size=280)
        .encode(tooltip=tooltip, opacity=alt.condition(hover, alt.value(0.25), alt.value(0)))
        .add_params(hover),
    ]
    if threshold is not None:
        layers.insert(0, alt.Chart().mark_rule(style="threshold").encode(y=alt.datum(threshold)))
    return alt.layer(*layers).properties(height=HEIGHT)


def _depth_axis(chart: Chart) -> alt.X:
    axis: dict[str, Any] = {"tickMinStep": 1, "grid": False}
    xs = [x for s in chart.series for x in s.x]
    if min(xs, default=0) == EMBEDDING:
        step = next(n for n in (1, 2, 5, 10, 20, 50, 100) if max(xs) <= 10 * n or n == 100)
        axis["values"] = [EMBEDDING, *range(0 if step == 1 else step, int(max(xs)) + 1, step)]
        axis["labelExpr"] = "datum.value < 0 ? 'in' : format(datum.value, '~r')"
    return alt.X("x:Q", title=chart.x, axis=alt.Axis(**axis), scale=alt.Scale(nice=False))


def _value_axis(chart: Chart, threshold: float | None) -> alt.Y:
    values = [v for s in chart.series for y in s.y if (v := _shown(y, chart)) is not None]
    values += [threshold] if threshold is not None else []
    size = max(map(abs, values), default=1.0)
    if not chart.log:
        return alt.Y("y:Q", title=chart.y, scale=alt.Scale(zero=size < 1), axis=alt.Axis(tickCount=5, labelExpr=PLAIN))
    ticks = _log_ticks(min(values, default=1.0), size)
    return alt.Y("y:Q", title=chart.y, scale=alt.Scale(type="log"), axis=alt.Axis(values=ticks, labelExpr=PLAIN))


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, at most about six; over less than two decades also their doubles and fives."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if math.log10(high / low) < 2 else (1,)
    every = max(1, round((last - first) / 6))
    return [float(f"{step}e{power}") for power in range(first, last + 1, every) for step in steps]


def _few_ticks(values: Sequence[float]) -> list[float]:
    """Ticks between the values, few enough to stand along a colour bar."""
    low, high = min(values), max(values)
    inside = [tick for tick in _log_ticks(low, high) if low <= tick <= high]
    return inside[:: math.ceil(len(inside) / 6)] if inside else [low, high]


def _heatmap(chart: Chart) -> alt.Chart:
    scale = alt.Scale(type="log") if chart.log else alt.Scale()
    values = [v for s in chart.series for y in s.y if (v := _shown(y, chart)) is not None]
    ticks = {"values": _few_ticks(values)} if chart.log and values else {"tickCount": 4}
    legend = alt.Legend(title=None, orient="top", gradientLength=180, labelExpr=PLAIN, **ticks)
    axis = {"ticks": False, "domain": False, "labelAngle": 0}
    across = axis | {"labelOverlap": True, "labelSeparation": 4, "labelLimit": 140}
    down = axis | {"labelOverlap": False, "labelLimit": 260}  # a row is as high as its name
    return (
        alt.Chart()
        .mark_rect()
        .encode(
            x=alt.X("x:O", title=chart.x, sort=None, axis=alt.Axis(**across)),
            y=alt.Y("s:O", title=chart.y, sort=None, axis=alt.Axis(**down)),
            color=alt.Color("y:Q", scale=scale, legend=legend),
            tooltip=[
                alt.Tooltip("x:O", title=chart.x),
                alt.Tooltip("s:O", title=chart.y),
                alt.Tooltip("y:Q", title="value", format=".4~g"),
            ],
        )
        .properties(height=max(ROW * len(chart.series), 5 * ROW))
    )


def _across(chart: Chart) -> int:
    return max((len(s.x) for s in chart.series), default=0)
