"""Online normalization on handwritten digits: batches of one and two, where batch norm has no statistics, and of 32.

A ReLU network of three hidden layers of 100 units is trained by plain gradient descent on the same number of *samples*
at each batch size, every arm at its own best learning rate. The claims are the paper's: online normalization trains
where batch norm can't, and is as good where it can. Layer norm knows no batch either, so being better than no
normalization at a batch of one says little; it is the arm to be held against there.

Reference: Chiley et al., 2019, "Online Normalization for Training Neural Networks", arXiv 1905.05894, section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any

import torch
from torch import nn

from setpoint.nn import BatchNorm1d, LayerNorm, OnlineNorm1d
from setpoint.studies import Arm, Better, Budget, Claim, Context, NotWorse, Outcome, Tuning, study
from setpoint.studies.batchnorm import split, version
from setpoint.types import Series

WIDTH = 100
READINGS = 20
GUESS = 0.1
"""Accuracy of a guess, as which a diverged run counts."""


def fast(width: int) -> nn.Module:
    """Online normalization that forgets ten times as fast."""
    return OnlineNorm1d(width, alpha_fwd=0.99, alpha_bkw=0.9)


PLAIN = Arm("plain", "no normalization", {"norm": nn.Identity})
LAYER = Arm("layernorm", "layer normalization", {"norm": LayerNorm})
BATCH = Arm("batchnorm", "batch normalization", {"norm": BatchNorm1d})
ONLINE = Arm("online", "online normalization, decays 0.999 and 0.99", {"norm": OnlineNorm1d})
FAST = Arm("online-fast", "online normalization, decays 0.99 and 0.9", {"norm": fast})

SIZES = {
    "smoke": Budget(seeds=2, minutes=0.3, options={"samples": 192}),
    "laptop": Budget(seeds=5, minutes=9, options={"samples": 7782}),
    "full": Budget(seeds=20, minutes=30, options={"samples": 15564}),
}


def network(norm: Callable[[int], nn.Module]) -> nn.Sequential:
    """64-100-100-100-10, a norm in front of each ReLU."""
    layers: list[nn.Module] = []
    for inputs in (64, WIDTH, WIDTH):
        linear = nn.Linear(inputs, WIDTH)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        nn.init.zeros_(linear.bias)
        layers += [linear, norm(WIDTH), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 10))


def outcome(size: int, arm: Arm, setting: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
    """One training run at a batch size; accuracy in evaluation mode, averaged over the last quarter of the run."""
    images, labels, held, labels_held = (part.to(ctx.device) for part in split(ctx.split))
    torch.manual_seed(seed)
    model = network(arm["norm"]).to(ctx.device)
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=setting["lr"])
    loss = nn.CrossEntropyLoss()
    steps = budget["samples"] // size
    every = max(1, steps // READINGS)
    at, accuracy = [], []
    for step in range(1, steps + 1):
        batch = torch.randint(len(images), (size,), generator=order)
        optimizer.zero_grad()
        loss(model(images[batch]), labels[batch]).backward()
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


def rates(size: int) -> Tuning:
    """Learning rates around one that suits a batch of 32, moved with the root of the size."""
    middle = 0.04 * (size / 32) ** 0.5
    return Tuning({"lr": tuple(middle * factor for factor in (0.25, 1.0, 4.0, 16.0))}, metric="error", seeds=2)


def more_accurate(text: str, by: float, than: str) -> Claim:
    """Online normalization is better by so much than another arm."""
    return Claim(text, Better(by), "accuracy", "online", than, better="higher", diverged=GUESS)


def as_accurate(text: str, than: str) -> Claim:
    """Online normalization is at most one point worse than another arm."""
    return Claim(text, NotWorse(0.01), "accuracy", "online", than, better="higher", diverged=GUESS)


@study(
    "Does it train with batches of two, where batch norm's statistics are noise?",
    arms=(PLAIN, LAYER, BATCH, ONLINE, FAST),
    claims=(
        more_accurate("It ends more accurate than batch norm, by two points or more.", 0.02, "batchnorm"),
        as_accurate("It ends as accurate as layer norm, to a point.", "layernorm"),
    ),
    tuning=rates(2),
    budgets=SIZES,
    data=("digits",),
    data_version=version,
)
def batches_of_two(arm: Arm, setting: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
    """One training run with batches of two."""
    return outcome(2, arm, setting, seed, budget, ctx)


@study(
    "Does it train sample by sample?",
    arms=(PLAIN, LAYER, ONLINE),
    claims=(
        more_accurate("It ends more accurate than no normalization, by a point or more.", 0.01, "plain"),
        as_accurate("It ends as accurate as layer norm, to a point.", "layernorm"),
    ),
    tuning=rates(1),
    budgets=SIZES,
    data=("digits",),
    data_version=version,
)
def batches_of_one(arm: Arm, setting: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
    """One training run with batches of one."""
    return outcome(1, arm, setting, seed, budget, ctx)


@study(
    "Is it as good as batch norm where that has its batches?",
    arms=(PLAIN, LAYER, BATCH, ONLINE, FAST),
    claims=(as_accurate("It ends as accurate as batch norm, to a point.", "batchnorm"),),
    tuning=rates(32),
    budgets=SIZES,
    data=("digits",),
    data_version=version,
)
def batches_of_thirty_two(arm: Arm, setting: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
    """One training run with batches of 32."""
    return outcome(32, arm, setting, seed, budget, ctx)
