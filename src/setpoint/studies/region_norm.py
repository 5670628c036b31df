"""Region normalization on photographs with holes: what a hole does to the features around it, and to what is painted.

The first study only looks: features of a convolution, normalized with and without holes, compared at pixels whose
neighbourhood has no hole in it. The second trains a small U-Net to fill brush-shaped holes in crops of two photographs;
it sees the filled image and no mask, as the paper's network does, so that a norm is where the hole can be told from the
rest. The third shows every arm the mask as a channel. Each arm has its own learning rate; measured is the PSNR in the
holes, on other parts of the photographs and other holes.

Reference: Yu, Guo, Jin, Wu, Chen, Li, Zhang and Liu, 2020, "Region Normalization for Image Inpainting",
arXiv 1911.10375.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import log10
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from setpoint.data.holes import free_form_holes
from setpoint.models import InpaintingConfig, InpaintingUNet
from setpoint.nn import RNB, RNL, conditioned
from setpoint.studies import Arm, Better, Budget, Claim, Context, NotWorse, Outcome, Tuning, study
from setpoint.studies._photographs import SOURCE, crops, fitted, part_of, photographs, version
from setpoint.types import Series

SIDE = 32
BATCH = 16
SHARES = (0.1, 0.3, 0.5)
"""Of the image, in the study that only looks."""


def grey(part: str, count: int, numbers: torch.Generator) -> Tensor:
    """Grey crops ``(count, 1, 32, 32)`` at random places of a part of the photographs, from 0 to 1."""
    return crops(part_of(photographs().mean(1, keepdim=True) / 255, part), count, SIDE, numbers)


# what a hole does to features ----------------------------------------------------------------------------------------


def features(norm: Callable[[int], nn.Module], convolution: nn.Conv2d, images: Tensor, holes: Tensor) -> Tensor:
    """Normalized features of images with holes painted white."""
    with conditioned(mask=holes):
        normalized: Tensor = norm(convolution.out_channels)(convolution(torch.where(holes, 1.0, images)))
    return normalized


LOOKING = Budget(seeds=20, minutes=1, options={"images": 256})


@study(
    "Does region normalization keep a hole from shifting the features around it?",
    arms=(
        Arm("batch", "batch norm", {"norm": nn.BatchNorm2d}),
        Arm("instance", "instance norm", {"norm": nn.InstanceNorm2d}),
        Arm("region", "RN-B", {"norm": RNB}),
    ),
    claims=tuple(
        Claim(
            f"With {share:.0%} of the image missing, features that see no hole move half as far as under {name} norm.",
            Better(1.0),
            f"moved_at_{round(100 * share)}",
            "region",
            name,
            scale="ratio",
        )
        for share in (0.5, 0.1)
        for name in ("batch", "instance")
    ),
    budgets={
        "smoke": Budget(seeds=2, minutes=0.2, options={"images": 8}),
        "laptop": LOOKING,
        "full": Budget(seeds=50, minutes=5, options={"images": 1024}),
    },
    data=(SOURCE,),
    data_version=version,
)
def shift(arm: Arm, _setting: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
    """Root mean square distance between features with and without holes, where no hole is seen."""
    numbers = torch.Generator().manual_seed(seed)
    images = grey(ctx.split, budget["images"], numbers)
    torch.manual_seed(seed)
    convolution = nn.Conv2d(1, 16, 3, padding=1, padding_mode="reflect")
    moved: dict[float, float] = {}
    with torch.no_grad():
        whole = features(arm["norm"], convolution, images, torch.zeros_like(images, dtype=torch.bool))
        for share in SHARES:
            holes = free_form_holes(len(images), SIDE, SIDE, numbers, (share, share))
            seen = F.max_pool2d(holes.float(), 3, 1, 1).bool()
            apart = features(arm["norm"], convolution, images, holes) - whole
            ctx.progress(len(moved) + 1, len(SHARES), f"{share:.0%} missing")
            moved[share] = float(apart.movedim(1, -1)[~seen[:, 0]].square().mean().sqrt())
    return Outcome(
        {f"moved_at_{round(100 * share)}": value for share, value in moved.items()},
        curves=(Series("distance moved over share missing", SHARES, tuple(moved.values())),),
        conditions={"images": len(images)},
    )


# filling holes -------------------------------------------------------------------------------------------------------


def psnr(model: nn.Module, images: Tensor, holes: Tensor) -> float:
    """In the holes, in dB, by batches of the size of training."""
    error, pixels = 0.0, 0.0
    for some, missing in zip(torch.split(images, BATCH), torch.split(holes, BATCH), strict=True):
        error += float((model(some, missing) - some)[missing].square().sum())
        pixels += float(missing.sum())
    return -10 * log10(max(error / pixels, 1e-10))


def trained(
    mask_channel: bool, arm: Arm, setting: Mapping[str, Any], seed: int, budget: Budget, ctx: Context
) -> Outcome:
    """One training run."""
    numbers = torch.Generator().manual_seed(seed)
    images = grey("train", budget["images"], numbers).to(ctx.device)
    fixed = torch.Generator().manual_seed(0 if ctx.split == "test" else 1)
    held = grey(ctx.split, budget["held"], fixed).to(ctx.device)
    held_holes = free_form_holes(len(held), SIDE, SIDE, fixed).to(ctx.device)
    torch.manual_seed(seed)
    config = InpaintingConfig(channels=1, widths=(16, 32, 32), mask_channel=mask_channel)
    model = InpaintingUNet(config, norm=arm["norm"], late_norm=arm["late"]).to(ctx.device)

    def loss() -> Tensor:
        chosen = images[torch.randint(len(images), (BATCH,), generator=numbers)]
        return F.l1_loss(model(chosen, free_form_holes(BATCH, SIDE, SIDE, numbers).to(ctx.device)), chosen)

    steps = budget["steps"]
    curve, end = fitted(
        model,
        loss,
        lambda: psnr(model, held, held_holes),
        "PSNR in the holes",
        steps=steps,
        lr=setting["lr"],
        ctx=ctx,
    )
    return Outcome(
        {"psnr": end},
        curves=(curve,),
        cost={"parameters": float(sum(p.numel() for p in model.parameters()))},
        conditions={"steps": steps, "images": len(images), "held": len(held), "batch": BATCH},
    )


ARMS = (
    Arm("none", "no norm", {"norm": nn.Identity, "late": None}),
    Arm("batch", "batch norm", {"norm": nn.BatchNorm2d, "late": None}),
    Arm("instance", "instance norm", {"norm": nn.InstanceNorm2d, "late": None}),
    Arm("rnb", "RN-B everywhere", {"norm": RNB, "late": None}),
    Arm("rnb-rnl", "RN-B in the encoder, RN-L behind it", {"norm": RNB, "late": RNL}),
)
BUDGETS = {
    "smoke": Budget(seeds=2, minutes=0.3, options={"steps": 3, "images": 16, "held": 8}),
    "laptop": Budget(seeds=5, minutes=10, options={"steps": 300, "images": 2048, "held": 128}),
    "full": Budget(seeds=20, minutes=60, options={"steps": 6000, "images": 8192, "held": 1024}),
}
TUNING = Tuning({"lr": (5e-4, 2e-3, 8e-3)}, metric="psnr", better="higher")


def brighter(text: str, method: str, than: str, by: float) -> Claim:
    """An arm paints so many dB better than another."""
    return Claim(text, Better(by), "psnr", method, than, better="higher", unit="dB", diverged=0.0)


@study(
    "Does region normalization fill holes better where the network is not shown the mask?",
    arms=ARMS,
    claims=(
        brighter("RN-B fills holes 0.5 dB better than instance norm.", "rnb", "instance", 0.5),
        brighter("It fills them 0.3 dB better than batch norm.", "rnb", "batch", 0.3),
        brighter("It fills them 0.3 dB better than no norm.", "rnb", "none", 0.3),
        brighter("RN-L behind the encoder is 0.3 dB better than RN-B there.", "rnb-rnl", "rnb", 0.3),
    ),
    tuning=TUNING,
    budgets=BUDGETS,
    data=(SOURCE,),
    data_version=version,
)
def holes_unseen(arm: Arm, setting: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
    """One training run on filled images alone."""
    return trained(False, arm, setting, seed, budget, ctx)


@study(
    "Is anything left of that where every network is shown the mask?",
    arms=ARMS,
    claims=(
        brighter("RN-B fills holes 0.5 dB better than instance norm.", "rnb", "instance", 0.5),
        Claim(
            "It is at most 0.3 dB worse than batch norm.",
            NotWorse(0.3),
            "psnr",
            "rnb",
            "batch",
            better="higher",
            unit="dB",
            diverged=0.0,
        ),
    ),
    tuning=TUNING,
    budgets=BUDGETS,
    data=(SOURCE,),
    data_version=version,
)
def holes_shown(arm: Arm, setting: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
    """One training run with the mask as a channel."""
    return trained(True, arm, setting, seed, budget, ctx)
