"""Leaky integrate-and-fire neurons and their surrogate gradient."""

from __future__ import annotations

from math import tanh

import pytest
import torch
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.nn import LIF, OverTime, fire


def test_surrogate_is_the_slope_of_the_ramp_inside_the_window_and_zero_outside() -> None:
    m = torch.tensor([-0.1, 0.0, 0.25, 0.5, 1.0, 1.1], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(fire(m).sum(), m)
    inside = 3 * (1 - torch.tanh(3 * (m.detach() - 0.5)) ** 2) / (2 * tanh(1.5))
    wanted = torch.where((m >= 0) & (m <= 1), inside, 0.0)
    torch.testing.assert_close(slope, wanted)
    assert slope[3].item() == pytest.approx(1.6572, abs=1e-4)


def test_surrogate_integrates_to_one_over_its_window() -> None:
    m = torch.linspace(0, 1, 10_001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(fire(m).sum(), m)
    assert torch.trapezoid(slope, dx=1e-4).item() == pytest.approx(1.0, abs=1e-6)


def test_window_moves_with_the_threshold() -> None:
    m = torch.tensor([1.6, 2.0, 2.4, 2.6], requires_grad=True)
    spikes = fire(m, threshold=2.0)
    assert spikes.tolist() == [0.0, 0.0, 1.0, 1.0]
    assert (torch.autograd.grad(spikes.sum(), m)[0] > 0).tolist() == [True, True, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_spikes_are_exactly_zero_or_one(dtype: torch.dtype) -> None:
    spikes = fire(torch.randn(100_000, dtype=dtype) + 0.5)
    assert torch.equal(spikes, (spikes > 0.5).to(dtype))


def test_weak_current_never_fires_and_a_stronger_one_fires_at_the_third_step() -> None:
    layer = LIF(tau=0.25, v_threshold=0.5)
    weak, _ = potentials(layer, torch.full((20, 1, 1), 0.3, dtype=torch.float64))
    torch.testing.assert_close(weak[:3].flatten().tolist(), [0.3, 0.375, 0.39375])
    assert weak[-1].item() == pytest.approx(0.4)
    assert layer(torch.full((20, 1, 1), 0.3)).sum() == 0
    strong = torch.full((3, 1, 1), 0.375)
    assert layer(strong).sum() == 0  # 0.375, 0.46875, 0.4921875
    assert layer(torch.full((3, 1, 1), 0.4)).flatten().tolist() == [0.0, 0.0, 1.0]


def potentials(layer: LIF, x: Tensor) -> tuple[Tensor, Tensor]:
    u, kept, trains = None, [], []
    for current in x:
        spikes, u = layer.step(current, u)
        kept.append(u), trains.append(spikes)
    return torch.stack(kept), torch.stack(trains)


def test_steps_one_by_one_give_what_a_sequence_gives_and_a_spike_empties_the_potential() -> None:
    layer, x = LIF(), torch.randn(6, 2, 3, 4)
    u, spikes = potentials(layer, x)
    assert torch.equal(layer(x), spikes)
    assert (u[spikes == 1] == 0).all()
    assert 0.1 < spikes.mean() < 0.9


def test_gradients_flow_through_time_and_through_the_reset() -> None:
    x = torch.tensor([0.7, 0.7], dtype=torch.float64, requires_grad=True)
    spikes = LIF()(x.reshape(2, 1, 1)).flatten()
    u = x.detach()
    slope = [3 * (1 - tanh(3 * (float(v) - 0.5)) ** 2) / (2 * tanh(1.5)) for v in u]
    # u2 = x2 + tau u1 (1 - s1): the spike has emptied it, and its derivative in u1 is tau ((1 - s1) - u1 s1')
    wanted = [slope[1] * 0.25 * (-0.7 * slope[0]), slope[1]]
    assert spikes.tolist() == [1.0, 1.0]
    assert torch.autograd.grad(spikes[1], x)[0].tolist() == pytest.approx(wanted)


def test_thresholds_and_their_signs_are_per_channel() -> None:
    layer = LIF((2,), tau=0.0)
    layer.v_threshold.copy_(torch.tensor([1.0, -1.0]))
    layer.sign.copy_(torch.tensor([1.0, -1.0]))
    x = torch.tensor([[0.5, -2.0], [2.0, 0.5]])[None, :, :, None].expand(1, 2, 2, 3)
    assert layer(x)[0, :, :, 0].tolist() == [[0.0, 1.0], [1.0, 0.0]]


def test_layer_over_time_sees_steps_as_examples() -> None:
    norm, x = nn.BatchNorm2d(3), torch.randn(4, 2, 3, 5, 5)
    joint = nn.BatchNorm3d(3)(x.permute(1, 2, 0, 3, 4)).permute(2, 0, 1, 3, 4)
    torch.testing.assert_close(OverTime(norm)(x), joint)
    assert OverTime(nn.Flatten())(x).shape == (4, 2, 75)
    assert OverTime(nn.Conv2d(3, 2, 3))(x[:, :0]).shape == (4, 0, 2, 3, 3)


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match=r"\(T, N, \.\.\.\) with at least one time step, got \(0, 2, 3\)"):
        LIF()(torch.zeros(0, 2, 3))
    with pytest.raises(InputError, match=r"got \(3,\); put the time axis in front"):
        LIF()(torch.zeros(3))
    with pytest.raises(InputError, match=r"\(T, N, 4, \*\), got \(2, 2, 3\)"):
        LIF((4,))(torch.zeros(2, 2, 3))
    with pytest.raises(InputError, match="tau between 0 and 1"):
        LIF(tau=2.0)
    with pytest.raises(TypeError, match="floating-point"):
        LIF()(torch.zeros(2, 2, 3, dtype=torch.long))
    with pytest.raises(InputError, match=r"\(T, N, \.\.\.\), got \(3,\)"):
        OverTime(nn.Identity())(torch.zeros(3))
