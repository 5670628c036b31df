from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from setpoint import fix
from setpoint.errors import InputError
from setpoint.fixes.mpbn import PotentialFolding, PotentialNorms
from setpoint.nn import LIF, MPBNLIF, OverTime


def spiking() -> tuple[nn.Module, Tensor]:
    """A convolution and a hidden layer, both with neurons."""
    torch.manual_seed(0)
    layers = (
        OverTime(nn.Conv2d(2, 4, 3)),
        LIF(tau=0.5),
        OverTime(nn.Flatten()),
        nn.Linear(64, 8),
        LIF(),
        nn.Linear(8, 3),
    )
    return nn.Sequential(*layers).eval(), torch.randn(4, 5, 2, 6, 6)


def test_every_neuron_gets_a_norm_of_its_channels_and_keeps_its_constants() -> None:
    model, x = spiking()
    fixed = fix(model, PotentialNorms(), [x], timed=False).model
    assert [m.feature_shape for m in fixed.modules() if isinstance(m, MPBNLIF)] == [(4,), (8,)]
    assert fixed[1].tau == 0.5
    assert fixed(x).shape == model(x).shape
    assert isinstance(model[1], LIF)


def test_trained_model_folds_to_plain_neurons_that_fire_alike() -> None:
    model, x = spiking()
    model = fix(model, "mpbn", [x], timed=False).model.train()
    for _ in range(5):
        model(torch.randn_like(x) + 0.5)
    for neuron in (model[1], model[4]):
        nn.init.normal_(neuron.bn.weight)
    model.eval()
    fixed = fix(model, PotentialFolding(), [x], timed=False)
    assert not any(isinstance(m, nn.BatchNorm1d | MPBNLIF) for m in fixed.model.modules())
    assert fixed.change.exact is not None
    torch.testing.assert_close(fixed.model(x), model(x))


def test_models_without_such_neurons_are_refused() -> None:
    model, x = spiking()
    with pytest.raises(InputError, match="no MPBNLIF neurons"):
        fix(model, PotentialFolding(), [x], timed=False)
    with pytest.raises(InputError, match="no LIF neurons"):
        fix(nn.Sequential(nn.Linear(2, 2)), PotentialNorms(), [torch.zeros(3, 2)], timed=False)


def test_neurons_that_have_the_norm_are_left_as_they_are() -> None:
    model, x = spiking()
    once = fix(model, PotentialNorms(), [x], timed=False).model
    assert not fix(once, PotentialNorms(), [x], timed=False).edits


def test_neurons_with_thresholds_of_their_own_are_refused() -> None:
    with pytest.raises(InputError, match=r"0: has a threshold for each channel"):
        fix(nn.Sequential(LIF((2,))), PotentialNorms(), [torch.zeros(3, 4, 2)])


def test_neurons_that_see_no_channels_are_refused() -> None:
    with pytest.raises(InputError, match=r"0: needs one number of channels on axis 2, and saw none"):
        fix(nn.Sequential(LIF()), PotentialNorms(), [torch.zeros(3, 4)])
