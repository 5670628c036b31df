"""Spatially-adaptive normalization (Park et al., 2019)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from setpoint.errors import InputError
from setpoint.nn import SPADE, Conditioned, RegionNorm, conditioned


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def made(channels: int = 3, labels: int = 2, **options: object) -> SPADE:
    """A layer in float64 with weights that do something."""
    layer = SPADE(channels, labels, **{"hidden": 4, "dtype": torch.float64, **options})  # type: ignore[arg-type]
    for index, parameter in enumerate(layer.parameters()):
        parameter.data.copy_(numbers(*parameter.shape, seed=index) / 2)
    return layer


X = 2 * numbers(2, 3, 8, 9) + 1
LABELS = torch.randint(2, (2, 8, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_without_gamma_and_beta_it_is_the_norm_inside(norm: str) -> None:
    layer = made(norm=norm)
    for parameter in (*layer.mlp_gamma.parameters(), *layer.mlp_beta.parameters()):
        nn.init.zeros_(parameter)
    wanted = F.instance_norm(X) if norm == "instance" else F.batch_norm(X, None, None, training=True)
    assert torch.equal(layer(X, LABELS), wanted)


def test_it_is_the_formula_with_one_added_to_gamma() -> None:
    layer, one_hot = made(), F.one_hot(LABELS, 2).movedim(-1, 1).double()
    active = F.conv2d(one_hot, layer.mlp_shared[0].weight, layer.mlp_shared[0].bias, padding=1).relu()
    gamma = F.conv2d(active, layer.mlp_gamma.weight, layer.mlp_gamma.bias, padding=1)
    beta = F.conv2d(active, layer.mlp_beta.weight, layer.mlp_beta.bias, padding=1)
    torch.testing.assert_close(layer(X, LABELS), F.instance_norm(X) * (1 + gamma) + beta)


def test_labels_survive_where_an_instance_norm_washes_them_away() -> None:
    flat = torch.ones(1, 3, 8, 8, dtype=torch.float64)
    layer, plain = made(), nn.InstanceNorm2d(3, affine=True).double()
    maps = [torch.full((1, 8, 8), label) for label in (0, 1)]
    torch.testing.assert_close(layer(flat, maps[0]), layer.modulation(maps[0], flat.shape[2:])[1])
    assert (layer(flat, maps[0]) - layer(flat, maps[1])).abs().max() > 0.1
    torch.testing.assert_close(plain(flat), plain(2 * flat))  # two labels, as a convolution would show them


def test_one_label_makes_one_gain_and_one_addend_a_channel_away_from_the_border() -> None:
    gamma, beta = made().modulation(torch.zeros(1, 12, 12, dtype=torch.long), torch.Size((12, 12)))
    for values in (gamma, beta):
        inner = values[:, :, 2:-2, 2:-2]
        torch.testing.assert_close(inner, inner[:, :, :1, :1].expand_as(inner))
    assert not torch.allclose(beta[:, :, 0], beta[:, :, 6])


def test_labels_stay_hard_when_they_grow() -> None:
    board = torch.tensor([[[0, 1], [1, 0]]])
    layer = made()
    grown = board.repeat_interleave(2, 1).repeat_interleave(2, 2)
    for given, same in ((board, grown), (F.one_hot(board, 2).movedim(-1, 1).double(), grown)):
        torch.testing.assert_close(layer.modulation(given, torch.Size((4, 4))), layer.modulation(same, same.shape[1:]))


@pytest.mark.parametrize(("kernel", "labels", "channels", "count"), [(3, 4, 16, 41632), (5, 2, 3, 6528 + 2 * 9603)])
def test_number_of_parameters(kernel: int, labels: int, channels: int, count: int) -> None:
    assert sum(p.numel() for p in SPADE(channels, labels, kernel_size=kernel).parameters()) == count


def test_one_pixel_of_the_map_reaches_two_kernels_far() -> None:
    layer, changed = made(), LABELS.clone()
    changed[0, 4, 4] = 1 - changed[0, 4, 4]
    moved = (layer(X, changed) - layer(X, LABELS)).abs().amax(1) > 0
    assert moved[0, 2:7, 2:7].any()
    moved[0, 2:7, 2:7] = False
    assert not moved.any()


def test_scale_and_shift_of_a_channel_are_forgotten() -> None:
    scale, shift = numbers(2, 3, 1, 1, seed=3).exp(), numbers(2, 3, 1, 1, seed=4)
    layer = made()
    torch.testing.assert_close(layer(scale * X + shift, LABELS), layer(X, LABELS), rtol=1e-4, atol=1e-4)


def test_batch_norm_inside_averages_in_training_and_uses_it_in_evaluation() -> None:
    layer = made(norm="batch")
    layer(X, LABELS)
    torch.testing.assert_close(layer.param_free_norm.running_mean, 0.1 * X.mean((0, 2, 3)))
    y = layer.eval()(X, LABELS)
    torch.testing.assert_close(layer(X[:1], LABELS[:1]), y[:1])


def test_numbers_of_labels_are_one_hot_and_others_are_no_label() -> None:
    layer = made()
    one_hot = F.one_hot(LABELS, 2).movedim(-1, 1)
    torch.testing.assert_close(layer(X, LABELS), layer(X, one_hot))
    torch.testing.assert_close(layer(X, LABELS.to(torch.uint8)), layer(X, one_hot.bool()))
    none = torch.zeros(2, 2, 8, 9, dtype=torch.float64)
    torch.testing.assert_close(layer(X, torch.full_like(LABELS, 255)), layer(X, none))


def test_one_map_serves_all_examples_and_its_modulation_can_be_kept() -> None:
    layer = made()
    gamma, beta = layer.modulation(LABELS[:1], X.shape[2:])
    kept = layer.param_free_norm(X) * (1 + gamma) + beta
    torch.testing.assert_close(layer(X, LABELS[:1]), kept)
    torch.testing.assert_close(kept, layer(X, LABELS[:1].expand(2, -1, -1)))


def test_any_norm_may_stand_inside() -> None:
    layer = made(norm=nn.GroupNorm(1, 3, affine=False))
    gamma, beta = layer.modulation(LABELS, X.shape[2:])
    torch.testing.assert_close(layer(X, LABELS), F.group_norm(X, 1) * (1 + gamma) + beta)


def test_it_starts_near_the_norm_inside() -> None:
    torch.manual_seed(0)
    layer = SPADE(3, 2, dtype=torch.float64)
    assert all(p.abs().max() == 0 for name, p in layer.named_parameters() if name.endswith("bias"))
    torch.testing.assert_close(layer(X, LABELS), F.instance_norm(X), atol=1e-3, rtol=0)


def test_maps_of_several_kinds_reach_their_layers_in_a_deep_model() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 2, stride=2), made(), RegionNorm(3), nn.Upsample(scale_factor=2), made())
    model.double()
    mask = LABELS.bool()[:, None]
    with conditioned(segmap=LABELS, mask=mask):
        y = model(X)
    first = model[2](model[1](model[0](X), LABELS), mask)
    torch.testing.assert_close(y, model[4](model[3](first), LABELS))
    torch.testing.assert_close(Conditioned(model, "segmap", "mask")(X, segmap=LABELS, mask=mask), y)


def test_state_has_the_official_names() -> None:
    assert [*SPADE(3, 2, norm="batch").state_dict()] == [
        *(f"param_free_norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")),
        *(f"{name}.{p}" for name in ("mlp_shared.0", "mlp_gamma", "mlp_beta") for p in ("weight", "bias")),
    ]


def test_bad_maps_and_arguments_are_refused() -> None:
    layer = made()
    with pytest.raises(InputError, match=r"\(N, 2, H, W\), or \(N, H, W\) .* got \(2, 3, 8, 9\)"):
        layer(X, torch.zeros(2, 3, 8, 9))
    with pytest.raises(InputError, match=r"got \(2, 8, 9\)"):
        layer(X, torch.zeros(2, 8, 9))  # numbers of labels are whole
    with pytest.raises(InputError, match="a map of 2 examples, as the input has, or of one for all, got 3"):
        layer(X, torch.zeros(3, 8, 9, dtype=torch.long))
    with pytest.raises(InputError, match="SPADE: expected the map 'segmap', found none"):
        layer(X)
    with pytest.raises(InputError, match="an odd kernel_size, got 3, 2, 128 and 4"):
        SPADE(3, 2, kernel_size=4)
    with pytest.raises(InputError, match="one of instance, batch, syncbatch, got 'layer'"):
        SPADE(3, 2, norm="layer")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"\(N, 3, \*\), got \(2, 4, 8, 9\)"):
        layer(torch.zeros(2, 4, 8, 9), LABELS)
    with pytest.raises(TypeError, match="floating-point"):
        layer(X.long(), LABELS)
