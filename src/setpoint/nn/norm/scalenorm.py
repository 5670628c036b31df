"""ScaleNorm: every vector gets one length, and that length is the only parameter.

``y = g x / max(||x||, eps)`` over the last axis, with one learned number ``g`` that starts at sqrt(d) (Nguyen and
Salazar, 2019, arXiv 1910.05895). There is no mean to remove and no gain per channel; at the start it is RMSNorm without
a weight.
"""

from __future__ import annotations

from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.nn.norm.checks import expect_floating, expect_trailing
from setpoint.nn.norm.functional import wide
from setpoint.optim.decay import no_weight_decay


def scale_norm(
    x: Float[Tensor, "... dim"], scale: Float[Tensor, 1] | float, eps: float = 1e-5
) -> Float[Tensor, "... dim"]:
    """Bring the vectors along the last axis to one length: ``scale * x / max(||x||, eps)``.

    Args:
        x: Input ``(*, dim)``. Half precision is computed in float32 and cast back.
        scale: The length, a number or a tensor of one entry.
        eps: The smallest norm that is divided by; a shorter vector is multiplied by ``scale / eps``.

    Returns:
        A tensor of the shape and dtype of ``x``.

    Raises:
        TypeError: ``x`` is not floating-point.

    Reference:
        Nguyen and Salazar, 2019, "Transformers without Tears", arXiv 1910.05895.

    Example:
        >>> scale_norm(torch.tensor([3.0, 4.0]), 2.0)
        tensor([1.2000, 1.6000])
    """
    expect_floating(x, "scale_norm")
    norm = torch.linalg.vector_norm(wide(x), dim=-1, keepdim=True).clamp_min(eps)
    y: Tensor = wide(x) * (scale / norm)
    return y.to(x.dtype)


class ScaleNorm(nn.Module):
    """``scale * x / max(||x||, eps)`` over the last axis, with one learned ``scale``.

    Checkpoints of two other layers load too: the authors' (``scale``, a number) and x-transformers' (``g``, to be
    multiplied by sqrt(dim)).

    Args:
        dim: Size of the last axis.
        eps: The smallest norm that is divided by; a bound, not an addend.
        scale: Where the length starts; None for sqrt(dim).
        learnable: Train ``scale``; without, it is a buffer. The paper fixes it with little loss everywhere but in the
            last norm of a decoder, which sets the range of the logits.
        device, dtype: Of ``scale``.

    Shape:
        Input and output ``(*, dim)``.

    Raises:
        InputError: ``dim`` below 1, ``eps`` or ``scale`` not above 0; on call, another size of the last axis.
        TypeError: On call, an input that is not floating-point.

    Reference:
        Nguyen and Salazar, 2019, "Transformers without Tears", arXiv 1910.05895.

    Example:
        >>> ScaleNorm(2)(torch.tensor([3.0, 4.0])).detach()
        tensor([0.8485, 1.1314])
    """

    scale: Tensor

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        scale: float | None = None,
        learnable: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim < 1:
            raise InputError(f"ScaleNorm: expected dim of at least 1, got {dim!r}; give the width that the layer sees")
        if not eps > 0 or not (scale is None or scale > 0):
            raise InputError(f"ScaleNorm: expected eps and scale above 0, got {eps!r} and {scale!r}")
        self.dim = dim
        self.eps = eps
        self.initial_scale = sqrt(dim) if scale is None else scale
        self.learnable = learnable
        value = torch.empty(1, device=device, dtype=dtype)
        if learnable:
            self.scale = nn.Parameter(value)
            no_weight_decay(self, "scale")
        else:
            self.register_buffer("scale", value)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """``scale`` to where it starts."""
        with torch.no_grad():
            self.scale.fill_(self.initial_scale)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Normalize ``(*, dim)``; shape and dtype stay."""
        expect_trailing(x, (self.dim,), "ScaleNorm")
        return scale_norm(x, wide(self.scale), self.eps)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: object) -> None:
        if prefix + "g" in state_dict:  # x-transformers stores 1 for a length of sqrt(dim)
            state_dict[prefix + "scale"] = state_dict.pop(prefix + "g") * sqrt(self.dim)
        if prefix + "scale" in state_dict:
            state_dict[prefix + "scale"] = state_dict[prefix + "scale"].reshape(-1)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """Width, eps, where the length starts and whether it is learned."""
        return f"{self.dim}, eps={self.eps}, scale={self.initial_scale:.4g}, learnable={self.learnable}"
