"""One cheap pass over a tensor: the reductions behind the recorder's statistics.

Eager PyTorch runs a reduction at memory speed when it is a BLAS call or a reduction over the outer axis, and many
times slower otherwise, so everything is phrased in those: with x of shape (rows, channels) and its square in a scratch
buffer,

    sums            Σx, Σx²             down the rows: by column a huge entry costs no other column a digit
    third, fourth   x·x², x²·x²         dot products of the flattened chunk
    extremes        max and min down the rows; the largest magnitude of a channel is the larger of the two
    row norms       x²1
    magnitudes      the exponent and leading mantissa bits of x², counted; of many values, a sample

A site that needs no more than sums and extremes by column has no square written: the kernel behind batch norm's
statistics (`launch_columns`) reads the values alone.

Tensors are taken in chunks that stay in cache, in float32, and every chunk's sums are joined in float64
(`setpoint.probe.statistics`). The sums are taken as they are where that is harmless (mean below 0.9 of the rms), about
the chunk's mean otherwise, and in float64 over the finite values when float32 overflowed, underflowed or met an
infinity or a NaN.

Between two large matrix products everything else has left the processor's cache, and the first run of any piece of
code costs 20 to 30 µs, twenty times the second. So a hook launches few and always the same operations, reads one small
tensor to see that the sums are sound, and leaves its results where they are; the arithmetic on them (`settle_chunks`
and what calls it) waits for the end of the pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from setpoint.probe.stat_scratch import Scratch, Workspace, chunk_rows, to_numpy
from setpoint.probe.statistics import BINS, MANTISSA_BITS, Array, Channels, Magnitudes, Moments
from setpoint.types import Stat

PER_CHANNEL = frozenset({Stat.CHANNELS, Stat.PEAKS})
_TINY = 1e-6
_CENTRED = 0.9
_FAR_OUT = 100.0
_PIECE = 1 << 18
_SAMPLE = 1 << 15


@dataclass(slots=True)
class Chunk:
    """The reductions of one chunk of rows.

    Args:
        moments: Of its values.
        channels: Per-channel sums, None when not taken.
        row_squares: Shape ``(rows,)``: squared L2 norms; None when not needed. NaN where a row is not finite.
    """

    moments: Moments
    channels: Channels | None
    row_squares: Array | None


def launch_chunk(x: Tensor, wanted: frozenset[Stat], per_row: bool, space: Workspace) -> bool:
    """Leave a chunk's sums in its workspace.

    Args:
        x: Shape ``(rows, channels)``, float32, contiguous.
        wanted: The statistics asked for.
        per_row: Whether squared row norms are needed.
        space: Receives the sums; its ``square`` holds x² afterwards.

    Returns:
        Whether float32 held the sums; if not, `reduce_carefully` is for this chunk.
    """
    total, squares, top, bottom, _ = space.parts
    # What reads x alone comes first, while x is in cache; the square then takes its place.
    torch.amax(x, 0, out=top)
    torch.amin(x, 0, out=bottom)
    torch.sum(x, 0, out=total)
    torch.mul(x, x, out=space.square)
    torch.sum(space.square, 0, out=squares)
    torch.sum(space.low, 1, out=space.low_sums)
    if Stat.TAILS in wanted:
        torch.dot(x.view(-1), space.flat, out=space.third)
        torch.dot(space.flat, space.flat, out=space.fourth)
    else:
        space.scalars[2:] = 0.0
    if per_row:
        torch.mm(space.square, space.column, out=space.row_squares)
    _, s2, _, s4 = space.scalars.tolist()
    return math.isfinite(s2 + s4) and (s2 > _TINY**2 * x.numel() or not bool(x.any()))


def about_the_mean(x: Tensor, space: Workspace, scratch: Scratch) -> Moments | None:
    """Moments from sums about the mean where sums about zero would cancel, otherwise None."""
    s1, s2, _, _ = space.scalars.tolist()
    mean = s1 / x.numel()
    if abs(mean) <= _CENTRED * math.sqrt(s2 / x.numel()):
        return None
    shift = float(np.float32(mean))
    y = torch.sub(x, shift, out=scratch.take("shifted", x))
    y2 = y * y
    sums = torch.stack(
        (y.sum(), y2.sum(), torch.dot(y.view(-1), y2.view(-1)), torch.dot(y2.view(-1), y2.view(-1)))
    ).tolist()
    return Moments.from_sums(x.numel(), tuple(sums), float(x.amin()), float(x.amax()), shift)


def settle_chunks(spaces: Sequence[Workspace], moments: Sequence[Moments | None], per_row: bool) -> list[Chunk]:
    """Read workspaces of one shape together: on arrays this small a call costs more than its arithmetic.

    Args:
        spaces: Where `launch_chunk` left its sums.
        moments: Those that take the place of a workspace's own, None where its own hold.
        per_row: Whether squared row norms are needed.
    """
    columns = to_numpy(torch.stack([space.sums[:4] for space in spaces]))
    scalars = to_numpy(torch.stack([space.scalars for space in spaces])).tolist()
    rows = to_numpy(torch.stack([space.rows[0] for space in spaces])) if per_row else None
    totals, squares, highest, lowest = (columns[:, i] for i in range(4))
    with np.errstate(invalid="ignore"):  # an infinity; that chunk went the careful way
        sums = zip(totals.sum(1).tolist(), squares.sum(1).tolist(), strict=True)
    ends = zip(lowest.min(1).tolist(), highest.max(1).tolist(), strict=True)
    largest = np.maximum(highest, -lowest)
    length, width = spaces[0].square.shape
    chunks = []
    for i, ((s1, s2), (low, high)) in enumerate(zip(sums, ends, strict=True)):
        own = moments[i] or Moments.from_sums(length * width, (s1, s2, scalars[i][2], scalars[i][3]), low, high)
        channels = Channels(np.full(width, float(length)), totals[i], squares[i], largest[i])
        chunks.append(Chunk(own, channels, None if rows is None else rows[i]))
    return chunks


def reduce_plainly(x: Tensor) -> Moments:
    """Mean, variance and extremes of a chunk without a square being written: all that `Stat.MOMENTS` alone needs.

    Args:
        x: Shape ``(rows, width)``, float32, contiguous; what stands in rows and columns does not matter.
    """
    by_row = torch.empty(2, len(x), device=x.device)  # so that a huge entry costs its own row's digits only
    ends: list[Tensor] = []
    step = max(1, _PIECE // max(x.shape[1], 1))
    for start in range(0, len(x), step):  # three reads, of which the second and third come from the cache
        piece = x[start : start + step]
        ends += torch.aminmax(piece)
        torch.sum(piece, 1, out=by_row[0, start : start + step])
        torch.linalg.vector_norm(piece, dim=1, out=by_row[1, start : start + step])
    totals, norms = to_numpy(by_row)
    s1, s2 = float(totals.sum()), float(np.square(norms).sum())
    minimum, maximum = (float(end) for end in torch.stack(ends).aminmax())
    mean_square = s2 / x.numel()
    if not math.isfinite(s2) or (mean_square < _TINY**2 and minimum < maximum):
        return Moments.of(to_numpy(x).reshape(-1))
    if abs(s1) > _CENTRED * x.numel() * math.sqrt(mean_square):
        shift = float(np.float32(s1 / x.numel()))
        y = x - shift
        sums = (float(y.sum()), float(y.square_().sum()), 0.0, 0.0)
        return Moments.from_sums(x.numel(), sums, minimum, maximum, shift)
    return Moments.from_sums(x.numel(), (s1, s2, 0.0, 0.0), minimum, maximum)


@dataclass(slots=True)
class Columns:
    """Per-channel reductions that read the values and write nothing of their size; `settle_columns` makes them sums.

    Args:
        rows: How many rows were reduced.
        mean, variance: Shape ``(channels,)``, the variance about the channel's own mean and biased.
        top, bottom: Shape ``(channels,)``: extremes.
    """

    rows: int
    mean: Tensor
    variance: Tensor
    top: Tensor
    bottom: Tensor


def settle_columns(columns: Sequence[Columns]) -> list[Chunk]:
    """Moments over all values and sums per channel, in float64, of reductions of one width."""
    width = len(columns[0].mean)
    stacked = torch.stack([t for c in columns for t in (c.mean, c.variance, c.top, c.bottom)])
    mean, variance, highest, lowest = np.moveaxis(to_numpy(stacked).reshape(-1, 4, width), 1, 0)
    rows = np.array([[float(c.rows)] for c in columns])
    totals, squares = mean * rows, (variance + mean * mean) * rows
    sums = zip(totals.sum(1).tolist(), squares.sum(1).tolist(), strict=True)
    ends = zip(lowest.min(1).tolist(), highest.max(1).tolist(), strict=True)
    largest = np.maximum(highest, -lowest)
    chunks = []
    for i, ((s1, s2), (low, high)) in enumerate(zip(sums, ends, strict=True)):
        moments = Moments.from_sums(columns[i].rows * width, (s1, s2, 0.0, 0.0), low, high)
        channels = Channels(np.full(width, float(columns[i].rows)), totals[i], squares[i], largest[i])
        chunks.append(Chunk(moments, channels, None))
    return chunks


def launch_columns(x: Tensor) -> Columns | None:
    """Reduce a chunk by column, for sites that need neither row norms nor powers of single values.

    The kernel behind batch norm's statistics takes mean and variance in two reads, at the price of one matrix product
    and without a square that would have to be written, and cannot cancel within a channel. Between channels it can
    only where their means are so far out that float32 has no digits of them left for the spread.

    Args:
        x: Shape ``(rows, channels)``, float32, contiguous.

    Returns:
        The reductions; None where float32 does not hold them.
    """
    top, bottom = torch.amax(x, 0), torch.amin(x, 0)
    mean, variance = torch.batch_norm_update_stats(x, None, None, 0.0)
    spread, offset = float(variance.sum()), float(torch.dot(mean, mean))
    if not _TINY**2 * len(mean) < spread + offset < math.inf or offset > _FAR_OUT * spread:
        return None
    return Columns(len(x), mean, variance, top, bottom)


def holds_zero(x: Tensor) -> bool:
    """Whether any value is zero: one read for all values, where counting them by column takes a write and two."""
    return int(torch.count_nonzero(x)) < x.numel()


def reduce_carefully(x: Tensor, wanted: frozenset[Stat], per_row: bool) -> Chunk:
    """A chunk that float32 sums can't hold, or whose values are not all finite: float64, finite ones only."""
    values = to_numpy(x)
    finite = np.isfinite(values)
    moments = Moments.of(values.reshape(-1))
    clean = np.where(finite, values, 0.0)
    channels = None
    if wanted & PER_CHANNEL:
        channels = Channels(
            count=finite.sum(0).astype(np.float64),
            total=clean.sum(0),
            squares=np.square(clean).sum(0),
            largest=np.abs(clean).max(0),
        )
    row_squares = np.where(finite.all(1), np.square(clean).sum(1), np.nan) if per_row else None
    return Chunk(moments, channels, row_squares)


def count_magnitudes(square: Tensor, scratch: Scratch) -> tuple[Tensor, int]:
    """Histogram, as `Magnitudes` keeps it, of magnitudes given by their float32 squares, none of them NaN.

    Of many values, every so manieth is counted, at least 32 768 of them: counting all would cost as much as all other
    statistics of the site together.

    Args:
        square: Shape ``(rows, channels)``, contiguous.
        scratch: Buffers.

    Returns:
        Counts by bin, and the stride between the values that were counted.
    """
    stride = sample_stride(square.numel(), square.shape[1])
    bits = square.view(torch.int32).view(-1)[::stride]
    bins = scratch.flat("bins", bits.numel(), square, torch.int32)
    torch.bitwise_right_shift(bits, 23 - MANTISSA_BITS, out=bins)
    return torch.bincount(bins, minlength=BINS), stride


def sample_stride(size: int, width: int) -> int:
    """The largest stride through ``size`` values that leaves a sample and visits every one of ``width`` columns.

    >>> sample_stride(512 * 576, 576), sample_stride(20_000, 576)
    (7, 1)
    """
    stride = max(size // _SAMPLE, 1)
    while math.gcd(stride, width) > 1:
        stride -= 1
    return stride


def settle_magnitudes(counts: Tensor, stride: int) -> Magnitudes:
    """The histogram without what was infinite once squared."""
    found = counts.cpu().numpy()
    found[255 << MANTISSA_BITS :] = 0
    if stride == 1:
        return Magnitudes(found)
    return Magnitudes(found * stride, sampled=float(found.sum()) * stride**2)


def flagged_columns(x: Tensor, space: Workspace, size: int) -> tuple[Tensor, Tensor]:
    """The ``size`` columns with the largest magnitudes, and which they are: the largest entries stand in them."""
    largest = space.sums[2:4].abs().amax(0)
    order = largest.topk(min(size, len(largest))).indices
    return x.index_select(1, order), order


def largest_entries(columns: Array, order: Array, size: int) -> Array:
    """Rows (value, row, channel) of the ``size`` largest finite magnitudes, largest first.

    Args:
        columns: Shape ``(rows, flagged)``: the columns in which they can stand.
        order: Shape ``(flagged,)``: the channel of each.
        size: How many.
    """
    magnitudes = np.abs(columns)
    magnitudes[~np.isfinite(magnitudes)] = -1.0
    # Each column's largest entry is one of at least so many that reach the smallest of them.
    floor = magnitudes.max(0).min() if len(order) >= size else 0.0
    row, column = np.nonzero(magnitudes >= max(floor, 0.0))
    best = np.argsort(-magnitudes[row, column], kind="stable")[:size]
    row, column = row[best], column[best]
    return np.stack((columns[row, column], row, order[column]), 1)


def sum_of_squares(values: Tensor) -> float:
    """Sum of squares of a tensor in float64, from float32 dot products over chunks; nan or inf if it carries them."""
    flat = values.detach().reshape(-1)
    step = chunk_rows(1 << 7, flat.device) << 7
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
