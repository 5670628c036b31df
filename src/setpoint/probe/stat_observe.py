"""From one batch's tensor at a site to the site's statistics, chunk by chunk."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from setpoint.probe.stat_kernels import (
    PER_CHANNEL,
    Chunk,
    Columns,
    about_the_mean,
    count_magnitudes,
    flagged_columns,
    holds_zero,
    largest_entries,
    launch_chunk,
    launch_columns,
    reduce_carefully,
    reduce_plainly,
    settle_chunks,
    settle_columns,
    settle_magnitudes,
)
from setpoint.probe.stat_scratch import Scratch, Workspace, chunk_rows, to_numpy
from setpoint.probe.statistics import Array, Counts, Group, Moments, SiteStatistics
from setpoint.types import Stat

_PER_ROW = frozenset({Stat.COSINE, Stat.STEP})
_PLAIN = frozenset({Stat.MOMENTS, Stat.GRADIENT})
_BY_COLUMN = _PLAIN | {Stat.CHANNELS, Stat.ZEROS}
_SHORTEST = 1e-38
"""Squared norm below which a token vector has no direction."""


@dataclass(slots=True)
class Stream:
    """The residual stream as a block finds it.

    Args:
        values: Shape ``(positions, channels)``.
        squares: Shape ``(positions,)``: squared norms of its rows, if they are known and no row was left out.
    """

    values: Tensor
    squares: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Selection:
    """Which positions of a batch count.

    Args:
        keep: Shape ``(positions,)``: indices of the positions that are not padding; None for all.
        groups: Name -> shape ``(positions,)``, bool.
    """

    keep: Tensor | None = None
    groups: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class Waiting:
    """What a chunk's operations left behind, until `settle_all`.

    ``chunk`` is there already if the chunk went the careful way. ``directions`` are the sums of unit vectors, shape
    ``(sequences, channels)``; ``given`` the squared norms of the rows at the block's input.
    """

    statistics: SiteStatistics
    space: Workspace
    places: range | Tensor
    length: int
    first_sequence: int
    per_row: bool
    chunk: Chunk | None = None
    moments: Moments | None = None
    counts: tuple[Tensor, int] | None = None
    magnitudes: Array | None = None
    flagged: tuple[Tensor, Tensor] | None = None
    directions: Tensor | None = None
    given: Tensor | None = None
    inside: dict[str, Tensor] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        """Whether float32 held the sums."""
        return self.chunk is None


@dataclass(slots=True)
class WaitingColumns:
    """The like for a chunk that was reduced by column; ``active`` counts its values that are not zero."""

    statistics: SiteStatistics
    columns: Columns
    active: Tensor | float


Later = list[Waiting | WaitingColumns]


def observe(
    values: Tensor,
    length: int,
    statistics: SiteStatistics,
    scratch: Scratch,
    *,
    later: Later | None = None,
    first_sequence: int = 0,
    selection: Selection | None = None,
    stream: Stream | None = None,
) -> Tensor | None:
    """Add one batch's values of a site to its statistics.

    Args:
        values: Shape ``(positions, channels)``; positions run through the sequences one after the other.
        length: Positions of one sequence.
        statistics: What is kept of the site; changed in place.
        scratch: Buffers.
        later: Receives what remains to be done by `settle_all`, at most one small piece per call; None to do all at
            once.
        first_sequence: Number of the first sequence, for the positions of peaks.
        selection: Padding and token groups.
        stream: The block's input, of the shape of ``values``, for `Stat.STEP`.

    Returns:
        Squared norms of all rows, shape ``(positions,)``, if they are at hand.
    """
    selection = selection or Selection()
    keep, groups, wanted = selection.keep, selection.groups, statistics.wanted
    if wanted <= _PLAIN and keep is None and not groups:
        _observe_plainly(values, statistics, scratch)
        return None
    count = values.shape[0] if keep is None else keep.numel()
    step = chunk_rows(values.shape[1], values.device)
    if count > step:
        later = None
    per_row = bool(wanted & _PER_ROW or groups)
    cut = later is None or keep is not None  # a sequence may lie in several chunks, or have gaps
    directions = _Directions(statistics, length) if Stat.COSINE in wanted else None
    for start in range(0, count, step):
        stop = min(start + step, count)
        chosen = None if keep is None else keep[start:stop]
        x = _load(values, start, stop, chosen, "values", scratch)
        if wanted <= _BY_COLUMN and not groups and _observe_columns(x, statistics, scratch, later):
            continue
        space = scratch.workspace(x)
        places = range(start, stop) if chosen is None else chosen
        waiting = Waiting(statistics, space, places, length, first_sequence, per_row)
        _launch(x, waiting, scratch)
        if directions is not None:
            if cut or not waiting.sound:
                directions.add(x, waiting)
            else:
                _launch_directions(x, waiting, length)
        if Stat.STEP in wanted and stream is not None:
            before = _load(stream.values, start, stop, chosen, "stream", scratch)
            _launch_step(x, before, stream.squares if keep is None and count <= step else None, waiting)
        for name, mask in groups.items():
            waiting.inside[name] = mask[start:stop] if chosen is None else mask[chosen]
        if later is None:
            settle_all([waiting], scratch)
        else:
            later.append(waiting)
            if per_row and keep is None and waiting.sound:
                return space.rows[0]
    if directions is not None:
        directions.finish()
    return None


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
        statistics.moments.add(reduce_plainly(x))


def _observe_columns(x: Tensor, statistics: SiteStatistics, scratch: Scratch, later: Later | None) -> bool:
    """A chunk of a site whose statistics are all sums and extremes by column; False if it can't be taken that way."""
    columns = launch_columns(x) if x.device.type == "cpu" else None
    if columns is None:
        return False
    active: Tensor | float = float(len(x))
    if Stat.ZEROS in statistics.wanted and holds_zero(x):
        space = scratch.workspace(x)
        torch.ne(x, 0, out=space.square)
        active = torch.sum(space.square, 0)
        scratch.release(space)
    waiting = WaitingColumns(statistics, columns, active)
    if later is None:
        settle_all([waiting], scratch)
    else:
        later.append(waiting)
    return True


def _load(values: Tensor, start: int, stop: int, chosen: Tensor | None, name: str, scratch: Scratch) -> Tensor:
    """The chunk's rows as contiguous float32; the values themselves where they already are."""
    if chosen is not None:
        rows = values.index_select(0, chosen)
    else:
        rows = values if stop - start == len(values) else values[start:stop]
    if rows.dtype is torch.float32 and rows.is_contiguous():
        return rows
    return scratch.take(name, rows).copy_(rows)


# -- in the hook: operations on the chunk ------------------------------------------------------------------------------


def _launch(x: Tensor, waiting: Waiting, scratch: Scratch) -> None:
    statistics, space = waiting.statistics, waiting.space
    wanted = statistics.wanted
    if launch_chunk(x, wanted, waiting.per_row, space):
        waiting.moments = about_the_mean(x, space, scratch)
    else:
        waiting.chunk = reduce_carefully(x, wanted, waiting.per_row)
    if Stat.MEDIAN in wanted:
        if statistics.magnitudes is not None and statistics.magnitudes.values is not None:
            waiting.magnitudes = to_numpy(x[x.isfinite()].abs())  # exact: every magnitude is kept
        else:
            if not waiting.sound:
                torch.nan_to_num(space.square, nan=math.inf, out=space.square)
            waiting.counts = count_magnitudes(space.square, scratch)
    if Stat.PEAKS in wanted:
        if waiting.chunk is not None and waiting.chunk.channels is not None:
            space.parts[2].copy_(torch.from_numpy(waiting.chunk.channels.largest))
            space.parts[3].copy_(space.parts[2])
        waiting.flagged = flagged_columns(x, space, statistics.peaks.size)
    if Stat.ZEROS in wanted:  # the last to use the square
        torch.ne(x, 0, out=space.square)
        torch.sum(space.square, 0, out=space.parts[4])


def _launch_directions(x: Tensor, waiting: Waiting, length: int) -> None:
    """Sum the unit vectors of whole sequences; a row of zeros adds nothing."""
    squares, weights = waiting.space.rows[0], waiting.space.rows[1]
    torch.clamp(squares, min=_SHORTEST, out=weights)
    weights.rsqrt_()
    if len(x) == length:
        waiting.directions = torch.mm(weights.unsqueeze(0), x)
    else:
        waiting.directions = torch.bmm(weights.view(-1, 1, length), x.view(-1, length, x.shape[1])).squeeze(1)


def _launch_step(x: Tensor, before: Tensor, known: Tensor | None, waiting: Waiting) -> None:
    space = waiting.space
    if known is None:
        torch.mul(before, before, out=space.square)
        torch.mm(space.square, space.column, out=space.rows[3].unsqueeze(1))
        known = space.rows[3]
    waiting.given = known
    torch.sub(x, before, out=space.square)
    torch.linalg.vector_norm(space.square, dim=1, out=space.rows[2])


# -- after the pass: arithmetic on small results -----------------------------------------------------------------------


def settle_all(later: Sequence[Waiting | WaitingColumns], scratch: Scratch) -> None:
    """Bring into the statistics what `observe` put off; chunks of one kind together.

    Args:
        later: What `observe` filled.
        scratch: Takes the workspaces back.
    """
    columns: dict[int, list[WaitingColumns]] = {}
    alike: dict[tuple[torch.Size, bool, bool], list[Waiting]] = {}
    for waiting in later:
        if isinstance(waiting, WaitingColumns):
            columns.setdefault(len(waiting.columns.mean), []).append(waiting)
        else:
            kind = (waiting.space.square.shape, waiting.per_row, waiting.given is not None)
            alike.setdefault(kind, []).append(waiting)
    for group in columns.values():
        for one, chunk in zip(group, settle_columns([one.columns for one in group]), strict=True):
            _settle_columns(one, chunk)
    for (_, per_row, stepped), several in alike.items():
        spaces = [waiting.space for waiting in several]
        chunks = settle_chunks(spaces, [waiting.moments for waiting in several], per_row)
        chunks = [waiting.chunk or chunk for waiting, chunk in zip(several, chunks, strict=True)]
        steps = _settle_steps(several, chunks) if stepped else [None] * len(several)
        for waiting, chunk, angles in zip(several, chunks, steps, strict=True):
            _settle(waiting, chunk, angles)
            scratch.release(waiting.space)


def _settle(waiting: Waiting, chunk: Chunk, angles: Array | None) -> None:
    statistics, space, length = waiting.statistics, waiting.space, waiting.length
    wanted = statistics.wanted
    statistics.tokens += len(waiting.places)
    statistics.moments.add(chunk.moments)
    if chunk.channels is not None and wanted & PER_CHANNEL:
        statistics.add_channels(chunk.channels)
    if waiting.counts is not None:
        statistics.add_magnitudes(settle_magnitudes(*waiting.counts))
    if (
        waiting.magnitudes is not None
        and statistics.magnitudes is not None
        and statistics.magnitudes.values is not None
    ):
        statistics.magnitudes.values.append(waiting.magnitudes)
    if waiting.flagged is not None:
        columns, order = waiting.flagged
        found = largest_entries(to_numpy(columns), order.cpu().numpy(), statistics.peaks.size)
        place = _numbers(waiting.places)[found[:, 1].astype(np.int64)]
        where = (found[:, 0], place // length + waiting.first_sequence, place % length, found[:, 2])
        statistics.peaks.add(np.stack(where, 1))
    if Stat.ZEROS in wanted:
        statistics.add_active(to_numpy(space.parts[4]), space.flat.numel())
    if chunk.row_squares is not None:
        if waiting.directions is not None:
            sums = to_numpy(waiting.directions)
            tokens = (chunk.row_squares > _SHORTEST).reshape(len(sums), -1).sum(1)
            for total, count in zip(sums, tokens.tolist(), strict=True):
                statistics.add_cosine(float(total @ total), count)
        for name, mask in waiting.inside.items():
            group = statistics.groups.setdefault(name, Group())
            _settle_group(group, chunk.row_squares, angles, mask.cpu().numpy())


def _settle_columns(waiting: WaitingColumns, chunk: Chunk) -> None:
    statistics, rows = waiting.statistics, waiting.columns.rows
    statistics.tokens += rows
    statistics.moments.add(chunk.moments)
    assert chunk.channels is not None
    if Stat.CHANNELS in statistics.wanted:
        statistics.add_channels(chunk.channels)
    if Stat.ZEROS in statistics.wanted:
        width, active = len(waiting.columns.mean), waiting.active
        found = to_numpy(active) if isinstance(active, Tensor) else np.full(width, active)
        statistics.add_active(found, rows * width)


def _settle_steps(several: Sequence[Waiting], chunks: Sequence[Chunk]) -> list[Array | None]:
    """Add the turn and the length of each step; return each row's angle in degrees.

    The angle comes from the chord between the two unit vectors, |u - v|² = (|x - y|² - (|x| - |y|)²) / (|x||y|), which
    keeps its digits for the smallest turns, where the arc cosine of a dot product has none left.
    """
    squares = np.stack([chunk.row_squares for chunk in chunks if chunk.row_squares is not None])
    given = to_numpy(torch.stack([waiting.given for waiting in several if waiting.given is not None]))
    taken = np.square(to_numpy(torch.stack([waiting.space.rows[2] for waiting in several])))
    with np.errstate(divide="ignore", invalid="ignore"):
        norm, before = np.sqrt(squares), np.sqrt(given)
        chord = (taken - (norm - before) ** 2) / (norm * before)
        angles = np.degrees(2 * np.arcsin(np.sqrt(np.clip(chord, 0.0, 4.0)) / 2))
    usable = np.isfinite(angles)
    sums = [np.where(usable, values, 0.0).sum(1).tolist() for values in (angles, taken, given)]
    for waiting, angle, step, start, count in zip(several, *sums, usable.sum(1).tolist(), strict=True):
        statistics = waiting.statistics
        statistics.angle += angle
        statistics.turned += count
        statistics.step_squares += step
        statistics.input_squares += start
    return list(angles)


def _settle_group(group: Group, row_squares: Array, angles: Array | None, inside: Counts) -> None:
    usable = inside & np.isfinite(row_squares)
    group.norm += float(np.sqrt(row_squares[usable]).sum())
    group.tokens += int(usable.sum())
    if angles is not None:
        turned = inside & np.isfinite(angles)
        group.angle += float(angles[turned].sum())
        group.turned += int(turned.sum())


class _Directions:
    """Sums the unit vectors of sequences that are cut by chunks or have tokens left out."""

    def __init__(self, statistics: SiteStatistics, length: int) -> None:
        self.statistics, self.length = statistics, length
        self.sequence = -1
        self.sum: Array | None = None
        self.tokens = 0

    def add(self, x: Tensor, waiting: Waiting) -> None:
        squares = to_numpy(waiting.space.rows[0])
        if waiting.chunk is not None and waiting.chunk.row_squares is not None:
            squares = waiting.chunk.row_squares
            x = torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)
        usable = squares > _SHORTEST
        inverse = np.zeros(len(squares), dtype=np.float32)
        inverse[usable] = squares[usable] ** -0.5
        weights = torch.from_numpy(inverse).to(x.device).view(1, -1)
        for sequence, start, stop in _pieces(_numbers(waiting.places), self.length):
            if sequence != self.sequence:
                self.finish()
                self.sequence = sequence
            total = to_numpy(torch.mm(weights[:, start:stop], x[start:stop])[0])
            self.sum = total if self.sum is None else self.sum + total
            self.tokens += int(usable[start:stop].sum())

    def finish(self) -> None:
        if self.sum is not None:
            self.statistics.add_cosine(float(self.sum @ self.sum), self.tokens)
        self.sum, self.tokens, self.sequence = None, 0, -1


def _numbers(places: range | Tensor) -> Counts:
    return np.arange(places.start, places.stop) if isinstance(places, range) else places.cpu().numpy()


def _pieces(places: Counts, length: int) -> Iterator[tuple[int, int, int]]:
    """Runs ``(sequence, start, stop)`` of rows that belong to the same sequence."""
    first, last = int(places[0]) // length, int(places[-1]) // length
    edges = np.searchsorted(places, np.arange(first, last + 2) * length).tolist()
    for i, sequence in enumerate(range(first, last + 1)):
        if edges[i] < edges[i + 1]:
            yield sequence, edges[i], edges[i + 1]
