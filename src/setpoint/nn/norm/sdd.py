"""Scale-distribution decoupling: a linear layer whose matrix sets a direction, and whose vector sets the magnitude.

``z = V x`` and ``y = alpha * z / sqrt(mean(z²) + eps)``: a linear layer with the RMS norm of its own *outputs* behind
it, token by token (Wang, Zhuo, Zeng, Zhou, Yang and Li, 2025, arXiv 2502.15499). Outputs are bounded whatever the size
of V, and gradients of deep stacks neither explode nor vanish with it. It is not weight normalization, which divides by
lengths of rows that no input changes; and so it can't be folded into a plain weight for inference.
"""

from __future__ import annotations

from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from setpoint.errors import InputError
from setpoint.nn.norm.checks import expect_trailing
from setpoint.nn.norm.functional import rms_norm
from setpoint.optim.decay import no_weight_decay


class SDDLinear(nn.Module):
    """``alpha * z / sqrt(mean(z²) + eps)`` over the outputs ``z = weight @ x + bias``.

    ``alpha`` is the gain of a norm and is not weight-decayed; ``weight`` is, as usual. Where the output is added to a
    residual stream of L layers start ``alpha`` at ``1 / sqrt(2 L)``, as the authors' code does (their text: ``1 /
    sqrt(L)``). Split over devices by outputs, the mean of squares takes a sum over all of them. A checkpoint of the
    authors' class (``linear.weight``, ``norm.weight``) loads too.

    Args:
        in_features: Width n of the input.
        out_features: Width m of the output.
        bias: Have an addend (initially 0), added in front of the norm.
        eps: Added to the mean square, inside the root.
        alpha_init: Where ``alpha`` starts.
        device, dtype: Of the parameters. ``weight`` starts normal with deviation ``1 / sqrt(2.5 n)``.

    Shape:
        ``(*, in_features)`` to ``(*, out_features)``.

    Raises:
        InputError: A size below 1, or ``alpha_init`` not above 0; on call, another width.
        TypeError: On call, an input that is not floating-point.

    Reference:
        Wang et al., 2025, "Scale-Distribution Decoupling: Enabling Stable and Effective Training of Large Language
        Models", arXiv 2502.15499.

    Example:
        >>> y = SDDLinear(8, 4, alpha_init=0.5)(torch.randn(3, 8))
        >>> y.norm(dim=-1).detach()  # alpha * sqrt(out_features)
        tensor([1.0000, 1.0000, 1.0000])
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        eps: float = 1e-6,
        alpha_init: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise InputError(f"SDDLinear: expected widths of at least 1, got {in_features!r} and {out_features!r}")
        if not alpha_init > 0:
            raise InputError(f"SDDLinear: expected alpha_init above 0, got {alpha_init!r}")
        self.in_features = in_features
        self.out_features = out_features
        self.eps = eps
        self.alpha_init = alpha_init
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )
        self.alpha = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        no_weight_decay(self, "alpha")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight normal, addend 0, ``alpha`` to ``alpha_init``."""
        nn.init.normal_(self.weight, std=1 / sqrt(2.5 * self.in_features))
        nn.init.constant_(self.alpha, self.alpha_init)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """Multiply, and normalize what comes out."""
        expect_trailing(x, (self.in_features,), "SDDLinear")
        return rms_norm(F.linear(x, self.weight, self.bias), self.out_features, self.alpha, None, self.eps)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: object) -> None:
        for theirs, ours in (("linear.weight", "weight"), ("linear.bias", "bias"), ("norm.weight", "alpha")):
            if prefix + theirs in state_dict:
                state_dict[prefix + ours] = state_dict.pop(prefix + theirs)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """Widths, bias, eps and where alpha starts."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"eps={self.eps}, alpha_init={self.alpha_init:.4g}"
        )
