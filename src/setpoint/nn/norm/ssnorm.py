"""Single-scale RMS normalization: an RMSNorm whose gain is one number.

``y = weight * x / sqrt(mean(x²) + eps)`` with a scalar ``weight`` (Park, Lee, Kim and Kang, 2025, arXiv 2506.19697). A
gain for each channel lets training single channels out, and those grow into the outliers that 4-bit quantization can't
hold. One gain for all treats every direction of the stream alike: the layer commutes with rotations.

The paper writes ``g x / ||x||``, its code ``weight = g / sqrt(d)`` with an eps; this is the code's form. The paper's is
`setpoint.nn.ScaleNorm`, which was published earlier and elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from setpoint.nn.norm.checks import expect_trailing, shape_of
from setpoint.nn.norm.functional import rms_norm
from setpoint.optim.decay import no_weight_decay


class SSNorm(nn.Module):
    """RMS normalization over the last axes with one gain for all of them.

    Statistics are in float32 for half precision; train and eval are the same.

    Args:
        normalized_shape: Sizes of the axes normalized over, or one size for the last axis.
        eps: Added to the mean square, inside the root.
        device, dtype: Of ``weight``, a number that starts at 1 and is not decayed.

    Shape:
        Input and output ``(*, *normalized_shape)``.

    Raises:
        InputError: A size below 1; on call, other trailing sizes than ``normalized_shape``.
        TypeError: On call, an input that is not floating-point.

    Reference:
        Park, Lee, Kim and Kang, 2025, "Outlier-Safe Pre-Training for Robust 4-Bit Quantization of Large Language
        Models", arXiv 2506.19697.

    Example:
        >>> SSNorm(2)(torch.tensor([3.0, 4.0])).detach()
        tensor([0.8485, 1.1314])
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.normalized_shape = shape_of(normalized_shape, "SSNorm")
        self.eps = eps
        self.weight = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        no_weight_decay(self)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The gain to 1."""
        nn.init.ones_(self.weight)

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Normalize ``(*, *normalized_shape)``; shape and dtype stay."""
        expect_trailing(x, self.normalized_shape, "SSNorm")
        return rms_norm(x, self.normalized_shape, self.weight.expand(self.normalized_shape), eps=self.eps)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: object) -> None:
        stored = state_dict.get(prefix + "weight")
        if stored is not None and stored.numel() == 1:  # others store a vector of one entry
            state_dict[prefix + "weight"] = stored.reshape(())
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """Shape and eps."""
        return f"{self.normalized_shape}, eps={self.eps}"
