"""Buffers that every site shares, so that measuring allocates nothing of the size of what it measures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROWS = 1 << 12
"""Most rows of a chunk: float32 column sums over more of them would lose digits."""

_CHUNK = {"cpu": 1 << 20}
_CHUNK_ELSEWHERE = 1 << 23
_AT_ONCE = 16
_SHAPES = 64


def chunk_rows(width: int, device: torch.device) -> int:
    """How many rows of ``width`` values make a chunk that stays in cache and keeps float32 sums accurate."""
    return max(1, min(ROWS, _CHUNK.get(device.type, _CHUNK_ELSEWHERE) // max(width, 1)))


@dataclass(slots=True)
class Workspace:
    """Ready-made views for chunks of one shape; making them anew for every chunk would cost more than the sums.

    ``square`` lies in a buffer that all workspaces share and is free once a chunk was reduced. Everything else is
    small, belongs to this workspace and holds a chunk's results until they are settled.

    Args:
        square: Shape ``(rows, width)``; ``flat`` is the same as a vector.
        column: Shape ``(width, 1)``: ones.
        sums: Shape ``(5, width)``: per column the sums of x and of x², the largest, the smallest, the count of
            values that are not zero.
        parts: Its rows; ``low`` is the first two together.
        scalars: Shape ``(4,)``: sums of x to the powers 1 to 4; ``low_sums`` (the first two), ``third`` and
            ``fourth`` are its parts.
        rows: Shape ``(4, rows)``: squared norms, their inverse roots, norms of the step, squared norms of its start;
            ``row_squares`` is the first as a column.
    """

    square: Tensor
    flat: Tensor
    column: Tensor
    sums: Tensor
    parts: tuple[Tensor, ...]
    low: Tensor
    scalars: Tensor
    low_sums: Tensor
    third: Tensor
    fourth: Tensor
    rows: Tensor
    row_squares: Tensor


class Scratch:
    """Buffers that are made once and reused by every site, a few of chunk size on each device.

    They are ordinary tensors even when made under inference mode, so that they serve outside it too.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        self._ones: dict[torch.device, Tensor] = {}
        self._free: dict[tuple[torch.Size, torch.device], list[Workspace]] = {}

    def workspace(self, x: Tensor) -> Workspace:
        """Views for chunks of ``x``'s shape, on its device; hand them back with `release`."""
        kind = (x.shape, x.device)
        if not self._free.get(kind):
            if len(self._free) > _SHAPES:  # batches of ever new lengths
                self._free.clear()
            self._free[kind] = self._build(x)
        return self._free[kind].pop()

    def release(self, space: Workspace) -> None:
        """Take a workspace back, unless its buffer was replaced meanwhile."""
        buffer = self._buffers.get(("square", torch.float32, space.square.device))
        if buffer is not None and buffer.data_ptr() == space.square.data_ptr():
            self._free.setdefault((space.square.shape, space.square.device), []).append(space)

    def _build(self, x: Tensor) -> list[Workspace]:
        """Several at once: their views come from a few calls for all of them."""
        (rows, width), count = x.shape, _AT_ONCE
        with torch.inference_mode(False):
            square = self.take("square", x)
            flat, column = square.view(-1), self.ones(width, x).view(width, 1)
            sums = torch.empty(count, 5, width, device=x.device)
            scalars = torch.empty(count, 4, device=x.device)
            by_row = torch.empty(count, 4, rows, device=x.device)
            parts = sums.view(count * 5, width).unbind()
            views = zip(
                sums.unbind(),
                (parts[5 * i : 5 * i + 5] for i in range(count)),
                sums[:, :2].unbind(),
                scalars.unbind(),
                scalars[:, :2].unbind(),
                scalars[:, 2].unbind(),
                scalars[:, 3].unbind(),
                by_row.unbind(),
                by_row[:, 0].unsqueeze(2).unbind(),
                strict=True,
            )
            return [Workspace(square, flat, column, *own) for own in views]

    def take(self, name: str, like: Tensor) -> Tensor:
        """A contiguous float32 tensor of ``like``'s shape and device; its content is arbitrary."""
        return self.flat(name, like.numel(), like, torch.float32).view(like.shape)

    def flat(self, name: str, size: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """A vector of ``size`` entries of ``dtype``; its content is arbitrary."""
        key = (name, dtype, like.device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            with torch.inference_mode(False):
                buffer = torch.empty(size, dtype=dtype, device=like.device)
            self._buffers[key] = buffer
            if name == "square":  # workspaces view the old one; results that wait there stay with who waits
                self._free.clear()
        return buffer[:size]

    def ones(self, size: int, like: Tensor) -> Tensor:
        """A float32 vector of ones."""
        ones = self._ones.get(like.device)
        if ones is None or ones.numel() < size:
            with torch.inference_mode(False):
                ones = torch.ones(max(size, ROWS), device=like.device)
            self._ones[like.device] = ones
        return ones[:size]

    @property
    def bytes(self) -> int:
        """Bytes held."""
        small = [t for free in self._free.values() for w in free for t in (w.sums, w.rows)]
        return sum(b.numel() * b.element_size() for b in (*self._buffers.values(), *self._ones.values(), *small))


def to_numpy(t: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A float64 copy on the host."""
    return t.cpu().numpy().astype(np.float64)
