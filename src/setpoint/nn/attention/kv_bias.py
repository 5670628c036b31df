"""KV bias: a learnable key and value in front of the others, in every attention.

A head that has nowhere to look puts its weight on the first token, and the network grows a massive activation there to
hold it. Here it gets a slot of its own: k' and v' of shape ``(key heads, 1, head_dim)`` are put in front of keys and
values, with no position, visible to every query: softmax over ``[k', K]``. With k' = 0 and v' = 0 that is a softmax
with one more 1 in the denominator.

Reference: Owen et al., 2025, "A Refined Analysis of Massive Activations in LLMs", arXiv 2503.22329.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from setpoint.errors import InputError
from setpoint.optim.decay import no_weight_decay

STD = 0.02
"""Spread from which key and value are drawn."""


class KVBias(nn.Module):
    """A learnable key and value for each key head, put in front of an attention's own.

    Args:
        num_kv_heads: Key and value heads.
        head_dim: Width of a head.
        slot_logit: Added to the slot's logits. At ``-inf`` the slot gets no weight and the attention is the plain
            one, in every dtype.
        device, dtype: Of the parameters.

    Raises:
        InputError: A size below 1; on call, keys of another number of heads or another width.

    Example:
        >>> bias = KVBias(2, 4)
        >>> k, v, mask = bias(torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4), causal=True)
        >>> k.shape, mask.shape, mask.sum(-1).tolist()
        (torch.Size([1, 2, 6, 4]), torch.Size([5, 6]), [2, 3, 4, 5, 6])
    """

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        *,
        slot_logit: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_kv_heads < 1 or head_dim < 1:
            raise InputError(f"KVBias: expected sizes from 1 on, got num_kv_heads={num_kv_heads}, head_dim={head_dim}")
        self.num_kv_heads, self.head_dim, self.slot_logit = num_kv_heads, head_dim, slot_logit
        self.key = nn.Parameter(torch.empty(num_kv_heads, 1, head_dim, device=device, dtype=dtype))
        self.value = nn.Parameter(torch.empty(num_kv_heads, 1, head_dim, device=device, dtype=dtype))
        no_weight_decay(self, "key", "value")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw key and value from N(0, 0.02²)."""
        nn.init.normal_(self.key, 0.0, STD)
        nn.init.normal_(self.value, 0.0, STD)

    def forward(
        self,
        key: Float[Tensor, "batch heads keys head_dim"],
        value: Float[Tensor, "batch heads keys head_dim"],
        mask: Tensor | None = None,
        *,
        queries: int | None = None,
        causal: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and mask with the slot in front.

        Args:
            key, value: After any rotation; ``heads`` may be a multiple of the key heads, when those were repeated.
            mask: As for ``scaled_dot_product_attention``: True where a query may look, or numbers that are added.
            queries: Number of queries, None for as many as keys.
            causal: Whether later keys are hidden. The result has that in its mask.

        Returns:
            ``(batch, heads, 1 + keys, head_dim)`` twice, and the mask with a column more, None for no mask.
        """
        heads = key.shape[-3]
        if heads % self.num_kv_heads or key.shape[-1] != self.head_dim:
            raise InputError(
                f"KVBias: expected keys (batch, {self.num_kv_heads}, keys, {self.head_dim}), or each head repeated, "
                f"got {tuple(key.shape)}"
            )
        queries = key.shape[-2] if queries is None else queries
        if causal:
            mask = torch.ones(queries, key.shape[-2], dtype=torch.bool, device=key.device).tril()
        repeat = heads // self.num_kv_heads
        slots = [
            own.repeat_interleave(repeat, 0).to(like.dtype).expand(*like.shape[:-2], 1, like.shape[-1])
            for own, like in ((self.key, key), (self.value, value))
        ]
        return torch.cat((slots[0], key), -2), torch.cat((slots[1], value), -2), self._mask(mask, key, queries)

    def _mask(self, mask: Tensor | None, key: Tensor, queries: int) -> Tensor | None:
        if self.slot_logit == 0.0:
            if mask is None:
                return None
            return functional.pad(mask, (1, 0), value=True if mask.dtype == torch.bool else 0.0)
        if mask is None:
            mask = torch.zeros(queries, key.shape[-2], dtype=key.dtype, device=key.device)
        elif mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=key.dtype).masked_fill(~mask, float("-inf"))
        return functional.pad(mask, (1, 0), value=self.slot_logit)

    def extra_repr(self) -> str:
        """Sizes and the slot's logit."""
        return f"num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, slot_logit={self.slot_logit}"
