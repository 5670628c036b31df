"""Group-wise deep whitening and coloring (Cho et al., 2019)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.nn import GDWCT, group_wct, whitening_loss
from setpoint.nn.norm.gdwct import coloring_of, distance_from_identity
from setpoint.testing.layer_case import Case, pattern
from setpoint.testing.pair import gradients_on_two


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def fixed(layer: GDWCT, a: Tensor, mu: Tensor, alpha: float) -> GDWCT:
    """A layer that predicts the same matrix for every group and the same mean, whatever the style."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        layer.alpha.fill_(alpha)
        layer.mlp_CT.main[-1].fc.bias.copy_(a.flatten())
        layer.mlp_mu.main[-1].fc.bias.copy_(mu)
    return layer


def white(*shape: int) -> Tensor:
    """Features of mean 0 whose unbiased covariance over batch and space is the identity."""
    x = numbers(*shape).movedim(1, 0)
    flat = x.flatten(1) - x.flatten(1).mean(1, keepdim=True)
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(flat.cov()), flat, upper=False)
    return whitened.view_as(x).movedim(0, 1)


CONTENT, STYLE = 2 * numbers(3, 6, 4, 5) + 1, numbers(3, 6, seed=1)
A = numbers(3, 3, seed=2)
ORTHOGONAL = torch.linalg.qr(A).Q
D = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)


def test_alpha_of_zero_leaves_the_content() -> None:
    layer = GDWCT(6, 2, hidden=4, alpha_init=0.0, dtype=torch.float64)
    assert torch.equal(layer(CONTENT, STYLE), CONTENT)


def test_alpha_of_one_with_the_identity_only_centres() -> None:
    layer = fixed(GDWCT(6, 2, hidden=4, dtype=torch.float64), torch.eye(3), torch.zeros(6), alpha=1.0)
    torch.testing.assert_close(layer(CONTENT, STYLE), CONTENT - CONTENT.mean((0, 2, 3), keepdim=True))
    layer.center = "instance"
    torch.testing.assert_close(layer(CONTENT, STYLE), CONTENT - CONTENT.mean((2, 3), keepdim=True))


def test_coloring_is_symmetric_without_negative_eigenvalues() -> None:
    u, x = coloring_of(numbers(50, 4, 4))
    torch.testing.assert_close(x, x.mT)
    assert torch.linalg.eigvalsh(x).min() > -1e-12
    torch.testing.assert_close(torch.linalg.vector_norm(u, dim=-2), torch.ones(50, 4, dtype=torch.float64))


def test_orthogonal_columns_make_it_the_root_of_a_covariance() -> None:
    u, x = coloring_of(ORTHOGONAL * D)
    torch.testing.assert_close(x @ x.mT, u @ torch.diag(D.square()) @ u.mT)


def test_white_content_gets_the_predicted_covariance_and_mean() -> None:
    content, mu = white(3, 6, 4, 5), numbers(6, seed=5)
    y = fixed(GDWCT(6, 2, hidden=4, dtype=torch.float64), ORTHOGONAL * D, mu, alpha=1.0)(content, STYLE)
    flat = y.movedim(1, 0).flatten(1)
    wanted = ORTHOGONAL @ torch.diag(D.square()) @ ORTHOGONAL.mT
    torch.testing.assert_close(flat.mean(1), mu)
    for group in flat.split(3):
        torch.testing.assert_close(group.cov(), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_groups_do_not_mix_and_each_reads_its_part_of_the_style(groups: int) -> None:
    torch.manual_seed(0)
    layer = GDWCT(6, groups, hidden=4, alpha_init=1.0, center="instance", dtype=torch.float64)
    nn.init.zeros_(layer.mlp_mu.main[-1].fc.weight)
    content, style = CONTENT.clone(), STYLE.clone()
    content[:, 0, 0, 0] += 1.0
    style[:, 0] += 1.0
    moved = (layer(content, style) - layer(CONTENT, STYLE)).abs().amax((0, 2, 3)) > 0
    assert moved.tolist() == [channel < 6 // groups for channel in range(6)]


def test_as_many_groups_as_channels_scale_each_channel() -> None:
    torch.manual_seed(0)
    layer = GDWCT(6, 6, hidden=4, alpha_init=1.0, dtype=torch.float64)
    nn.init.zeros_(layer.mlp_mu.main[-1].fc.weight), nn.init.zeros_(layer.mlp_mu.main[-1].fc.bias)
    scale = layer.mlp_CT(STYLE[..., None]).abs()[..., None]
    torch.testing.assert_close(layer(CONTENT, STYLE), scale * (CONTENT - CONTENT.mean((0, 2, 3), keepdim=True)))


def test_number_of_parameters() -> None:
    layer = GDWCT(256, 8)
    assert sum(p.numel() for p in layer.mlp_CT.parameters()) == 468_992
    assert sum(p.numel() for p in layer.mlp_mu.parameters()) == 3 * (256 * 256 + 256)
    assert layer.alpha.item() == pytest.approx(0.6)


# the losses ----------------------------------------------------------------------------------------------------------


def test_whitening_loss_is_zero_at_white_features_and_pulls_scaled_ones_back() -> None:
    x = white(3, 6, 4, 5)
    assert whitening_loss((1 - 1e-5) ** 0.5 * x, 2) < 1e-12
    assert whitening_loss(x, 2) < 1e-5
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    for _ in range(200):
        loss = whitening_loss(scale * x, 2)
        scale = (scale - 0.02 * torch.autograd.grad(loss, scale)[0]).detach().requires_grad_()
    assert scale.item() == pytest.approx(1.0, abs=0.03)


def test_regularizers_are_of_the_content_and_of_u() -> None:
    torch.manual_seed(0)
    layer = GDWCT(6, 2, hidden=4, dtype=torch.float64)
    y, losses = layer(CONTENT, STYLE, need_regularizers=True)
    assert torch.equal(y, layer(CONTENT, STYLE))
    flat = CONTENT.movedim(1, 0).flatten(1)
    wanted = torch.stack([group.cov() + 1e-5 * torch.eye(3) for group in flat.split(3)])
    torch.testing.assert_close(losses.covariance, wanted)
    torch.testing.assert_close(losses.whitening, whitening_loss(CONTENT, 2))
    assert losses.u.shape == (3, 2, 3, 3)
    torch.testing.assert_close(losses.coloring, (losses.u.mT @ losses.u - torch.eye(3)).abs().mean())
    turned = fixed(layer, ORTHOGONAL * D, torch.zeros(6), alpha=1.0)(CONTENT, STYLE, need_regularizers=True)[1]
    assert turned.coloring < 1e-12
    assert distance_from_identity(turned.u) > 0.1  # what the official code takes


def test_covariance_of_each_example_where_each_is_centred() -> None:
    layer = GDWCT(6, 2, hidden=4, center="instance", dtype=torch.float64)
    _, losses = layer(CONTENT, STYLE, need_regularizers=True)
    torch.testing.assert_close(losses.covariance[1, 1], CONTENT[1, 3:].flatten(1).cov() + 1e-5 * torch.eye(3))
    torch.testing.assert_close(losses.whitening, whitening_loss(CONTENT, 2, "instance"))


def test_too_few_pixels_are_warned_of() -> None:
    layer = GDWCT(6, 1, hidden=4)
    with pytest.warns(UserWarning, match="4 pixels for groups of 6 channels"):
        layer(torch.randn(1, 6, 2, 2), torch.randn(1, 6), need_regularizers=True)


# exact ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2])
def test_exact_transform_gives_covariance_and_mean_of_the_style(groups: int) -> None:
    style = numbers(3, 6, 40, seed=3) @ numbers(40, 70, seed=4) + 2
    y = group_wct(CONTENT, style, groups).flatten(2)
    torch.testing.assert_close(y.mean(2), style.mean(2))
    for ours, theirs in zip(y, style, strict=True):
        for a, b in zip(ours.split(6 // groups), theirs.split(6 // groups), strict=True):
            torch.testing.assert_close(a.cov(), b.cov(), atol=1e-4, rtol=1e-6)


def test_exact_transform_to_a_white_style_whitens() -> None:
    y = group_wct(CONTENT, white(1, 6, 9, 9), 2)
    for example in y.flatten(2):
        for group in example.split(3):
            torch.testing.assert_close(group.cov(), torch.eye(3, dtype=torch.float64), atol=1e-4, rtol=0)


# other ways to call --------------------------------------------------------------------------------------------------


def test_a_style_of_one_example_or_with_axes_of_space_serves_too() -> None:
    torch.manual_seed(0)
    layer = GDWCT(6, 2, style_dim=4, hidden=4, dtype=torch.float64)
    style = STYLE[:1, :4]
    torch.testing.assert_close(layer(CONTENT, style), layer(CONTENT, style.expand(3, -1)[..., None, None]))


def test_column_of_zeros_is_finite() -> None:
    a = A.clone()
    a[:, 1] = 0
    a.requires_grad_()
    u, x = coloring_of(a)
    assert torch.equal(u[:, 1], torch.zeros(3, dtype=torch.float64))
    x.sum().backward()
    assert a.grad.isfinite().all()


def test_alpha_is_brought_back_between_zero_and_one() -> None:
    layer = GDWCT(6, 2, hidden=4, alpha_init=1.7)
    layer.clamp_alpha()
    assert layer.alpha.item() == 1.0
    layer.reset_parameters()
    assert layer.alpha.item() == pytest.approx(1.7)


def test_the_mean_is_that_of_both_processes() -> None:
    """Seen in the gradient of alpha, of which the two processes hold the mean."""
    content, style = CONTENT[:2].float() * torch.tensor([1.0, 5.0])[:, None, None, None], STYLE[:2].float()
    layer = Case(lambda: GDWCT(6, 2, hidden=4), (content, style)).layer()
    with torch.no_grad():
        moved = (layer(content, style) - content) / layer.alpha  # what alpha multiplies
    wanted = sum((pattern(half) * half).sum() for half in moved.split(1)) / 2
    for outcome, problem in gradients_on_two(layer, [(content[:1], style[:1]), (content[1:], style[1:])]):
        assert outcome is not None, problem
        torch.testing.assert_close(outcome["alpha"], wanted[None], rtol=1e-4, atol=1e-4)


def test_state_has_the_official_names() -> None:
    assert [*GDWCT(6, 2).state_dict()] == [
        "alpha",
        *(f"mlp_CT.main.{i}.fc.{p}" for i in range(5) for p in ("weight", "bias")),
        *(f"mlp_mu.main.{i}.fc.{p}" for i in range(3) for p in ("weight", "bias")),
    ]


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(InputError, match="num_features to be a multiple of num_groups, got 6 and 4"):
        GDWCT(6, 4)
    with pytest.raises(InputError, match="style_dim to be a multiple of num_groups, got 5 and 2"):
        GDWCT(6, 2, style_dim=5)
    with pytest.raises(InputError, match="'batch' or 'instance', got 'none'"):
        GDWCT(6, 2, center="none")  # type: ignore[arg-type]
    layer = GDWCT(6, 2, hidden=4, dtype=torch.float64)
    with pytest.raises(InputError, match=r"a style of shape \(3, 6\), or of one example, got \(2, 6\)"):
        layer(CONTENT, STYLE[:2])
    with pytest.raises(InputError, match=r"got \(3, 6, 4, 5\); average maps over space"):
        layer(CONTENT, CONTENT)
    with pytest.raises(InputError, match=r"\(N, 6, \*\), got \(3, 3, 4, 5\)"):
        layer(CONTENT[:, :3], STYLE)
    with pytest.raises(
        InputError, match=r"a style of shape \(3, 6\) and pixels, or of one example, got \(3, 3, 4, 5\)"
    ):
        group_wct(CONTENT, CONTENT[:, :3], 2)
    with pytest.raises(InputError, match="got 6 and 4"):
        whitening_loss(CONTENT, 4)
