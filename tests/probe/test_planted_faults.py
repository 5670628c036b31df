"""Each finding on a real network through the real recorder: silent while healthy, raised once the fault is in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from setpoint.probe import registry
from setpoint.probe.recorder import record
from setpoint.types import Finding, Trace

WIDTH, DEPTH, HEADS, VOCABULARY, TOKENS = 64, 6, 4, 101, 128


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """``spike``, when set, is added to what is written at the first token."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.spike: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(torch.relu(self.up(x)))
        return y if self.spike is None else torch.cat([y[:, :1] + self.spike, y[:, 1:]], dim=1)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.attention, self.mlp = Attention(), FeedForward()
        self.skip = 1.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.skip * x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Network(nn.Module):
    """A causal pre-norm language model; weights of size 1/sqrt(fan-in) make attention neither flat nor hard."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(DEPTH))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def next_token(output: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(output[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


GROUPS: dict[str, Any] = {"text": lambda ids: ids < 50, "image": lambda ids: ids >= 50}


def network() -> Network:
    torch.manual_seed(3)
    return Network().eval()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(0, VOCABULARY, (4, TOKENS), generator=generator) for _ in range(3)]


def recorded(model: nn.Module, inputs: list[Tensor], code: str) -> Trace:
    probes = registry.probes_for({code})
    return record(
        model,
        inputs,
        needs=registry.needs(probes),
        loss=next_token if code == "gradient-imbalance" else None,
        groups=GROUPS if code == "norm-mismatch" else None,
        task="language-model",
    )


def findings(model: nn.Module, inputs: list[Tensor], code: str) -> list[Finding]:
    return registry.run(registry.probes_for({code}), recorded(model, inputs, code))


Fault = Callable[[Network, list[Tensor]], None]


def grow(model: Network, _inputs: list[Tensor]) -> None:
    for i, layer in enumerate(model.layers):
        layer.mlp.down.weight *= 4.0**i


def weaken_skip(model: Network, _inputs: list[Tensor]) -> None:
    model.embed.weight *= 1e4
    model.layers[3].skip = 1e-4


def spike(model: Network, _inputs: list[Tensor]) -> None:
    model.layers[2].mlp.spike = 8000.0 * F.one_hot(torch.tensor(9), WIDTH).float()


def widen_channel(model: Network, _inputs: list[Tensor]) -> None:
    for layer in model.layers:
        layer.norm1.weight[9] *= 60
        layer.norm2.weight[9] *= 60


def kill_units(model: Network, _inputs: list[Tensor]) -> None:
    model.layers[1].mlp.up.bias[:100] = -1e3


def quieten(model: Network, _inputs: list[Tensor]) -> None:
    for layer in model.layers:
        layer.mlp.up.bias -= 2.0


def idle(model: Network, _inputs: list[Tensor]) -> None:
    for i in (2, 3, 4):
        for last in (model.layers[i].attention.out, model.layers[i].mlp.down):
            last.weight.zero_()
            last.bias.zero_()


def flatten_attention(model: Network, _inputs: list[Tensor]) -> None:
    for layer in model.layers:
        layer.attention.q.weight.zero_()


def harden_attention(model: Network, _inputs: list[Tensor]) -> None:
    for layer in model.layers:
        layer.attention.q.weight *= 300


def same_tokens(_model: Network, inputs: list[Tensor]) -> None:
    for ids in inputs:
        ids.fill_(7)


def lengthen_group(model: Network, _inputs: list[Tensor]) -> None:
    model.embed.weight[50:] *= 30


def enlarge(model: Network, _inputs: list[Tensor]) -> None:
    model.embed.weight *= 1e5


def poison(model: Network, _inputs: list[Tensor]) -> None:
    model.layers[2].mlp.down.weight[5, 6] = float("nan")


FAULTS: dict[str, Fault] = {
    "variance-growth": grow,
    "gradient-imbalance": weaken_skip,
    "massive-activation": spike,
    "outlier-channels": widen_channel,
    "dead-units": kill_units,
    "activation-sparsity": quieten,
    "idle-layers": idle,
    "attention-collapse": flatten_attention,
    "attention-saturation": harden_attention,
    "rank-collapse": same_tokens,
    "norm-mismatch": lengthen_group,
    "precision-risk": enlarge,
    "non-finite": poison,
}


def broken(code: str) -> list[Finding]:
    model, inputs = network(), batches()
    with torch.no_grad():
        FAULTS[code](model, inputs)
    return findings(model, inputs, code)


def test_every_code_has_a_fault() -> None:
    assert set(FAULTS) == set(registry.codes())


@pytest.mark.parametrize("code", registry.codes())
def test_healthy_network_is_met_with_silence(code: str) -> None:
    assert [f.evidence for f in findings(network(), batches(), code)] == []


@pytest.mark.parametrize("code", registry.codes())
def test_planted_fault_is_found(code: str) -> None:
    found = broken(code)
    assert [f.code for f in found].count(code) == len(found) > 0


def test_spike_is_placed_at_its_token_channel_and_block() -> None:
    (finding,) = broken("massive-activation")
    assert (finding.numbers["token"], finding.numbers["channel"]) == (0, 9)
    assert (finding.numbers["first_block"], finding.numbers["last_block"]) == (2, DEPTH - 1)
    assert finding.numbers["value"] == pytest.approx(8000, rel=1e-2)


def test_dead_units_are_counted_exactly() -> None:
    (finding,) = broken("dead-units")
    assert finding.severity == "warning"
    assert finding.numbers["dead"] == 100


def test_idle_blocks_are_exactly_those_that_write_nothing() -> None:
    (finding,) = broken("idle-layers")
    assert "blocks 2-4" in finding.evidence
    assert finding.severity == "warning"


def test_nan_is_placed_at_the_block_of_the_bad_weight() -> None:
    weights, values = sorted(broken("non-finite"), key=lambda f: f.id != "non-finite@parameters")
    assert weights.sites == ("layers.2.mlp.down.weight",)
    assert "layers.2" in values.sites[0]


def test_mismatched_groups_are_named_with_their_ratio() -> None:
    (finding,) = broken("norm-mismatch")
    assert finding.id == "norm-mismatch@image/text"
    assert finding.value == pytest.approx(30, rel=0.1)


def test_weak_skip_path_makes_the_gradient_vanish_toward_the_input() -> None:
    (finding,) = broken("gradient-imbalance")
    assert "vanishes toward the input" in finding.evidence


def squares(output: Tensor, _batch: Any) -> Tensor:
    return output.square().mean()


def test_gradients_of_a_network_without_blocks_are_compared_layer_by_layer() -> None:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(64, 64), nn.Sigmoid()) for _ in range(12)]
    trace = record(nn.Sequential(*layers), [torch.randn(16, 64)], loss=squares)
    (finding,) = registry.run(registry.probes_for({"gradient-imbalance"}), trace)
    assert finding.id == "gradient-imbalance@layers"
    assert finding.severity == "warning"
    assert "vanishes toward the input" in finding.evidence
    assert finding.sites == ("11.0",)
    assert finding.chart is not None
    assert finding.chart.x == "layer, in order of execution"


def test_a_frozen_layer_of_a_network_without_blocks_is_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(6)))
    model[2].requires_grad_(False)
    trace = record(model, [torch.randn(16, 64)], loss=squares)
    (finding,) = registry.run(registry.probes_for({"gradient-imbalance"}), trace)
    assert (finding.id, finding.severity, finding.sites) == ("gradient-imbalance@no-gradient", "info", ("2.0",))


def test_detached_stream_leaves_early_blocks_without_gradient() -> None:
    model = network()
    model.layers[1].register_forward_hook(lambda _m, _a, output: output.detach().requires_grad_())
    (finding,) = findings(model, batches(), "gradient-imbalance")
    assert finding.id == "gradient-imbalance@no-gradient"
    assert finding.severity == "info", "it may be frozen on purpose"
    assert finding.sites == ("block 0", "block 1")


def test_outlier_channel_is_named() -> None:
    (finding,) = broken("outlier-channels")
    assert finding.numbers["worst_channel"] == 9


def test_grown_stream_is_exponential() -> None:
    (finding,) = broken("variance-growth")
    assert finding.severity == "warning"
    assert finding.numbers["form"] == "exponential"


def test_convolutional_network_is_read_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    images = [torch.randn(4, 3, 24, 24)]
    model(images[0])
    model.eval()
    assert findings(model, images, "dead-units") == []
    with torch.no_grad():
        model[1].bias[:12] = -1e3
    (finding,) = findings(model, images, "dead-units")
    assert finding.id == "dead-units@convolution"
    assert finding.numbers["dead"] == 12
