"""α-BN on corrupted handwritten digits: a trained network meets shifted images, in small and in large batches.

A convolutional network with batch norms is trained on clean digits. Then it sees images with less contrast, noise,
little light or blur, and is asked with its own statistics, with those of the test batch alone, and with mixtures. The
mixture of each arm is chosen on corruptions that the test does not have, and on images of its own. Accuracy is the mean
over four corruptions, with batches of 4, 16 and 100; what adapting costs where nothing has shifted is measured too, and
what it costs when batches hold one class alone. Core is run with the loss that this project has for it.

Reference: You, Li and Zhao, 2021, "Test-time Batch Statistics Calibration for Covariate Shift", arXiv 2110.04065.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from setpoint.nn import adapt_batchnorm
from setpoint.optim.core import CoreAdapter
from setpoint.studies import Arm, Better, Budget, Claim, Context, NotWorse, Outcome, Tuning, study
from setpoint.studies.batchnorm import digits, version

BATCH = 64
RATE = 0.05
GUESS = 0.1

Corruption = Callable[[Tensor, torch.Generator], Tensor]


def blurred(images: Tensor, _numbers: torch.Generator) -> Tensor:
    """Means over 3 x 3 pixels."""
    return F.avg_pool2d(images, 3, stride=1, padding=1)


def noisy(images: Tensor, numbers: torch.Generator) -> Tensor:
    """Gaussian noise, a third of white."""
    return images + 0.35 * torch.randn(images.shape, generator=numbers)


def speckled(images: Tensor, numbers: torch.Generator) -> Tensor:
    """A tenth of the pixels white."""
    return torch.where(torch.rand(images.shape, generator=numbers) < 0.1, 1.0, images)


TESTED: dict[str, Corruption] = {
    "contrast": lambda images, _: 0.5 * images + 0.4,
    "noise": noisy,
    "darkening": lambda images, _: 0.3 * images,
    "blur": blurred,
}
TUNED_ON: dict[str, Corruption] = {
    "brightening": lambda images, _: 0.6 * images + 0.3,
    "speckle": speckled,
    "gamma": lambda images, _: images.clamp_min(0).pow(3),
    "inversion in part": lambda images, _: 0.7 - 0.4 * images,
}

Predict = Callable[[Tensor], Tensor]


def as_trained(model: nn.Module, _setting: Mapping[str, Any]) -> Predict:
    """The statistics of the training data."""
    return model


def of_the_batch(model: nn.Module, _setting: Mapping[str, Any]) -> Predict:
    """The statistics of the test batch."""
    return adapt_batchnorm(model, 0.0)


def mixed(model: nn.Module, setting: Mapping[str, Any]) -> Predict:
    """A mixture with a weight of its own."""
    return adapt_batchnorm(model, setting["source_weight"])


def by_size(model: nn.Module, setting: Mapping[str, Any]) -> Predict:
    """A mixture by the size of the batch."""
    return adapt_batchnorm(model, prior=setting["prior"])


def core(model: nn.Module, setting: Mapping[str, Any]) -> Predict:
    """The mixture, with gains trained on the way."""
    return CoreAdapter(model, setting["source_weight"], lr=setting["lr"])


WEIGHTS = (0.9, 0.7, 0.5, 0.3, 0.1)
ARMS = (
    Arm("source", "statistics of the training data", {"adapt": as_trained}),
    Arm("batch", "statistics of the test batch", {"adapt": of_the_batch}),
    Arm("mixed", "a mixture of both", {"adapt": mixed}, {"source_weight": WEIGHTS}),
    Arm("prior", "a mixture by the size of the batch", {"adapt": by_size}, {"prior": (4.0, 16.0, 64.0)}),
    Arm(
        "core",
        "a mixture, and gains trained on the test batches",
        {"adapt": core},
        {"source_weight": WEIGHTS, "lr": (1e-4, 1e-3, 1e-2)},
    ),
)


def network() -> nn.Sequential:
    """Four convolutions, a batch norm and a ReLU behind each."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2)):
        convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def trained(images: Tensor, labels: Tensor, steps: int, seed: int, ctx: Context) -> nn.Module:
    """A network trained on clean images."""
    torch.manual_seed(seed)
    model = network().to(ctx.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    order = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        chosen = torch.randint(len(images), (BATCH,), generator=order)
        optimizer.zero_grad()
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % 20 == 0 or step == steps:
            ctx.progress(step, steps, "training on clean images")
    return model.eval()


def accuracy(predict: Predict, images: Tensor, labels: Tensor, size: int) -> float:
    """Of batches of a size, in the given order; the rest that fills no batch is left out."""
    whole = len(images) // size * size
    with torch.no_grad():
        right = [
            (predict(batch).argmax(1) == truth).float().mean()
            for batch, truth in zip(torch.split(images[:whole], size), torch.split(labels[:whole], size), strict=True)
        ]
    return float(torch.stack(right).mean())


@study(
    "Do batch norms cope better with shifted images when they mix the statistics of the batch into their own?",
    arms=ARMS,
    claims=(
        Claim(
            "With batches of 4, the mixture is 3 points more accurate than the batch's statistics alone.",
            Better(0.03),
            "accuracy_4",
            "mixed",
            "batch",
            better="higher",
        ),
        Claim(
            "It is 5 points more accurate than the statistics of the training data.",
            Better(0.05),
            "accuracy_4",
            "mixed",
            "source",
            better="higher",
        ),
        Claim(
            "With batches of 100, it is as accurate as the batch's statistics alone, to a point.",
            NotWorse(0.01),
            "accuracy_100",
            "mixed",
            "batch",
            better="higher",
        ),
        Claim(
            "Where nothing has shifted, it costs a point at most with batches of 4.",
            NotWorse(0.01),
            "clean_4",
            "mixed",
            "source",
            better="higher",
        ),
        Claim(
            "Batches of one class hurt it less than the batch's statistics alone, by ten points.",
            Better(0.1),
            "sorted_16",
            "mixed",
            "batch",
            better="higher",
        ),
        Claim(
            "Training gains on the way adds half a point with batches of 16.",
            Better(0.005),
            "accuracy_16",
            "core",
            "mixed",
            better="higher",
        ),
    ),
    tuning=Tuning({}, metric="accuracy_4", better="higher", seeds=2, widen=0),
    budgets={
        "smoke": Budget(seeds=2, minutes=0.4, options={"steps": 20, "tested": 100}),
        "laptop": Budget(seeds=5, minutes=8, options={"steps": 300, "tested": 500}),
        "full": Budget(seeds=20, minutes=30, options={"steps": 600, "tested": 500}),
    },
    data=("digits",),
    data_version=version,
)
def corrupted_digits(arm: Arm, setting: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
    """One network trained on clean images, and asked about corrupted ones."""
    found = digits(ctx.split)
    held = found.valid if ctx.split == "valid" else found.test
    scaled = found.train.images.float() / found.white
    model = trained(scaled.to(ctx.device), found.train.labels.to(ctx.device), budget["steps"], seed, ctx)
    numbers = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(held.labels), generator=numbers)[: budget["tested"]]
    clean, labels = held.images[order].float() / found.white, held.labels[order]
    corruptions = TUNED_ON if ctx.split == "valid" else TESTED
    shifted = [corrupt(clean, numbers) for corrupt in corruptions.values()]
    by_class = labels.argsort(stable=True)

    def mean_over(images: list[Tensor], size: int, arranged: Tensor | None = None) -> float:
        rows = slice(None) if arranged is None else arranged
        truth = labels[rows].to(ctx.device)
        asked = [accuracy(arm["adapt"](model, setting), x[rows].to(ctx.device), truth, size) for x in images]
        return sum(asked) / len(asked)

    metrics = {f"accuracy_{size}": mean_over(shifted, size) for size in (4, 16, 100)}
    metrics |= {"clean_4": mean_over([clean], 4), "sorted_16": mean_over(shifted, 16, by_class)}
    ctx.progress(budget["steps"], budget["steps"], f"accuracy {metrics['accuracy_4']:.3f} with batches of 4")
    return Outcome(
        metrics,
        cost={"parameters": float(sum(p.numel() for p in model.parameters()))},
        conditions={"steps": budget["steps"], "images": len(order), "corruptions": len(corruptions)},
    )
