from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from setpoint.running import evaluated
from setpoint.surgery import Anatomy
from setpoint.surgery.comparing import double, lifted
from setpoint.surgery.copying import in_float64
from setpoint.surgery.editing import commit
from setpoint.surgery.equalize import absorb_bias, cannot_equalize, equalize, merge_qkv
from setpoint.surgery.fold import cannot_fold, fold_norm
from setpoint.testing.tiny import tiny
from setpoint.types import FeedForwardSite, Projection


def run(model: nn.Module, batch: Tensor) -> Tensor:
    with evaluated(model), lifted():
        output = model(batch)
    return output if isinstance(output, Tensor) else output.logits


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "vit", "encoder", "decoder"])
def test_every_norm_whose_readers_allow_it_folds_with_the_same_outputs(family: str) -> None:
    model, batch = tiny(family)
    model, batch = in_float64(model), double(batch)
    before = run(model, batch)
    anatomy = Anatomy.trace(model, batch)
    folded = [name for name, site in anatomy.norms.items() if cannot_fold(anatomy, site) is None]
    for name in folded:
        commit(model, fold_norm(model, anatomy.norms[name]))
    assert len(folded) >= 4
    assert (run(model, batch) - before).abs().max() < 1e-10 * before.abs().max()
    again = Anatomy.trace(model, batch)
    for name in folded:
        assert torch.allclose(again.norms[name].gain, torch.ones(1, dtype=torch.float64))
        assert again.norms[name].shift is None or not again.norms[name].shift.any()


def test_a_norm_that_a_tied_head_reads_does_not_fold() -> None:
    model, batch = tiny("gpt2")
    anatomy = Anatomy.trace(model, batch)
    refusal = cannot_fold(anatomy, anatomy.norms["transformer.ln_f"])
    assert refusal is not None
    assert "tied head" in refusal.reason


def test_a_norm_that_feeds_the_stream_does_not_fold() -> None:
    model, batch = tiny("bert")
    anatomy = Anatomy.trace(model, batch)
    refusal = cannot_fold(anatomy, anatomy.norms["embeddings.LayerNorm"])
    assert refusal is not None
    assert "read by" in refusal.reason


def test_a_shift_gets_a_bias_where_there_was_none() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2, bias=False)).double()
    with torch.no_grad():
        model[0].bias.fill_(0.7)
    x = torch.randn(3, 4, dtype=torch.float64)
    before = model(x)
    anatomy = Anatomy.trace(model, x)
    commit(model, fold_norm(model, anatomy.norms["0"]))
    torch.testing.assert_close(model(x), before)
    assert model[1].bias is not None


def test_half_of_a_norm_folds_into_each_of_two_readers() -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b = nn.LayerNorm(6), nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            left, right = self.norm(x).chunk(2, -1)
            return self.a(left) + self.b(right)

    model = Split().double()
    with torch.no_grad():
        model.norm.weight.copy_(torch.arange(1.0, 7.0))
        model.norm.bias.copy_(torch.arange(6.0))
    x = torch.randn(5, 6, dtype=torch.float64)
    before = model(x)
    anatomy = Anatomy.trace(model, x)
    commit(model, fold_norm(model, anatomy.norms["norm"]))
    torch.testing.assert_close(model(x), before)


def feed_forward(model: nn.Module, batch: Tensor) -> FeedForwardSite:
    branches = [b for block in Anatomy.trace(model, batch).blocks for b in block.branches]
    return next(b.feed_forward for b in branches if b.feed_forward is not None)


@pytest.mark.parametrize("family", ["opt", "llama", "encoder", "decoder"])
def test_a_relu_or_gated_feed_forward_is_equalized_with_the_same_outputs(family: str) -> None:
    model, batch = tiny(family)
    model, batch = in_float64(model), double(batch)
    site = feed_forward(model, batch)
    assert cannot_equalize(site) is None
    before = run(model, batch)
    commit(model, equalize(model, site))
    assert (run(model, batch) - before).abs().max() < 1e-10 * before.abs().max()
    up, down = model.get_parameter(site.up.parameter), model.get_parameter(site.down.parameter)
    torch.testing.assert_close(up.abs().amax(1), down.abs().amax(0))


@pytest.mark.parametrize("family", ["gpt2", "vit"])
def test_through_gelu_no_scale_passes(family: str) -> None:
    model, batch = tiny(family)
    refusal = cannot_equalize(feed_forward(model, batch))
    assert refusal is not None
    assert "homogeneous" in refusal.reason


def test_a_bias_is_absorbed_exactly_where_the_relu_is_open() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        model[0].bias.fill_(50.0)
    x = torch.randn(6, 3, dtype=torch.float64)
    before = model(x)
    first, second = Projection("0", "0.weight", "0.bias"), Projection("2", "2.weight", "2.bias")
    commit(model, absorb_bias(model, first, second, torch.full((4,), 40.0)))
    assert model[0].bias.tolist() == [10.0] * 4
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "encoder"])
def test_merged_queries_keys_and_values_compute_what_they_did_apart(family: str) -> None:
    model, batch = tiny(family)
    site = Anatomy.trace(model, batch).attention[0]
    weight, bias = merge_qkv(model, site)
    x = torch.randn(3, weight.shape[1])
    merged = nn.functional.linear(x, weight, bias)
    apart = {
        "gpt2": lambda: model.transformer.h[0].attn.c_attn(x),
        "opt": lambda: torch.cat([getattr(model.model.decoder.layers[0].self_attn, f"{n}_proj")(x) for n in "qkv"], -1),
        "llama": lambda: torch.cat([getattr(model.model.layers[0].self_attn, f"{n}_proj")(x) for n in "qkv"], -1),
        "encoder": lambda: nn.functional.linear(
            x, model[1].layers[0].self_attn.in_proj_weight, model[1].layers[0].self_attn.in_proj_bias
        ),
    }
    torch.testing.assert_close(merged, apart[family]())
