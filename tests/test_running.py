"""Whatever runs a model leaves it as it was, and runs it as it would be used."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

import setpoint
from setpoint.probe.recorder import record
from setpoint.types import Site, Tap


class Counting(nn.Module):
    """Writes a buffer and draws from the random state at each call, also in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x) + 0.0 * torch.rand(())


def test_recording_puts_buffers_and_random_state_back() -> None:
    model, state = Counting(), torch.get_rng_state()
    site = Site("out", "residual", Tap("linear", "output"))
    record(model, [torch.ones(1, 3, 4)] * 3, sites=[site])
    assert model.calls == 0
    assert torch.equal(torch.get_rng_state(), state)


class Inner(nn.Module):
    """Owns two attentions: a sharp one, then a uniform one."""

    def forward(self, x: Tensor) -> Tensor:
        sharp = functional.scaled_dot_product_attention(20.0 * x, x, x)
        return sharp + functional.scaled_dot_product_attention(0.0 * x, x, x)


class Outer(nn.Module):
    """Owns one attention itself, and holds a module with two more."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + functional.scaled_dot_product_attention(0.0 * x, x, x)


def test_attentions_inside_another_attentions_module_are_heard_once_each() -> None:
    sites = [
        Site("outer", "attention", Tap("", "input"), 0),
        Site("sharp", "attention", Tap("inner", "input"), 0),
        Site("uniform", "attention", Tap("inner", "input"), 0),
    ]
    found = record(Outer(), [torch.randn(1, 1, 12, 8)], sites=sites).attention
    assert found["sharp"].entropy[0] < 0.5
    assert found["uniform"].entropy[0] > 0.999  # all logits are 0
    assert found["outer"].entropy[0] > 0.999


class Dropping(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(torch.relu(self.up(self.norm(x)))))


def test_interventions_see_no_dropout_of_a_model_in_training() -> None:
    model, batch = nn.Sequential(*(Dropping(16) for _ in range(3))), torch.randn(2, 8, 16)
    seen = [setpoint.check(model.train(mode), [batch], deep=True).to_json() for mode in (True, False)]
    assert seen[0] == seen[1]
    assert not model.training
