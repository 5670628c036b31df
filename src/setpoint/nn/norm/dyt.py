"""Dynamic Tanh: a squashing function where a norm used to be.

Trained layer norms act on a token as an S-shaped curve that squashes its extreme entries. DyT is that curve without
the statistics: ``y = weight * tanh(alpha * x) + bias``, with one learnable scalar ``alpha`` for the whole layer and
gain and bias per channel (Zhu, Chen, He, LeCun and Liu, 2025, arXiv 2503.10622). Nothing is summed over a row, so
elements don't depend on each other; and the output of a fresh layer does *not* have unit variance.

For language models the paper adds a learnable factor on the embeddings and starts ``alpha`` higher in front of
attention than elsewhere, lower the wider the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.nn.norm.checks import expect_channels, expect_trailing, shape_of
from setpoint.nn.norm.functional import scale_shift, tanh
from setpoint.optim.decay import no_weight_decay


class DyT(nn.Module):
    """Element-wise ``weight * tanh(alpha * x) + bias`` in place of a norm.

    Args:
        normalized_shape: What the norm in its place would normalize over: the size of the channel axis, or several
            trailing sizes.
        alpha_init_value: Where ``alpha`` starts; larger is closer to saturation.
        channels_last: Whether channels are the last axes, ``(*, *normalized_shape)``; else they are axis 1 of
            ``(N, C, *)``.
        elementwise_affine: Have ``weight`` (initially 1) and ``bias``; ``alpha`` is there in any case.
        bias: Have an addend ``bias`` (initially 0); without for what replaces an RMSNorm.
        device, dtype: Of the parameters, ``alpha`` among them. In bfloat16 the steps of training (1e-4, say) are below
            what an ``alpha`` of 0.5 or a gain of 1 can register (4e-3), and vanish: train with float32 parameters under
            autocast (``"bf16-mixed"``), where ``alpha`` multiplies in float32.

    Shape:
        Output as input.

    Raises:
        InputError: ``alpha_init_value`` not above 0, or a size below 1; on call, other sizes than those it was made
            for.
        TypeError: On call, an input that is not floating-point.

    Reference:
        Zhu, Chen, He, LeCun and Liu, 2025, "Transformers without Normalization", arXiv 2503.10622.

    Example:
        >>> DyT(3)(torch.tensor([1.0, 2.0, 4.0])).detach()
        tensor([0.4621, 0.7616, 0.9640])
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        alpha_init_value: float = 0.5,
        channels_last: bool = True,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.normalized_shape = shape_of(normalized_shape, "DyT")
        if not alpha_init_value > 0:
            raise InputError(f"DyT: expected alpha_init_value above 0, got {alpha_init_value!r}; the paper uses 0.5")
        if not channels_last and len(self.normalized_shape) > 1:
            raise InputError(
                f"DyT: expected one size of the channel axis with channels_last=False, got {normalized_shape!r}"
            )
        self.alpha_init_value = alpha_init_value
        self.channels_last = channels_last
        self.elementwise_affine = elementwise_affine
        # Of the dtype of the rest: a float32 scalar in a bfloat16 layer would bar the model from sharding, which wants
        # one dtype in a block.
        self.alpha = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        weight = torch.empty(self.normalized_shape, device=device, dtype=dtype) if elementwise_affine else None
        addend = torch.empty_like(weight) if weight is not None and bias else None
        self.register_parameter("weight", None if weight is None else nn.Parameter(weight))
        self.register_parameter("bias", None if addend is None else nn.Parameter(addend))
        no_weight_decay(self)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """``alpha`` to ``alpha_init_value``, gain to 1, addend to 0."""
        nn.init.constant_(self.alpha, self.alpha_init_value)
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Squash every element; shape and dtype stay."""
        if self.channels_last:
            expect_trailing(x, self.normalized_shape, "DyT")
        else:
            expect_channels(x, self.normalized_shape[0], "DyT")
        squashed = tanh(self.alpha * x)
        return self._affine(squashed).to(x.dtype)

    def _affine(self, squashed: Tensor) -> Tensor:
        if self.weight is None:
            return squashed
        if self.channels_last and len(self.normalized_shape) == 1:
            return scale_shift(squashed, self.weight, self.bias)
        ones = () if self.channels_last else (1,) * (squashed.dim() - 2)
        scaled = squashed * self.weight.reshape(*self.normalized_shape, *ones)
        return scaled if self.bias is None else scaled + self.bias.reshape(*self.normalized_shape, *ones)

    def extra_repr(self) -> str:
        """Shape, the start of alpha, and which parameters there are."""
        return (
            f"{self.normalized_shape}, alpha_init_value={self.alpha_init_value}, channels_last={self.channels_last}, "
            f"elementwise_affine={self.elementwise_affine}, bias={self.bias is not None}"
        )
