"""Attention statistics against the plain formula, for every way in which attention is written."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from setpoint.probe import record
from setpoint.probe.recorder_attention import attention_rows, settle_cores, spread_rows
from setpoint.probe.statistics import AttentionStatistics
from setpoint.types import AttentionRecord, Site, Tap


def attention_statistics(query: Tensor, key: Tensor, **options: Any) -> AttentionStatistics:
    return settle_cores([attention_rows(query, key, **options)])[0]


ATTENTION = Site("attention", "attention", Tap("", "output"))


def reference(q: Tensor, k: Tensor, bias: Tensor | None = None, valid: Tensor | None = None, rows: int = 64) -> Any:
    """Per head: entropy, sink, largest, saturated, logit_max, straight from the definitions, in float64."""
    q, k = q.double(), k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    visible = torch.ones_like(logits, dtype=torch.bool)
    if bias is not None:
        bias = bias.expand_as(logits)
        visible = bias > -1e4
        logits = logits + bias.double()
    heads = []
    for h in range(q.shape[1]):
        found: list[tuple[float, ...]] = []
        highest = 0.0
        for b in range(q.shape[0]):
            for i in spread_rows(q.shape[2], rows).tolist():
                seen = logits[b, h, i][visible[b, h, i]]
                if len(seen):
                    highest = max(highest, seen.abs().max().item())
                if len(seen) < 2 or (valid is not None and not valid[b, i]):
                    continue
                p = seen.softmax(0)
                first = p[0].item() if visible[b, h, i, 0] else 0.0
                entropy = -(p * p.log().clamp(min=-1e300)).sum().item() / math.log(len(seen))
                found.append((entropy, first, p.max().item(), float(p.max() > 0.999)))
        heads.append((*np.mean(found, 0), highest))
    return np.array(heads).T


def assert_matches(found: AttentionRecord, expected: Any) -> None:
    for name, values in zip(("entropy", "sink", "largest", "saturated", "logit_max"), expected, strict=True):
        assert getattr(found, name) == pytest.approx(values, rel=1e-4, abs=1e-6), name


def causal_bias(queries: int, keys: int) -> Tensor:
    return torch.zeros(queries, keys).masked_fill(torch.ones(queries, keys).triu(1).bool(), -math.inf)


@pytest.mark.parametrize("tokens", [5, 64, 200])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_causal_and_grouped_attention_matches_the_formula(tokens: int, kv_heads: int) -> None:
    q, k = torch.randn(2, 4, tokens, 8), torch.randn(2, kv_heads, tokens, 8)
    found = attention_statistics(q, k, causal=True).record(ATTENTION)
    assert_matches(found, reference(q, k, causal_bias(tokens, tokens)))


def test_bool_and_additive_masks_mean_the_same() -> None:
    q, k = torch.randn(2, 3, 20, 8), torch.randn(2, 3, 30, 8)
    keep = torch.rand(2, 1, 20, 30) < 0.6
    added = torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)
    expected = reference(q, k, torch.zeros(keep.shape).masked_fill(~keep, -math.inf))
    assert_matches(attention_statistics(q, k, mask=keep).record(ATTENTION), expected)
    assert_matches(attention_statistics(q, k, mask=added).record(ATTENTION), expected)


def test_position_bias_counts_as_part_of_the_logits() -> None:
    q, k = torch.randn(1, 2, 16, 8), torch.randn(1, 2, 16, 8)
    bias = torch.randn(1, 2, 16, 16) * 3
    assert_matches(attention_statistics(q, k, mask=bias).record(ATTENTION), reference(q, k, bias))


def test_padded_queries_and_keys_are_left_out() -> None:
    q, k = torch.randn(2, 2, 12, 8), torch.randn(2, 2, 12, 8)
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[1, 7:] = False
    keys = valid[:, None, None, :]
    bias = torch.zeros(2, 1, 1, 12).masked_fill(~keys, -math.inf)
    found = attention_statistics(q, k, mask=keys, valid=valid).record(ATTENTION)
    expected = reference(q, k, bias, valid)
    assert_matches(found, expected)
    assert found.queries == int(valid.sum())


def test_uniform_attention_has_entropy_one_and_one_hot_zero() -> None:
    k = torch.eye(16)[None, None]
    flat = attention_statistics(torch.zeros(1, 1, 16, 16), k).record(ATTENTION)
    sharp = attention_statistics(1e4 * k, k).record(ATTENTION)
    assert flat.entropy == pytest.approx([1.0])
    assert flat.largest == pytest.approx([1 / 16])
    assert (sharp.entropy.tolist(), sharp.saturated.tolist()) == ([0.0], [1.0])
    assert sharp.sink == pytest.approx([1 / 16])


def test_rows_with_one_visible_key_are_left_out() -> None:
    q = k = torch.randn(1, 1, 2, 4)
    assert attention_statistics(q, k, causal=True).record(ATTENTION).queries == 1


def test_batches_too_large_for_one_piece_are_cut_without_a_seam() -> None:
    q, k = torch.randn(40, 4, 64, 8), torch.randn(40, 4, 512, 8)
    pieces = attention_statistics(q, k).record(ATTENTION)
    halves = attention_statistics(q[:20], k[:20])
    halves.add(attention_statistics(q[20:], k[20:]))
    assert pieces.queries == 40 * 64
    assert pieces.entropy == pytest.approx(halves.record(ATTENTION).entropy, rel=1e-6)


def test_half_precision_queries_are_multiplied_in_float32() -> None:
    q, k = torch.randn(1, 2, 16, 8).bfloat16() * 8, torch.randn(1, 2, 16, 8).bfloat16() * 8
    assert_matches(attention_statistics(q, k).record(ATTENTION), reference(q, k))


class SelfAttention(nn.Module):
    """One attention written in a given style; ``q`` and ``k`` are kept for the reference."""

    def __init__(self, style: str, heads: int = 4, width: int = 32) -> None:
        super().__init__()
        self.style, self.heads = style, heads
        self.project = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.project(x).chunk(3, -1))
        self.q, self.k = q.detach(), k.detach()
        length = x.shape[1]
        if self.style == "fused":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif self.style == "masked":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(length, length).tril().bool())
        else:
            logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + causal_bias(length, length)
            weights = {
                "functional": lambda: F.softmax(logits, dim=-1),
                "torch": lambda: torch.softmax(logits, -1),
                "method": lambda: logits.softmax(3),
                "module": lambda: nn.Softmax(dim=-1)(logits),
            }[self.style]()
            y = weights @ v
        return y.transpose(1, 2).flatten(2)


def recorded(model: nn.Module, batch: Any, sites: list[Site], **options: Any) -> list[AttentionRecord]:
    return list(record(model, [batch], sites=sites, **options).attention.values())


@pytest.mark.parametrize("style", ["fused", "masked", "functional", "torch", "method", "module"])
@pytest.mark.parametrize("gradients", [False, True])
def test_however_attention_is_written_it_is_measured_alike(style: str, gradients: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 32), SelfAttention(style))
    loss = (lambda out, _: out.square().mean()) if gradients else None
    (found,) = recorded(model, torch.randn(2, 20, 8), [Site("attention", "attention", Tap("1", "output"))], loss=loss)
    assert_matches(found, reference(model[1].q, model[1].k, causal_bias(20, 20)))


def test_autocast_does_not_reach_the_recomputed_logits() -> None:
    model = nn.Sequential(nn.Linear(8, 32), SelfAttention("fused"))

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m(x)

    site = Site("attention", "attention", Tap("1", "output"))
    (found,) = recorded(model, torch.randn(2, 20, 8), [site], forward=forward)
    assert_matches(found, reference(model[1].q, model[1].k, causal_bias(20, 20)))


@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention_is_measured_with_and_without_its_weights(need_weights: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=need_weights)[0]

    model, x = Model().eval(), torch.randn(3, 10, 16)
    (found,) = recorded(model, x, [Site("attention", "attention", Tap("attention", "output"))])
    inner = model.attention
    q, k, _ = F.linear(x, inner.in_proj_weight, inner.in_proj_bias).chunk(3, -1)
    q, k = (t.unflatten(-1, (4, -1)).transpose(1, 2).detach() for t in (q, k))
    assert_matches(found, reference(q, k))


def test_encoder_layers_of_torch_leave_their_fused_path_while_recorded() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 3).eval()
    sites = [Site(f"attention {i}", "attention", Tap(f"layers.{i}.self_attn", "output"), i) for i in range(3)]
    found = recorded(model, torch.randn(2, 9, 16), sites)
    assert [a.site.name for a in found] == ["attention 0", "attention 1", "attention 2"]
    assert {a.queries for a in found} == {18}


def test_several_cores_in_one_module_are_taken_in_order() -> None:
    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x.unsqueeze(1)
            first = F.scaled_dot_product_attention(x, x, x)
            return F.scaled_dot_product_attention(torch.zeros_like(x), x, first)

    sites = [Site(name, "attention", Tap("", "output")) for name in ("first", "second")]
    first, second = recorded(Flat(), torch.randn(1, 6, 8), sites)
    assert (first.site.name, second.site.name) == ("first", "second")
    assert second.entropy == pytest.approx([1.0])
    assert first.entropy[0] < 0.999


def test_softmax_over_experts_is_no_attention() -> None:
    class Router(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.softmax(x.flatten(0, 1), dim=-1)

    model = nn.Sequential(Router(), nn.Linear(8, 8))
    needs_a_site = Site("linear", "hidden", Tap("1", "output"))
    trace = record(model, [torch.randn(2, 5, 8)], sites=[Site("a", "attention", Tap("0", "output")), needs_a_site])
    assert not trace.attention


def test_no_mode_stays_behind_after_an_exception_inside_attention() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("inside")

    depth = torch._C._len_torch_function_stack()
    with pytest.raises(RuntimeError, match="inside"):
        record(Broken(), [torch.ones(1, 2, 3)], sites=[ATTENTION])
    assert torch._C._len_torch_function_stack() == depth


def test_recomputed_attention_is_not_counted_twice() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.attention = nn.Linear(8, 32), SelfAttention("fused")

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.attention, self.embed(x), use_reentrant=False)

    site = Site("attention", "attention", Tap("attention", "output"))
    (found,) = recorded(Model(), torch.randn(2, 20, 8), [site], loss=lambda out, _: out.square().mean())
    assert found.queries == 2 * 19
