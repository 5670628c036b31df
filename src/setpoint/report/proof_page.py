"""A proof as one HTML page that needs nothing else: the same frame, style and theme as the report of a check."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import altair as alt

import setpoint
from setpoint.report import proof_words, wording
from setpoint.report.charts import HEIGHT, Figure
from setpoint.report.page import environment, library, script
from setpoint.types.proving import Better, Interval, Judgement, Pair, Shape, StudyResult

if TYPE_CHECKING:
    from setpoint.report.proof import Proof

LOG_FROM = 50.0
"""A curve whose values span more than this ratio is drawn on a logarithmic axis."""

FEW = 12
"""Up to so many whole numbers (blocks of a model, say) each have a tick of their own: no block is number 0.5."""


@dataclass(frozen=True, slots=True)
class _Part:
    """A study as the page shows it."""

    result: StudyResult
    effects: tuple[Figure | None, ...]
    curves: tuple[Figure, ...]
    costs: tuple[str, ...]
    trials: Figure | None


def render(proof: Proof) -> str:
    """The page as text."""
    parts = [_part(study, i, says_something=proof.budget != "smoke") for i, study in enumerate(proof.studies)]
    figures = [f for part in parts for f in (*part.effects, *part.curves, part.trials) if f is not None]
    return (
        environment()
        .get_template("proof.html.j2")
        .render(
            proof=proof,
            parts=parts,
            specs=script({figure.id: figure.spec for figure in figures}),
            data=script(json.loads(proof.to_json())),
            library=library(),
            words=wording,
            says=proof_words,
            version=setpoint.__version__,
        )
    )


def _part(study: StudyResult, index: int, *, says_something: bool) -> _Part:
    """A study's figures; effects that say nothing are not drawn."""
    names = dict.fromkeys(curve.name for arm in study.arms for curve in arm.curves)
    return _Part(
        result=study,
        effects=tuple(
            _effect(j, f"effect-{index}-{i}") if says_something else None for i, j in enumerate(study.judgements)
        ),
        curves=tuple(_curve(name, study, f"curve-{index}-{i}") for i, name in enumerate(names)),
        costs=tuple(dict.fromkeys(name for arm in study.arms for name in arm.cost)),
        trials=_trials(study, f"trials-{index}"),
    )


def _curve(name: str, study: StudyResult, id_: str) -> Figure:
    """One line per arm, and the range over the replicates of those that the first claim compares."""
    arms, banded = study.arms, _compared(study)
    rows: list[dict[str, Any]] = [
        {"x": x, "y": mean, "low": low, "high": high, "s": arm.name}
        for arm in arms
        for band in arm.curves
        if band.name == name
        for x, mean, low, high in zip(band.x, band.mean, band.low, band.high, strict=True)
    ]
    y_scale = _scale([value for row in rows for value in (row["low"], row["high"])])
    xs = sorted({float(row["x"]) for row in rows})
    few = len(xs) <= FEW and all(x.is_integer() for x in xs)
    x_axis = alt.Axis(grid=False, values=xs, format="d") if few else alt.Axis(grid=False)
    legend = alt.Legend(orient="top", symbolOpacity=1, symbolType="stroke")
    colour = alt.Color("s:N", title=None, sort=None, legend=legend)
    what, _, over = name.partition(" over ")
    across = over or "step"
    base = alt.Chart().encode(x=alt.X("x:Q", title=across, scale=_x_scale(xs), axis=x_axis), color=colour)
    tooltip = [
        alt.Tooltip("s:N", title="arm"),
        alt.Tooltip("x:Q", title=across),
        alt.Tooltip("y:Q", title="mean", format=".4~g"),
        alt.Tooltip("low:Q", title="lowest", format=".4~g"),
        alt.Tooltip("high:Q", title="highest", format=".4~g"),
    ]
    chart = alt.layer(
        base.mark_area(opacity=0.18)
        .transform_filter(alt.FieldOneOfPredicate("s", banded))
        .encode(y=alt.Y("low:Q", title=what, scale=y_scale), y2="high:Q"),
        base.mark_line().encode(y=alt.Y("y:Q", title=what, scale=y_scale)),
        base.mark_point(filled=True, size=160, opacity=0).encode(y=alt.Y("y:Q", scale=y_scale), tooltip=tooltip),
    )
    ends = [f"{a.name} ends at {wording.number(b.mean[-1])}" for a in arms for b in a.curves if b.name == name]
    ranges = (
        f"and range over the {study.replicate}s"
        if len(banded) == len(arms)
        else f"with the range of {' and '.join(banded)}"
    )
    title = f"{what[:1].upper()}{what[1:]}: mean {ranges}"
    return _figure(chart, id_, rows, title, f"Line chart of {what} over {across}. {'; '.join(ends)}.")


def _effect(judgement: Judgement, id_: str) -> Figure | None:
    """The effect with both intervals, each replicate, and the smallest effect that matters as a zone around none."""
    claim, effect = judgement.claim, judgement.effect
    if effect is None:
        return None
    draw = _draw_as(judgement, effect)
    spans = {"Student t": (effect.low, effect.high), "bootstrap": (effect.bootstrap_low, effect.bootstrap_high)}
    rows: list[dict[str, Any]] = [
        {"kind": kind, "low": draw(low), "high": draw(high), "mid": draw(effect.estimate)}
        for kind, (low, high) in spans.items()
    ]
    each = {pair.replicate: _each(judgement, pair) for pair in judgement.pairs}
    rows += [{"kind": "replicates", "v": draw(value), "at": at} for at, value in each.items() if value is not None]
    low, high = map(draw, _zone(judgement))
    factor = claim.scale == "ratio" and proof_words.as_factor(effect)
    scale = alt.Scale(type="log", nice=False, padding=12) if factor else alt.Scale(zero=False, nice=False, padding=12)
    unit = (
        "times as good" if factor else "%" if claim.scale == "ratio" else claim.unit or proof_words.plain(claim.metric)
    )
    x = alt.X("low:Q", title=f"effect, {unit}", scale=scale, axis=alt.Axis(grid=False, tickCount=6, format="~g"))
    y = alt.Y("kind:N", title=None, sort=None, axis=alt.Axis(ticks=False, domain=False))
    once = alt.InlineData(values=[{}])  # on the chart's own data each row would draw it again
    layers = [
        alt.Chart(once).mark_rect(style="zone").encode(x=alt.X(datum=low, type="quantitative"), x2=alt.datum(high)),
        alt.Chart(once).mark_rule(style="none").encode(x=alt.datum(draw(0.0))),
        alt.Chart().transform_filter("isValid(datum.low)").mark_rule(style="span").encode(x=x, x2="high:Q", y=y),
        alt.Chart()
        .transform_filter("isValid(datum.mid)")
        .mark_point(filled=True, size=90, opacity=1)
        .encode(x="mid:Q", y=y, tooltip=[alt.Tooltip("mid:Q", title="estimate", format=".4~g")]),
    ]
    if any("v" in row for row in rows):
        marks = alt.Chart().transform_filter("isValid(datum.v)").mark_tick(thickness=2)
        shown = [alt.Tooltip("at:Q", title="replicate"), alt.Tooltip("v:Q", title="effect", format=".4~g")]
        layers.append(marks.encode(x="v:Q", y=y, tooltip=shown))
    if isinstance(claim.criterion, Shape):
        layers.pop(1)  # a parameter of a form has no "none"
    chart = alt.layer(*layers)
    middle = proof_words.estimate_of(claim, effect)
    words = f"Effect {middle}, interval {proof_words.span_of(claim, effect)}."
    return _figure(chart, id_, rows, _zone_words(judgement), words, height=110)


def _draw_as(judgement: Judgement, effect: Interval) -> Callable[[float], float]:
    """From an effect to its place on the axis: a ratio as a factor or in per cent, as the words beside it are."""
    if judgement.claim.scale != "ratio":
        return lambda value: value
    return (lambda value: 1 + value) if proof_words.as_factor(effect) else (lambda value: 100 * value)


def _each(judgement: Judgement, pair: Pair) -> float | None:
    """The effect in one replicate."""
    claim = judgement.claim
    if isinstance(claim.criterion, Shape):
        return float(pair.method) if pair.method is not None else None
    ratio = claim.scale == "ratio"
    baseline = pair.baseline if claim.baseline is not None else 1.0 if ratio else 0.0
    if pair.method is None or baseline is None:
        return None
    up = claim.better == "higher"
    if ratio:
        return float(pair.method / baseline if up else baseline / pair.method) - 1
    return float(pair.method - baseline if up else baseline - pair.method)


def _zone(judgement: Judgement) -> tuple[float, float]:
    criterion = judgement.claim.criterion
    if isinstance(criterion, Shape):
        return criterion.low, criterion.high
    bound = criterion.bound
    return (1 / (1 + bound) - 1, bound) if judgement.claim.scale == "ratio" else (-bound, bound)


def _zone_words(judgement: Judgement) -> str:
    criterion = judgement.claim.criterion
    if isinstance(criterion, Shape):
        return "Fitted parameter; shaded: the claimed range"
    if isinstance(criterion, Better):
        return "Effect, right is better; shaded: too small to matter"
    return "Effect, right is better; shaded: allowed difference"


def _trials(study: StudyResult, id_: str) -> Figure | None:
    """What tuning saw, if one number was tuned: the score over it, a line per arm."""
    settings = [trial.setting for arm in study.arms for trial in arm.trials]
    names = {name for setting in settings for name in setting}
    if len(names) != 1:
        return None
    (name,) = names
    rows = [
        {"x": trial.setting[name], "y": trial.score, "s": arm.name}
        for arm in study.arms
        for trial in arm.trials
        if trial.score is not None
    ]
    if not rows or not all(isinstance(row["x"], int | float) for row in rows):
        return None
    xs = sorted({float(row["x"]) for row in rows})
    axis = alt.Axis(values=xs, format="~g", grid=False)
    colour = alt.Color("s:N", title=None, sort=None, legend=alt.Legend(orient="top"))
    metric, knob = proof_words.plain(study.tuning_metric), proof_words.plain(name)
    base = alt.Chart().encode(
        x=alt.X("x:Q", title=knob, scale=_x_scale(xs), axis=axis),
        y=alt.Y("y:Q", title=metric, scale=alt.Scale(zero=False)),
        color=colour,
        tooltip=[
            alt.Tooltip("s:N", title="arm"),
            alt.Tooltip("x:Q", title=knob),
            alt.Tooltip("y:Q", title=metric, format=".4~g"),
        ],
    )
    chart = alt.layer(base.mark_line(), base.mark_point(filled=True, size=60, opacity=1))
    title = f"Tuning: {metric} over {knob}, validation split"
    return _figure(chart, id_, rows, title, f"Line chart of {metric} over {knob} for each arm.")


def _figure(
    chart: alt.LayerChart, id_: str, rows: list[dict[str, Any]], title: str, words: str, height: int = HEIGHT
) -> Figure:
    spec = chart.properties(data=alt.NamedData(id_), width="container", height=height).to_dict()
    for key in ("$schema", "config"):  # the page knows the version and has its own theme
        spec.pop(key, None)
    spec.setdefault("datasets", {})[id_] = rows  # there may be one of a single row already
    spec["description"] = words
    return Figure(id_, title, words, spec, wide=False)


def _scale(values: Sequence[float]) -> alt.Scale:
    low, high = min(values, default=1.0), max(values, default=1.0)
    if low > 0 and high / low > LOG_FROM:
        return alt.Scale(type="log", nice=False)
    return alt.Scale(zero=False)


def _x_scale(xs: Sequence[float]) -> alt.Scale:
    """Logarithmic where the values are spread more evenly by their ratios than by their differences."""
    if len(xs) > 2 and xs[0] > 0:
        gaps = [(b - a, b / a) for a, b in pairwise(xs)]
        uneven, uneven_ratios = (max(values) / min(values) for values in zip(*gaps, strict=True))
        if uneven_ratios < uneven:
            return alt.Scale(type="log", nice=False)
    return alt.Scale(nice=False)


def _compared(study: StudyResult) -> list[str]:
    """The arms of the first claim where there are more than two, which is as many ranges as can be told apart."""
    names = [arm.name for arm in study.arms]
    if len(names) <= 2 or not study.judgements:
        return names
    claim = study.judgements[0].claim
    return [name for name in names if name in (claim.method, claim.baseline)]
