"""The recorder on real models: what it measures, and that it leaves no trace of itself."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from setpoint.errors import InputError
from setpoint.probe import CHEAP, Recorder, record
from setpoint.types import Site, SiteRole, Stat, Tap

STREAM = frozenset({Stat.MOMENTS, Stat.MEDIAN, Stat.PEAKS, Stat.CHANNELS, Stat.COSINE, Stat.STEP})


def output(module: str, role: SiteRole = "residual", block: int | None = None, axis: int = -1, call: int = 0) -> Site:
    return Site(f"{module} {role} {call}", role, Tap(module, "output", call=call), block, axis, module)


class Branch(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.norm(x))))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = Branch(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class InPlaceBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        x += self.branch(x)
        return x


class Network(nn.Module):
    def __init__(self, block: type[nn.Module] = Block, depth: int = 3, width: int = 16, vocabulary: int = 50) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(block(width) for _ in range(depth))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def sites(model: Network) -> list[Site]:
    found = [output("embed", "embedding")]
    for i in range(len(model.blocks)):
        found += [
            Site(f"hidden {i}", "hidden", Tap(f"blocks.{i}.branch.down", "input"), i),
            output(f"blocks.{i}.branch", "branch", i),
            output(f"blocks.{i}", "residual", i),
        ]
    return [*found, output("head", "logits")]


def ids(batch: int = 2, tokens: int = 12) -> Tensor:
    return torch.randint(0, 50, (batch, tokens))


def stream_of(model: Network, batch: Tensor) -> list[Tensor]:
    """Reference: the residual stream, embedding first, computed by hand."""
    x = model.embed(batch)
    stream = [x]
    for block in model.blocks:
        x = x + block.branch(x)
        stream.append(x)
    return stream


def test_each_site_is_measured_where_it_says() -> None:
    model, batch = Network(), ids()
    trace = record(model, [batch], sites=sites(model))
    stream = stream_of(model, batch)
    assert [r.site.role for r in trace.records.values()][:4] == ["embedding", "hidden", "branch", "residual"]
    for found, true in zip([*trace.by_role("embedding"), *trace.by_role("residual")], stream, strict=True):
        assert found.rms == pytest.approx(true.double().square().mean().sqrt().item(), rel=1e-5)
    hidden = torch.relu(model.blocks[0].branch.up(model.blocks[0].branch.norm(stream[0])))
    assert trace.records["hidden 0"].zeros == pytest.approx((hidden == 0).double().mean().item())
    assert (trace.tokens, trace.sequences, trace.blocks) == (24, 2, 3)
    assert trace.facts["vocabulary"] == 50
    assert trace.facts["parameters"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("block", [Block, InPlaceBlock])
def test_step_is_taken_from_the_blocks_own_input_even_if_it_adds_in_place(block: type[nn.Module]) -> None:
    model, batch = Network(block), ids()
    trace = record(model, [batch], sites=sites(model))
    stream = stream_of(model, batch)
    for i, found in enumerate(trace.by_role("residual")):
        before, after = stream[i].double(), stream[i + 1].double()
        ratio = ((after - before).square().mean() / before.square().mean()).sqrt().item()
        assert found.step_ratio == pytest.approx(ratio, rel=1e-4)


def test_several_batches_are_pooled() -> None:
    model = Network()
    batches = [ids(2, 12), ids(3, 7), ids(1, 30)]
    trace = record(model, batches, sites=sites(model))
    last = torch.cat([stream_of(model, b)[-1].flatten(0, 1) for b in batches]).double()
    found = trace.by_role("residual")[-1]
    assert found.tokens == trace.tokens == 75
    assert found.variance == pytest.approx(last.var(correction=0).item(), rel=1e-5)
    assert max(p.sequence for p in found.peaks) <= 5
    assert trace.sequences == 6


def test_shared_modules_are_told_apart_by_their_call() -> None:
    block = nn.Linear(4, 4)
    model = nn.Sequential(block, nn.Tanh(), block)
    x = torch.randn(2, 5, 4)
    trace = record(model, [x], sites=[output("0", call=0), output("0", call=1)])
    first = block(x)
    second = block(torch.tanh(first))
    rms = [r.rms for r in trace.records.values()]
    assert rms == pytest.approx([t.square().mean().sqrt().item() for t in (first, second)], rel=1e-5)


def test_keyword_inputs_are_counted_after_positional_ones() -> None:
    class Inner(nn.Module):
        def forward(self, a: Tensor, *, b: Tensor) -> Tensor:
            return a + b

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, b=3 * x)

    site = Site("b", "norm", Tap("inner", "input", index=1))
    x = torch.randn(1, 4, 8)
    assert record(Outer(), [x], sites=[site]).records["b"].maximum == (3 * x).max().item()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_feature_maps_have_their_channels_on_axis_one(memory_format: torch.memory_format) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU())
    x = torch.randn(4, 3, 9, 8).to(memory_format=memory_format)
    needs = {Stat.MOMENTS, Stat.CHANNELS, Stat.ZEROS, Stat.PEAKS}
    found = record(model, [x], sites=[output("1", "convolution", axis=1)], needs=needs).records["1 convolution 0"]
    y = model(x).detach()
    assert found.channel_rms == pytest.approx(y.double().square().mean((0, 2, 3)).sqrt().numpy(), rel=1e-5)
    assert found.channel_active == pytest.approx((y != 0).double().mean((0, 2, 3)).numpy())
    assert found.tokens == 4 * 7 * 6
    peak = found.peaks[0]
    assert y[peak.sequence, peak.channel].flatten()[peak.token].item() == peak.value


def test_tokens_in_one_row_are_put_back_into_their_sequences() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).flatten(0, 1))

    trace = record(Flat(), [torch.randn(2, 5, 4)], sites=[output("first", "embedding"), output("second")], needs=STREAM)
    assert {p.token < 5 and p.sequence < 2 for p in trace.records["second residual 0"].peaks} == {True}


def test_padded_tokens_are_left_out() -> None:
    model, batch = Network(), ids(2, 10)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, 6:] = 0
    trace = record(model, [{"ids": batch, "attention_mask": mask}], sites=sites(model))
    kept = stream_of(model, batch)[-1][mask.bool()].double()
    assert trace.tokens == 16
    assert trace.by_role("residual")[-1].variance == pytest.approx(kept.var(correction=0).item(), rel=1e-5)


def test_groups_are_masks_or_callables_of_the_batch() -> None:
    model, batch = Network(), ids(2, 12)
    first = torch.arange(12) < 3
    groups: dict[str, Any] = {"first": first, "low": lambda b: b < 25}
    trace = record(model, [batch], sites=sites(model), groups=groups)
    last, before = stream_of(model, batch)[-1], stream_of(model, batch)[-2]
    found = trace.by_role("residual")[-1].groups
    low = batch < 25
    assert (found["first"].tokens, found["low"].tokens) == (6, int(low.sum()))
    assert found["low"].norm == pytest.approx(last.norm(dim=-1)[low].mean().item(), rel=1e-5)
    angle = torch.nn.functional.cosine_similarity(last.double(), before.double(), dim=-1).acos().rad2deg()
    assert found["first"].angle == pytest.approx(angle[:, :3].mean().item(), rel=1e-4)


def test_needs_may_differ_by_role() -> None:
    model = Network()
    needs: dict[SiteRole, Any] = {"residual": {Stat.MOMENTS}, "hidden": {Stat.ZEROS}}
    trace = record(model, [ids()], sites=sites(model), needs=needs)
    assert {r.site.role for r in trace.records.values()} == {"residual", "hidden"}
    assert trace.records["hidden 0"].mean is None
    assert trace.by_role("residual")[0].zeros is None


def test_recorder_is_a_context_around_a_loop_of_ones_own() -> None:
    model, batch = Network(), ids()
    with Recorder(model, sites(model), needs=CHEAP) as recorder:
        model(batch)
        model(batch)
    by_hand, at_once = recorder.trace(), record(model, [batch, batch], sites=sites(model))
    assert by_hand.tokens == at_once.tokens
    assert [r.rms for r in by_hand.records.values()] == [r.rms for r in at_once.records.values()]


def test_forward_that_bypasses_the_models_call_is_recorded() -> None:
    class TwoWays(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def features(self, x: Tensor) -> Tensor:
            return self.inner(x)

    model, x = TwoWays(), torch.randn(2, 5, 4)
    trace = record(model, [x, x], sites=[output("inner")], forward=lambda m, b: m.features(b))
    assert trace.records["inner residual 0"].tokens == trace.tokens == 20


# -- dtypes and modes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_say_so_and_are_measured_in_float32(dtype: torch.dtype) -> None:
    model = Network().to(dtype)
    trace = record(model, [ids()], sites=sites(model))
    found = trace.by_role("residual")[-1]
    assert found.dtype == str(dtype).removeprefix("torch.")
    assert found.rms is not None
    assert 0 < found.rms < 100


def test_autocast_does_not_reach_the_statistics() -> None:
    model, batch = Network(), ids()

    def forward(m: nn.Module, b: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m(b)

    trace = record(model, [batch], sites=sites(model), forward=forward)
    assert trace.by_role("branch")[0].dtype == "bfloat16"
    embedded = model.embed(batch).double()
    found = trace.by_role("embedding")[0]
    assert found.channel_mean == pytest.approx(embedded.mean((0, 1)).detach().numpy(), abs=1e-6)


def test_inference_mode_and_ordinary_passes_mix() -> None:
    model, batch = Network(), ids()
    with Recorder(model, sites(model), needs=CHEAP) as recorder:
        with torch.inference_mode():
            model(batch)
        model(batch)
    assert recorder.trace().tokens == 48


def test_non_finite_values_are_reported_not_spread() -> None:
    model = Network()
    with torch.no_grad():
        model.blocks[1].branch.down.bias[3] = torch.nan
    trace = record(model, [ids()], sites=sites(model))
    first, second, _ = trace.by_role("residual")
    assert (first.non_finite, second.non_finite) == (0, 24)
    assert second.rms is not None
    assert np.isfinite(second.rms)
    assert np.isnan(trace.parameters["blocks.1.branch.down.bias"].norm)


# -- untouched -----------------------------------------------------------------------------------------------------


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def test_model_is_untouched_afterwards() -> None:
    model, batch = Network(), ids()
    model.train()
    model.blocks[1].eval()
    modes = [m.training for m in model.modules()]
    gradient = torch.randn_like(model.head.weight)
    model.head.weight.grad = gradient
    before, state = model(batch).detach(), torch.get_rng_state()
    record(model, [batch], sites=sites(model), loss=lambda out, _: out.square().mean())
    assert hooks(model) == 0
    assert [m.training for m in model.modules()] == modes
    assert model.head.weight.grad is gradient
    assert model.embed.weight.grad is None
    assert not model.head.weight._post_accumulate_grad_hooks
    assert torch.equal(model(batch), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.backends.mha.get_fastpath_enabled()


def test_model_is_untouched_after_an_exception() -> None:
    model = Network()
    model.train()

    def broken(*_: object) -> None:
        raise RuntimeError("halfway")

    handle = model.blocks[1].branch.register_forward_hook(broken)
    with pytest.raises(RuntimeError, match="halfway"):
        record(model, [ids()], sites=sites(model))
    handle.remove()
    assert hooks(model) == 0
    assert model.training
    assert torch.backends.mha.get_fastpath_enabled()


def test_outputs_are_bit_for_bit_the_same_while_recording() -> None:
    model, batch = Network(), ids()
    plain = model(batch)
    with Recorder(model, sites(model), needs=CHEAP):
        assert torch.equal(model(batch), plain)


def test_nothing_with_a_token_axis_outlives_its_hook() -> None:
    model = Network()
    alive: list[weakref.ref[Tensor]] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, out: alive.append(weakref.ref(out)))
    with Recorder(model, sites(model), needs=CHEAP) as recorder, torch.no_grad():
        model(ids())
        gc.collect()
        assert [ref() for ref in alive] == [None] * 3
    recorder.trace()


def test_what_is_kept_does_not_grow_with_tokens() -> None:
    def kept(tokens: int) -> int:
        model = Network()
        with Recorder(model, sites(model), needs=CHEAP) as recorder:
            model(ids(1, tokens))
        found = 0
        for statistics in recorder._statistics.values():
            arrays = [statistics.peaks.rows, statistics.active]
            if statistics.channels is not None:
                arrays += [statistics.channels.total, statistics.channels.squares, statistics.channels.largest]
            found += sum(a.nbytes for a in arrays if a is not None)
        return found

    assert kept(20) == kept(2000)


# -- errors --------------------------------------------------------------------------------------------------------


def test_unknown_modules_are_named_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"blocks\.7.*blocks\."):
        Recorder(Network(), [output("blocks.7")], needs=STREAM)


def test_names_of_sites_are_unique() -> None:
    with pytest.raises(InputError, match="Two sites are called"):
        Recorder(Network(), [output("head"), output("head")], needs=STREAM)


def test_no_batches_is_said_plainly() -> None:
    with pytest.raises(InputError, match="batches is empty"):
        record(Network(), [], sites=[output("head")])


def test_nothing_reached_is_said_plainly() -> None:
    recorder = Recorder(Network(), [output("head")], needs=STREAM)
    with pytest.raises(InputError, match="Nothing was recorded"):
        recorder.trace()


def test_losses_must_be_scalars_with_a_graph() -> None:
    model = Network()
    with pytest.raises(InputError, match=r"scalar tensor, got a tensor of shape \(2, 12, 50\)"):
        record(model, [ids()], sites=sites(model), loss=lambda out, _: out)
    with pytest.raises(InputError, match="does not depend on any parameter"):
        record(model, [ids()], sites=sites(model), loss=lambda out, _: out.detach().sum())


def test_group_masks_have_one_or_two_axes() -> None:
    with pytest.raises(InputError, match="Group 'odd' needs a bool mask"):
        record(Network(), [ids()], sites=[output("head")], groups={"odd": lambda _: torch.ones(1, 2, 3)})


def test_a_mask_of_another_length_than_the_sequences_is_refused() -> None:
    model = Network()
    with pytest.raises(InputError, match=r"group 'text' has shape \(2, 11\).*\(2, 12\)"):
        record(model, [ids()], sites=sites(model), groups={"text": torch.ones(2, 11, dtype=torch.bool)})


def test_a_mask_that_fits_only_some_batches_is_refused() -> None:
    model = Network()
    with pytest.raises(InputError, match="group 'text'"):
        record(model, [ids(), ids(tokens=9)], sites=sites(model), groups={"text": torch.ones(12, dtype=torch.bool)})


def test_groups_that_are_no_tensors_are_refused_by_name() -> None:
    model = Network()
    with pytest.raises(InputError, match=r"'text' needs a bool tensor.*got list"):
        record(model, [ids()], sites=sites(model), groups={"text": [True] * 12})  # type: ignore[dict-item]


def test_groups_reach_feature_maps_image_by_image() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1))
    left = torch.zeros(2, 4, 4, dtype=torch.bool)
    left[:, :, :2] = True
    site = output("0", "residual", 0, axis=1)
    trace = record(model, [torch.randn(2, 3, 4, 4)], sites=[site], groups={"left": left.flatten(1)})
    assert trace.records[site.name].groups["left"].tokens == 16


def test_what_was_run_is_counted_alike_whatever_is_measured() -> None:
    model = Network()
    everything = record(model, [ids(), ids()], sites=sites(model))
    nothing = record(model, [ids(), ids()], sites=[])
    assert (nothing.sequences, nothing.tokens) == (everything.sequences, everything.tokens) == (4, 48)
    assert nothing.records == {}


def test_parameters_have_gradients_where_no_site_is_recorded() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 1))
    trace = record(model, [torch.randn(5, 4)], sites=[], loss=lambda output, _: output.square().mean())
    assert all(p.gradient_rms is not None and p.gradient_rms > 0 for p in trace.parameters.values())


def test_non_finite_inputs_are_counted_and_masks_of_minus_infinity_are_not() -> None:
    model = nn.Sequential(nn.Linear(4, 8))
    batch = torch.randn(2, 3, 4)
    batch[0, 0, 0], batch[1, 0, 1], batch[1, 1, 1] = float("nan"), float("inf"), -float("inf")
    trace = record(model, [batch, torch.randn(2, 3, 4)], sites=[output("0")])
    assert trace.facts["non_finite_inputs"] == 2
    assert "non_finite_inputs" not in record(model, [torch.randn(2, 3, 4)], sites=[output("0")]).facts


def test_a_recorder_is_entered_once_at_a_time() -> None:
    model = Network()
    recorder = Recorder(model, sites(model), needs=CHEAP)
    with recorder, pytest.raises(InputError, match="already recording"), recorder:
        pass
    assert hooks(model) == 0


# -- compiled ------------------------------------------------------------------------------------------------------


def test_compiled_models_are_recorded_eagerly_and_keep_working() -> None:
    model, batch = Network(), ids()
    compiled = torch.compile(model, backend="eager")
    plain = compiled(batch)
    trace = record(compiled, [batch], sites=sites(model))
    assert len(trace.records) == len(sites(model))
    assert torch.equal(compiled(batch), plain)


def test_a_compiled_model_inside_a_loop_of_ones_own_is_recorded_too() -> None:
    model, batch = Network(), ids()
    compiled = torch.compile(model, backend="eager")
    compiled(batch)
    with (
        pytest.warns(UserWarning, match=r"run `recorder\.model`"),
        Recorder(compiled, sites(model), needs=CHEAP) as recorder,
    ):
        recorder.model(batch)
    assert recorder.trace().tokens == 24


def test_layers_compiled_one_by_one_are_recorded() -> None:
    model, batch = Network(), ids()
    model.blocks[1].compile(backend="eager")
    model(batch)
    trace = record(model, [batch], sites=sites(model))
    assert len(trace.records) == len(sites(model))


# -- gradients -----------------------------------------------------------------------------------------------------


def loss_of(out: Tensor, batch: Any) -> Tensor:
    target = batch["ids"] if isinstance(batch, dict) else batch
    return nn.functional.cross_entropy(out.flatten(0, 1), target.flatten())


def reference_gradients(model: Network, batch: Tensor) -> tuple[list[float], dict[str, float]]:
    stream = stream_of(model, batch)
    loss = loss_of(model.head(stream[-1]), batch)
    found = torch.autograd.grad(loss, stream, retain_graph=True)
    named = dict(model.named_parameters())
    norms = torch.autograd.grad(loss, list(named.values()))
    return (
        [g.double().square().mean().sqrt().item() for g in found],
        {n: g.double().norm().item() for n, g in zip(named, norms, strict=True)},
    )


def test_gradients_at_sites_and_parameters_match_autograd() -> None:
    model, batch = Network(), ids()
    trace = record(model, [batch], sites=sites(model), loss=loss_of)
    expected, norms = reference_gradients(model, batch)
    found = [r.gradient_rms for r in (*trace.by_role("embedding"), *trace.by_role("residual"))]
    assert found == pytest.approx(expected, rel=1e-5)
    assert {n: p.gradient_norm for n, p in trace.parameters.items()} == pytest.approx(norms, rel=1e-5)
    assert trace.loss == pytest.approx(loss_of(model(batch), batch).item(), rel=1e-6)


def test_loss_is_the_mean_over_tokens_of_all_batches() -> None:
    model, batches = Network(), [ids(2, 12), ids(1, 3)]
    trace = record(model, batches, sites=sites(model), loss=loss_of)
    losses = [loss_of(model(b), b).item() for b in batches]
    assert trace.loss == pytest.approx((losses[0] * 24 + losses[1] * 3) / 27, rel=1e-6)


def test_gradient_norms_average_over_batches_in_the_square() -> None:
    model, batches = Network(), [ids(), ids()]
    trace = record(model, batches, sites=sites(model), loss=loss_of)
    norms = [reference_gradients(model, b)[1]["head.weight"] for b in batches]
    expected = np.sqrt(np.mean(np.square(norms)))
    assert trace.parameters["head.weight"].gradient_norm == pytest.approx(expected, rel=1e-5)


def test_without_a_loss_there_are_no_gradients_and_no_graph() -> None:
    model = Network()
    graphs: list[bool] = []
    handle = model.head.register_forward_hook(lambda _, __, out: graphs.append(out.requires_grad))
    trace = record(model, [ids()], sites=sites(model))
    handle.remove()
    assert graphs == [False]
    assert trace.by_role("residual")[0].gradient_rms is None
    assert trace.parameters["head.weight"].gradient_norm is None
    assert trace.parameters["head.weight"].norm == pytest.approx(model.head.weight.norm().item(), rel=1e-5)


class CheckpointedNetwork(Network):
    reentrant = False

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_under_checkpointing_is_not_counted_twice(reentrant: bool) -> None:
    model, batch = CheckpointedNetwork(), ids()
    model.reentrant = reentrant
    trace = record(model, [batch, batch], sites=sites(model), loss=loss_of)
    expected, norms = reference_gradients(model, batch)
    assert {r.tokens for r in trace.records.values()} == {48}
    found = [r.gradient_rms for r in (*trace.by_role("embedding"), *trace.by_role("residual"))]
    assert found == pytest.approx(expected, rel=1e-5)
    assert {n: p.gradient_norm for n, p in trace.parameters.items()} == pytest.approx(norms, rel=1e-5)


def test_models_that_add_in_place_to_their_branch_still_train() -> None:
    class AddsToBranch(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = self.branch(x)
            y += x
            return y

    model, batch = Network(AddsToBranch), ids()
    needs = {**CHEAP, "branch": {Stat.MOMENTS, Stat.GRADIENT}}
    trace = record(model, [batch], sites=sites(model), needs=needs, loss=loss_of)
    expected, _ = reference_gradients(model, batch)
    # What is added to the stream has the stream's gradient behind it.
    assert [r.gradient_rms for r in trace.by_role("branch")] == pytest.approx(expected[1:], rel=1e-5)


def test_parameters_know_their_block() -> None:
    from setpoint.probe.recorder import block_finder

    block_of = block_finder([("layers.1", 1), ("layers.10", 10), ("", 0)])
    assert (block_of("layers.1.up.weight"), block_of("layers.10.up.weight"), block_of("head.weight")) == (1, 10, None)


def test_parameters_that_are_frozen_have_a_norm_and_no_gradient() -> None:
    model = Network()
    model.embed.weight = Parameter(model.embed.weight.detach(), requires_grad=False)
    trace = record(model, [ids()], sites=sites(model), loss=loss_of)
    assert trace.parameters["embed.weight"].gradient_norm is None
    assert trace.parameters["head.weight"].gradient_norm is not None
