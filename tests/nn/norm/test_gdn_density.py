"""The density of image patches made of GDNs (Ballé, Laparra and Simoncelli, 2016)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from setpoint.errors import InputError
from setpoint.nn import GDNDensity


def made(stages: int = 1, scale: float = 0.05) -> GDNDensity:
    """Two dimensions, float64, small pools: outputs are bounded far outside a standard normal."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        density = GDNDensity(2, stages, dtype=torch.float64)
    for norm in density.norms:
        norm.assign(torch.tensor([0.8, 1.2]), scale * torch.tensor([[1.0, 0.3], [0.1, 0.7]]))
    return density


def grid(reach: float, step: float) -> Tensor:
    axis = torch.arange(-reach, reach, step, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis)


@pytest.mark.parametrize("stages", [1, 2])
def test_total_probability_is_one(stages: int) -> None:
    step = 0.1
    with torch.no_grad():
        total = float(made(stages, 0.04 / stages).log_prob(grid(30.0, step)).exp().sum() * step**2)
    assert total == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("stages", [1, 3])
def test_log_density_is_that_of_the_change_of_variables(stages: int) -> None:
    density, x = made(stages), torch.randn(1, 2, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda row: density(row[None])[0], x[0])
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(density(x)).sum()
    torch.testing.assert_close(density.log_prob(x)[0], normal + torch.linalg.slogdet(jacobian).logabsdet)


def heavy_tailed(count: int) -> Tensor:
    """A Student t with three degrees of freedom: uncorrelated components that depend on each other."""
    numbers = torch.Generator().manual_seed(3)
    radius = torch.randn(count, 3, generator=numbers).square().mean(1, keepdim=True).sqrt()
    return torch.randn(count, 4, generator=numbers) / radius


def test_fit_beats_the_gaussian_of_the_same_covariance_on_held_out_data() -> None:
    data, held_out = heavy_tailed(8000).split(4000)
    torch.manual_seed(0)
    density = GDNDensity(4)
    losses = density.fit(data, steps=150, lr=1e-2, generator=torch.Generator().manual_seed(0))
    assert losses[-20:].mean() < losses[:5].mean() - 0.1
    gaussian = torch.distributions.MultivariateNormal(torch.zeros(4), data.T.cov())
    assert density.log_prob(held_out).mean() > gaussian.log_prob(held_out).mean() + 0.05


def test_samples_follow_the_density() -> None:
    density = made()
    drawn = density.sample(20_000, torch.Generator().manual_seed(0))
    assert drawn.shape == (20_000, 2)
    y = density(drawn).detach()
    torch.testing.assert_close(y.T.cov(), torch.eye(2, dtype=torch.float64), atol=0.05, rtol=0)
    assert density.sample(0).shape == (0, 2)


def test_samples_are_within_the_bounds_of_strong_pools() -> None:
    drawn = made(scale=1.0).sample(200, torch.Generator().manual_seed(0))
    assert len(drawn) == 200
    assert drawn.isfinite().all()


def test_denoising_with_a_gaussian_prior_is_the_wiener_filter() -> None:
    density = made()
    for norm in density.norms:
        norm.assign(torch.ones(2), torch.zeros(2, 2))  # what is left is a rotation: a standard normal
    noisy = torch.tensor([[1.0, -2.0], [0.3, 0.1]], dtype=torch.float64)
    torch.testing.assert_close(density.denoise(noisy, 0.5, steps=400), noisy / 1.25, atol=1e-3, rtol=0)


def test_denoising_brings_patches_nearer_to_the_clean_ones_than_no_filter() -> None:
    data, clean = heavy_tailed(8000).split(4000)
    torch.manual_seed(0)
    density = GDNDensity(4)
    density.fit(data, steps=150, lr=1e-2, generator=torch.Generator().manual_seed(0))
    noisy = clean + 0.7 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    error = (density.denoise(noisy, 0.7) - clean).square().mean()
    assert error < 0.9 * (noisy - clean).square().mean()
    assert all(p.grad is None or not p.grad.isnan().any() for p in density.parameters())


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match="dim and stages of at least 1"):
        GDNDensity(0)
    with pytest.raises(InputError, match="patches to fit, got none"):
        GDNDensity(2).fit(torch.zeros(0, 2))
    with pytest.raises(InputError, match=r"\(\*, 2\), got \(3, 4\)"):
        GDNDensity(2).log_prob(torch.zeros(3, 4))
    with pytest.raises(InputError, match="sigma above 0"):
        GDNDensity(2).denoise(torch.zeros(3, 2), 0.0)
    with pytest.raises(InputError, match="no longer finite at step 0"):
        GDNDensity(2).fit(torch.full((3, 2), float("nan")), steps=3)
