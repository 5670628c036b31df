"""Peri-LN: norms on both sides of each sub-layer, inside the branch.

    y_0 = N_0(embedding)        y = x + dropout(N_out(F(N_in(x))))        and one more norm after the last block

The output norm bounds what a branch can add, so the stream's variance grows by a constant per sub-layer, linearly in
depth, however large the sub-layer's weights become; and the gradient of the last weight W2 of a branch is divided by
the size of the branch's output, so that a massive activation does not make a massive gradient. N_out acts on the branch
alone (a norm behind the addition would be Post-LN). Since it undoes any scale of W2, neither zero nor 1/sqrt(2 depth)
initialization of W2 does what it does elsewhere: N_out amplifies a near-zero branch to its full size.

Without N_in this is the output norm of OLMo 2 (`OutputLN`).

Reference: Kim et al., 2025, "Peri-LN: Revisiting Normalization Layer in the Transformer Architecture",
arXiv 2502.02732.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.nn.block.base import NormFactory, UniformPlacement, run_branch
from setpoint.nn.norm.checks import NormalizedShape, expect_trailing, shape_of
from setpoint.nn.norm.rmsnorm import RMSNorm


class PeriLN(nn.Module):
    """``x + dropout(out_norm(sublayer(norm(x))))``.

    Args:
        sublayer: Maps ``(..., dim)`` to ``(..., dim)``. Further arguments of the call go to it; if it returns a tuple,
            the first element is added to the stream and the tail is passed on.
        normalized_shape: Width of the stream.
        norm_layer: Makes each of the two norms from ``normalized_shape``.
        dropout: Probability on the normalized branch before the addition.
        out_gain_init: Start value of the output norm's gain, which has to be learnable to work as published.
        norm_options: Passed to ``norm_layer``: ``eps``, ``elementwise_affine``, ``bias``, ``device``, ``dtype``.

    Raises:
        InputError: ``out_gain_init`` is not 1 and the norm has no gain.

    Example:
        >>> x = torch.randn(2, 5, 8)
        >>> branch = PeriLN(nn.Linear(8, 8), 8)(x) - x
        >>> bool((branch.square().mean(-1).sqrt() - 1).abs().max() < 1e-3)
        True
    """

    def __init__(
        self,
        sublayer: nn.Module,
        normalized_shape: NormalizedShape,
        *,
        norm_layer: NormFactory = RMSNorm,
        dropout: float = 0.0,
        out_gain_init: float = 1.0,
        **norm_options: Any,
    ) -> None:
        super().__init__()
        self.normalized_shape = shape_of(normalized_shape, type(self).__name__)
        self.norm = norm_layer(normalized_shape, **norm_options)
        self.sublayer = sublayer
        self.out_norm = _with_gain(norm_layer(normalized_shape, **norm_options), out_gain_init)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "*batch dim"], *args: Any, **kwargs: Any) -> Any:
        """The stream after the unit.

        Args:
            x: The stream.
            args, kwargs: For the sub-layer.

        Returns:
            ``(..., dim)``, or a tuple of it and the tail that the sub-layer returned.

        Raises:
            InputError: The stream's width is not ``normalized_shape``, or the sub-layer changes the shape.
        """
        expect_trailing(x, self.normalized_shape, type(self).__name__)
        branch, rest = run_branch(self.sublayer, self.norm(x), x, args, kwargs)
        y = x + self.dropout(self.out_norm(branch))
        return (y, *rest) if rest else y


class OutputLN(PeriLN):
    """``x + dropout(out_norm(sublayer(x)))``: `PeriLN` without its input norm (OLMo 2's placement).

    Args:
        sublayer, normalized_shape, options: As for `PeriLN`.

    Example:
        >>> sorted(name for name, _ in OutputLN(nn.Linear(8, 8), 8).named_parameters())
        ['out_norm.weight', 'sublayer.bias', 'sublayer.weight']
    """

    def __init__(self, sublayer: nn.Module, normalized_shape: NormalizedShape, **options: Any) -> None:
        super().__init__(sublayer, normalized_shape, **options)
        self.norm = nn.Identity()


@dataclass(frozen=True)
class PeriNorm(UniformPlacement):
    """Norms on both sides of each sub-layer, on the embedding, and after the last block (Kim et al., 2025).

    Args:
        embed_norm: Normalize the embedding, as the paper recommends.
        out_gain_init: Start value of the output norms' gains.

    Example:
        >>> unit = PeriNorm().residual(nn.Linear(8, 8), 8, norm=nn.RMSNorm, layer=1, depth=2)
        >>> unit.norm is unit.out_norm, PeriNorm().embed_norm
        (False, True)
    """

    name: ClassVar[str] = "peri"
    unit: ClassVar[type[nn.Module]] = PeriLN
    aliases: ClassVar[tuple[str, ...]] = ("sandwich",)

    embed_norm: bool = True
    out_gain_init: float = 1.0

    def unit_options(self) -> dict[str, Any]:
        """The start of the output norm's gain."""
        return {"out_gain_init": self.out_gain_init}


@dataclass(frozen=True)
class OutputNorm(UniformPlacement):
    """Norm at the output of each sub-layer, before the addition, and after the last block (OLMo 2).

    Args:
        embed_norm: Also normalize the embedding.
        out_gain_init: Start value of the output norms' gains.

    Example:
        >>> OutputNorm().final_norm
        True
    """

    name: ClassVar[str] = "output"
    unit: ClassVar[type[nn.Module]] = OutputLN

    out_gain_init: float = 1.0

    def unit_options(self) -> dict[str, Any]:
        """The start of the output norm's gain."""
        return {"out_gain_init": self.out_gain_init}


def _with_gain(norm: nn.Module, value: float) -> nn.Module:
    if value == 1.0:
        return norm
    gain = getattr(norm, "weight", None)
    if not isinstance(gain, Tensor):
        raise InputError(
            f"expected a norm with a learnable gain for out_gain_init={value}, got {type(norm).__name__} without one; "
            f"pass a norm_layer with elementwise_affine=True"
        )
    with torch.no_grad():
        gain.fill_(value)
    return norm
