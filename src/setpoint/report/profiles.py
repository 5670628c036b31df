"""Depth profiles: what the trace says about each quantity, block by block, as charts in data form.

A model with a residual stream is drawn over its blocks, the embedding standing before block 0; a network without one
over its convolutions in order of execution. A quantity that was not measured has no chart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from setpoint.types import Chart, Record, Series, Trace

CHANNELS_SHOWN = 48
"""A heat map keeps this many channels, those with the largest magnitudes."""

EMBEDDING = -1.0
"""Where the embedding stands on a block axis: before block 0."""

Measure = Callable[[Record], "float | None"]


@dataclass(frozen=True, slots=True)
class Profile:
    """A chart, the group it is shown in, and the name of the site behind each x."""

    group: str
    chart: Chart
    labels: Mapping[float, str] = field(default_factory=dict)


def profiles(trace: Trace) -> list[Profile]:
    """Every chart that ``trace`` has numbers for, in reading order."""
    found = [*_stream(trace), *_branches(trace), *_attention(trace), *_hidden(trace), *_convolutions(trace)]
    found += [*_gradients(trace), *_heatmaps(trace)]
    return [p for p in found if any(y for s in p.chart.series for y in s.y)]  # nothing, or zero throughout: no picture


def largest(record: Record) -> float | None:
    """The largest magnitude at a site."""
    ends = [abs(x) for x in (record.minimum, record.maximum) if x is not None]
    return max(ends) if ends else None


_SCALE: Mapping[str, Measure] = {"largest": largest, "rms": lambda r: r.rms, "median": lambda r: r.median}


def _stream(trace: Trace) -> list[Profile]:
    points = [(EMBEDDING, r) for r in trace.by_role("embedding")[-1:]] + _by_block(trace.by_role("residual"))
    if len(points) < 2:
        return []
    make = _maker("Residual stream", points, "block")
    return [
        make("Magnitude of the residual stream", "magnitude", _SCALE, log=True),
        make("Variance of the residual stream", "variance", {"variance": lambda r: r.variance}, log=True),
        make(
            "Excess kurtosis: how far out the largest values are (Gaussian: 0)",
            "kurtosis",
            {"kurtosis": lambda r: r.kurtosis},
            log=_wide(r.kurtosis for _, r in points),
        ),
        make(
            "Cosine between token vectors: 1 means all tokens look alike", "mean cosine", {"cosine": lambda r: r.cosine}
        ),
        make("Angle by which a block turns the stream", "degrees", {"angle": lambda r: r.angle}),
        make("Step of a block against its input", "rms ratio", {"step": lambda r: r.step_ratio}),
    ]


def _branches(trace: Trace) -> list[Profile]:
    kinds: dict[str, list[tuple[float, Record]]] = {}
    for x, record in _by_block(trace.by_role("branch")):
        kinds.setdefault(record.site.module.rpartition(".")[2] or "branch", []).append((x, record))
    if not kinds or len(kinds) > 6:  # with more, the names are not kinds of branches
        return []
    series = tuple(_series(name, points, lambda r: r.rms, log=True) for name, points in kinds.items())
    chart = Chart("profile", "What each branch adds to the stream", "block", "rms", series, log=True)
    return [Profile("Residual stream", chart)]


def _attention(trace: Trace) -> list[Profile]:
    records = [r for r in trace.attention.values() if r.site.block is not None]
    if not records:
        return []
    blocks = [float(r.site.block or 0) for r in records]
    labels = dict(zip(blocks, (r.site.name for r in records), strict=True))
    quantities = (
        (
            "Attention entropy: 1 is uniform, 0 a single key",
            "entropy (share of the maximum)",
            [r.entropy for r in records],
        ),
        ("Attention on the first token", "share of mass", [r.sink for r in records]),
        ("Largest attention logit", "logit", [r.logit_max for r in records]),
    )
    found = [
        Profile("Attention", Chart("profile", title, "block", y, _spread(blocks, heads)), labels)
        for title, y, heads in quantities
    ]
    rows = tuple(
        Series(f"{b:.0f}", tuple(float(h) for h in range(r.sink.size)), _finite(r.sink))
        for b, r in zip(blocks, records, strict=True)
    )
    return [
        *found,
        Profile("Attention", Chart("heatmap", "Attention on the first token, head by head", "head", "block", rows)),
    ]


def _hidden(trace: Trace) -> list[Profile]:
    points = _by_block(trace.by_role("hidden"))
    if not points:
        return []
    make = _maker("Feed-forward", points, "block")
    return [
        make("Share of feed-forward activations that are exactly zero", "share", {"zeros": lambda r: r.zeros}),
        make("Share of feed-forward units that never fire", "share", {"dead": _dead}),
        make("Magnitude of feed-forward activations", "magnitude", _SCALE, log=True),
    ]


def _convolutions(trace: Trace) -> list[Profile]:
    points = [(float(i), record) for i, record in enumerate(trace.by_role("convolution"))]
    if len(points) < 2:
        return []
    make = _maker("Convolutions", points, "convolution, in order of execution")
    return [
        make("Magnitude after each convolution", "magnitude", _SCALE, log=True),
        make("Share of exact zeros after each convolution", "share", {"zeros": lambda r: r.zeros}),
        make("Share of channels that never fire", "share", {"dead": _dead}),
        make(
            "Excess kurtosis after each convolution",
            "kurtosis",
            {"kurtosis": lambda r: r.kurtosis},
            log=_wide(r.kurtosis for _, r in points),
        ),
    ]


def _gradients(trace: Trace) -> list[Profile]:
    points = _by_block(trace.by_role("residual"))
    found = [
        _maker("Gradients", points, "block")(
            "Gradient at the residual stream", "rms", {"gradient": lambda r: r.gradient_rms}, log=True
        )
    ]
    squares: dict[int, float] = {}
    for p in trace.parameters.values():
        if p.block is not None and p.gradient_norm is not None:
            squares[p.block] = squares.get(p.block, 0.0) + p.gradient_norm**2
    xs = tuple(float(b) for b in sorted(squares))
    norms = _positive(squares[b] ** 0.5 for b in sorted(squares))
    series = (Series("gradient norm", xs, norms),)
    return [
        *found,
        Profile(
            "Gradients",
            Chart("profile", "Gradient norm of each block's parameters", "block", "L2 norm", series, log=True),
        ),
    ]


def _heatmaps(trace: Trace) -> list[Profile]:
    points = [
        (b, r.channel_max)
        for b, r in _by_block(trace.by_role("residual"))
        if r.channel_max is not None and r.channel_max.size
    ]
    if len(points) < 2 or len({row.size for _, row in points}) > 1:  # stages of different width share no channels
        return []
    table = np.nan_to_num(np.stack([row for _, row in points]), posinf=np.nan)
    top = np.sort(np.argsort(-np.nanmax(table, axis=0))[:CHANNELS_SHOWN])
    series = tuple(
        Series(f"{b:.0f}", tuple(float(c) for c in top), _positive(row[top]))
        for (b, _), row in zip(points, table, strict=True)
    )
    title = f"Largest magnitude in the residual stream: the {len(top)} most extreme of {table.shape[1]} channels"
    return [Profile("Channels", Chart("heatmap", title, "channel", "block", series, log=True))]


def _by_block(records: Sequence[Record]) -> list[tuple[float, Record]]:
    return [(float(r.site.block), r) for r in records if r.site.block is not None]


def _maker(group: str, points: list[tuple[float, Record]], x: str) -> Callable[..., Profile]:
    labels = {at: record.site.name for at, record in points}

    def make(title: str, y: str, measures: Mapping[str, Measure], *, log: bool = False) -> Profile:
        series = tuple(_series(name, points, measure, log=log) for name, measure in measures.items())
        return Profile(group, Chart("profile", title, x, y, series, log=log), labels)

    return make


def _series(name: str, points: list[tuple[float, Record]], measure: Measure, *, log: bool) -> Series:
    measured = [(x, value) for x, record in points if (value := measure(record)) is not None]
    values = [value for _, value in measured]
    return Series(name, tuple(x for x, _ in measured), _positive(values) if log else _finite(values))


def _spread(blocks: list[float], heads: list[np.ndarray]) -> tuple[Series, ...]:
    kinds: Mapping[str, Callable[[np.ndarray], Any]] = {"highest head": np.max, "mean": np.mean, "lowest head": np.min}
    return tuple(
        Series(name, tuple(blocks), _finite(reduce(row) if row.size else None for row in heads))
        for name, reduce in kinds.items()
    )


def _dead(record: Record) -> float | None:
    active = record.channel_active
    return None if active is None or not active.size else float((active == 0).mean())


def _wide(values: Iterable[float | None]) -> bool:
    """Whether a logarithmic axis shows the values better: all above zero, over more than two decades."""
    known = [v for v in _finite(values) if v is not None]
    return bool(known) and min(known) > 0 and max(known) > 100 * min(known)


def _finite(values: Iterable[float | None]) -> tuple[float | None, ...]:
    return tuple(float(f"{v:.5g}") if v is not None and np.isfinite(v) else None for v in values)


def _positive(values: Iterable[float | None]) -> tuple[float | None, ...]:
    """Values that a logarithmic axis can show."""
    return tuple(v if v is not None and v > 0 else None for v in _finite(values))
