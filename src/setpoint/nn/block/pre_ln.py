"""Pre-LN and Post-LN: a norm at the input of each sub-layer, or behind each residual addition.

    Pre-LN    y = x + dropout(F(N(x)))      and one more norm after the last block
    Post-LN   y = N(x + dropout(F(x)))      and no other norm

With the norm inside the branch the identity path runs from the embedding to the last norm without a division. At
initialization gradients are then small and about equal over depth, and training needs no warm-up; behind the
additions, the last blocks start with large gradients whatever the depth.

Reference: Xiong et al., 2020, "On Layer Normalization in the Transformer Architecture", arXiv 2002.04745.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from setpoint.nn.block.base import NormFactory, UniformPlacement, run_branch
from setpoint.nn.norm.checks import NormalizedShape, expect_trailing, shape_of
from setpoint.nn.norm.layernorm import LayerNorm


class PreLN(nn.Module):
    """``x + dropout(sublayer(norm(x)))``.

    Args:
        sublayer: Maps ``(..., dim)`` to ``(..., dim)``. Further arguments of the call go to it; if it returns a tuple,
            the first element is added to the stream and the tail is passed on.
        normalized_shape: Width of the stream.
        norm_layer: Makes the norm from ``normalized_shape``.
        dropout: Probability on the branch before the addition.
        norm_options: Passed to ``norm_layer``: ``eps``, ``elementwise_affine``, ``bias``, ``device``, ``dtype``.

    Example:
        >>> import torch
        >>> unit = PreLN(nn.Linear(8, 8), 8, eps=1e-6)
        >>> unit(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        sublayer: nn.Module,
        normalized_shape: NormalizedShape,
        *,
        norm_layer: NormFactory = LayerNorm,
        dropout: float = 0.0,
        **norm_options: Any,
    ) -> None:
        super().__init__()
        self.normalized_shape = shape_of(normalized_shape, type(self).__name__)
        self.norm = norm_layer(normalized_shape, **norm_options)
        self.sublayer = sublayer
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
        y = x + self.dropout(branch)
        return (y, *rest) if rest else y


class PostLN(nn.Module):
    """``norm(x + dropout(sublayer(x)))``.

    Args:
        sublayer: As for `PreLN`.
        normalized_shape: Width of the stream.
        norm_layer: Makes the norm from ``normalized_shape``.
        dropout: Probability on the branch before the addition.
        norm_options: Passed to ``norm_layer``.

    Example:
        >>> import torch
        >>> y = PostLN(nn.Linear(8, 8), 8)(torch.randn(2, 5, 8))
        >>> bool(y.mean(-1).abs().max() < 1e-6)
        True
    """

    def __init__(
        self,
        sublayer: nn.Module,
        normalized_shape: NormalizedShape,
        *,
        norm_layer: NormFactory = LayerNorm,
        dropout: float = 0.0,
        **norm_options: Any,
    ) -> None:
        super().__init__()
        self.normalized_shape = shape_of(normalized_shape, type(self).__name__)
        self.sublayer = sublayer
        self.dropout = nn.Dropout(dropout)
        self.norm = norm_layer(normalized_shape, **norm_options)

    def forward(self, x: Float[Tensor, "*batch dim"], *args: Any, **kwargs: Any) -> Any:
        """The stream after the unit; arguments, result and errors as for `PreLN`."""
        expect_trailing(x, self.normalized_shape, type(self).__name__)
        branch, rest = run_branch(self.sublayer, x, x, args, kwargs)
        y = self.norm(x + self.dropout(branch))
        return (y, *rest) if rest else y


@dataclass(frozen=True)
class PreNorm(UniformPlacement):
    """Norm at the input of each sub-layer, one after the last block (Xiong et al., 2020).

    Args:
        embed_norm: Also normalize the embedding.

    Example:
        >>> unit = PreNorm().residual(nn.Linear(8, 8), 8, norm=nn.RMSNorm, layer=1, depth=2)
        >>> type(unit).__name__, PreNorm().final_norm
        ('PreLN', True)
    """

    name: ClassVar[str] = "pre"
    unit: ClassVar[type[nn.Module]] = PreLN


@dataclass(frozen=True)
class PostNorm(UniformPlacement):
    """Norm behind each residual addition, and none after the last block (Vaswani et al., 2017).

    Args:
        embed_norm: Also normalize the embedding, as BERT does.

    Example:
        >>> PostNorm().final_norm
        False
    """

    name: ClassVar[str] = "post"
    unit: ClassVar[type[nn.Module]] = PostLN
    final_norm: ClassVar[bool] = False
