"""SPADE on photographs: images painted from label maps, by generators that see the labels once or at every norm.

Labels are six clusters of colour, found on one part of two photographs; a generator paints crops from their label maps,
and is held against the photograph by the absolute error. Then it is shown maps of a single label, and asked whether
what it paints has that label's colour rather than another's: an instance norm makes such maps all alike. Generators
have about the same number of parameters, each its own learning rate. One without any norm tells whether it is the norm
that hides the labels; one that is shown them at each convolution, whether SPADE is more than a reminder.

Reference: Park, Liu, Wang and Zhu, 2019, "Semantic Image Synthesis with Spatially-Adaptive Normalization",
arXiv 1903.07291.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from setpoint.models import LabelsToImage, LabelsToImageConfig
from setpoint.nn import SPADE
from setpoint.studies import Arm, Better, Budget, Claim, Context, NotWorse, Outcome, Tuning, study
from setpoint.studies._photographs import SOURCE, crops, fitted, part_of, photographs, version

LABELS = 6
SIDE = 32
BATCH = 16
GUESS = 1 / LABELS


@cache
def colours() -> Tensor:
    """Centres of six clusters of colour ``(6, 3)``, from 0 to 1, of the part to train on."""
    from sklearn.cluster import KMeans

    pixels = part_of(photographs(), "train")[..., ::8, ::8].movedim(1, -1).reshape(-1, 3) / 255
    return torch.tensor(KMeans(LABELS, n_init=4, random_state=0).fit(pixels.numpy()).cluster_centers_).float()


def nearest_colour(images: Tensor) -> Tensor:
    """Which of the colours each pixel is nearest to, ``(N, H, W)``."""
    return torch.stack([(images - c[:, None, None]).square().sum(1) for c in colours()], 1).argmin(1)


@cache
def labelled(part: str) -> Tensor:
    """A part of the photographs from 0 to 1, and as a fourth channel its labels.

    A blur comes before them, that takes single pixels away.
    """
    images = part_of(photographs(), part) / 255
    labels = nearest_colour(F.avg_pool2d(images, 5, 1, 2, count_include_pad=False))
    return torch.cat([images, labels[:, None]], 1)


def drawn(part: str, count: int, numbers: torch.Generator) -> tuple[Tensor, Tensor]:
    """Crops ``(count, 3, 32, 32)`` from 0 to 1 at random places of a part, and their label maps."""
    found = crops(labelled(part), count, SIDE, numbers)
    return found[:, :3], found[:, 3].long()


def recovered(model: nn.Module, device: str) -> float:
    """Share of pixels of maps of one label each whose nearest colour is that label's."""
    flat = torch.arange(LABELS)[:, None, None].expand(LABELS, SIDE, SIDE)
    with torch.no_grad():
        painted = model(flat.to(device)).cpu()
    return float((nearest_colour(painted) == flat).float().mean())


def spade(norm: Literal["instance", "batch"]) -> Any:
    """A factory of SPADE layers."""
    return partial(SPADE, label_nc=LABELS, hidden=16, norm=norm)


ARMS = (
    Arm("instance", "instance norm", {"norm": nn.InstanceNorm2d, "width": 44, "relabel": False}),
    Arm("none", "no norm", {"norm": nn.Identity, "width": 44, "relabel": False}),
    Arm(
        "relabel",
        "instance norm, labels at every convolution",
        {"norm": nn.InstanceNorm2d, "width": 41, "relabel": True},
    ),
    Arm("spade", "SPADE on instance norm", {"norm": spade("instance"), "width": 28, "relabel": False}),
    Arm("spade-batch", "SPADE on batch norm", {"norm": spade("batch"), "width": 28, "relabel": False}),
)


@study(
    "Do labels survive a generator's norms where SPADE shows them to each?",
    arms=ARMS,
    claims=(
        Claim(
            "Of maps of one label, SPADE paints half the pixels more in the label's colour than instance norm.",
            Better(0.5),
            "recovered_accuracy",
            "spade",
            "instance",
            better="higher",
            diverged=GUESS,
        ),
        Claim(
            "Its images of other parts of the photographs are 10 % nearer.",
            Better(0.1),
            "l1_error",
            "spade",
            "instance",
            scale="ratio",
            diverged=1.0,
        ),
        Claim(
            "They are 3 % nearer than with instance norm and the labels at every convolution.",
            Better(0.03),
            "l1_error",
            "spade",
            "relabel",
            scale="ratio",
            diverged=1.0,
        ),
        Claim(
            "They are at most 3 % further than without any norm.",
            NotWorse(0.03),
            "l1_error",
            "spade",
            "none",
            scale="ratio",
            diverged=1.0,
        ),
    ),
    tuning=Tuning({"lr": (5e-4, 2e-3, 8e-3)}, metric="l1_error"),
    budgets={
        "smoke": Budget(seeds=2, minutes=0.3, options={"steps": 2, "images": 16, "held": 8}),
        "laptop": Budget(seeds=5, minutes=10, options={"steps": 200, "images": 2048, "held": 128}),
        "full": Budget(seeds=20, minutes=60, options={"steps": 4000, "images": 8192, "held": 1024}),
    },
    data=(SOURCE,),
    data_version=version,
)
def painting(arm: Arm, setting: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
    """One training run."""
    numbers = torch.Generator().manual_seed(seed)
    images, labels = (t.to(ctx.device) for t in drawn("train", budget["images"], numbers))
    fixed = torch.Generator().manual_seed(0)
    held, held_labels = (t.to(ctx.device) for t in drawn(ctx.split, budget["held"], fixed))
    torch.manual_seed(seed)
    config = LabelsToImageConfig(label_nc=LABELS, width=arm["width"], relabel=arm["relabel"])
    model = LabelsToImage(config, norm=arm["norm"]).to(ctx.device)

    def loss() -> Tensor:
        chosen = torch.randint(len(images), (BATCH,), generator=numbers)
        return F.l1_loss(model(labels[chosen]), images[chosen])

    def error() -> float:
        parts = zip(torch.split(held_labels, BATCH), torch.split(held, BATCH), strict=True)
        return sum(float((model(some) - wanted).abs().sum()) for some, wanted in parts) / held.numel()

    steps = budget["steps"]
    curve, end = fitted(model, loss, error, "held-out absolute error", steps=steps, lr=setting["lr"], ctx=ctx)
    return Outcome(
        {"l1_error": end, "recovered_accuracy": recovered(model.eval(), ctx.device)},
        curves=(curve,),
        cost={"parameters": float(sum(p.numel() for p in model.parameters()))},
        conditions={"steps": steps, "images": len(images), "held": len(held), "batch": BATCH},
    )
