"""Where activations can be measured in networks without a residual stream, and outside the blocks of those with one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import setpoint
from setpoint.surgery import Anatomy
from setpoint.types import Site


def sites(model: nn.Module, batch: Any, role: str) -> list[Site]:
    return [site for site in Anatomy.trace(model, batch).sites() if site.role == role]


def caught(model: nn.Module, batch: Tensor, site: Site) -> Tensor:
    """What a hook at a site sees."""
    seen: list[Tensor] = []
    module = model.get_submodule(site.tap.module)
    if site.tap.side == "output":
        module.register_forward_hook(lambda m, a, y: seen.append(y))
    else:
        module.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    model(batch)
    return seen[0]


ROWS = torch.linspace(-3, 3, 40).sin().reshape(5, 8)


def modules() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 6), nn.BatchNorm1d(6), nn.GELU(), nn.Linear(6, 3))


class Functions(nn.Module):
    """The same with functions, so that only the next module's input can be caught."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 12), nn.Linear(12, 6), nn.Linear(6, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(functional.relu(self.first(x)))
        return self.last(functional.gelu(self.second(x), approximate="tanh"))  # type: ignore[no-any-return]


def test_a_plain_network_has_a_hidden_site_behind_each_activation() -> None:
    model = modules().eval()
    found = sites(model, ROWS, "hidden")
    assert [(site.name, site.tap.module, site.block) for site in found] == [
        ("0 hidden", "1", None),
        ("2 hidden", "4", None),
    ]
    assert [(c.norm, c.activation) for c in Anatomy.trace(model, ROWS).layers] == [("", "relu"), ("3", "gelu")]
    assert torch.equal(caught(model, ROWS, found[0]), model[:2](ROWS))


def test_activations_written_as_functions_are_caught_at_the_next_module() -> None:
    model = Functions().eval()
    found = sites(model, ROWS, "hidden")
    assert [site.module for site in found] == ["first", "second"]
    assert [layer.activation for layer in Anatomy.trace(model, ROWS).layers] == ["relu", "gelu_tanh"]
    assert torch.equal(caught(model, ROWS, found[0]), functional.relu(model.first(ROWS)))


class LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3)
        self.fc1, self.fc2 = nn.Linear(8 * 2 * 2, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.conv1(x)), 2)
        x = functional.max_pool2d(functional.relu(self.conv2(x)), 2)
        return self.fc2(functional.relu(self.fc1(x.flatten(1))))  # type: ignore[no-any-return]


def test_a_plain_convolutional_network_has_sites_behind_convolutions_and_linears() -> None:
    x = torch.linspace(-2, 2, 3 * 14 * 14).sin().reshape(1, 3, 14, 14)
    model = LeNet().eval()
    assert [(s.module, s.tap.module, s.channel_axis) for s in sites(model, x, "convolution")] == [
        ("conv1", "conv2", 1),
        ("conv2", "fc1", -1),
    ]
    assert [(s.module, s.tap.module, s.channel_axis) for s in sites(model, x, "hidden")] == [("fc1", "fc2", -1)]


def test_dead_units_of_a_plain_network_are_found() -> None:
    model = modules().eval()
    with torch.no_grad():
        model[0].bias[:6] = -100.0
    report = setpoint.check(model, [torch.randn(600, 8) for _ in range(4)])
    dead = [finding for finding in report.findings if finding.code == "dead-units"]
    assert [finding.sites for finding in dead] == [("0 hidden",)]


class Tail(nn.Module):
    """A residual unit, and a classifier with a hidden layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.classifier = nn.Sequential(nn.Linear(8, 10), nn.SiLU(), nn.Linear(10, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(x + self.down(torch.relu(self.up(self.norm(x)))))  # type: ignore[no-any-return]


def test_a_hidden_layer_behind_the_blocks_is_a_site_of_its_own() -> None:
    assert [(s.module, s.block) for s in sites(Tail(), ROWS, "hidden")] == [("", 0), ("classifier.0", None)]


@pytest.mark.parametrize(("form", "name"), [("none", "gelu"), ("tanh", "gelu_tanh")])
def test_the_two_forms_of_gelu_are_told_apart(form: str, name: str) -> None:
    class Written(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if form == "none":
                return 0.5 * x * (1.0 + torch.erf(x / 2.0**0.5))
            return 0.5 * x * (1.0 + torch.tanh((2.0 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))

    for activation in (nn.GELU(approximate=form), Written()):
        layers = Anatomy.trace(nn.Sequential(nn.Linear(8, 12), activation, nn.Linear(12, 3)), ROWS).layers
        assert [layer.activation for layer in layers] == [name]
