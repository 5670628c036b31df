from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from setpoint import fix, load
from setpoint.errors import InputError
from setpoint.fixes.kv_bias import CLOSED
from setpoint.models import Attention, Transformer, TransformerConfig
from setpoint.nn.attention.kv_bias import KVBias
from setpoint.optim import decay_groups
from setpoint.running import evaluated, tensors_of
from setpoint.surgery.inserts import WithKVBias

Make = Callable[..., tuple[nn.Module, Tensor]]


def logits(model: nn.Module, batch: Tensor) -> Tensor:
    with evaluated(model):
        output = model(batch)
    return output if isinstance(output, Tensor) else output.logits


def qkv(tokens: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(2, 3, tokens, 4) for _ in range(3))  # type: ignore[return-value]


def test_a_closed_slot_is_plain_attention() -> None:
    q, k, v = qkv()
    keys, values, mask = KVBias(3, 4, slot_logit=CLOSED)(k, v, queries=5, causal=True)
    with_slot = functional.scaled_dot_product_attention(q, keys, values, mask)
    torch.testing.assert_close(with_slot, functional.scaled_dot_product_attention(q, k, v, is_causal=True))


def test_a_slot_of_zeros_is_a_softmax_with_one_more_in_the_denominator() -> None:
    q, k, v = qkv()
    bias = KVBias(3, 4)
    nn.init.zeros_(bias.key)
    nn.init.zeros_(bias.value)
    keys, values, mask = bias(k, v, queries=5)
    weights = (q @ k.mT / 2).exp()
    expected = weights / (1 + weights.sum(-1, keepdim=True)) @ v
    torch.testing.assert_close(functional.scaled_dot_product_attention(q, keys, values, mask), expected)


def test_row_t_of_a_causal_attention_has_t_plus_two_weights_that_sum_to_one() -> None:
    q, k, v = qkv()
    keys, _, mask = KVBias(3, 4)(k, v, queries=5, causal=True)
    weights = functional.scaled_dot_product_attention(q, keys, torch.eye(6).expand(2, 3, 6, 6), mask)
    assert (weights > 0).sum(-1)[0, 0].tolist() == [2, 3, 4, 5, 6]
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 5))


def test_heads_of_one_group_get_the_same_key() -> None:
    keys, _, _ = KVBias(2, 4)(torch.randn(1, 6, 5, 4), torch.randn(1, 6, 5, 4), queries=5)
    assert torch.equal(keys[:, 0, 0], keys[:, 2, 0])
    assert not torch.equal(keys[:, 0, 0], keys[:, 3, 0])


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "vit", "bert"])
def test_the_closed_slot_leaves_a_model_as_it_computes(make: Make, family: str) -> None:
    model, batch = make(family)
    fixed = fix(model, "kv-bias-slot", [batch], timed=False)
    assert sum(isinstance(m, WithKVBias) for m in fixed.model.modules()) == 2
    assert fixed.change.exact is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "vit", "bert"])
def test_the_closed_slot_is_closed_in_half_precision(make: Make, family: str, dtype: torch.dtype) -> None:
    model, batch = make(family)
    model.to(dtype)
    batch = batch.to(dtype) if batch.is_floating_point() else batch
    fixed = fix(model, "kv-bias-slot", [batch], timed=False)
    assert fixed.change.exact is not None
    assert all(bool(t.isfinite().all()) for t in tensors_of(fixed.model(batch)) if t.is_floating_point())


def test_a_row_with_every_key_masked_looks_at_the_closed_slot_as_little_as_before() -> None:
    q, k, v = qkv()
    lowest = torch.full((5, 5), torch.finfo(k.dtype).min)
    keys, values, mask = KVBias(3, 4, slot_logit=CLOSED)(k, v, lowest, queries=5)
    with_slot = functional.scaled_dot_product_attention(q, keys, values, mask)
    torch.testing.assert_close(with_slot, functional.scaled_dot_product_attention(q, k, v, lowest))
    nothing = torch.zeros(5, 5, dtype=torch.bool)
    keys, values, mask = KVBias(3, 4, slot_logit=CLOSED)(k, v, nothing, queries=5)
    assert not functional.scaled_dot_product_attention(q, keys, values, mask).any()


def test_a_closed_slot_is_saved_and_can_be_opened_for_training(make: Make, tmp_path: Path) -> None:
    model, batch = make("gpt2")
    fixed = fix(model, "kv-bias-slot", [batch], timed=False)
    again = load(fixed.save(tmp_path / "out")).model
    assert torch.equal(logits(again, batch), logits(fixed.model, batch))
    for slot in (m for m in again.modules() if isinstance(m, KVBias)):
        slot.slot_logit = 0.0
    again(batch).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in again.named_parameters() if ".kv_bias." in n)


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "vit", "encoder"])
def test_the_open_slot_changes_it_and_is_seen_by_training(make: Make, family: str) -> None:
    model, batch = make(family)
    fixed = fix(model, "kv-bias:std=1.0", [batch], timed=False)
    assert fixed.change.relative > 1e-3
    output = fixed.model(batch)
    (output if isinstance(output, Tensor) else output.logits).square().sum().backward()
    slots = [
        p for name, p in fixed.model.named_parameters() if "kv_bias" in name or name.endswith(("bias_k", "bias_v"))
    ]
    assert len(slots) == 4
    assert all(p.grad is not None and bool(p.grad.any()) for p in slots)


def test_it_makes_the_model_that_the_attention_argument_makes() -> None:
    class Biased(Attention):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs, kv_bias=True)

    config = TransformerConfig(vocab_size=32, dim=16, depth=2, num_heads=4, num_kv_heads=2)
    plain, biased = Transformer(config).eval(), Transformer(config, attention=Biased).eval()
    biased.load_state_dict(plain.state_dict(), strict=False)
    batch = torch.randint(0, 32, (2, 7))
    fixed = fix(plain, "kv-bias", [batch], timed=False).model
    with torch.no_grad():
        for own, block in zip(biased.stack.blocks, fixed.stack.blocks, strict=True):
            own.attention.sublayer.kv_bias.key.copy_(block.attention.sublayer.kv_bias.key)
            own.attention.sublayer.kv_bias.value.copy_(block.attention.sublayer.kv_bias.value)
        torch.testing.assert_close(fixed(batch), biased(batch))


def test_generation_with_a_cache_sees_the_slot_once(make: Make) -> None:
    model, batch = make("llama")
    fixed = fix(model, "kv-bias:std=1.0", [batch], timed=False).model
    with torch.no_grad():
        whole = fixed(batch).logits[:, -1]
        past = fixed(batch[:, :-1], use_cache=True).past_key_values
        last = fixed(batch[:, -1:], past_key_values=past, use_cache=True).logits[:, -1]
    torch.testing.assert_close(last, whole, rtol=1e-4, atol=1e-5)


def test_the_same_seed_draws_the_same_slot(make: Make) -> None:
    model, batch = make("gpt2")
    first, second, third = (fix(model, "kv-bias", [batch], seed=s, timed=False).model for s in (0, 0, 1))
    assert torch.equal(logits(first, batch), logits(second, batch))
    assert not torch.equal(logits(first, batch), logits(third, batch))


def test_attention_by_a_softmax_of_its_own_is_refused(make: Make) -> None:
    model, batch = make("gpt2")
    model.set_attn_implementation("eager")
    with pytest.raises(InputError, match=r"h\.0\.attn: computes its attention by a softmax"):
        fix(model, "kv-bias", [batch])


def test_a_closed_slot_does_not_go_into_torch_attention(make: Make) -> None:
    model, batch = make("encoder")
    with pytest.raises(InputError, match="MultiheadAttention"):
        fix(model, "kv-bias-slot", [batch])


def test_weight_decay_leaves_a_slot_alone_wherever_it_was_put_in(make: Make) -> None:
    model, batch = make("gpt2")
    fixed = fix(model, "kv-bias", [batch], timed=False).model
    decayed, kept = (group["names"] for group in decay_groups(fixed, 0.1))
    slots = {name for name, _ in fixed.named_parameters() if ".kv_bias." in name}
    assert slots
    assert slots <= set(kept)
    assert not slots & set(decayed)
