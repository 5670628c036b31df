"""Region normalization (Yu et al., 2020)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from setpoint.errors import InputError
from setpoint.nn import RNB, RNL, RegionNorm, conditioned, region_norm
from setpoint.testing.layer_case import Case, pattern
from setpoint.testing.pair import gradients_on_two

EPS = 1e-5


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X = 3 * numbers(2, 3, 4, 5) + 1
MASK = numbers(2, 1, 4, 5, seed=1) > 0.3


def filled(x: Tensor, mask: Tensor) -> Tensor:
    """The official way: outside a region its mean, then a norm over all pixels, then the root of the region's share."""
    y = torch.zeros_like(x)
    for inside in (mask.to(x), 1 - mask.to(x)):
        pixels = inside.sum().clamp_min(1)
        mean = (x * inside).sum((0, 2, 3), keepdim=True) / pixels
        norm = F.batch_norm(x * inside + (1 - inside) * mean, None, None, training=True, eps=EPS)
        y = y + norm * (pixels / (len(x) * x.shape[2:].numel())).sqrt()
    return y


def test_hole_and_rest_are_normalized_apart() -> None:
    row, hole = torch.tensor([[[0.0, 2.0, 10.0, 14.0]]]), torch.tensor([[False, False, True, True]])
    torch.testing.assert_close(region_norm(row, hole), torch.tensor([[[-1.0, 1.0, -1.0, 1.0]]]), atol=1e-4, rtol=0)
    whole = F.batch_norm(row, None, None, training=True).flatten()
    assert (whole[:2].abs() - whole[2:].abs()).abs().min() > 0.1


@pytest.mark.parametrize("stats", ["batch", "instance"])
def test_scale_and_shift_of_a_region_are_forgotten(stats: str) -> None:
    layer = RegionNorm(3, stats, eps=0.0)
    torch.testing.assert_close(layer(torch.where(MASK, 7 * X + 100, X), MASK), layer(X, MASK))


@pytest.mark.parametrize("inside", [False, True])
def test_one_region_is_a_batch_norm_or_an_instance_norm(inside: bool) -> None:
    mask = torch.full_like(MASK, inside)
    batch = nn.BatchNorm2d(3, affine=False).double()
    torch.testing.assert_close(region_norm(X, mask), batch(X), atol=1e-6, rtol=0)
    torch.testing.assert_close(region_norm(X, mask, "instance"), F.instance_norm(X), atol=1e-6, rtol=0)


def test_output_and_gradient_are_those_of_filling_normalizing_and_rescaling() -> None:
    x = X.clone().requires_grad_()
    torch.testing.assert_close(region_norm(x, MASK), filled(x, MASK), atol=1e-12, rtol=0)
    got, wanted = (torch.autograd.grad((pattern(X) * norm(x, MASK)).sum(), x)[0] for norm in (region_norm, filled))
    torch.testing.assert_close(got, wanted, atol=1e-10, rtol=0)


def test_each_region_has_mean_zero_and_the_variance_that_eps_leaves() -> None:
    y = region_norm(X, MASK, eps=0.1)
    for region in (MASK, ~MASK):
        before, after = (t.movedim(1, -1)[region[:, 0]] for t in (X, y))
        torch.testing.assert_close(after.mean(0), torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)
        variance = before.var(0, correction=0)
        share = len(before) / MASK.numel()
        torch.testing.assert_close(after.var(0, correction=0), variance / (variance + 0.1 / share))


def test_regions_are_masks_one_mask_each_or_numbers() -> None:
    wanted = region_norm(X, MASK)
    for regions in (MASK[:, 0], MASK.double(), MASK.long(), MASK[:, 0].long(), torch.cat([MASK, ~MASK], 1)):
        torch.testing.assert_close(region_norm(X, regions), wanted)
    torch.testing.assert_close(region_norm(X, MASK[:1]), region_norm(X, MASK[:1].expand_as(MASK)))


def test_three_regions_of_a_volume_and_pixels_without_one() -> None:
    x, labels = numbers(2, 2, 2, 3, 2), torch.arange(24).reshape(2, 2, 3, 2) % 4
    y = RegionNorm(2, num_regions=3, eps=0.0)(x, labels).movedim(1, -1)
    assert torch.equal(y[labels == 3], torch.zeros(6, 2, dtype=torch.float64))
    for number in range(3):
        torch.testing.assert_close(y[labels == number].mean(0), torch.zeros(2, dtype=torch.float64), atol=1e-9, rtol=0)
        torch.testing.assert_close(y[labels == number].var(0, correction=0), torch.ones(2, dtype=torch.float64))


def test_single_pixel_gives_zero_and_empty_region_nothing() -> None:
    mask = torch.zeros(2, 1, 4, 5, dtype=torch.bool)
    mask[0, 0, 1, 1] = True
    y = region_norm(X, mask)
    assert torch.equal(y[0, :, 1, 1], torch.zeros(3, dtype=torch.float64))
    assert y.isfinite().all()
    instance = region_norm(X, mask, "instance")  # the second example has no pixel in the foreground
    torch.testing.assert_close(instance[1:], F.instance_norm(X[1:]), atol=1e-6, rtol=0)


def test_half_precision_is_computed_in_float32() -> None:
    x = (1000 + X).half()
    torch.testing.assert_close(region_norm(x, MASK), region_norm(x.double(), MASK).half(), atol=2e-3, rtol=0)
    assert region_norm(torch.full_like(x, 6e4), MASK).isfinite().all()


def test_evaluation_uses_the_batch_and_no_state() -> None:
    for layer in (RegionNorm(3), RNB(3).double(), RNL(3).double()):
        arguments = (X,) if isinstance(layer, RNL) else (X, MASK)
        assert not list(layer.buffers())
        torch.testing.assert_close(layer.eval()(*arguments), layer.train()(*arguments))


# RN-B ----------------------------------------------------------------------------------------------------------------


def test_rnb_starts_as_the_norm_and_has_four_numbers_a_channel() -> None:
    layer = RNB(3, dtype=torch.float64)
    torch.testing.assert_close(layer(X, MASK), region_norm(X, MASK))
    assert sum(p.numel() for p in layer.parameters()) == 12


@pytest.mark.parametrize("official", [False, True])
def test_beta_of_a_region_stays_in_it_unless_as_in_the_official_code(official: bool) -> None:
    layer = RNB(3, official_bias=official, dtype=torch.float64)
    with torch.no_grad():
        layer.foreground_beta.fill_(1.0)
    moved = layer(X, MASK) - region_norm(X, MASK)
    torch.testing.assert_close(moved, torch.ones_like(X) if official else MASK.to(X).expand_as(X))


def test_swapping_the_regions_with_their_parameters_changes_nothing() -> None:
    one, other = RNB(3, dtype=torch.float64), RNB(3, dtype=torch.float64)
    for index, name in enumerate(("gamma", "beta")):
        for region, opposite in (("foreground", "background"), ("background", "foreground")):
            value = numbers(3, seed=2 * index + (region == "foreground"))
            one.get_parameter(f"{region}_{name}").data.copy_(value)
            other.get_parameter(f"{opposite}_{name}").data.copy_(value)
    torch.testing.assert_close(one(X, MASK), other(X, ~MASK))


def test_mask_in_the_size_of_the_image_is_taken_at_the_nearest_pixels() -> None:
    layer = RNB(3, dtype=torch.float64)
    large = MASK.repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(layer(X, large), layer(X, MASK))


def test_mask_is_found_by_its_name() -> None:
    model = nn.Sequential(RNB(3), RNB(3, condition="other"), RegionNorm(3)).double()
    with conditioned(mask=MASK, other=~MASK):
        y = model(X)
    torch.testing.assert_close(y, model[2](model[1](model[0](X, MASK), ~MASK), MASK))
    with pytest.raises(InputError, match="RNB: expected the map 'mask', found none"):
        model(X)


def test_statistics_are_those_of_both_processes_even_if_one_has_no_hole() -> None:
    """Seen in the gradients of the gains, of which the two processes hold the mean."""
    x, mask = X.float(), MASK.clone()
    mask[1] = False
    layer = Case(lambda: RNB(3), (x, mask)).layer()
    y = region_norm(x, mask)
    outcomes = gradients_on_two(layer, [(x[:1], mask[:1]), (x[1:], mask[1:])])
    for region, inside in (("foreground", mask), ("background", ~mask)):
        halves = zip((y * inside).split(1), strict=True)
        wanted = sum((pattern(half) * half).sum((0, 2, 3)) for (half,) in halves) / 2
        for outcome, problem in outcomes:
            assert outcome is not None, problem
            torch.testing.assert_close(outcome[f"{region}_gamma"], wanted)


# RN-L ----------------------------------------------------------------------------------------------------------------


def test_rnl_without_weights_is_a_batch_norm() -> None:
    layer = RNL(3, dtype=torch.float64)
    assert sum(p.numel() for p in layer.parameters()) == 198
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    torch.testing.assert_close(layer(X), F.batch_norm(X, None, None, training=True), atol=1e-6, rtol=0)


def test_rnl_normalizes_what_its_map_picks_out() -> None:
    layer = RNL(3, kernel_size=3, dtype=torch.float64)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        layer.sa.conv1.weight[0, 1, 1, 1] = 1.0  # s = sigmoid of the largest channel
    picked = X.amax(1, keepdim=True) >= torch.tensor(4.0).log()  # where a sigmoid is 0.8
    assert picked.any()
    assert not picked.all()
    torch.testing.assert_close(layer(X), region_norm(X, picked))


def test_the_split_passes_no_gradient_and_its_map_learns_by_gain_and_addend() -> None:
    torch.manual_seed(0)
    layer = RNL(3, threshold=0.5, dtype=torch.float64)
    split = layer(X)
    gradient = torch.autograd.grad((pattern(X) * split).sum(), layer.sa.conv1.weight, retain_graph=True)[0]
    assert gradient.abs().max() > 0
    for convolution in (layer.sa.gamma_conv, layer.sa.beta_conv):
        nn.init.zeros_(convolution.weight)
    gradient = torch.autograd.grad((pattern(X) * layer(X)).sum(), layer.sa.conv1.weight)[0]
    assert gradient.abs().max() == 0


# what is refused -----------------------------------------------------------------------------------------------------


def test_bad_masks_are_refused() -> None:
    layer = RNB(3, dtype=torch.float64)
    with pytest.raises(InputError, match=r"shape \(N, 1, \*\) .* \(2, 3, 4, 5\), got \(3, 1, 4, 5\)"):
        layer(X, torch.ones(3, 1, 4, 5, dtype=torch.bool))
    with pytest.raises(InputError, match="zeros and ones, got other values"):
        layer(X, torch.full((2, 1, 4, 5), 0.5))
    with pytest.raises(InputError, match=r"a mask of one channel, got \(2, 3, 4, 5\)"):
        layer(X, torch.ones(2, 3, 4, 5, dtype=torch.bool))
    with pytest.raises(InputError, match=r"the size \(4, 5\) of the input, got \(2, 2\)"):
        region_norm(X, torch.ones(2, 1, 2, 2, dtype=torch.bool))


def test_bad_arguments_and_inputs_are_refused() -> None:
    with pytest.raises(InputError, match="kernel_size to be 3 or 7, got 5"):
        RNL(3, kernel_size=5)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="'batch' or 'instance', got 'layer'"):
        RegionNorm(3, "layer")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="num_features of at least 1, got 0"):
        RNB(0)
    with pytest.raises(InputError, match="4 axes, got 3"):
        RNL(3)(torch.zeros(2, 3, 4))
    with pytest.raises(InputError, match=r"\(N, 4, \*\), got \(2, 3, 4, 5\)"):
        RNB(4)(X, MASK)
    with pytest.raises(TypeError, match="floating-point"):
        RegionNorm(3)(X.long(), MASK)
