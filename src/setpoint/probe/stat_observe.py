"""From one batch's tensor at a site to the site's statistics, chunk by chunk."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from setpoint.probe.stat_kernels import (
    Chunk,
    count_magnitudes,
    count_nonzero,
    largest_entries,
    reduce_chunk,
    reduce_plainly,
)
from setpoint.probe.stat_scratch import Scratch, chunk_rows, to_numpy
from setpoint.probe.statistics import Array, Counts, Group, SiteStatistics
from setpoint.types import Stat

_PER_ROW = frozenset({Stat.COSINE, Stat.STEP})
_PLAIN = frozenset({Stat.MOMENTS, Stat.GRADIENT})


@dataclass(slots=True)
class Stream:
    """The residual stream as a block finds it.

    Args:
        values: Shape ``(positions, channels)``.
        squares: Squared norms of the rows that counted, if they were computed.
    """

    values: Tensor
    squares: Array | None = None


@dataclass(frozen=True, slots=True)
class Selection:
    """Which positions of a batch count.

    Args:
        keep: Shape ``(positions,)``: indices of the positions that are not padding; None for all.
        groups: Name -> shape ``(positions,)``, bool.
    """

    keep: Tensor | None = None
    groups: Mapping[str, Tensor] | None = None


def observe(
    values: Tensor,
    length: int,
    statistics: SiteStatistics,
    scratch: Scratch,
    *,
    first_sequence: int = 0,
    selection: Selection | None = None,
    stream: Stream | None = None,
) -> Array | None:
    """Add one batch's values of a site to its statistics.

    Args:
        values: Shape ``(positions, channels)``; positions run through the sequences one after the other.
        length: Positions of one sequence.
        statistics: What is kept of the site; changed in place.
        scratch: Buffers.
        first_sequence: Number of the first sequence, for the positions of peaks.
        selection: Padding and token groups.
        stream: The block's input, of the shape of ``values``, for `Stat.STEP`.

    Returns:
        Squared norms of the rows that counted, None if no statistic needed them.
    """
    selection = selection or Selection()
    keep, groups = selection.keep, selection.groups or {}
    count = values.shape[0] if keep is None else keep.numel()
    step = chunk_rows(values.shape[1], values.device)
    wanted = statistics.wanted
    if wanted <= _PLAIN and keep is None and not groups:
        _observe_plainly(values, statistics, scratch)
        return None
    per_row = bool(wanted & _PER_ROW or groups)
    squares: list[Array] = []
    directions = _Directions(statistics, length) if Stat.COSINE in wanted else None
    for start in range(0, count, step):
        stop = min(start + step, count)
        chosen = None if keep is None else keep[start:stop]
        x = _load(values, start, stop, chosen, "values", scratch)
        chunk = reduce_chunk(x, wanted, per_row, scratch)
        positions = np.arange(start, stop) if chosen is None else chosen.cpu().numpy()
        statistics.tokens += stop - start
        statistics.moments.add(chunk.moments)
        if chunk.channels is not None:
            statistics.add_channels(chunk.channels)
        if Stat.MEDIAN in wanted:
            _add_magnitudes(x, chunk, statistics, scratch)
        if Stat.PEAKS in wanted:
            _add_peaks(x, chunk, positions, length, first_sequence, statistics)
        if Stat.ZEROS in wanted:
            active = count_nonzero(x, chunk, scratch)
            statistics.add_active(active)
            statistics.seen += x.numel()
            statistics.zeros += x.numel() - float(active.sum())
        if chunk.row_squares is None:
            continue
        squares.append(chunk.row_squares)
        if directions is not None:
            directions.add(x if chunk.finite else _without_infinities(x), chunk.row_squares, positions)
        angles = None
        if Stat.STEP in wanted and stream is not None:
            before = _load(stream.values, start, stop, chosen, "stream", scratch)
            given = None if stream.squares is None else stream.squares[start:stop]
            angles = _add_step(x, before, chunk.row_squares, given, statistics, scratch)
        for name, mask in groups.items():
            inside = (mask[start:stop] if chosen is None else mask[chosen]).cpu().numpy()
            _add_group(statistics.groups.setdefault(name, Group()), chunk.row_squares, angles, inside)
    if directions is not None:
        directions.finish()
    return np.concatenate(squares) if squares else None


def _observe_plainly(values: Tensor, statistics: SiteStatistics, scratch: Scratch) -> None:
    """Moments alone. Wide rows, as of logits, are folded: sums by column then have few columns and many rows."""
    statistics.tokens += len(values)
    width = values.shape[1]
    while width > 1024 and width % 2 == 0:
        width //= 2
    if width != values.shape[1]:
        values = values.reshape(-1, width)
    step = chunk_rows(width, values.device)
    for start in range(0, len(values), step):
        x = _load(values, start, min(start + step, len(values)), None, "values", scratch)
        statistics.moments.add(reduce_plainly(x, scratch))


def _load(values: Tensor, start: int, stop: int, chosen: Tensor | None, name: str, scratch: Scratch) -> Tensor:
    """The chunk's rows as contiguous float32; the values themselves where they already are."""
    if chosen is not None:
        rows = values.index_select(0, chosen)
    else:
        rows = values if stop - start == len(values) else values[start:stop]
    if rows.dtype is torch.float32 and rows.is_contiguous():
        return rows
    return scratch.take(name, rows).copy_(rows)


def _without_infinities(x: Tensor) -> Tensor:
    return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)


def _add_magnitudes(x: Tensor, chunk: Chunk, statistics: SiteStatistics, scratch: Scratch) -> None:
    kept = statistics.magnitudes
    if kept is not None and kept.values is not None:  # exact: every magnitude is kept
        kept.values.append(to_numpy(x[x.isfinite()].abs()))
        return
    square = scratch.workspace(x).square
    if not chunk.finite:
        torch.nan_to_num(square, nan=math.inf, out=square)
    counted = count_magnitudes(square, scratch)
    if kept is None:
        statistics.magnitudes = counted
    else:
        kept.add(counted)


def _add_peaks(
    x: Tensor, chunk: Chunk, positions: Counts, length: int, first_sequence: int, statistics: SiteStatistics
) -> None:
    assert chunk.channels is not None
    found = largest_entries(x, chunk.channels.largest, statistics.peaks.size, statistics.peaks.floor)
    if found is None:
        return
    place = positions[found[:, 1].astype(np.int64)]
    columns = (found[:, 0], place // length + first_sequence, place % length, found[:, 2])
    statistics.peaks.add(np.stack(columns, 1))


class _Directions:
    """Sums the unit token vectors of each sequence, which may be cut by chunks."""

    def __init__(self, statistics: SiteStatistics, length: int) -> None:
        self.statistics, self.length = statistics, length
        self.sequence = -1
        self.sum: Array | None = None
        self.tokens = 0

    def add(self, x: Tensor, row_squares: Array, positions: Counts) -> None:
        usable = row_squares > 0
        inverse = np.zeros_like(row_squares)
        inverse[usable] = row_squares[usable] ** -0.5
        weights = torch.from_numpy(inverse.astype(np.float32)).to(x.device).view(1, -1)
        for sequence, start, stop in _pieces(positions, self.length):
            if sequence != self.sequence:
                self.finish()
                self.sequence = sequence
            whole = stop - start == len(positions)
            part = torch.mm(weights, x) if whole else torch.mm(weights[:, start:stop], x[start:stop])
            total = to_numpy(part[0])
            self.sum = total if self.sum is None else self.sum + total
            self.tokens += int(usable[start:stop].sum())

    def finish(self) -> None:
        if self.sum is not None and self.tokens > 1:
            self.statistics.cosine += float(self.sum @ self.sum) - self.tokens
            self.statistics.pairs += self.tokens * (self.tokens - 1)
        self.sum, self.tokens, self.sequence = None, 0, -1


def _pieces(positions: Counts, length: int) -> Iterator[tuple[int, int, int]]:
    """Runs ``(sequence, start, stop)`` of rows that belong to the same sequence."""
    first, last = int(positions[0]) // length, int(positions[-1]) // length
    edges = np.searchsorted(positions, np.arange(first, last + 2) * length).tolist()
    for i, sequence in enumerate(range(first, last + 1)):
        if edges[i] < edges[i + 1]:
            yield sequence, edges[i], edges[i + 1]


def _add_step(
    x: Tensor,
    before: Tensor,
    row_squares: Array,
    given: Array | None,
    statistics: SiteStatistics,
    scratch: Scratch,
) -> Array:
    """Add the turn and the length of the step from ``before`` to ``x``; return each row's angle in degrees.

    The angle comes from the chord between the two unit vectors, |u - v|² = (|x - y|² - (|x| - |y|)²) / (|x||y|), which
    keeps its digits for the smallest turns, where the arc cosine of a dot product has none left.
    """
    space = scratch.workspace(x)
    buffer = space.square
    if given is None:
        given = to_numpy(torch.mv(torch.mul(before, before, out=buffer), space.column))
    torch.sub(x, before, out=buffer)
    taken = to_numpy(torch.mv(buffer.mul_(buffer), space.column))
    with np.errstate(divide="ignore", invalid="ignore"):
        norm, before_norm = np.sqrt(row_squares), np.sqrt(given)
        chord = (taken - (norm - before_norm) ** 2) / (norm * before_norm)
        angles: Array = np.degrees(2 * np.arcsin(np.sqrt(np.clip(chord, 0.0, 4.0)) / 2))
    usable = np.isfinite(angles)
    statistics.angle += float(angles[usable].sum())
    statistics.turned += int(usable.sum())
    statistics.step_squares += float(taken[usable].sum())
    statistics.input_squares += float(given[usable].sum())
    return angles


def _add_group(group: Group, row_squares: Array, angles: Array | None, inside: Counts) -> None:
    usable = inside & np.isfinite(row_squares)
    group.norm += float(np.sqrt(row_squares[usable]).sum())
    group.tokens += int(usable.sum())
    if angles is not None:
        turned = inside & np.isfinite(angles)
        group.angle += float(angles[turned].sum())
        group.turned += int(turned.sum())
