"""Whether later tokens are masked, however the mask is written and whatever stands beside the tokens' keys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from setpoint.surgery import Anatomy

TRIANGLE = torch.ones(6, 6, dtype=torch.bool).tril()
SEEN = torch.ones(6, 1, dtype=torch.bool)
CAUSAL = {
    "plain": TRIANGLE,
    "a slot in front": torch.cat((SEEN, TRIANGLE), 1),
    "a slot behind": torch.cat((TRIANGLE, SEEN), 1),
    "keys of earlier tokens": torch.ones(6, 9, dtype=torch.bool).tril(3),
}
NOT_CAUSAL = {
    "everything is seen": torch.ones(6, 6, dtype=torch.bool),
    "padding at the end": torch.arange(6).expand(6, 6) < 4,
    "everything is seen beside a slot": torch.ones(6, 7, dtype=torch.bool),
    "earlier tokens are hidden": TRIANGLE.T,
}


class Attention(nn.Module):
    """Attention with a mask; keys beyond the tokens' own are learned."""

    def __init__(self, mask: Tensor, form: str) -> None:
        super().__init__()
        self.form, self.seen = form, mask
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.slots = nn.Parameter(torch.ones(1, mask.shape[1] - 6, 8))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), torch.cat((self.k(x), self.slots), 1), torch.cat((self.v(x), self.slots), 1)
        numbers = torch.zeros(self.seen.shape).masked_fill(~self.seen, -torch.inf)
        if self.form == "softmax":
            return x + (q @ k.mT / 3 + numbers).softmax(-1) @ v  # type: ignore[no-any-return]
        mask = self.seen if self.form == "booleans" else numbers
        return x + functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], mask)[:, 0]


@pytest.mark.parametrize("form", ["booleans", "numbers", "softmax"])
@pytest.mark.parametrize(
    ("mask", "causal"),
    [*((mask, True) for mask in CAUSAL.values()), *((mask, False) for mask in NOT_CAUSAL.values())],
    ids=[*CAUSAL, *NOT_CAUSAL],
)
def test_a_mask_that_hides_later_tokens_is_causal(mask: Tensor, causal: bool, form: str) -> None:
    x = torch.linspace(-2, 2, 48).sin().reshape(1, 6, 8)
    assert [site.causal for site in Anatomy.trace(Attention(mask, form), x).attention] == [causal]
