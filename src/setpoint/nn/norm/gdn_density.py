"""A density of image patches, and what it is good for: likelihoods, samples and a prior for denoising.

``log p(x) = log N(y; 0, I) + log |det dy/dx|``, where ``y`` comes out of stages of a linear transform and a GDN (Ballé,
Laparra and Simoncelli, 2016, arXiv 1511.06281). Trained by likelihood, the stages make patches Gaussian. The outputs of
a GDN with the usual exponents are bounded, so the total probability is that of a standard normal within those bounds, a
little below 1.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from setpoint.errors import InputError
from setpoint.nn.norm.checks import expect_trailing
from setpoint.nn.norm.functional import wide
from setpoint.nn.norm.gdn import GDN, full_precision

Patches = Float[Tensor, "batch dim"]


class GDNDensity(nn.Module):
    """Stages of a linear transform and a `GDN` that turn patches into a standard normal.

    Patches should be centred, and whitening them speeds up the fit. Values of 8 bits need noise of one step added, or
    the likelihood of flat patches grows without limit.

    Args:
        dim: Numbers in a patch.
        stages: Pairs of a linear transform and a GDN.
        alpha, epsilon: Exponents of the GDNs.
        device, dtype: Of the parameters.

    Shape:
        Input ``(N, dim)``; output ``(N, dim)``, the patches made Gaussian.

    Raises:
        InputError: ``dim`` or ``stages`` below 1; on call, patches of another size.

    Reference:
        Ballé, Laparra and Simoncelli, 2016, "Density Modeling of Images using a Generalized Normalization
        Transformation", arXiv 1511.06281.

    Example:
        >>> density = GDNDensity(4)
        >>> losses = density.fit(torch.randn(64, 4), steps=2)
        >>> density.log_prob(torch.randn(3, 4)).shape, density.sample(5).shape
        (torch.Size([3]), torch.Size([5, 4]))
    """

    def __init__(
        self,
        dim: int,
        stages: int = 1,
        alpha: float = 2.0,
        epsilon: float = 0.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim < 1 or stages < 1:
            raise InputError(f"GDNDensity: expected dim and stages of at least 1, got {dim} and {stages}")
        self.dim = dim
        self.linears = nn.ModuleList(nn.Linear(dim, dim, bias=False, device=device, dtype=dtype) for _ in range(stages))
        self.norms = nn.ModuleList(
            GDN(dim, alpha=alpha, epsilon=epsilon, device=device, dtype=dtype) for _ in range(stages)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random rotations, and GDNs as they start."""
        for linear, norm in self._stages():
            nn.init.orthogonal_(linear.weight)
            norm.reset_parameters()

    def _stages(self) -> list[tuple[nn.Linear, GDN]]:
        return list(zip(self.linears, self.norms, strict=True))  # type: ignore[arg-type]

    def forward(self, x: Patches) -> Patches:
        """The patches ``(N, dim)`` made Gaussian; shape and dtype stay."""
        return self._transform(x)[0].to(x.dtype)

    def log_prob(self, x: Patches) -> Float[Tensor, " batch"]:
        """Log density of each patch, in nats.

        Args:
            x: Patches ``(N, dim)``.

        Returns:
            ``(N,)``.
        """
        y, volume = self._transform(x)
        return volume - 0.5 * (y.square().sum(1) + self.dim * math.log(2 * math.pi))

    def _transform(self, x: Patches) -> tuple[Patches, Float[Tensor, " batch"]]:
        """Outputs, and ``log |det|`` of all stages."""
        expect_trailing(x, (self.dim,), "GDNDensity")
        x = wide(x)
        volume = x.new_zeros(len(x))
        with full_precision(x):
            for linear, norm in self._stages():
                weight = wide(linear.weight)
                z = F.linear(x, weight)
                volume = volume + torch.linalg.slogdet(weight).logabsdet + norm.log_abs_det_jacobian(z)
                x = norm(z)
        return x, volume

    def fit(
        self,
        patches: Patches,
        steps: int = 800,
        batch_size: int = 256,
        lr: float = 2e-3,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, " steps"]:
        """Maximize the likelihood by Adam, on batches drawn with replacement.

        Args:
            patches: Training data ``(N, dim)``.
            steps: Steps of the optimizer.
            batch_size: Patches in a batch.
            lr: Learning rate.
            generator: Source of the draws.

        Returns:
            The batches' mean negative log likelihoods, in nats a patch.

        Raises:
            InputError: No patches, patches of another size, or a loss that is not finite.
        """
        expect_trailing(patches, (self.dim,), "GDNDensity")
        if not len(patches):
            raise InputError("GDNDensity: expected patches to fit, got none")
        optimizer = torch.optim.Adam(self.parameters(), lr=lr)
        losses = []
        for step in range(steps):
            drawn = torch.randint(len(patches), (batch_size,), generator=generator)
            loss = -self.log_prob(patches[drawn]).mean()
            if not bool(loss.isfinite()):
                raise InputError(
                    f"GDNDensity: the likelihood is no longer finite at step {step}; take a lower lr than {lr}, or add "
                    "noise to the patches"
                )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses) if losses else patches.new_zeros(0)

    @torch.no_grad()
    def sample(self, count: int, generator: torch.Generator | None = None, rounds: int = 100) -> Patches:
        """Patches drawn from the density.

        A standard normal draw that no patch is turned into is drawn again.

        Args:
            count: How many.
            generator: Source of the draws.
            rounds: How often to draw again at most.

        Returns:
            ``(count, dim)``.

        Raises:
            InputError: After ``rounds`` there are too few.
        """
        kept = wide(self._stages()[0][0].weight).new_zeros(0, self.dim)
        for _ in range(rounds):
            if len(kept) == count:
                break
            x = torch.randn(count - len(kept), self.dim, generator=generator, dtype=kept.dtype).to(kept.device)
            for linear, norm in reversed(self._stages()):
                z, reached = norm._fixed_point(x, 1e-5, 1000)
                x = torch.linalg.solve(wide(linear.weight), z[reached].T).T
            kept = torch.cat([kept, x])
        if len(kept) < count:
            raise InputError(
                f"GDNDensity: {rounds} rounds of draws gave {len(kept)} of {count} patches; few draws are within the "
                "bounds of its outputs, so fit it longer, or with a smaller epsilon"
            )
        return kept

    def denoise(self, noisy: Patches, sigma: float, steps: int = 100) -> Patches:
        """The most probable clean patches, given patches with Gaussian noise.

        Maximizes ``log p(x) - |x - noisy|² / (2 sigma²)`` over x by Adam, starting at the noisy patches.

        Args:
            noisy: Patches ``(N, dim)``.
            sigma: Standard deviation of the noise, in the patches' unit.
            steps: Steps of the optimizer.

        Returns:
            ``(N, dim)``.

        Raises:
            InputError: ``sigma`` is not above 0, or patches of another size.
        """
        if not sigma > 0:
            raise InputError(f"GDNDensity: expected the noise's sigma above 0, got {sigma}")
        expect_trailing(noisy, (self.dim,), "GDNDensity")
        clean = wide(noisy).detach().clone().requires_grad_()
        optimizer = torch.optim.Adam([clean], lr=0.1 * sigma)
        for _ in range(steps):
            with torch.enable_grad():
                misfit = (clean - noisy).square().sum() / (2 * sigma**2)
                (clean.grad,) = torch.autograd.grad(misfit - self.log_prob(clean).sum(), clean)
            optimizer.step()
        return clean.detach().to(noisy.dtype)

    def extra_repr(self) -> str:
        """Numbers in a patch."""
        return f"{self.dim}"
