"""Membrane potential batch normalization (Guo et al., 2023)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.nn import LIF, MPBNLIF, fire


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.3


def trained(features: int | tuple[int, ...], **options: float) -> MPBNLIF:
    """In float64 and eval mode, with gains of both signs and statistics of its own."""
    layer = MPBNLIF(features, dtype=torch.float64, **options)
    with torch.no_grad():
        for tensor, start in ((layer.bn.weight, 0.0), (layer.bn.bias, 0.2), (layer.bn.running_mean, 0.3)):
            tensor.copy_(start + torch.cos(2.0 * torch.arange(tensor.numel()) + start))
        layer.bn.running_var.copy_(1 + 0.5 * torch.sin(torch.arange(layer.bn.running_var.numel())))
    return layer.eval()


def reference(x: Tensor, norm: nn.Module, tau: float, threshold: float) -> tuple[Tensor, Tensor]:
    """The definition, a line each; returns spikes and the potentials before the reset."""
    u, trains, kept = torch.zeros_like(x[0]), [], []
    for current in x:
        u = tau * u + current
        kept.append(u)
        spikes = fire(norm(u), threshold)
        u = u * (1 - spikes)
        trains.append(spikes)
    return torch.stack(trains), torch.stack(kept)


def test_outputs_gradients_and_running_statistics_are_those_of_the_definition() -> None:
    layer, norm, x = MPBNLIF(3, dtype=torch.float64), nn.BatchNorm2d(3, dtype=torch.float64), numbers(4, 5, 3, 2, 2)
    with torch.no_grad():
        layer.bn.weight.copy_(torch.tensor([0.7, -0.5, 1.4])), layer.bn.bias.fill_(0.3)
    norm.load_state_dict(layer.bn.state_dict())
    x.requires_grad_()
    got, (wanted, _) = layer(x), reference(x, norm, 0.25, 0.5)
    assert torch.equal(got, wanted)
    assert 0.05 < got.mean() < 0.95
    g = torch.randn_like(got)
    ours = torch.autograd.grad(got, [x, layer.bn.weight, layer.bn.bias], g)
    torch.testing.assert_close(ours, torch.autograd.grad(wanted, [x, norm.weight, norm.bias], g))
    torch.testing.assert_close(layer.bn.state_dict(), norm.state_dict())


def test_running_statistics_move_once_in_every_time_step() -> None:
    layer = MPBNLIF(3)
    layer(torch.randn(5, 4, 3))
    assert layer.bn.num_batches_tracked == 5


def test_folded_threshold_of_one_channel() -> None:
    layer = MPBNLIF(1).eval()
    with torch.no_grad():
        layer.bn.weight.fill_(2.0), layer.bn.bias.fill_(0.1)
        layer.bn.running_mean.fill_(0.3), layer.bn.running_var.fill_(0.25)
    folded = layer.fold()
    assert isinstance(folded, LIF)
    assert folded.v_threshold.item() == pytest.approx(0.400002, abs=1e-6)


@pytest.mark.parametrize(("features", "shape"), [(6, (8, 5, 6, 3, 3)), (6, (8, 50, 6)), ((6, 2, 3), (8, 30, 6, 2, 3))])
def test_folded_neurons_fire_alike_whatever_the_sign_of_the_gain(
    features: int | tuple[int, ...], shape: tuple[int, ...]
) -> None:
    layer, x = trained(features), numbers(*shape)
    assert (layer.bn.weight < 0).any()
    assert (layer.bn.weight > 0).any()
    spikes = layer(x)
    assert torch.equal(layer.fold()(x), spikes)
    assert 0.1 < spikes.mean() < 0.9


def test_neuron_with_gain_zero_fires_always_or_never() -> None:
    layer = trained(2)
    with torch.no_grad():
        layer.bn.weight.zero_(), layer.bn.bias.copy_(torch.tensor([0.6, 0.4]))
    x = numbers(3, 4, 2)
    assert torch.equal(layer.fold()(x), layer(x))
    assert layer(x).mean((0, 1)).tolist() == [1.0, 0.0]


def test_with_the_identity_for_a_norm_it_is_a_plain_neuron() -> None:
    layer, x = MPBNLIF(3, eps=0.0).eval(), torch.randn(6, 4, 3)
    assert torch.equal(layer(x), LIF()(x))


def test_normalized_potential_is_not_carried_on() -> None:
    """A norm that never lets a neuron fire leaves the potential a plain sum that leaks."""
    layer, x = trained(3, v_threshold=100.0), numbers(4, 2, 3)
    u, potential = torch.zeros_like(x[0]), None
    for current in x:
        u = 0.25 * u + current
        _, potential = layer.step(current, potential)
        torch.testing.assert_close(potential, u)


def test_spike_empties_the_raw_potential() -> None:
    layer, x = trained(3), numbers(5, 8, 3)
    potential = None
    for current in x:
        spikes, potential = layer.step(current, potential)
        assert (potential[spikes == 1] == 0).all()


def test_one_step_is_a_batch_norm_and_a_threshold() -> None:
    layer, norm, x = MPBNLIF(3), nn.BatchNorm2d(3), torch.randn(1, 6, 3, 4, 4)
    assert torch.equal(layer(x)[0], (norm(x[0]) > 0.5).float())


def test_elements_are_normalized_by_themselves() -> None:
    layer, x = MPBNLIF((3, 2, 2)), torch.randn(1, 6, 3, 2, 2)
    wanted = (x[0] - x[0].mean(0)) / (x[0].var(0, correction=0) + 1e-5).sqrt() > 0.5
    assert torch.equal(layer(x)[0], wanted.float())
    assert layer.fold is not None
    assert layer.eval().fold().v_threshold.shape == (3, 2, 2)


def test_norm_stays_in_float32_in_half_precision() -> None:
    layer = MPBNLIF(3).bfloat16()
    assert layer.bn.weight.dtype == layer.bn.running_var.dtype == torch.float32
    assert layer(torch.randn(2, 4, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_an_empty_batch_leaves_the_running_statistics_finite() -> None:
    layer = MPBNLIF(3)
    assert layer(torch.zeros(2, 0, 3, 4)).shape == (2, 0, 3, 4)
    assert layer.bn.running_mean.isfinite().all()
    assert layer.bn.running_var.isfinite().all()


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match="got training mode; call eval"):
        MPBNLIF(3).fold()
    with pytest.raises(InputError, match=r"\(T, N, 3, \*\), got \(2, 4, 5\)"):
        MPBNLIF(3)(torch.zeros(2, 4, 5))
    with pytest.raises(InputError, match=r"at least one time step, got \(0, 4, 3\)"):
        MPBNLIF(3)(torch.zeros(0, 4, 3))
    with pytest.raises(InputError, match="more than one value per channel and time step"):
        MPBNLIF(3)(torch.zeros(2, 1, 3))
    assert MPBNLIF(3).eval()(torch.zeros(2, 1, 3)).sum() == 0
    with pytest.raises(InputError, match="positive sizes"):
        MPBNLIF(0)
