"""RMSNorm and CRMSNorm: normalization by the root mean square alone.

``RMSNorm(x) = x / sqrt(mean(x²) + eps)`` leaves the mean in (Zhang and Sennrich, 2019, arXiv 1910.07467). On inputs
whose mean is zero it *is* LayerNorm, for any ``eps``; and there one of the d entries follows from the others, which is
what ``CRMSNorm`` uses (Jiang, Gu, Zhu and Pan, 2023, arXiv 2305.14858).

torch's own `torch.nn.RMSNorm` is not used for three reasons: its ``eps`` defaults to the machine epsilon of whatever
comes in, so that a converted LayerNorm changes its function; it has no bias, so that a LayerNorm can't be converted
with its parameters; and on a CPU it is several times slower than a layer norm.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.nn.norm.checks import expect_trailing, shape_of
from setpoint.nn.norm.functional import crms_norm, rms_norm
from setpoint.optim.decay import no_weight_decay


class RMSNorm(nn.Module):
    """Root mean square normalization over the last axes: ``y = x / sqrt(mean(x²) + eps) * weight + bias``.

    Statistics are in float32 for half precision; train and eval are the same.

    Args:
        normalized_shape: Sizes of the axes normalized over, or one size for the last axis.
        eps: Added to the mean square, inside the root.
        elementwise_affine: Have a gain ``weight`` (initially 1).
        bias: Have an addend ``bias`` (initially 0) too; a LayerNorm that is converted brings one.
        device, dtype: Of the parameters.

    Shape:
        Input and output ``(*, *normalized_shape)``.

    Raises:
        InputError: A size below 1; on call, other trailing sizes than ``normalized_shape``.
        TypeError: On call, an input that is not floating-point.

    Reference:
        Zhang and Sennrich, 2019, "Root Mean Square Layer Normalization", arXiv 1910.07467.

    Example:
        >>> RMSNorm(2, eps=0.0)(torch.tensor([3.0, 4.0])).tolist()
        [0.848..., 1.131...]
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.normalized_shape = shape_of(normalized_shape, "RMSNorm")
        self.eps = eps
        self.elementwise_affine = elementwise_affine
        weight = torch.empty(self.normalized_shape, device=device, dtype=dtype) if elementwise_affine else None
        addend = torch.empty_like(weight) if weight is not None and bias else None
        self.register_parameter("weight", None if weight is None else nn.Parameter(weight))
        self.register_parameter("bias", None if addend is None else nn.Parameter(addend))
        no_weight_decay(self)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gain to 1, addend to 0."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Normalize ``(*, *normalized_shape)``; shape and dtype stay."""
        expect_trailing(x, self.normalized_shape, "RMSNorm")
        return rms_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        """Shape, eps and which parameters there are."""
        return (
            f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}, "
            f"bias={self.bias is not None}"
        )


class CRMSNorm(nn.Module):
    """RMS normalization of a zero-mean vector without its last entry, which the others determine.

    ``CRMSNorm(c) = c / sqrt((sum(c²) + sum(c)²) / d + eps)`` with ``d = dim + 1``: the first d - 1 entries of
    ``RMSNorm([c, -sum(c)])``, and so of LayerNorm. It has no parameters: a gain would have to act on the entry that is
    not there, so a norm's gain and bias are folded into its readers before the stream is narrowed.

    Args:
        dim: Width of its input, one less than the width of the vector it stands for.
        eps: Added to the mean square, inside the root.

    Shape:
        Input and output ``(*, dim)``.

    Raises:
        InputError: ``dim`` below 1; on call, another width than ``dim``.
        TypeError: On call, an input that is not floating-point.

    Reference:
        Jiang, Gu, Zhu and Pan, 2023, "Pre-RMSNorm and Pre-CRMSNorm Transformers", arXiv 2305.14858.

    Example:
        >>> CRMSNorm(2, eps=0.0)(torch.tensor([1.0, 2.0]))  # the layer norm of [1, 2, -3]
        tensor([0.4629, 0.9258])
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        if not isinstance(dim, int) or dim < 1:
            raise InputError(
                f"CRMSNorm: expected dim to be a positive whole number, got {dim!r}; give the stream's width"
            )
        self.dim = dim
        self.eps = eps

    def forward(self, c: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
        """Normalize ``(*, dim)``; shape and dtype stay."""
        expect_trailing(c, (self.dim,), "CRMSNorm")
        return crms_norm(c, self.eps)

    def extra_repr(self) -> str:
        """Width and eps."""
        return f"{self.dim}, eps={self.eps}"
