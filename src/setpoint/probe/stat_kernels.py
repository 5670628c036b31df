"""One cheap pass over a tensor: the reductions behind the recorder's statistics.

Eager PyTorch runs a reduction at memory speed when it is a BLAS call or a reduction over the outer axis, and many
times slower otherwise, so everything is phrased in those: with x of shape (rows, channels) and its square in a scratch
buffer,

    sums            1ᵀx, 1ᵀx²           one matrix-vector product each, by column: quick, and exact beside a huge entry
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
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from setpoint.probe.stat_scratch import Scratch, chunk_rows, to_numpy
from setpoint.probe.statistics import BINS, MANTISSA_BITS, Array, Channels, Magnitudes, Moments
from setpoint.types import Stat

_PER_CHANNEL = frozenset({Stat.CHANNELS, Stat.PEAKS})
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
    row_squares: Array | None
    finite: bool = True


def reduce_chunk(x: Tensor, wanted: frozenset[Stat], per_row: bool, scratch: Scratch) -> Chunk:
    """Reduce a chunk.

    Args:
        x: Shape ``(rows, channels)``, float32, contiguous.
        wanted: The statistics asked for.
        per_row: Whether squared row norms are needed.
        scratch: Buffers; the workspace's ``square`` holds x² afterwards.

    Returns:
        Moments, per-channel sums and row norms of the chunk.
    """
    space, flat = scratch.workspace(x), x.view(-1)
    total, squares, top, bottom = space.parts
    per_channel = bool(wanted & _PER_CHANNEL)
    # What reads x alone comes first, while x is in cache; the square then takes its place.
    if per_channel:
        torch.amax(x, 0, out=top)
        torch.amin(x, 0, out=bottom)
    torch.mm(space.ones, x, out=total)
    torch.mul(x, x, out=space.square)
    torch.mm(space.ones, space.square, out=squares)
    s3 = s4 = 0.0
    if Stat.TAILS in wanted:
        torch.dot(flat, space.flat, out=space.third)
        torch.dot(space.flat, space.flat, out=space.fourth)
        s3, s4 = space.powers.tolist()
    if per_channel:
        t, s, high, low = to_numpy(space.sums)
        maximum, minimum = float(high.max()), float(low.min())
    else:
        t, s = to_numpy(space.sums[:2])
        lowest, highest = torch.aminmax(x)
        maximum, minimum = float(highest), float(lowest)
    s1, s2 = float(t.sum()), float(s.sum())
    if not _sound(s2, s4, x.numel(), minimum, maximum):
        return reduce_carefully(x, wanted, per_row)
    moments = Moments.from_sums(x.numel(), (s1, s2, s3, s4), minimum, maximum)
    if abs(moments.mean) > 0.5 * math.sqrt(s2 / x.numel()):
        moments = _about_the_mean(x, moments, scratch)
    return Chunk(
        moments,
        Channels(np.full(len(t), float(len(x))), t, s, np.maximum(high, -low)) if per_channel else None,
        to_numpy(torch.mv(space.square, space.column)) if per_row else None,
    )


def reduce_plainly(x: Tensor, scratch: Scratch) -> Moments:
    """Mean, variance and extremes of a chunk without a square being written: all that `Stat.MOMENTS` alone needs.

    Args:
        x: Shape ``(rows, width)``, float32, contiguous; what stands in rows and columns does not matter.
        scratch: Buffers.
    """
    space = scratch.workspace(x)
    lowest, highest = torch.aminmax(x)
    torch.mm(space.ones, x, out=space.parts[0])
    norms = torch.linalg.vector_norm(x, dim=1)  # by row, so that a huge entry costs its own row's digits only
    s1, s2 = float(to_numpy(space.parts[0]).sum()), float(np.square(to_numpy(norms)).sum())
    maximum, minimum = float(highest), float(lowest)
    if not _sound(s2, 0.0, x.numel(), minimum, maximum):
        return reduce_carefully(x, frozenset(), False).moments
    moments = Moments.from_sums(x.numel(), (s1, s2, 0.0, 0.0), minimum, maximum)
    if abs(moments.mean) > 0.5 * math.sqrt(s2 / x.numel()):
        moments = _about_the_mean(x, moments, scratch)
    return moments


def _sound(s2: float, s4: float, count: int, minimum: float, maximum: float) -> bool:
    """Whether sums of squares and fourth powers neither overflowed nor underflowed, and met no infinity or NaN."""
    return math.isfinite(s2 + s4) and (s2 > _TINY**2 * count or minimum == maximum)


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
    values = to_numpy(x)
    finite = np.isfinite(values)
    moments = Moments.of(values.reshape(-1))
    clean = np.where(finite, values, 0.0)
    channels = None
    if wanted & _PER_CHANNEL:
        channels = Channels(
            count=finite.sum(0).astype(np.float64),
            total=clean.sum(0),
            squares=np.square(clean).sum(0),
            largest=np.abs(clean).max(0),
        )
    row_squares = np.where(finite.all(1), np.square(clean).sum(1), np.nan) if per_row else None
    return Chunk(moments, channels, row_squares, finite=False)


def count_magnitudes(square: Tensor, scratch: Scratch) -> Magnitudes:
    """Histogram of magnitudes from their float32 squares, none of them NaN; infinite squares are left out."""
    bins = scratch.flat("bins", square.numel(), square, torch.int32)
    torch.bitwise_right_shift(square.view(torch.int32).view(-1), 23 - MANTISSA_BITS, out=bins)
    counts = torch.bincount(bins, minlength=BINS).cpu().numpy()
    counts[255 << MANTISSA_BITS :] = 0
    return Magnitudes(counts)


def count_nonzero(x: Tensor, chunk: Chunk, scratch: Scratch) -> Array:
    """Per channel, how many values are not zero, shape ``(channels,)``; call it before x² is overwritten."""
    space = scratch.workspace(x)
    if chunk.finite and float(space.square.amin()) > 0:  # no zero at all, as after SiLU or GELU
        return np.full(x.shape[1], float(len(x)))
    torch.ne(x, 0, out=space.square)
    return to_numpy(torch.mm(space.ones, space.square)[0])


def largest_entries(x: Tensor, largest: Array, size: int, floor: float) -> Array | None:
    """Rows (value, row, channel) of the ``size`` largest finite magnitudes of a chunk, largest first.

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
    columns = to_numpy(x.index_select(1, torch.from_numpy(order).to(x.device)))
    magnitudes = np.where(np.isfinite(columns), np.abs(columns), -1.0).ravel()
    size = min(size, magnitudes.size)
    found = np.argpartition(-magnitudes, size - 1)[:size]
    found = found[magnitudes[found] > floor]
    found = found[np.argsort(-magnitudes[found], kind="stable")]
    row, column = np.divmod(found, len(order))
    return np.stack((columns.ravel()[found], row, order[column]), 1)


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
