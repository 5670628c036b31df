"""QK-norm: queries and keys normalized in each head, before they meet.

A product of queries and keys grows with their lengths, and a softmax of large numbers is all or nothing. With a norm on
each, logits are bounded by the norms' gains, and training bears higher learning rates (Henry, Dachapally, Pawar and
Chen, 2020, arXiv 2010.04245, by length; Dehghani et al., 2023, arXiv 2302.05442, by LayerNorm; by RMSNorm in Qwen3 and
Gemma 3). Norms stand in front of any rotation, which keeps lengths.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.nn.norm.rmsnorm import RMSNorm


class QKNorm(nn.Module):
    """A norm for queries and one for keys, over the width of a head.

    For an attention of your own: ``q, k = self.qk_norm(q, k)``. `setpoint.models.Attention` takes the norm's class as
    ``qk_norm=RMSNorm`` and holds the same two layers by the same names.

    Args:
        head_dim: Width of a head.
        norm: Makes a norm from that width: a class, or ``functools.partial(RMSNorm, eps=1e-6)``.

    Shape:
        Queries ``(*, head_dim)`` and keys ``(*, head_dim)``, heads on any other axis; the same come out.

    Raises:
        InputError: ``head_dim`` below 1; on call, whatever the norm refuses.

    Reference:
        Henry, Dachapally, Pawar and Chen, 2020, "Query-Key Normalization for Transformers", arXiv 2010.04245.

    Example:
        >>> import torch
        >>> q, k = QKNorm(8)(torch.randn(2, 4, 5, 8), torch.randn(2, 1, 5, 8))
        >>> q.square().mean().item()
        0.999...
    """

    def __init__(self, head_dim: int, norm: Callable[[int], nn.Module] = RMSNorm) -> None:
        super().__init__()
        if head_dim < 1:
            raise InputError(f"QKNorm: expected head_dim of at least 1, got {head_dim!r}; give the width of a head")
        self.q_norm, self.k_norm = norm(head_dim), norm(head_dim)

    def forward(
        self, q: Float[Tensor, "*queries head_dim"], k: Float[Tensor, "*keys head_dim"]
    ) -> tuple[Float[Tensor, "*queries head_dim"], Float[Tensor, "*keys head_dim"]]:
        """Normalized queries and keys; shapes and dtypes stay."""
        return self.q_norm(q), self.k_norm(k)
