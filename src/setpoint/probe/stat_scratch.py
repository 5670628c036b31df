"""Buffers that every site shares, so that measuring allocates nothing of the size of what it measures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROWS = 1 << 12
"""Most rows of a chunk: float32 column sums over more of them would lose digits."""

_CHUNK = {"cpu": 1 << 19}
_CHUNK_ELSEWHERE = 1 << 23


def chunk_rows(width: int, device: torch.device) -> int:
    """How many rows of ``width`` values make a chunk that stays in cache and keeps float32 sums accurate."""
    return max(1, min(ROWS, _CHUNK.get(device.type, _CHUNK_ELSEWHERE) // max(width, 1)))


@dataclass(slots=True)
class Workspace:
    """Ready-made views for chunks of one shape; making them anew for every chunk would cost more than the sums.

    Args:
        square: Shape ``(rows, width)``: x².
        flat: The same as a vector.
        ones: Shape ``(1, rows)``.
        column: Shape ``(width,)``: ones.
        sums: Shape ``(4, width)``: column sums of x and x², largest and smallest of each column.
        parts: Its rows; the first two of shape ``(1, width)``.
        powers: Shape ``(2,)``: sums of x³ and x⁴; ``third`` and ``fourth`` are its entries.
    """

    square: Tensor
    flat: Tensor
    ones: Tensor
    column: Tensor
    sums: Tensor
    parts: tuple[Tensor, Tensor, Tensor, Tensor]
    powers: Tensor
    third: Tensor
    fourth: Tensor


class Scratch:
    """Buffers that are made once and reused by every site, a few of chunk size on each device.

    They are ordinary tensors even when made under inference mode, so that they serve outside it too.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        self._ones: dict[torch.device, Tensor] = {}
        self._workspaces: dict[tuple[torch.Size, torch.device], Workspace] = {}

    def workspace(self, x: Tensor) -> Workspace:
        """Views for chunks of ``x``'s shape, on its device."""
        key = (x.shape, x.device)
        found = self._workspaces.get(key)
        if found is None:
            if len(self._workspaces) > 64:  # batches of ever new lengths
                self._workspaces.clear()
            found = self._workspaces[key] = self._build(x)
        return found

    def _build(self, x: Tensor) -> Workspace:
        rows, width = x.shape
        with torch.inference_mode(False):
            square = self.take("square", x)
            sums = torch.empty(4, width, device=x.device)
            powers = torch.empty(2, device=x.device)
            return Workspace(
                square=square,
                flat=square.view(-1),
                ones=self.ones(rows, x).view(1, rows),
                column=self.ones(width, x),
                sums=sums,
                parts=(sums[0:1], sums[1:2], sums[2], sums[3]),
                powers=powers,
                third=powers[0],
                fourth=powers[1],
            )

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
            self._workspaces.clear()  # they may hold views of the old one
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
        held = [*self._buffers.values(), *self._ones.values(), *(w.sums for w in self._workspaces.values())]
        return sum(b.numel() * b.element_size() for b in held)


def to_numpy(t: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A float64 copy on the host."""
    return t.cpu().numpy().astype(np.float64)
