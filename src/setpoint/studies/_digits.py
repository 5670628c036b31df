"""The setting of the studies of norms in small batches: handwritten digits, so many samples at any batch size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

import torch
from torch import nn
from torch.nn import functional as F

from setpoint.studies import Budget, Claim, Context, NotWorse, Outcome, Tuning
from setpoint.studies.batchnorm import split
from setpoint.types import Series

READINGS = 20
GUESS = 0.1
"""Accuracy of a guess, as which a diverged run counts."""


def trained(
    make: Callable[[], nn.Module], size: int, seed: int, budget: Budget, ctx: Context, *, lr: float, momentum: float = 0
) -> Outcome:
    """One training run by gradient descent; accuracy in evaluation mode, averaged over the last quarter of the run.

    Args:
        make: Makes the network, from flattened images to logits.
        size: Images in a batch.
        seed: Of the network and of the order of the images.
        budget: Gives the number of samples.
        ctx: Gives split, device and progress.
        lr: Learning rate.
        momentum: Of the descent.
    """
    images, labels, held, labels_held = (part.to(ctx.device) for part in split(ctx.split))
    torch.manual_seed(seed)
    model = make().to(ctx.device)
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    steps = budget["samples"] // size
    every = max(1, steps // READINGS)
    at, accuracy = [], []
    for step in range(1, steps + 1):
        batch = torch.randint(len(images), (size,), generator=order)
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % every == 0:
            model.eval()
            with torch.no_grad():
                accuracy.append((model(held).argmax(1) == labels_held).float().mean().item())
            model.train()
            at.append(step)
            ctx.progress(step, steps, f"accuracy {accuracy[-1]:.3f}")
    end = fmean(accuracy[-max(1, len(accuracy) // 4) :])
    return Outcome(
        {"accuracy": end, "error": 1 - end},
        curves=(Series("held-out accuracy over step", tuple(map(float, at)), tuple(accuracy)),),
        cost={"parameters": sum(p.numel() for p in model.parameters())},
        conditions={"samples": steps * size, "batch": size, "images": len(images)},
    )


def rates(middle: float, size: int, factors: Sequence[float]) -> Tuning:
    """Learning rates around one that suits a batch of 32, moved with the root of the size."""
    moved = middle * (size / 32) ** 0.5
    return Tuning({"lr": tuple(moved * factor for factor in factors)}, metric="error", seeds=2)


def as_accurate(text: str, method: str, than: str) -> Claim:
    """An arm is at most one point worse than another."""
    return Claim(text, NotWorse(0.01), "accuracy", method, than, better="higher", diverged=GUESS)
