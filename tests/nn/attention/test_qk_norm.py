"""QK-norm (Henry et al., 2020; Dehghani et al., 2023)."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from setpoint.errors import InputError
from setpoint.models import Attention, Transformer, TransformerConfig
from setpoint.nn import LayerNorm, QKNorm, RMSNorm
from setpoint.surgery import Anatomy


def test_each_head_of_queries_and_keys_is_normalized_by_itself() -> None:
    q, k = 9 * torch.randn(2, 4, 5, 8), 0.1 * torch.randn(2, 1, 5, 8)
    for y in QKNorm(8, partial(RMSNorm, eps=0.0))(q, k):
        torch.testing.assert_close(y.square().mean(-1), torch.ones(y.shape[:-1]))
    for y in QKNorm(8, LayerNorm)(q, k):
        torch.testing.assert_close(y.mean(-1), torch.zeros(y.shape[:-1]), atol=1e-5, rtol=0)


def test_it_bounds_the_logits_of_attention() -> None:
    q, k = QKNorm(16)(100 * torch.randn(2, 5, 16), 100 * torch.randn(2, 5, 16))
    assert (q @ k.mT / 16**0.5).abs().max() <= 16**0.5


def test_an_attention_with_the_norm_as_argument_is_one_with_this_layer() -> None:
    attention, own = Attention(16, 2, causal=False, qk_norm=RMSNorm), QKNorm(8)
    nn.init.normal_(own.q_norm.weight), nn.init.normal_(own.k_norm.weight)
    attention.load_state_dict(own.state_dict(), strict=False)
    x = torch.randn(2, 5, 16)
    q, k, v = (
        proj(x).unflatten(-1, (2, 8)).transpose(1, 2) for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    mixed = nn.functional.scaled_dot_product_attention(*own(q, k), v)
    torch.testing.assert_close(attention(x), attention.o_proj(mixed.transpose(1, 2).flatten(2)))


def test_an_anatomy_finds_the_norms_of_a_transformer_made_with_it() -> None:
    config = TransformerConfig(vocab_size=11, dim=16, depth=1, num_heads=2)
    model = Transformer(config, attention=partial(Attention, qk_norm=RMSNorm))
    (site,) = Anatomy.trace(model, torch.tensor([[1, 2, 3]])).attention
    assert site.query_norm.endswith("q_norm")
    assert site.key_norm.endswith("k_norm")


def test_bad_arguments_and_inputs_are_refused() -> None:
    with pytest.raises(InputError, match="head_dim of at least 1"):
        QKNorm(0)
    with pytest.raises(InputError, match=r"\(\*, 8\), got \(2, 5, 4\)"):
        QKNorm(8)(torch.randn(2, 5, 8), torch.randn(2, 5, 4))
