"""The data-dependent start of weight normalization (Salimans and Kingma, 2016, section 3)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.nn import MeanOnlyBatchNorm1d, apply_weight_norm, data_dependent_init, weight_norm


def deep() -> nn.Sequential:
    widths = [9, 8, 8, 8, 8, 8]
    parts: list[nn.Module] = []
    for a, b in pairwise(widths):
        parts += [nn.Linear(a, b), nn.ReLU(), nn.Dropout(0.5)]
    return apply_weight_norm(nn.Sequential(*parts))


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """What every layer gives before its activation, dropout off."""
    seen: list[Tensor] = []
    keep: Any = lambda _m, _i, y: seen.append(y)  # noqa: E731
    handles = [m.register_forward_hook(keep) for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    model.eval()(x)
    for handle in handles:
        handle.remove()
    return seen


def test_every_unit_of_five_layers_has_mean_zero_and_deviation_one() -> None:
    model, x = deep(), torch.randn(400, 9) * 3 + 1
    seen = outputs(data_dependent_init(model, x), x)
    assert len(seen) == 5
    for t in seen:
        assert t.mean(0).abs().max() < 1e-5
        assert (t.std(0, correction=0) - 1).abs().max() < 1e-4


def test_statistics_of_a_convolution_are_over_batch_and_space() -> None:
    model = apply_weight_norm(nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 6, 3, groups=2)))
    x = torch.randn(20, 2, 6, 6)
    t = data_dependent_init(model, x)(x)
    assert t.mean((0, 2, 3)).abs().max() < 1e-5
    assert (t.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-4


def test_directions_are_drawn_with_the_papers_deviation_and_the_same_by_seed() -> None:
    drawn = []
    for _ in range(2):
        model = nn.Sequential(weight_norm(nn.Linear(100, 100)))
        data_dependent_init(model, torch.randn(200, 100), generator=torch.Generator().manual_seed(3))
        drawn.append(model[0].parametrizations.weight.original1)
    assert drawn[0].std().item() == pytest.approx(0.05, rel=0.03)
    assert torch.equal(drawn[0], drawn[1])


def test_with_mean_only_batch_norm_its_output_has_mean_zero_and_deviation_one() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(9, 8, bias=False)), MeanOnlyBatchNorm1d(8), nn.ReLU())
    x = torch.rand(300, 9)
    data_dependent_init(model, x)
    t = model[:2].train()(x)
    assert t.mean(0).abs().max() < 1e-5
    assert (t.std(0, correction=0) - 1).abs().max() < 1e-4
    assert model[1].running_mean.abs().max() > 0


def test_modes_come_back_and_no_hook_stays() -> None:
    model = deep().train()
    model[2].eval()
    data_dependent_init(model, torch.randn(100, 9))
    assert model.training
    assert not model[2].training
    assert all(not m._forward_hooks for m in model.modules())


def test_a_failure_leaves_the_model_as_it_was() -> None:
    model = deep()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(InputError, match="0: 8 of 8 units give one value"):
        data_dependent_init(model, torch.ones(50, 9))
    two = nn.ModuleDict({"used": deep(), "unused": weight_norm(nn.Linear(2, 2))})
    with pytest.raises(InputError, match="unused did not run"):
        data_dependent_init(two, torch.randn(100, 9), forward=lambda m, x: m["used"](x))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    with pytest.raises(InputError, match="found none"):
        data_dependent_init(nn.Linear(2, 2), torch.randn(4, 2))
    with pytest.raises(InputError, match="std above 0"):
        data_dependent_init(model, torch.randn(4, 9), std=0.0)
