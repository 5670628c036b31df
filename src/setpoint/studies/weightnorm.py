"""Weight normalization on handwritten digits: what the reparametrization does, and what its start does.

A network of six hidden layers of 100 ReLU units is trained by plain gradient descent. Weight normalization comes with a
data-dependent start, which helps by itself: so the baseline is a plain network that was started in the same way, the
lengths multiplied into the weights once. Further arms are He's start, mean-only batch normalization on top of weight
normalization, and batch normalization. Each has its own learning rate; the grid goes far down, since directions drawn
at 0.05 turn quickly and would diverge at the rates of the others.

Reference: Salimans and Kingma, 2016, "Weight Normalization", arXiv 1602.07868.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from setpoint.nn import BatchNorm1d, MeanOnlyBatchNorm1d, apply_weight_norm, data_dependent_init, fold_weights
from setpoint.studies import Arm, Better, Budget, Claim, Context, NotWorse, Outcome, Tuning, study
from setpoint.studies.batchnorm import split, version
from setpoint.types import Series

BATCH = 60
WIDTH = 100
DEPTH = 6
REACHED = 0.93
START = 500
"""Images that the data-dependent start sees."""


def network(norm: Callable[[int], nn.Module] | None = None, *, bias: bool = True) -> nn.Sequential:
    """64-100-…-100-10, by He's start; a norm may follow each hidden linear layer."""
    layers: list[nn.Module] = []
    for inputs in (64, *(WIDTH,) * (DEPTH - 1)):
        layers += [nn.Linear(inputs, WIDTH, bias=bias), *([norm(WIDTH)] if norm else []), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, 10))
    for module in model:
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def he(_: Tensor) -> nn.Module:
    """A plain network."""
    return network()


def batch_norm(_: Tensor) -> nn.Module:
    """With batch normalization."""
    return network(BatchNorm1d, bias=False)


def weight_normalized(images: Tensor) -> nn.Module:
    """Under weight normalization, by its data-dependent start."""
    return data_dependent_init(apply_weight_norm(network()), images)


def started(images: Tensor) -> nn.Module:
    """The same network at its start, trained plainly from there."""
    return fold_weights(weight_normalized(images))


def mean_only(images: Tensor) -> nn.Module:
    """Under weight normalization, with mean-only batch normalization."""
    return data_dependent_init(apply_weight_norm(network(MeanOnlyBatchNorm1d, bias=False)), images)


@study(
    "Does weight normalization let a network learn faster than its start alone?",
    arms=(
        Arm("he", "plain, He's start", {"make": he}),
        Arm("started", "plain, data-dependent start", {"make": started}),
        Arm("weightnorm", "weight normalization, data-dependent start", {"make": weight_normalized}),
        Arm("mean-only", "the same, with mean-only batch normalization", {"make": mean_only}),
        Arm("batchnorm", "batch normalization, He's start", {"make": batch_norm}),
    ),
    claims=(
        Claim(
            "Each at its best learning rate, its mean training loss is 5 % lower than with the same start alone.",
            Better(0.05),
            "mean_loss",
            "weightnorm",
            "started",
            scale="ratio",
            diverged=2.4,
        ),
        Claim(
            "With mean-only batch normalization its mean training loss is 5 % lower than without.",
            Better(0.05),
            "mean_loss",
            "mean-only",
            "weightnorm",
            scale="ratio",
            diverged=2.4,
        ),
        Claim(
            "With mean-only batch normalization it reaches 93 % accuracy in three quarters of the plain steps.",
            Better(0.25),
            "steps_to_93",
            "mean-only",
            "started",
            scale="ratio",
            diverged=300,
        ),
        Claim(
            "With mean-only batch normalization its mean training loss is within 5 % of batch normalization's.",
            NotWorse(0.05),
            "mean_loss",
            "mean-only",
            "batchnorm",
            scale="ratio",
            diverged=2.4,
        ),
    ),
    tuning=Tuning({"lr": (3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)}, metric="mean_loss", seeds=2),
    budgets={
        "smoke": Budget(seeds=2, minutes=0.2, options={"steps": 10}),
        "laptop": Budget(seeds=8, minutes=5, options={"steps": 300}),
        "full": Budget(seeds=30, minutes=20, options={"steps": 300}),
    },
    data=("digits",),
    data_version=version,
    parameter_slack=0.05,
)
def digits(arm: Arm, setting: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
    """One training run by plain gradient descent."""
    images, labels, held, labels_held = (part.to(ctx.device) for part in split(ctx.split))
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    model = arm["make"](images[torch.randperm(len(images), generator=order)[:START]].cpu()).to(ctx.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=setting["lr"])
    losses, at, accuracy = [], [], []
    for step in range(1, budget["steps"] + 1):
        batch = torch.randint(len(images), (BATCH,), generator=order)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model.train()(images[batch]), labels[batch])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
        if step % 10 == 0:
            with torch.no_grad():
                right = (model.eval()(held).argmax(1) == labels_held).float().mean().item()
            at.append(float(step))
            accuracy.append(right)
            ctx.progress(step, budget["steps"], f"accuracy {right:.3f}")
    reached = (step for step, right in zip(at, accuracy, strict=True) if right >= REACHED)
    return Outcome(
        # A run that never gets there counts as if it had at its last step.
        {"mean_loss": sum(losses) / len(losses), "steps_to_93": next(reached, float(budget["steps"]))},
        curves=(Series("held-out accuracy over step", tuple(at), tuple(accuracy)),),
        cost={"parameters": float(sum(p.numel() for p in model.parameters()))},
        conditions={"steps": budget["steps"], "batch": BATCH, "images": len(images)},
    )
