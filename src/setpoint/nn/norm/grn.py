"""Global response normalization: channels compete by how strongly they respond over a whole image.

``y = x + weight * x * N + bias`` with ``N = G / (mean_c(G) + eps)`` and ``G`` the Euclidean norm of each channel over
all positions of an example (Woo, Debnath, Hu, Chen, Liu, Kweon and Xie, 2023, arXiv 2301.00808). It keeps channels from
dying or saying all the same. Both parameters start at 0, so that the layer starts as the identity.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.nn.norm.checks import expect_channels, expect_trailing
from setpoint.nn.norm.functional import wide
from setpoint.optim.decay import no_weight_decay


class GRN(nn.Module):
    """Scale every channel by its response over all positions, beside the mean response of all channels.

    Checkpoints of the authors' code (``gamma`` and ``beta`` with axes of size 1) and of timm's load.

    Args:
        dim: Number of channels.
        eps: Added to the mean response.
        channels_last: Whether channels are the last axis, ``(N, *, dim)``, as in ConvNeXt V2; else they are axis 1.
        device, dtype: Of ``weight`` and ``bias``.

    Shape:
        Output as input: at least three axes, the first one for examples.

    Raises:
        InputError: ``dim`` below 1 or ``eps`` not above 0; on call, another number of channels, or no axis for
            positions.
        TypeError: On call, an input that is not floating-point.

    Reference:
        Woo et al., 2023, "ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders", arXiv 2301.00808.

    Example:
        >>> layer, x = GRN(2), torch.tensor([[[3.0, 0.0], [4.0, 0.0]]])
        >>> _ = nn.init.ones_(layer.weight)
        >>> layer(x).detach()
        tensor([[[ 9.0000,  0.0000],
                 [12.0000,  0.0000]]])
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-6,
        channels_last: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim < 1 or not eps > 0:
            raise InputError(f"GRN: expected dim of at least 1 and eps above 0, got {dim!r} and {eps!r}")
        self.dim = dim
        self.eps = eps
        self.channels_last = channels_last
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        no_weight_decay(self)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Both to 0: the identity."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """Scale every channel; shape and dtype stay. Responses are in float32 for half precision."""
        if self.channels_last:
            expect_trailing(x, (self.dim,), "GRN")
        else:
            expect_channels(x, self.dim, "GRN")
        if x.dim() < 3:
            raise InputError(f"GRN: expected axes for examples, positions and channels, got shape {tuple(x.shape)}")
        channel = x.dim() - 1 if self.channels_last else 1
        positions = [axis for axis in range(1, x.dim()) if axis != channel]
        along = [self.dim if axis == channel else 1 for axis in range(x.dim())]
        response = torch.linalg.vector_norm(wide(x), dim=positions, keepdim=True)
        relative = response / (response.mean(channel, keepdim=True) + self.eps)
        y = torch.addcmul(self.bias.view(along), wide(x), 1 + self.weight.view(along) * relative)
        return y.to(x.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: object) -> None:
        for ours, theirs in (("weight", "gamma"), ("bias", "beta")):
            if prefix + theirs in state_dict:
                state_dict[prefix + ours] = state_dict.pop(prefix + theirs).flatten()
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """Channels, eps and where they are."""
        return f"{self.dim}, eps={self.eps}, channels_last={self.channels_last}"
