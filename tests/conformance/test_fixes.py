"""Every fix of the catalogue goes through `check_fix`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from setpoint import fix
from setpoint.catalog import items
from setpoint.fixing.spec import fix_class
from setpoint.nn import LIF, MPBNLIF, PowerNorm, UnifiedNorm, weight_norm
from setpoint.testing import check_fix
from setpoint.testing.tiny import shaken, tiny

FIXES = sorted(name for name, (_, item) in items().items() if item.kind == "fix")


def normalized() -> tuple[nn.Module, torch.Tensor]:
    """The tiny encoder with every linear layer of its own under weight normalization."""
    model, batch = tiny("encoder")
    weight_norm(model[0])
    weight_norm(model[2])
    return model, batch


def projected() -> tuple[nn.Module, torch.Tensor]:
    """The tiny decoder, whose head is its token table, with embedding projections."""
    model, batch = tiny("decoder")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return shaken(fix(model, "osp:norms=false", [batch], timed=False).model), batch


def batch_normalized() -> tuple[nn.Module, torch.Tensor]:
    """A convolution, a batch norm and a classifier."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))
        return shaken(nn.Sequential(*layers)), torch.randn(2, 3, 8, 8)


def spiking(neuron: nn.Module) -> tuple[nn.Module, torch.Tensor]:
    """A hidden layer with neurons, over three time steps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return shaken(nn.Sequential(nn.Linear(4, 8), neuron, nn.Linear(8, 3))), torch.randn(3, 5, 4)


OWN = {
    "lns-fold": partial(tiny, "scaled"),
    "fold-weights": normalized,
    "unified-norm-fold": partial(tiny, "decoder", norm=UnifiedNorm),
    "powernorm-fold": partial(tiny, "decoder", norm=partial(PowerNorm, group_num=2)),
    "online-norm": batch_normalized,
    "osp-fold": projected,
    "alpha-bn": batch_normalized,
    "bn-fold": batch_normalized,
    "evonorm": batch_normalized,
    "region-norm": batch_normalized,
    "mpbn": lambda: spiking(LIF()),
    "mpbn-fold": lambda: spiking(MPBNLIF(8)),
}
"""Models for fixes that are made for one kind of model alone."""


@pytest.mark.parametrize("item", FIXES)
def test_every_fix_passes_the_suite(item: str) -> None:
    kind = fix_class(item)
    assert kind.id == item
    assert items()[item][1].preserves == kind.preserves
    assert check_fix(kind, OWN.get(item))


@pytest.mark.parametrize("item", FIXES)
def test_every_fix_has_a_file_and_tests_of_its_own(item: str) -> None:
    module = fix_class(item).__module__.rpartition(".")[2]
    assert list(Path(__file__).parents[1].rglob(f"test_{module}.py")), f"write tests/fixes/test_{module}.py"
