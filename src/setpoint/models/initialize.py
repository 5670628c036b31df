"""How the weight matrices of a backbone are drawn. Biases start at 0, and norms as their class says.

An initializer is a frozen object that is passed to a backbone; the backbone calls it once for each matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Normal:
    """Every matrix from N(0, std²).

    Args:
        std: Standard deviation.
    """

    std: float = 0.02

    def __call__(
        self,
        weight: Tensor,
        *,
        layer: int | None,  # noqa: ARG002
        depth: int,  # noqa: ARG002
        output: bool,  # noqa: ARG002
    ) -> None:
        """Draw a weight in place.

        Args:
            weight: The matrix, ``(out, in)``.
            layer: Number of its block, counted from 1; None for the head.
            depth: How many blocks there are.
            output: Whether its product is what a sub-layer adds to the stream.
        """
        nn.init.normal_(weight, 0.0, self.std)


@dataclass(frozen=True)
class DepthScaledNormal(Normal):
    """As `Normal`, with ``std / sqrt(2 depth)`` for the matrices that write to the residual stream (GPT-2)."""

    def __call__(
        self,
        weight: Tensor,
        *,
        layer: int | None,  # noqa: ARG002
        depth: int,
        output: bool,
    ) -> None:
        """Draw a weight in place; arguments as for `Normal`."""
        nn.init.normal_(weight, 0.0, self.std * (2 * depth) ** -0.5 if output else self.std)


@dataclass(frozen=True)
class LayerIndexNormal(Normal):
    """``std / sqrt(layer)`` in layer 1, 2, ... (layer-index rescaling, Owen et al., 2025, arXiv 2503.22329).

    Args:
        std: Standard deviation in the first layer.
    """

    std: float = 0.006

    def __call__(
        self,
        weight: Tensor,
        *,
        layer: int | None,
        depth: int,  # noqa: ARG002
        output: bool,  # noqa: ARG002
    ) -> None:
        """Draw a weight in place; arguments as for `Normal`."""
        nn.init.normal_(weight, 0.0, self.std * (layer or 1) ** -0.5)


@dataclass(frozen=True)
class XavierNormal:
    """Every matrix from N(0, 2 / (fan_in + fan_out)) (Glorot and Bengio, 2010)."""

    def __call__(
        self,
        weight: Tensor,
        *,
        layer: int | None,  # noqa: ARG002
        depth: int,  # noqa: ARG002
        output: bool,  # noqa: ARG002
    ) -> None:
        """Draw a weight in place; arguments as for `Normal`."""
        nn.init.xavier_normal_(weight)
