"""What a recording promises, against float64 references on models small enough to compute by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from setpoint.errors import InputError
from setpoint.probe.recorder import Recorder, record
from setpoint.types import Site, Stat, Tap

RESIDUALS = (
    Site("embedding", "embedding", Tap("0", "input"), module="0"),
    Site("0 residual", "residual", Tap("0", "output"), block=0, module="0"),
    Site("1 residual", "residual", Tap("1", "output"), block=1, module="1"),
)


class Adds(nn.Module):
    """A block that adds to its input in place, as some models do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        y += x
        return y  # type: ignore[no-any-return]


class Attends(nn.Module):
    """Grouped-query attention straight from its input."""

    def __init__(self, *, fail: bool = False) -> None:
        super().__init__()
        self.fail = fail

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        if self.fail:
            raise RuntimeError("broken on purpose")
        return functional.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)


def two_blocks() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Adds(6), Adds(6))


def reference(model: nn.Sequential, x: Tensor) -> list[np.ndarray[Any, Any]]:
    double = two_blocks().double()
    double.load_state_dict(model.state_dict())
    with torch.no_grad():
        first = double[0](x.double())
        return [x.double().numpy(), first.numpy(), double[1](first).numpy()]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_moments_and_channels_match_float64_also_far_from_zero(offset: float) -> None:
    model = two_blocks()
    batches = [torch.randn(2, 7, 6) + offset, torch.randn(1, 5, 6) + offset]
    trace = record(model, batches, sites=RESIDUALS)
    for index, site in enumerate(RESIDUALS):
        x = np.concatenate([reference(model, b)[index].reshape(-1, 6) for b in batches])
        found = trace.records[site.name]
        assert (found.count, found.tokens) == (x.size, 19)
        assert found.mean == pytest.approx(x.mean(), rel=1e-5, abs=1e-6)
        assert found.variance == pytest.approx(x.var(), rel=1e-4)
        assert found.fourth_moment == pytest.approx(((x - x.mean()) ** 4).mean(), rel=1e-3)
        np.testing.assert_allclose(found.channel_rms, np.sqrt((x**2).mean(0)), rtol=1e-5)
        np.testing.assert_allclose(found.channel_max, np.abs(x).max(0), rtol=1e-5)
    assert (trace.sequences, trace.tokens, trace.blocks) == (3, 19, 2)


def test_steps_compare_a_block_with_its_input_though_it_adds_in_place() -> None:
    model, x = two_blocks(), torch.randn(2, 7, 6)
    trace = record(model, [x], sites=RESIDUALS)
    streams = reference(model, x)
    for block in (0, 1):
        a, b = streams[block].reshape(-1, 6), streams[block + 1].reshape(-1, 6)
        cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        found = trace.records[f"{block} residual"]
        assert found.angle == pytest.approx(np.degrees(np.arccos(cosine)).mean(), rel=1e-4)
        assert found.step_ratio == pytest.approx(np.sqrt(((b - a) ** 2).mean() / (a**2).mean()), rel=1e-4)
    assert trace.records["embedding"].angle is None


def test_peaks_name_sequence_token_and_channel_over_all_batches() -> None:
    first, second = torch.randn(2, 7, 6), torch.randn(3, 7, 6)
    first[1, 4, 2], second[2, 0, 5] = -2e4, 500.0
    peaks = record(nn.Identity(), [first, second], sites=[Site("x", "residual", Tap("", "output"))]).records["x"].peaks
    assert [(p.value, p.sequence, p.token, p.channel) for p in peaks[:2]] == [(-2e4, 1, 4, 2), (500.0, 4, 0, 5)]


def test_feature_maps_have_their_channels_on_axis_1() -> None:
    x = torch.randn(2, 3, 4, 5).relu()
    sites = [Site("x", "convolution", Tap("", "output"), channel_axis=1)]
    found = record(nn.Identity(), [x], sites=sites).records["x"]
    np.testing.assert_allclose(found.channel_mean, x.double().mean((0, 2, 3)).numpy(), rtol=1e-5)
    np.testing.assert_allclose(found.channel_active, (x > 0).double().mean((0, 2, 3)).numpy(), rtol=1e-6)
    assert found.tokens == 40


def test_non_finite_values_are_counted_and_left_out() -> None:
    x = torch.randn(1, 8, 6)
    x[0, 3, 2], x[0, 5, 0] = math.nan, math.inf
    found = record(nn.Identity(), [x], sites=[Site("x", "residual", Tap("", "output"))]).records["x"]
    finite = x[x.isfinite()].double()
    assert (found.non_finite, found.count) == (2, 48)
    assert found.mean == pytest.approx(float(finite.mean()))
    assert found.maximum == float(finite.max())


def test_padding_and_groups_select_tokens() -> None:
    class Takes(nn.Module):
        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return x

    x, mask = torch.ones(2, 4, 6), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    x[1, 2:] = 1e3
    x[:, 0] = 10.0
    first = torch.zeros(2, 4, dtype=torch.bool)
    first[:, 0] = True
    sites = [Site("x", "residual", Tap("", "output"))]
    batch = {"x": x, "attention_mask": mask}
    found = record(Takes(), [batch], sites=sites, groups={"first": first, "rest": lambda _: ~first}).records["x"]
    assert (found.tokens, found.maximum) == (6, 10.0)
    assert found.groups["first"].norm == pytest.approx(10 * math.sqrt(6))
    assert (found.groups["rest"].norm, found.groups["rest"].tokens) == (pytest.approx(math.sqrt(6)), 4)


def test_attention_entropy_matches_a_hand_computation_with_grouped_queries() -> None:
    torch.manual_seed(1)
    q, k = torch.randn(2, 4, 9, 8) * 3, torch.randn(2, 2, 9, 8)
    site = Site("core", "attention", Tap("", "input"))
    found = record(Attends(), [(q, k)], sites=[site]).attention["core"]
    logits = q.double() @ k.double().repeat_interleave(2, 1).transpose(2, 3) / math.sqrt(8)
    hidden = torch.ones(9, 9).triu(1).bool()
    p = logits.masked_fill(hidden, -math.inf).softmax(-1)[:, :, 1:]
    entropy = -torch.special.xlogy(p, p).sum(-1) / torch.arange(2, 10).double().log()
    np.testing.assert_allclose(found.entropy, entropy.mean((0, 2)).numpy(), rtol=1e-4)
    np.testing.assert_allclose(found.sink, p[..., 0].mean((0, 2)).numpy(), rtol=1e-4)
    np.testing.assert_allclose(found.logit_max, logits.masked_fill(hidden, 0).abs().amax((0, 2, 3)).numpy(), rtol=1e-4)


@pytest.mark.parametrize("weights", [False, True])
def test_multi_head_attention_is_read_fused_and_eager(weights: bool) -> None:
    torch.manual_seed(2)
    model, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 5, 8) * 4
    trace = record(
        model,
        [x],
        sites=[Site("core", "attention", Tap("", "input"))],
        forward=lambda m, b: m(b, b, b, need_weights=weights),
    )
    with torch.no_grad():
        p = model.eval()(x, x, x, average_attn_weights=False)[1].double()
    entropy = -torch.special.xlogy(p, p).sum(-1) / math.log(5)
    np.testing.assert_allclose(trace.attention["core"].entropy, entropy.mean((0, 2)).numpy(), rtol=1e-4)


def test_gradients_match_autograd_and_leave_grad_as_it_was() -> None:
    model, x = two_blocks(), torch.randn(2, 7, 6)
    kept = torch.ones_like(model[0].linear.weight)
    model[0].linear.weight.grad = kept
    trace = record(model, [x], sites=RESIDUALS, loss=lambda y, _: y.square().mean())
    assert model[0].linear.weight.grad is kept
    assert torch.equal(kept, torch.ones_like(kept))
    assert model[1].linear.weight.grad is None

    middle = model[0](x).detach().requires_grad_()
    value = model[1](middle).square().mean()
    at_site, at_weight = torch.autograd.grad(value, [middle, model[1].linear.weight])
    assert trace.loss == pytest.approx(float(value.detach()))
    assert trace.records["0 residual"].gradient_rms == pytest.approx(float(at_site.square().mean().sqrt()), rel=1e-5)
    assert trace.parameters["1.linear.weight"].gradient_norm == pytest.approx(float(at_weight.norm()), rel=1e-5)


def test_a_shared_module_is_told_apart_by_its_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Linear(1, 1, bias=False)
            nn.init.constant_(self.scale.weight, 3.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.scale(self.scale(x))  # type: ignore[no-any-return]

    sites = [Site(f"call {c}", "residual", Tap("scale", "output", call=c), block=c) for c in (0, 1)]
    trace = record(Twice(), [torch.ones(1, 2, 1)] * 2, sites=sites)
    assert [trace.records[s.name].mean for s in sites] == [3.0, 9.0]


def test_nothing_stays_behind_also_after_an_exception() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4), Attends(fail=True)).train()
    sites = [Site("norm", "norm", Tap("1", "output"), channel_axis=1), Site("core", "attention", Tap("2", "input"))]
    fast, running = torch.backends.mha.get_fastpath_enabled(), model[1].running_mean
    before = running.clone()
    with pytest.raises(TypeError):
        record(model, [torch.randn(3, 4)], sites=sites)
    model[2] = nn.Identity()
    with pytest.raises(RuntimeError, match="on purpose"):
        record(Attends(fail=True), [(torch.ones(1, 1, 2, 2),) * 2], sites=[Site("c", "attention", Tap("", "input"))])
    state = torch.get_rng_state()
    record(model, [torch.randn(3, 4, generator=torch.Generator().manual_seed(0))], sites=sites[:1])
    assert hooks(model) == 0
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert model[1].running_mean is running
    assert torch.equal(running, before)
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert not torch.overrides._get_current_function_mode_stack()


def test_recomputation_under_checkpointing_is_not_counted_twice() -> None:
    from torch.utils.checkpoint import checkpoint

    model = two_blocks()

    def forward(m: nn.Module, x: Tensor) -> Any:
        return m[1](checkpoint(m[0], x, use_reentrant=False))  # type: ignore[index]

    trace = record(model, [torch.randn(2, 7, 6)], sites=RESIDUALS, forward=forward, loss=lambda y, _: y.mean())
    assert [r.tokens for r in trace.records.values()] == [14, 14, 14]


def test_a_loop_of_ones_own_counts_its_batches() -> None:
    model = two_blocks()
    recorder = Recorder(model, RESIDUALS, needs={"residual": {Stat.MOMENTS}})
    with recorder, torch.no_grad():
        for _ in range(3):
            model(torch.randn(2, 7, 6))
    trace = recorder.trace()
    assert (trace.sequences, trace.tokens, trace.records["1 residual"].count) == (6, 42, 252)
    assert hooks(model) == 0


def test_mistakes_are_named() -> None:
    with pytest.raises(InputError, match="at least one batch"):
        record(two_blocks(), [], sites=RESIDUALS)
    with pytest.raises(InputError, match="'9'"):
        record(two_blocks(), [torch.ones(1, 2, 6)], sites=[Site("x", "residual", Tap("9", "output"))])
    with pytest.raises(InputError, match="scalar"):
        record(two_blocks(), [torch.ones(1, 2, 6)], sites=RESIDUALS, loss=lambda y, _: y)
