"""One cheap pass over a tensor: the reductions behind the recorder's statistics.

Eager PyTorch runs a reduction at memory speed when it is a BLAS call or a reduction over the outer axis, and many
times slower otherwise, so everything is phrased in those: with x of shape (rows, channels) and its square in a scratch
buffer,

    sums            1ᵀx, 1ᵀx²           one matrix-vector product each
    third, fourth   x·x², x²·x²         dot products of the flattened chunk
    extremes        max and min down the rows; the largest magnitude of a channel is the larger of the two
    row norms       x²1
    magnitudes      the exponent and leading mantissa bits of x², counted
    cosine          |Σ x/|x||² of a sequence is the sum of all its pairwise cosines

Tensors are taken in chunks that stay in cache, in float32, and every chunk's sums are joined in float64
(`setpoint.probe.statistics`). The sums are taken as they are where that is harmless (mean below half the rms), about
the chunk's mean otherwise, and in float64 over the finite values when float32 overflowed, underflowed or met an
infinity or a NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from setpoint.probe.statistics import (
    BINS,
    MANTISSA_BITS,
    Array,
    Channels,
    Counts,
    Group,
    Magnitudes,
    Moments,
    SiteStatistics,
)
from setpoint.types import Stat

_CHUNK = {"cpu": 1 << 19}
_CHUNK_ELSEWHERE = 1 << 23
_ROWS = 1 << 12
_PER_CHANNEL = frozenset({Stat.CHANNELS, Stat.PEAKS})
_PER_ROW = frozenset({Stat.COSINE, Stat.STEP})
_TINY = 1e-6


@dataclass(slots=True)
class Chunk:
    """The reductions of one chunk of rows.

    Args:
        moments: Of its values.
        channels: Per-channel sums, None when not needed.
        row_squares: Shape ``(rows,)``: squared L2 norms; None when not needed. NaN where a row is not finite.
        finite: Whether all values are known to be finite.
    """

    moments: Moments
    channels: Channels | None
    row_squares: Tensor | None
    finite: bool = True


class Scratch:
    """Buffers that are made once and reused by every site, three of chunk size on each device.

    They are ordinary tensors even when made under inference mode, so that they serve outside it too.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.device], Tensor] = {}
        self._ones: dict[torch.device, Tensor] = {}

    def take(self, name: str, like: Tensor) -> Tensor:
        """A contiguous float32 tensor of ``like``'s shape and device; its content is arbitrary."""
        return self.flat(name, like.numel(), like, torch.float32).view(like.shape)

    def flat(self, name: str, size: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """A vector of ``size`` entries of ``dtype``; its content is arbitrary."""
        key = (f"{name} {dtype}", like.device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            with torch.inference_mode(False):
                buffer = torch.empty(size, dtype=dtype, device=like.device)
            self._buffers[key] = buffer
        return buffer[:size]

    def ones(self, size: int, like: Tensor) -> Tensor:
        """A float32 vector of ones."""
        ones = self._ones.get(like.device)
        if ones is None or ones.numel() < size:
            with torch.inference_mode(False):
                ones = torch.ones(max(size, _ROWS), device=like.device)
            self._ones[like.device] = ones
        return ones[:size]

    @property
    def bytes(self) -> int:
        """Bytes held."""
        return sum(b.numel() * b.element_size() for b in (*self._buffers.values(), *self._ones.values()))


def chunk_rows(width: int, device: torch.device) -> int:
    """How many rows of ``width`` values make a chunk that stays in cache and keeps float32 sums accurate."""
    return max(1, min(_ROWS, _CHUNK.get(device.type, _CHUNK_ELSEWHERE) // max(width, 1)))


def reduce_chunk(x: Tensor, wanted: frozenset[Stat], per_row: bool, scratch: Scratch) -> Chunk:
    """Reduce a chunk.

    Args:
        x: Shape ``(rows, channels)``, float32, contiguous.
        wanted: The statistics asked for.
        per_row: Whether squared row norms are needed.
        scratch: Buffers; ``"square"`` holds x² afterwards.

    Returns:
        Moments, per-channel sums and row norms of the chunk.
    """
    rows, width = x.shape
    square = torch.mul(x, x, out=scratch.take("square", x))
    flat, flat_square, ones = x.view(-1), square.view(-1), scratch.ones(rows, x)
    total, squares = ones @ x, ones @ square  # by column even when only their sum is wanted: quicker and more exact
    third, fourth = torch.dot(flat, flat_square), torch.dot(flat_square, flat_square)
    channels = None
    if wanted & _PER_CHANNEL:
        top, bottom = x.amax(0), x.amin(0)
        t, s, g = torch.stack((total, squares, torch.maximum(top, -bottom))).cpu().double().numpy()
        channels = Channels(count=np.full(width, float(rows)), total=t, squares=s, largest=g)
        maximum, minimum, s3, s4 = torch.stack((top.amax(), bottom.amin(), third, fourth)).tolist()
    else:
        low, high = torch.aminmax(x)
        t, s = torch.stack((total, squares)).cpu().double().numpy()
        maximum, minimum, s3, s4 = torch.stack((high, low, third, fourth)).tolist()
    s1, s2 = float(t.sum()), float(s.sum())
    count = rows * width
    rms = math.sqrt(s2 / count) if math.isfinite(s2) else math.inf
    if not math.isfinite(s1 + s4) or (rms < _TINY and maximum > minimum):
        return reduce_carefully(x, wanted, per_row)
    row_squares = square @ scratch.ones(width, x) if per_row else None
    moments = Moments.from_sums(count, (s1, s2, s3, s4), minimum, maximum)
    if abs(moments.mean) > 0.5 * rms:
        moments = _about_the_mean(x, moments, scratch)
    return Chunk(moments, channels, row_squares)


def _about_the_mean(x: Tensor, rough: Moments, scratch: Scratch) -> Moments:
    """Moments from sums about the mean, where sums about zero would cancel."""
    y = scratch.take("shifted", x)
    shift = float(np.float32(rough.mean))
    torch.sub(x, shift, out=y)
    s1, s2 = y.sum(), torch.dot(y.view(-1), y.view(-1))
    y2 = y * y
    sums = torch.stack((s1, s2, torch.dot(y.view(-1), y2.view(-1)), torch.dot(y2.view(-1), y2.view(-1)))).tolist()
    a, b, c, d = sums
    return Moments.from_sums(rough.count, (a, b, c, d), rough.minimum, rough.maximum, shift)


def reduce_carefully(x: Tensor, wanted: frozenset[Stat], per_row: bool) -> Chunk:
    """`reduce_chunk` for values that float32 sums can't hold, or that are not all finite: float64, finite ones only."""
    values = x.cpu().double()
    finite = values.isfinite()
    moments = Moments.of(values.numpy().reshape(-1))
    clean = torch.where(finite, values, 0.0)
    channels = None
    if wanted & _PER_CHANNEL:
        channels = Channels(
            count=finite.sum(0).double().numpy(),
            total=clean.sum(0).numpy(),
            squares=clean.square().sum(0).numpy(),
            largest=clean.abs().amax(0).numpy(),
        )
    row_squares = None
    if per_row:
        row_squares = torch.where(finite.all(1), clean.square().sum(1), math.nan).to(x.device)
    return Chunk(moments, channels, row_squares, finite=False)


def count_magnitudes(square: Tensor, scratch: Scratch) -> Magnitudes:
    """Histogram of magnitudes from their float32 squares, none of them NaN; infinite squares are left out."""
    bins = scratch.flat("bins", square.numel(), square, torch.int32)
    torch.bitwise_right_shift(square.view(torch.int32).view(-1), 23 - MANTISSA_BITS, out=bins)
    counts = torch.bincount(bins, minlength=BINS).cpu().numpy()
    counts[255 << MANTISSA_BITS :] = 0
    return Magnitudes(counts)


def largest_entries(x: Tensor, largest: Array, size: int, floor: float) -> Tensor | None:
    """Rows (value, row, channel), float64, of the ``size`` largest magnitudes of a chunk.

    They can only stand in the ``size`` channels whose own largest magnitude is largest, so nothing else is searched.

    Args:
        x: Shape ``(rows, channels)``, float32.
        largest: Shape ``(channels,)``: largest finite magnitude of each channel.
        size: How many.
        floor: Magnitude that an entry must exceed.

    Returns:
        At most ``size`` rows, or None when no entry exceeds the floor.
    """
    order = np.argsort(-largest, kind="stable")[:size]
    order = order[largest[order] > floor]
    if not len(order):
        return None
    columns = x[:, torch.from_numpy(order).to(x.device)]
    magnitudes = torch.nan_to_num(columns.abs(), nan=-1.0, posinf=-1.0)
    found, where = magnitudes.view(-1).topk(min(size, magnitudes.numel()))
    row, column = where // len(order), where % len(order)
    values = torch.stack((columns[row, column].double(), row.double(), column.double()), 1)[found > floor].cpu()
    values[:, 2] = torch.from_numpy(order)[values[:, 2].long()].double()
    return values


@dataclass(slots=True)
class Stream:
    """The residual stream as the last site left it: what the next block starts from.

    Args:
        values: Shape ``(positions, channels)``; a copy in a buffer that is reused, since models may add in place.
        block: Index of the block that wrote it, None for the embedding.
    """

    values: Tensor
    block: int | None


@dataclass(frozen=True, slots=True)
class Selection:
    """Which positions of a batch count.

    Args:
        keep: Shape ``(positions,)``: indices of the positions that are not padding; None for all.
        groups: Name -> shape ``(positions,)``, bool.
    """

    keep: Tensor | None = None
    groups: Mapping[str, Tensor] | None = None


def _pieces(positions: Counts, length: int) -> Iterator[tuple[int, int, int]]:
    """Runs ``(sequence, start, stop)`` of rows that belong to the same sequence."""
    sequences = positions // length
    starts = np.flatnonzero(np.diff(sequences, prepend=-1))
    for i, start in enumerate(starts):
        stop = starts[i + 1] if i + 1 < len(starts) else len(sequences)
        yield int(sequences[start]), int(start), int(stop)


def observe(
    values: Tensor,
    length: int,
    statistics: SiteStatistics,
    scratch: Scratch,
    *,
    first_sequence: int = 0,
    selection: Selection | None = None,
    stream: Tensor | None = None,
) -> None:
    """Add one batch's values of a site to its statistics.

    Args:
        values: Shape ``(positions, channels)``; positions run through the sequences one after the other.
        length: Positions of one sequence.
        statistics: What is kept of the site; changed in place.
        scratch: Buffers.
        first_sequence: Number of the first sequence, for the positions of peaks.
        selection: Padding and token groups.
        stream: Shape of ``values``: the block's input, for `Stat.STEP`.
    """
    selection = selection or Selection()
    keep, groups = selection.keep, selection.groups or {}
    width = values.shape[1]
    count = values.shape[0] if keep is None else keep.numel()
    step = chunk_rows(width, values.device)
    wanted = statistics.wanted
    per_row = bool(wanted & _PER_ROW or groups)
    directions = _Directions(statistics, length) if Stat.COSINE in wanted else None
    for start in range(0, count, step):
        stop = min(start + step, count)
        chosen = None if keep is None else keep[start:stop]
        x = _load(values, start, stop, chosen, "values", scratch)
        chunk = reduce_chunk(x, wanted, per_row, scratch)
        statistics.moments.add(chunk.moments)
        if chunk.channels is not None:
            statistics.add_channels(chunk.channels)
        if Stat.MEDIAN in wanted:
            _add_magnitudes(x, chunk, statistics, scratch)
        positions = np.arange(start, stop) if chosen is None else chosen.cpu().numpy()
        if Stat.PEAKS in wanted and chunk.channels is not None:
            entries = largest_entries(x, chunk.channels.largest, statistics.peaks.size, statistics.peaks.floor)
            if entries is not None:
                found = entries.numpy()
                place = positions[found[:, 1].astype(np.int64)]
                columns = (found[:, 0], place // length + first_sequence, place % length, found[:, 2])
                statistics.peaks.add(np.stack(columns, 1))
        if Stat.ZEROS in wanted:
            nonzero = torch.ne(x, 0, out=scratch.take("square", x))
            active = (scratch.ones(stop - start, x) @ nonzero).cpu().double().numpy()
            statistics.add_active(active)
            statistics.seen += x.numel()
            statistics.zeros += x.numel() - float(active.sum())
        angles = None
        if chunk.row_squares is not None:
            if directions is not None:
                directions.add(x if chunk.finite else _without_infinities(x), chunk.row_squares, positions)
            if Stat.STEP in wanted and stream is not None:
                before = _load(stream, start, stop, chosen, "stream", scratch)
                angles = _add_step(x, before, chunk.row_squares, statistics, scratch)
            for name, mask in groups.items():
                inside = mask[start:stop] if chosen is None else mask[chosen]
                _add_group(statistics.groups.setdefault(name, Group()), chunk.row_squares, angles, inside)
        statistics.tokens += stop - start
    if directions is not None:
        directions.finish()


def _load(values: Tensor, start: int, stop: int, chosen: Tensor | None, name: str, scratch: Scratch) -> Tensor:
    """The chunk's rows as contiguous float32; a view where they already are."""
    rows = values[start:stop] if chosen is None else values.index_select(0, chosen)
    if rows.dtype is torch.float32 and rows.is_contiguous():
        return rows
    return scratch.take(name, rows).copy_(rows)


def _add_magnitudes(x: Tensor, chunk: Chunk, statistics: SiteStatistics, scratch: Scratch) -> None:
    kept = statistics.magnitudes
    if kept is not None and kept.values is not None:  # exact: every magnitude is kept
        kept.values.append(x[x.isfinite()].abs().cpu().numpy().astype(np.float64))
        return
    square = scratch.take("square", x)  # as the chunk's reduction left it
    if not chunk.finite:
        torch.nan_to_num(square, nan=math.inf, out=square)
    counted = count_magnitudes(square, scratch)
    if kept is None:
        statistics.magnitudes = counted
    else:
        kept.add(counted)


class _Directions:
    """Sums the unit token vectors of each sequence, which may be cut by chunks."""

    def __init__(self, statistics: SiteStatistics, length: int) -> None:
        self.statistics, self.length = statistics, length
        self.sequence = -1
        self.sum: Tensor | None = None
        self.tokens = 0.0

    def add(self, x: Tensor, row_squares: Tensor, positions: Counts) -> None:
        usable = row_squares > 0
        inverse = torch.where(usable, row_squares.rsqrt(), 0.0).to(x.dtype)
        for sequence, start, stop in _pieces(positions, self.length):
            if sequence != self.sequence:
                self.finish()
                self.sequence = sequence
            part = inverse[start:stop] @ x[start:stop]
            self.sum = part if self.sum is None else self.sum + part
            self.tokens += float(usable[start:stop].sum())

    def finish(self) -> None:
        if self.sum is not None and self.tokens > 1:
            self.statistics.cosine += float(self.sum.double().square().sum()) - self.tokens
            self.statistics.pairs += self.tokens * (self.tokens - 1)
        self.sum, self.tokens, self.sequence = None, 0.0, -1


def _without_infinities(x: Tensor) -> Tensor:
    return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)


def _add_step(x: Tensor, before: Tensor, row_squares: Tensor, statistics: SiteStatistics, scratch: Scratch) -> Tensor:
    """Add the turn and the length of the step from ``before`` to ``x``; return each row's angle in degrees.

    The angle comes from the chord between the two unit vectors, |u - v|² = (|x - y|² - (|x| - |y|)²) / (|x||y|), which
    keeps its digits for the smallest turns, where the arc cosine of a dot product has none left.
    """
    width = x.shape[1]
    ones = scratch.ones(width, x)
    buffer = scratch.take("square", x)
    input_squares = (torch.mul(before, before, out=buffer) @ ones).double()
    difference = torch.sub(x, before, out=buffer)
    step_squares = (difference.mul_(difference) @ ones).double()
    norm, input_norm = row_squares.double().sqrt(), input_squares.sqrt()
    chord = ((step_squares - (norm - input_norm).square()) / (norm * input_norm)).clamp(0.0, 4.0)
    angles = torch.rad2deg(2 * torch.asin(chord.sqrt() / 2))
    usable = angles.isfinite()
    angle, turned, taken, given = torch.stack(
        (
            torch.where(usable, angles, 0.0).sum(),
            usable.sum().double(),
            torch.where(usable, step_squares, 0.0).sum(),
            torch.where(usable, input_squares, 0.0).sum(),
        )
    ).tolist()
    statistics.angle += angle
    statistics.turned += int(turned)
    statistics.step_squares += taken
    statistics.input_squares += given
    return angles


def _add_group(group: Group, row_squares: Tensor, angles: Tensor | None, inside: Tensor) -> None:
    usable = inside & row_squares.isfinite()
    group.norm += float(row_squares[usable].double().sqrt().sum())
    group.tokens += int(usable.sum())
    if angles is not None:
        turned = inside & angles.isfinite()
        group.angle += float(angles[turned].sum())
        group.turned += int(turned.sum())


def sum_of_squares(values: Tensor) -> float:
    """Sum of squares of a tensor in float64, from float32 dot products over chunks; nan or inf if it carries them."""
    flat = values.detach().reshape(-1)
    step = _CHUNK.get(flat.device.type, _CHUNK_ELSEWHERE)
    total = 0.0
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step]
        scale = 1.0
        if part.dtype is not torch.float32:
            part = part.float()
        square = float(torch.dot(part, part))
        largest = 0.0
        if not 1e-24 < square < 1e36:  # out of float32's comfortable range: scale by the largest magnitude first
            largest = float(part.abs().amax()) if part.numel() else 0.0
            if 0.0 < largest < math.inf:
                scale = largest
                part = part / scale
                square = float(torch.dot(part, part))
        total += square * scale * scale
    return total


__all__ = ["Chunk", "Scratch", "Selection", "Stream", "observe", "reduce_chunk", "sum_of_squares"]
