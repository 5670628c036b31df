"""LayerScale: what a branch adds to the stream, times a small learned number for each channel.

``x + gamma * branch(x)`` with ``gamma`` near zero at the start, so that a deep network begins close to the identity
(Touvron, Cord, Sablayrolles, Synnaeve and Jégou, 2021, arXiv 2103.17239). The paper starts at 0.1 up to 18 layers, at
1e-5 up to 24 and at 1e-6 beyond.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.nn.norm.checks import expect_channels, expect_trailing
from setpoint.nn.norm.functional import per_channel, scale_shift
from setpoint.optim.decay import no_weight_decay


class LayerScale(nn.Module):
    """Multiply every channel by a learned number; it stands behind a branch, before the addition.

    Args:
        dim: Number of channels.
        init_values: Where ``gamma`` starts.
        channels_last: Whether channels are the last axis, ``(*, dim)``; else they are axis 1, ``(N, dim, *)``.
        device, dtype: Of ``gamma``, which goes by the name it has in timm and DINOv2.

    Shape:
        Output as input.

    Raises:
        InputError: ``dim`` below 1; on call, another number of channels.
        TypeError: On call, an input that is not floating-point.

    Reference:
        Touvron, Cord, Sablayrolles, Synnaeve and Jégou, 2021, "Going deeper with Image Transformers", arXiv 2103.17239.

    Example:
        >>> LayerScale(2, init_values=0.5)(torch.tensor([2.0, 4.0])).detach()
        tensor([1., 2.])
    """

    def __init__(
        self,
        dim: int,
        init_values: float = 1e-5,
        channels_last: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim < 1:
            raise InputError(f"LayerScale: expected dim of at least 1, got {dim!r}; give the branch's width")
        self.dim = dim
        self.init_values = init_values
        self.channels_last = channels_last
        self.gamma = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        no_weight_decay(self)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """``gamma`` to where it starts."""
        nn.init.constant_(self.gamma, self.init_values)

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Scale every channel; shape and dtype stay."""
        if self.channels_last:
            expect_trailing(x, (self.dim,), "LayerScale")
            return scale_shift(x, self.gamma).to(x.dtype)
        expect_channels(x, self.dim, "LayerScale")
        return (x * per_channel(self.gamma, x)).to(x.dtype)

    def extra_repr(self) -> str:
        """Channels, the start, and where they are."""
        return f"{self.dim}, init_values={self.init_values}, channels_last={self.channels_last}"
