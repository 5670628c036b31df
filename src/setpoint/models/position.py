"""Where tokens stand: tables that are added to the embedding, and rotations of queries and keys.

A position is a frozen object that is passed to a backbone. It may bring a ``table`` (a module from positions to vectors
that are added to the embedding) or a ``rotation`` (angles by which each pair of query and key channels is turned, so
that their product depends on the distance between two tokens alone).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from setpoint.errors import InputError

Rotation = tuple[Float[Tensor, "tokens half"], Float[Tensor, "tokens half"]]
"""Cosines and sines, one column for each pair of channels."""


@dataclass(frozen=True)
class Position:
    """No positions at all, and the base of those below."""

    def table(self, context: int, dim: int) -> nn.Module | None:  # noqa: ARG002
        """A module from positions ``(tokens,)`` to ``(tokens, dim)`` that is added to the embedding."""
        return None

    def rotation(
        self,
        positions: Int[Tensor, " tokens"],  # noqa: ARG002
        head_dim: int,  # noqa: ARG002
        dtype: torch.dtype,  # noqa: ARG002
    ) -> Rotation | None:
        """What `rotate` takes, for queries and keys at these positions."""
        return None


@dataclass(frozen=True)
class Learned(Position):
    """A trained vector for each position up to the context (GPT-2, BERT, ViT)."""

    def table(self, context: int, dim: int) -> nn.Module:
        """An embedding table."""
        return nn.Embedding(context, dim)


@dataclass(frozen=True)
class Sinusoidal(Position):
    """Fixed sines and cosines of the position (Vaswani et al., 2017, arXiv 1706.03762).

    Args:
        theta: The longest wavelength is ``2 pi theta``.
    """

    theta: float = 10000.0

    def table(self, context: int, dim: int) -> nn.Module:  # noqa: ARG002
        """A module without parameters."""
        return _Sinusoids(dim, self.theta)


@dataclass(frozen=True)
class Rotary(Position):
    """Rotary position embedding (Su et al., 2021, arXiv 2104.09864).

    Channel ``i`` of a head is paired with channel ``i + head_dim / 2``, as Llama and GPT-NeoX do.

    Args:
        theta: Pair ``i`` turns by ``theta ** (-2 i / head_dim)`` for each position.

    Example:
        >>> cos, sin = Rotary().rotation(torch.arange(3), head_dim=4, dtype=torch.float32)
        >>> cos.shape
        torch.Size([3, 2])
    """

    theta: float = 10000.0

    def frequencies(self, head_dim: int, device: torch.device) -> Float[Tensor, " half"]:
        """Angle for one step, for each pair of channels, in radians."""
        if head_dim % 2:
            raise InputError(f"expected an even head_dim for rotary positions, got {head_dim}")
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
        return 1.0 / self.theta**exponents

    def rotation(self, positions: Int[Tensor, " tokens"], head_dim: int, dtype: torch.dtype) -> Rotation:
        """Cosines and sines, computed in float32: bfloat16 cannot tell position 256 from 257."""
        angles = positions.float()[:, None] * self.frequencies(head_dim, positions.device)
        return angles.cos().to(dtype), angles.sin().to(dtype)


@dataclass(frozen=True)
class Llama3Rotary(Rotary):
    """Rotary positions whose slow pairs are slowed further, so that a model trained on short contexts takes long ones.

    Args:
        theta: As for `Rotary`.
        factor: By how much pairs are slowed whose wavelength is beyond ``original_context / low_frequency``.
        low_frequency, high_frequency: Turns within the original context below which a pair is slowed by the whole
            factor, and above which it is left alone; between them the two are mixed linearly.
        original_context: Tokens of the context before it was extended.
    """

    theta: float = 500000.0
    factor: float = 8.0
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    original_context: int = 8192

    def frequencies(self, head_dim: int, device: torch.device) -> Float[Tensor, " half"]:
        """Angle for one step, for each pair of channels, in radians."""
        plain = super().frequencies(head_dim, device)
        turns = self.original_context * plain / (2 * math.pi)
        share = (turns - self.low_frequency) / (self.high_frequency - self.low_frequency)
        share = share.clamp(0.0, 1.0)
        return plain * share + plain / self.factor * (1.0 - share)


def rotate(x: Float[Tensor, "*batch tokens head_dim"], rotation: Rotation) -> Float[Tensor, "*batch tokens head_dim"]:
    """Turn each pair of channels by its angle.

    Args:
        x: Queries or keys.
        rotation: Cosines and sines for each token.
    """
    cos, sin = (part.to(x.dtype) for part in rotation)  # under autocast x is narrower than the embedding was
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class _Sinusoids(nn.Module):
    def __init__(self, dim: int, theta: float) -> None:
        super().__init__()
        if dim % 2:
            raise InputError(f"expected an even width for sinusoidal positions, got {dim}")
        self.dim, self.theta = dim, theta

    def forward(self, positions: Int[Tensor, " tokens"]) -> Float[Tensor, "tokens dim"]:
        exponents = torch.arange(0, self.dim, 2, dtype=torch.float32, device=positions.device) / self.dim
        angles = positions.float()[:, None] / self.theta**exponents
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)
