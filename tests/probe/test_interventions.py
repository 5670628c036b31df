"""Interventions on small networks whose answer is known."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from setpoint.errors import InputError
from setpoint.probe import registry
from setpoint.probe.base import Subject
from setpoint.probe.interventions.dependence import MassiveDependence
from setpoint.probe.interventions.hooks import caught, edited, exchange, module_at
from setpoint.probe.interventions.outcome import Bench
from setpoint.probe.interventions.removal import BlockRemoval, bypass
from setpoint.probe.interventions.sparsity import SilencedNeurons
from setpoint.types import Block, Branch, FeedForwardSite, Peak, Projection, Record, Site, Tap, Trace


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.norm(x))))


class Layer(nn.Module):
    """A pre-norm block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = FeedForward(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class Stack(nn.Module):
    def __init__(self, depth: int = 4, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))
        self.head = nn.Linear(width, 11)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def blocks_of(depth: int, prefix: str = "layers") -> tuple[Block, ...]:
    return tuple(
        Block(
            i,
            f"{prefix}.{i}",
            (
                Branch(
                    "feed_forward",
                    Tap(f"{prefix}.{i}", "input"),
                    Tap(f"{prefix}.{i}.mlp", "output"),
                    feed_forward=FeedForwardSite(
                        f"{prefix}.{i}.mlp",
                        None,
                        None,
                        Projection(f"{prefix}.{i}.mlp.down", f"{prefix}.{i}.mlp.down.weight"),
                        "relu",
                        Tap(f"{prefix}.{i}.mlp.down", "input"),
                    ),
                ),
            ),
            Tap(f"{prefix}.{i}", "input"),
            Tap(f"{prefix}.{i}", "output"),
        )
        for i in range(depth)
    )


def subject(model: nn.Module, batches: list[Any], depth: int, loss: Any = None) -> Subject:
    return Subject(model, SimpleNamespace(blocks=blocks_of(depth)), batches, lambda m, b: m(b), loss)


def trace_of(*records: Record, task: Any = "other") -> Trace:
    return Trace({r.site.name: r for r in records}, {}, {}, len(records), task, 2, 12)


def untouched(model: nn.Module) -> bool:
    return all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


# --------------------------------------------------------------------------------------------------------------------
# Catching and replacing tensors


@dataclass
class Holder:
    a: Tensor
    b: str = "text"


Pair = namedtuple("Pair", "first second")


@pytest.mark.parametrize(
    "tree",
    [
        torch.zeros(1),
        (torch.zeros(1), None),
        [torch.zeros(1), "text"],
        Pair(torch.zeros(1), 3),
        {"a": torch.zeros(1)},
        OrderedDict(a=torch.zeros(1)),
        Holder(torch.zeros(1)),
        BaseModelOutput(last_hidden_state=torch.zeros(1)),
    ],
    ids=lambda t: type(t).__name__,
)
def test_exchange_keeps_the_kind_of_structure(tree: Any) -> None:
    changed = exchange(tree, 0, lambda t: t + 7)
    assert type(changed) is type(tree)
    found: list[Tensor] = []
    exchange(changed, 0, lambda t: found.append(t) or t)  # type: ignore[func-returns-value]
    assert found[0].item() == 7
    exchange(tree, 0, lambda t: found.append(t) or t)  # type: ignore[func-returns-value]
    assert found[1].item() == 0, "the original must stay as it was"


def test_model_output_is_exchanged_in_attribute_and_in_key() -> None:
    changed = exchange(BaseModelOutput(last_hidden_state=torch.zeros(1)), 0, lambda t: t + 7)
    assert changed.last_hidden_state.item() == changed["last_hidden_state"].item() == 7


def test_edit_of_a_keyword_argument_reaches_the_module() -> None:
    class Named(nn.Module):
        def forward(self, *, x: Tensor) -> Tensor:
            return x

    model = nn.Module()
    model.inner = Named()
    with edited(model, {Tap("inner", "input"): lambda t: 2 * t}):
        assert model.inner(x=torch.ones(1)).item() == 2


def test_calls_of_a_shared_module_are_told_apart() -> None:
    shared = nn.Identity()
    model = nn.Sequential(shared, shared, shared)
    with (
        edited(model, {Tap("0", "output", call=1): lambda t: t + 1}),
        caught(model, [Tap("0", "output", call=2)]) as got,
    ):
        assert model(torch.zeros(1)).item() == 1
    assert got[Tap("0", "output", call=2)].item() == 1
    assert untouched(model)


def test_unknown_module_gets_the_nearest_names() -> None:
    with pytest.raises(InputError, match=r"layers\.1"):
        module_at(Stack(), "layer.1")


# --------------------------------------------------------------------------------------------------------------------
# Leaving blocks out


def test_left_out_block_equals_a_network_without_it() -> None:
    model, x = Stack(3), torch.randn(2, 5, 16)
    way = bypass(model, blocks_of(3)[1])
    assert way is not None
    with way():
        without = model(x)
    h = model.layers[2](model.layers[0](x))
    assert torch.equal(without, model.head(h))
    assert untouched(model)


def test_block_caught_only_at_its_branches_is_left_out_by_silencing_them() -> None:
    model, x = Stack(3), torch.randn(2, 5, 16)
    block = blocks_of(3)[1]
    way = bypass(model, Block(1, block.name, block.branches, None, None))
    assert way is not None
    with way():
        without = model(x)
    torch.testing.assert_close(without, model.head(model.layers[2](model.layers[0](x))))


def test_post_norm_block_without_an_output_tap_is_not_left_out() -> None:
    branch = Branch("feed_forward", None, Tap("layers.0.mlp", "output"), after_norms=("norm",))
    assert bypass(Stack(), Block(0, "layers.0", (branch,), None, None)) is None


def test_block_that_changes_the_shape_runs_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 6))
    x = torch.randn(2, 4)
    way = bypass(model, Block(0, "1", (), Tap("1", "input"), Tap("1", "output")))
    assert way is not None
    with way():
        assert torch.equal(model(x), model(x))
        assert model(x).shape == (2, 6)


def test_block_that_writes_nothing_costs_nothing_and_is_named() -> None:
    model = Stack(4)
    nn.init.zeros_(model.layers[2].mlp.down.weight)
    nn.init.zeros_(model.layers[2].mlp.down.bias)
    records = [Record(Site(f"layers.{i} residual", "residual", Tap(f"layers.{i}", "output"), i)) for i in range(4)]
    (finding,) = BlockRemoval()(subject(model, [torch.randn(2, 5, 16)], 4), trace_of(*records))
    assert finding.id == "idle-layers@removal"
    assert finding.numbers["least_needed"] == 2
    assert finding.numbers["cheap"] == 1
    assert finding.value == 0.0
    assert finding.severity == "info"
    assert untouched(model)


def test_block_that_changes_the_shape_is_not_counted_as_idle() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)), nn.Linear(4, 6))
    blocks = tuple(Block(i, str(i), (), Tap(str(i), "input"), Tap(str(i), "output")) for i in range(4))
    given = Subject(model, SimpleNamespace(blocks=blocks), [torch.randn(2, 4)], lambda m, b: m(b))
    (finding,) = BlockRemoval()(given, trace_of())
    assert finding.numbers["blocks"] == 3
    assert finding.numbers["cheap"] == 0


def test_half_of_the_blocks_idle_is_a_warning() -> None:
    model = Stack(4)
    for i in (1, 2):
        nn.init.zeros_(model.layers[i].mlp.down.weight)
        nn.init.zeros_(model.layers[i].mlp.down.bias)
    x = torch.randn(2, 5, 16)
    target = model(x).detach()

    def loss(output: Tensor, batch: Tensor) -> Tensor:
        return (output - target).square().mean() * 100

    (finding,) = BlockRemoval()(subject(model, [x], 4, loss), trace_of())
    assert finding.severity == "warning"
    assert finding.unit == "loss", "only a language model's loss is known to be in nats"
    assert " nats" not in finding.evidence
    assert "blocks 1-2" in finding.evidence


def test_outcome_without_a_loss_is_the_relative_change_of_the_output() -> None:
    model = nn.Sequential(nn.Identity())
    bench = Bench(subject(model, [torch.tensor([3.0, 4.0])], 0))
    outcome = bench.outcome(lambda _: edited(model, {Tap("0", "output"): lambda t: t * torch.tensor([0.0, 1.0])}))
    assert outcome.rise == pytest.approx(3 / 5)


# --------------------------------------------------------------------------------------------------------------------
# Massive activations


class Sink(nn.Module):
    """Writes 5000 and a little of the input to channel 3 of the first token, which then biases every token."""

    def __init__(self, width: int = 16, used: bool = True) -> None:
        super().__init__()
        self.writer, self.norm, self.value = nn.Identity(), nn.RMSNorm(width), nn.Linear(width, width)
        self.used = used

    def forward(self, x: Tensor) -> Tensor:
        h = x.clone()
        h[:, 0, 3] = 5000.0 + h[:, 0, 3]
        h = self.writer(h)
        first = self.norm(h)[:, :1] if self.used else 0.0
        return x + self.value(first * torch.ones_like(x))


def sink_trace(task: Any = "other") -> Trace:
    record = Record(
        Site("writer residual", "residual", Tap("writer", "output"), 0, module="writer"),
        median=0.67,
        peaks=(Peak(5000.2, 0, 0, 3), Peak(5000.1, 1, 0, 3)),
    )
    return trace_of(record, task=task)


def test_entry_that_works_as_a_fixed_bias_is_recognised() -> None:
    model, batches = Sink(), [torch.randn(2, 6, 16), torch.randn(2, 6, 16)]
    (finding,) = MassiveDependence()(subject(model, batches, 0), sink_trace())
    assert finding.id == "massive-activation@writer"
    assert finding.severity == "info"
    assert finding.numbers["relies"] == "yes"
    assert finding.numbers["zero_moved"] > 0.05
    assert finding.numbers["mean_moved"] < 1e-3
    assert finding.numbers["control_moved"] < 1e-3
    assert "as on a constant" in finding.evidence
    assert untouched(model)


def test_entry_that_nothing_reads_is_not_relied_on() -> None:
    model = Sink(used=False)
    (finding,) = MassiveDependence()(subject(model, [torch.randn(2, 6, 16)], 0), sink_trace())
    assert finding.numbers["zero_moved"] == 0.0
    assert "does not rely on it" in finding.evidence


def test_with_one_sequence_there_is_no_mean_over_others() -> None:
    (finding,) = MassiveDependence()(subject(Sink(), [torch.randn(1, 6, 16)], 0), sink_trace())
    assert "mean_moved" not in finding.numbers
    assert "over other sequences" not in finding.evidence


def test_language_models_are_judged_by_perplexity() -> None:
    model, batches = Sink(), [torch.randn(2, 6, 16) for _ in range(2)]
    targets = {id(b): model(b).detach() for b in batches}

    def loss(output: Tensor, batch: Tensor) -> Tensor:
        return 1.0 + (output - targets[id(batch)]).square().mean() * 100

    (finding,) = MassiveDependence()(subject(model, batches, 0, loss), sink_trace("language-model"))
    assert "Perplexity 2.72 becomes" in finding.evidence
    assert finding.numbers["loss"] == pytest.approx(1.0)
    assert finding.numbers["zero_loss"] > 1.05


class SummedOutside(nn.Module):
    """A network that adds its branches in its own forward; ``spike`` is written to one channel at one place."""

    def __init__(self, spatial: bool) -> None:
        super().__init__()
        width = 16
        make = (lambda: nn.Conv2d(width, width, 1)) if spatial else (lambda: nn.Linear(width, width))
        self.branches = nn.ModuleList(make() for _ in range(4))
        self.last = nn.Identity()
        self.spatial = spatial

    def forward(self, x: Tensor) -> Tensor:
        for i, branch in enumerate(self.branches):
            x = x + branch(x)
            if i == 1:
                x = x + self._spike(x)
        return self.last(x)

    def _spike(self, x: Tensor) -> Tensor:
        spike = torch.zeros_like(x)
        spike[(slice(None), 3, 0, 0) if self.spatial else (slice(None), 0, 3)] = 5000.0
        return spike


def blocks_summed_outside() -> tuple[Block, ...]:
    streams = [Tap(f"branches.{i}", "input") for i in range(4)] + [Tap("last", "input")]
    return tuple(
        Block(i, "", (Branch("other", streams[i], Tap(f"branches.{i}", "output")),), streams[i], streams[i + 1])
        for i in range(4)
    )


@pytest.mark.parametrize("spatial", [False, True])
def test_entry_of_a_stream_that_is_caught_as_an_input_is_removed_from_the_skip_path_too(spatial: bool) -> None:
    model, axis = SummedOutside(spatial), 1 if spatial else -1
    batch = torch.randn(2, 16, 3, 4) if spatial else torch.randn(2, 6, 16)
    site = Site("block 1 residual", "residual", Tap("branches.2", "input"), 1, axis, "branches.2")
    record = Record(site, median=0.7, peaks=(Peak(5000.0, 0, 0, 3), Peak(5000.0, 1, 0, 3)))
    target = Subject(model, SimpleNamespace(blocks=blocks_summed_outside()), [batch], lambda m, b: m(b))
    (finding,) = MassiveDependence()(target, trace_of(record))
    with torch.no_grad():
        plain = model(batch)
        x = batch + model.branches[0](batch)
        x = x + model.branches[1](x)
        x[(slice(None), 3, 0, 0) if spatial else (slice(None), 0, 3)] = 0.0
        for branch in list(model.branches)[2:]:
            x = x + branch(x)
    assert finding.numbers["zero_moved"] == pytest.approx(float((x - plain).norm() / plain.norm()), rel=1e-4)
    assert finding.numbers["zero_moved"] > 0.5 > 0.1 > finding.numbers["control_moved"]
    assert untouched(model)


def test_intervention_tests_the_entries_that_the_recording_reported() -> None:
    batch = torch.randn(2, 6, 16)
    batch[1] *= 20.0  # beside the median of its own sequence alone the entry would not be massive
    (finding,) = MassiveDependence()(subject(Sink(), [batch[1:]], 0), sink_trace())
    assert finding.numbers["zero_moved"] > 0.01


def test_an_intervention_that_fails_costs_nothing_but_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> list[Any]:
        raise RuntimeError("no such layer")

    monkeypatch.setattr(BlockRemoval, "__call__", refuse)
    target = subject(Sink(), [torch.randn(2, 6, 16)] * 2, 0)
    with pytest.warns(UserWarning, match="no such layer"):
        found = registry.deepen(target, sink_trace(), registry.run(registry.PROBES, sink_trace()))
    (finding,) = (f for f in found if f.code == "massive-activation")
    assert finding.numbers["relies"] == "yes"
    assert target.failed == {"idle-layers --deep": "no such layer"}


def test_nothing_massive_means_no_pass_at_all() -> None:
    def never(model: nn.Module, batch: Any) -> Any:
        raise AssertionError("no pass was needed")

    idle = Subject(Sink(), SimpleNamespace(blocks=()), [torch.randn(1, 6, 16)], never)
    assert MassiveDependence()(idle, trace_of()) == []


# --------------------------------------------------------------------------------------------------------------------
# Silenced neurons


def test_sparsity_is_reported_for_a_language_model_only() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 16)
            self.stack = Stack(2)
            self.layers = self.stack.layers

        def forward(self, ids: Tensor) -> Tensor:
            return self.stack(self.embed(ids))

    model, ids = Language(), torch.randint(0, 11, (2, 30))

    def loss(output: Tensor, batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    given = subject(model, [ids], 2, loss)
    (finding,) = SilencedNeurons()(given, trace_of(task="language-model"))
    assert finding.severity == "info"
    assert 0.3 < finding.value <= 1.0, "half of the hidden units of an untrained ReLU network are zero"
    assert SilencedNeurons()(given, trace_of(task="encoder")) == []
    assert SilencedNeurons()(subject(model, [ids], 2), trace_of(task="language-model")) == []
