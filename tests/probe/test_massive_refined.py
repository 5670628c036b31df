"""Fidelity to the measuring protocol of Owen et al., 2025 (arXiv 2503.22329)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.probe.interventions.massive import (
    Entry,
    attention_sink_mass,
    group_means,
    intervene,
    massive_activations,
    massive_entries,
)


class Block(nn.Module):
    """A pre-norm residual block that returns a tuple, as decoder blocks do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return x + self.down(torch.relu(self.up(self.norm(x)))), "cache"


class Network(nn.Module):
    def __init__(self, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x, _ = block(x)
        return self.head(self.norm(x))


NAMES = ["blocks.0", "blocks.1", "blocks.2"]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def planted(value: float = 5000.0) -> Network:
    """The second block writes ``value`` to channel 3 of the first token."""
    model = Network()
    block = model.blocks[1]

    def write(_module: nn.Module, _args: Any, output: tuple[Tensor, str]) -> tuple[Tensor, str]:
        h = output[0].clone()
        h[:, 0, 3] = value
        return h, output[1]

    block.register_forward_hook(write)
    return model


# Check 1: the rule.


def test_one_entry_of_2000_among_ones_is_massive() -> None:
    hidden = torch.ones(1, 32, 64)
    hidden[0, 5, 7] = 2000.0
    entries, largest, median = massive_entries(hidden)
    assert entries == (Entry(0, 5, 7, 2000.0),)
    assert (largest, median) == (2000.0, 1.0)


def test_999_times_the_median_is_not_massive() -> None:
    hidden = torch.ones(1, 32, 64)
    hidden[0, 5, 7] = 999.0
    assert massive_entries(hidden)[0] == ()


def test_below_100_is_not_massive_whatever_the_ratio() -> None:
    hidden = torch.ones(1, 32, 64)
    hidden[0, 5, 7] = 2000.0
    assert massive_entries(0.04 * hidden)[0] == ()


def test_the_median_of_an_even_count_is_the_lower_middle() -> None:
    assert massive_entries(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))[2] == 2.0


# Check 2: the intervention.


def test_setting_an_entry_to_its_own_value_changes_nothing_bitwise() -> None:
    model = planted()
    x = torch.randn(2, 6, 16)
    report = massive_activations(model, x, blocks=NAMES)
    entries = report.layers[1].entries
    plain = model(x)
    before = hooks(model)
    with intervene(model, "blocks.1", entries, torch.tensor([e.value for e in entries])):
        assert torch.equal(model(x), plain)
    assert hooks(model) == before
    assert torch.equal(model(x), plain)


def test_hooks_are_gone_after_an_exception() -> None:
    model = Network()
    with pytest.raises(RuntimeError, match="stop"), intervene(model, "blocks.0", [Entry(0, 0, 0, 1.0)]):
        raise RuntimeError("stop")
    assert hooks(model) == 0


def test_zeroing_reaches_later_blocks_and_only_the_named_entry() -> None:
    model, x = Network(), torch.randn(1, 4, 16)
    seen: dict[str, Tensor] = {}
    model.blocks[1].register_forward_pre_hook(lambda _m, args: seen.update(h=args[0]))
    model(x)
    plain = seen["h"]
    with intervene(model, model.blocks[0], [Entry(0, 2, 5, 1.0)], 0.0):
        model(x)
    expected = plain.clone()
    expected[0, 2, 5] = 0.0
    assert torch.equal(seen["h"], expected)


def test_mean_is_taken_apart_for_starting_and_other_tokens() -> None:
    entries = [Entry(0, 0, 3, 100.0), Entry(1, 0, 3, 300.0), Entry(0, 5, 3, 8.0), Entry(0, 0, 4, 1.0)]
    assert group_means(entries) == {(True, 3): 200.0, (False, 3): 8.0, (True, 4): 1.0}
    model, x = nn.Sequential(nn.Identity()), torch.zeros(2, 6, 8)
    with intervene(model, "0", entries, "mean"):
        y = model(x)
    assert y[0, 0, 3] == y[1, 0, 3] == 200.0
    assert y[0, 5, 3] == 8.0


# Check 7: zeroing a channel that the next norm's weight ignores acts through the norm's denominator alone.


def test_zeroing_an_ignored_channel_acts_through_the_norm_denominator_only() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Identity(), nn.RMSNorm(16, eps=0.0), nn.Linear(16, 5, bias=False)).double()
    with torch.no_grad():
        model[1].weight[3] = 0.0
    x = torch.randn(1, 4, 16, dtype=torch.float64)
    x[0, 1, 3] = 50.0
    plain = model(x)
    with intervene(model, "0", [Entry(0, 1, 3, 50.0)], 0.0):
        zeroed = model(x)
    emptied = x.clone()
    emptied[0, 1, 3] = 0.0
    ratio = x[0, 1].square().mean().sqrt() / emptied[0, 1].square().mean().sqrt()
    assert not torch.allclose(zeroed[0, 1], plain[0, 1])
    torch.testing.assert_close(zeroed[0, 1], plain[0, 1] * ratio)
    torch.testing.assert_close(zeroed[0, 0], plain[0, 0])


# What users expect.


def test_report_names_first_and_last_layer_channels_and_tokens() -> None:
    report = massive_activations(planted(), torch.randn(2, 6, 16), blocks=NAMES)
    assert (report.first_layer, report.last_layer) == (1, 2)
    assert report.channels == (3,)
    assert report.tokens == (0,)


def test_blocks_are_found_by_tracing() -> None:
    report = massive_activations(planted(), torch.randn(1, 6, 16))
    assert report.first_layer == 1
    assert [layer.name for layer in report.layers] == NAMES


def test_model_without_massive_activations_reports_none() -> None:
    report = massive_activations(Network(), torch.randn(1, 6, 16), blocks=NAMES)
    assert report.first_layer is None
    assert report.channels == ()


@pytest.mark.parametrize("bad", [{"abs_threshold": 0.0}, {"rel_threshold": -1.0}])
def test_thresholds_must_be_positive(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        massive_activations(Network(), torch.randn(1, 6, 16), blocks=NAMES, **bad)


def test_no_blocks_is_an_error_that_says_what_to_type() -> None:
    with pytest.raises(ValueError, match="blocks="):
        massive_activations(nn.Linear(4, 4), torch.randn(1, 3, 4))


def test_unknown_block_gets_the_nearest_names() -> None:
    with pytest.raises(InputError, match=r"blocks\.1"):
        massive_activations(Network(), torch.randn(1, 6, 16), blocks=["block.1"])


def test_values_of_the_wrong_count_are_refused() -> None:
    with (
        pytest.raises(InputError, match="one per entry"),
        intervene(nn.Identity(), "", [Entry(0, 0, 0, 1.0)], torch.ones(3)),
    ):
        pass


def test_sink_mass_leaves_the_first_query_out() -> None:
    weights = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.25, 0.25, 0.5]])
    assert attention_sink_mass(weights.expand(2, 4, 3, 3)) == pytest.approx(0.375)
    assert attention_sink_mass(weights, slot=-1) == pytest.approx(0.25)
