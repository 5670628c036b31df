"""Generalized divisive normalization as a density of photograph patches, and as a prior for denoising them.

Patches of 4 x 4 grey pixels are modelled by a linear transform alone (a Gaussian), by one with a divisive norm of each
component by itself (marginal non-linearities, as in independent component analysis), by one with a norm that pools all
components, and by two such stages. All start from whitening and are trained by likelihood alike; each has its own
learning rate. Held out are other parts of the photographs. Values of 8 bits get noise of one step, or flat sky would
have any likelihood. The arms differ in what they may pool, so they hold the same parameters, some of them still.

Reference: Ballé, Laparra and Simoncelli, 2016, "Density Modeling of Images using a Generalized Normalization
Transformation", arXiv 1511.06281.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import log10
from typing import Any

import torch
from torch import Tensor

from setpoint.nn import GDN, GDNDensity
from setpoint.studies import Arm, Better, Budget, Claim, Context, Outcome, Tuning, study
from setpoint.studies._photographs import SOURCE, part_of, photographs, version
from setpoint.types import Series

SIDE = 4
SIGMA = 0.1
"""Of the noise to take away, where white is 1."""


def patches(part: str, count: int, numbers: torch.Generator) -> Tensor:
    """Patches ``(count, 16)`` at random places of a part, from 0 to 1, with noise of one step added."""
    windows = part_of(photographs().mean(1), part).unfold(1, SIDE, 1).unfold(2, SIDE, 1).flatten(0, 2)
    chosen = windows[torch.randint(len(windows), (count,), generator=numbers)].flatten(1)
    return (chosen + torch.rand(chosen.shape, generator=numbers)) / 256


def made(arm: Arm, whitening: Tensor) -> GDNDensity:
    """An arm's model, at whitening; what an arm may not pool gets no gradient and stays 0."""
    density = GDNDensity(len(whitening), arm["stages"])
    with torch.no_grad():
        density.linears[0].get_parameter("weight").copy_(whitening)
    for norm in density.norms:
        assert isinstance(norm, GDN)
        if arm["pool"] != "all":
            itself = torch.eye(norm.num_features)
            norm.raw_gamma.register_hook(lambda g, m=itself: g * m)  # type: ignore[no-untyped-call]
        if arm["pool"] == "nothing":
            norm.assign(norm.beta.detach(), torch.zeros_like(norm.gamma))
            norm.raw_gamma.register_hook(torch.zeros_like)  # type: ignore[no-untyped-call]
            norm.raw_beta.register_hook(torch.zeros_like)  # type: ignore[no-untyped-call]
    return density


ARMS = (
    Arm("gaussian", "a linear transform", {"pool": "nothing", "stages": 1}),
    Arm("diagonal", "a linear transform, each component normalized by itself", {"pool": "itself", "stages": 1}),
    Arm("gdn", "a linear transform and a norm that pools all", {"pool": "all", "stages": 1}),
    Arm("two-stages", "two linear transforms, a norm that pools all behind each", {"pool": "all", "stages": 2}),
)


@study(
    "Does pooling over components model photograph patches better than each component by itself?",
    arms=ARMS,
    claims=(
        Claim(
            "Held-out patches are 4 nats likelier than with each component by itself.",
            Better(4.0),
            "nll",
            "gdn",
            "diagonal",
            unit="nats a patch",
            diverged=1e3,
        ),
        Claim(
            "They are 6 nats likelier than under a Gaussian.",
            Better(6.0),
            "nll",
            "gdn",
            "gaussian",
            unit="nats a patch",
            diverged=1e3,
        ),
        Claim(
            "A second stage makes them likelier still, by half a nat.",
            Better(0.5),
            "nll",
            "two-stages",
            "gdn",
            unit="nats a patch",
            diverged=1e3,
        ),
        Claim(
            "As a prior it takes noise away 0.5 dB better than a Gaussian.",
            Better(0.5),
            "psnr",
            "gdn",
            "gaussian",
            better="higher",
            unit="dB",
            diverged=0.0,
        ),
    ),
    tuning=Tuning({"lr": (5e-4, 2e-3, 8e-3)}, metric="nll"),
    budgets={
        "smoke": Budget(seeds=2, minutes=0.3, options={"steps": 4, "patches": 512, "denoised": 16}),
        "laptop": Budget(seeds=5, minutes=10, options={"steps": 800, "patches": 25_000, "denoised": 2000}),
        "full": Budget(seeds=20, minutes=60, options={"steps": 4000, "patches": 100_000, "denoised": 5000}),
    },
    data=(SOURCE,),
    data_version=version,
    parameter_slack=1.1,  # the two stages
)
def natural_patches(arm: Arm, setting: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
    """One fit, its held-out likelihood, and its use as a prior."""
    numbers = torch.Generator().manual_seed(seed)
    train = patches("train", budget["patches"], numbers)
    held = patches(ctx.split, budget["patches"] // 4, numbers)
    mean = train.mean(0)
    train, held = train - mean, held - mean
    variances, directions = torch.linalg.eigh(train.T.cov())
    torch.manual_seed(seed)
    density = made(arm, directions.T / variances.sqrt()[:, None]).to(ctx.device)
    ctx.progress(0, budget["steps"], "fitting")
    losses = density.fit(train.to(ctx.device), budget["steps"], lr=setting["lr"], generator=numbers).cpu()
    ctx.progress(budget["steps"], budget["steps"], f"{float(losses[-1]):.1f} nats")
    clean = held[: budget["denoised"]]
    noisy = clean + SIGMA * torch.randn(clean.shape, generator=numbers)
    error = (density.denoise(noisy.to(ctx.device), SIGMA).cpu() - clean).square().mean()
    with torch.no_grad():
        likelihoods = density.log_prob(held.to(ctx.device))
        y = density(held.to(ctx.device)).cpu()
    magnitudes = torch.corrcoef(y.abs().T)
    return Outcome(
        {
            "nll": -float(likelihoods.mean()),
            "psnr": -10 * log10(float(error)),
            "kurtosis": float((y.pow(4).mean(0) / y.square().mean(0).square()).mean()),
            "dependence": float((magnitudes.abs().sum() - len(magnitudes)) / (magnitudes.numel() - len(magnitudes))),
        },
        curves=(Series("training loss over step", tuple(map(float, range(len(losses)))), tuple(losses.tolist())),),
        cost={"parameters": float(sum(p.numel() for p in density.parameters()))},
        conditions={"steps": budget["steps"], "patches": budget["patches"], "noise": SIGMA},
    )
