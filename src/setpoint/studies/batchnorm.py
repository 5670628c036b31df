"""Batch normalization on handwritten digits, at the size of the first experiment of its paper.

A network of three hidden layers of 100 units is trained by plain gradient descent, without and with batch normalization
between each linear layer and its non-linearity. Each arm has its own best learning rate. The paper's network is
of sigmoids, which saturate; the same with ReLU and an initialization made for it shows how much of the gain is left
where there is less to mend. The third study takes the learning rate itself: over how wide a range does a network train?

Reference: Ioffe and Szegedy, 2015, "Batch Normalization", arXiv 1502.03167, section 4.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from setpoint.nn import BatchNorm1d
from setpoint.studies import Arm, Better, Budget, Claim, Context, NotWorse, Outcome, Tuning, study
from setpoint.types import Series

BATCH = 60
WIDTH = 100
TEST, VALID = 500, 200
REACHED = 0.95
TRAINED = 0.90
RATES = (0.02, 0.1, 0.5, 2.0, 8.0)


@cache
def digits() -> tuple[Tensor, Tensor]:
    """The 1,797 images of 8 × 8, flattened and standardized as a whole, in one fixed random order."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(found.data, dtype=torch.float32)
    return ((images - images.mean()) / images.std())[order], torch.tensor(found.target)[order]


@cache
def version() -> str:
    """Checksum of the data."""
    return sha256(digits()[0].numpy().tobytes()).hexdigest()[:12]


def split(part: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and held-out images and labels; the test images are never seen while tuning."""
    images, labels = digits()
    held, labels_held = images[:TEST], labels[:TEST]
    images, labels = images[TEST:], labels[TEST:]
    if part == "valid":
        return images[VALID:], labels[VALID:], images[:VALID], labels[:VALID]
    return images, labels, held, labels_held


def network(arm: Arm) -> nn.Sequential:
    """64-100-100-100-10; an arm chooses what follows each hidden linear layer."""
    layers: list[nn.Module] = []
    for inputs in (64, WIDTH, WIDTH):
        linear = nn.Linear(inputs, WIDTH)
        if arm["activation"] is nn.ReLU:
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
            nn.init.zeros_(linear.bias)
        layers += [linear, *([BatchNorm1d(WIDTH)] if arm["norm"] else []), arm["activation"]()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 10))


def train(
    arm: Arm, rate: float, seed: int, budget: Budget, ctx: Context, *, done: int = 0, total: int | None = None
) -> tuple[nn.Sequential, list[int], list[float]]:
    """Plain gradient descent; held-out accuracy every so many steps."""
    images, labels, held, labels_held = (part.to(ctx.device) for part in split(ctx.split))
    torch.manual_seed(seed)
    model = network(arm).to(ctx.device)
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    loss = nn.CrossEntropyLoss()
    steps, every = budget["steps"], budget["every"]
    at, accuracy = [], []
    for step in range(1, steps + 1):
        batch = torch.randint(len(images), (BATCH,), generator=order)
        optimizer.zero_grad()
        loss(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        if step % every == 0:
            model.eval()
            with torch.no_grad():
                right = (model(held).argmax(1) == labels_held).float().mean().item()
            model.train()
            at.append(step)
            accuracy.append(right)
            ctx.progress(done + step, total or steps, f"accuracy {right:.3f}")
    return model, at, accuracy


def reading(at: list[int], accuracy: list[float], steps: int) -> dict[str, float]:
    """Figures of one training run. A run that never gets there counts as if it had at its last step."""
    last = sorted(accuracy[-5:])
    return {
        "steps_to_95": float(next((s for s, right in zip(at, accuracy, strict=True) if right >= REACHED), steps)),
        "accuracy": last[len(last) // 2],  # of batch normalization a single reading can be off
        "mean_error": 1 - sum(accuracy) / len(accuracy),
    }


def outcome(arm: Arm, setting: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
    """One training run at the tuned learning rate."""
    model, at, accuracy = train(arm, setting["lr"], seed, budget, ctx)
    return Outcome(
        reading(at, accuracy, budget["steps"]),
        curves=(Series("held-out accuracy over step", tuple(map(float, at)), tuple(accuracy)),),
        cost={"parameters": sum(p.numel() for p in model.parameters())},
        conditions={"steps": budget["steps"], "batch": BATCH, "images": len(split(ctx.split)[0])},
    )


def arms(activation: type[nn.Module], name: str) -> tuple[Arm, Arm]:
    """Without and with batch normalization."""
    return (
        Arm("plain", f"{name}, no normalization", {"norm": False, "activation": activation}),
        Arm("batchnorm", f"{name}, batch normalization before each", {"norm": True, "activation": activation}),
    )


SIZES = {
    "smoke": Budget(seeds=2, minutes=0.2, options={"steps": 60, "every": 10}),
    "laptop": Budget(seeds=8, minutes=5, options={"steps": 3000, "every": 10}),
    "full": Budget(seeds=30, minutes=15, options={"steps": 3000, "every": 10}),
}
FEWER_STEPS = Claim(
    "Each at its best learning rate, the normalized network needs fewer steps to 95 % accuracy.",
    Better(0.5),
    "steps_to_95",
    "batchnorm",
    "plain",
    scale="ratio",
    diverged=3000,
)
TUNING = Tuning({"lr": RATES}, metric="mean_error", seeds=2)


@study(
    "Does batch normalization let a network of sigmoids learn faster?",
    arms=arms(nn.Sigmoid, "sigmoids"),
    claims=(
        FEWER_STEPS,
        Claim(
            "It ends at least as accurate.",
            NotWorse(0.005),
            "accuracy",
            "batchnorm",
            "plain",
            better="higher",
            diverged=0.1,
        ),
    ),
    tuning=TUNING,
    budgets=SIZES,
    data=("digits",),
    data_version=version,
)
def sigmoid_digits(arm: Arm, setting: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
    """One training run of the paper's network."""
    return outcome(arm, setting, seed, budget, ctx)


@study(
    "Is anything left of it with ReLU and an initialization made for it?",
    arms=arms(nn.ReLU, "ReLU"),
    claims=(FEWER_STEPS,),
    tuning=TUNING,
    budgets=SIZES,
    data=("digits",),
    data_version=version,
)
def relu_digits(arm: Arm, setting: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
    """One training run of the control."""
    return outcome(arm, setting, seed, budget, ctx)


@study(
    "Does it widen the range of learning rates that train?",
    arms=arms(nn.Sigmoid, "sigmoids"),
    claims=(
        Claim(
            "More of nine learning rates, a factor of 4 apart, take the network to 90 % accuracy.",
            Better(1.0),
            "rates_that_train",
            "batchnorm",
            "plain",
            better="higher",
            unit="rates",
        ),
        Claim(
            "The largest learning rate that does is larger.",
            Better(1.0),
            "largest_rate",
            "batchnorm",
            "plain",
            better="higher",
            scale="ratio",
        ),
    ),
    budgets={
        "smoke": Budget(seeds=2, minutes=0.2, options={"steps": 20, "every": 10, "rates": [0.1, 1.0]}),
        "laptop": Budget(
            seeds=5,
            minutes=5,
            options={"steps": 1500, "every": 25, "rates": [0.0078125 * 4**k for k in range(9)]},
        ),
        "full": Budget(
            seeds=20,
            minutes=15,
            options={"steps": 3000, "every": 25, "rates": [0.0078125 * 4**k for k in range(9)]},
        ),
    },
    data=("digits",),
    data_version=version,
)
def learning_rates(arm: Arm, _: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
    """The same network trained once at each learning rate."""
    rates, steps = budget["rates"], budget["steps"]
    ends, parameters = [], 0
    for i, rate in enumerate(rates):
        model, at, accuracy = train(arm, rate, seed, budget, ctx, done=i * steps, total=len(rates) * steps)
        ends.append(reading(at, accuracy, steps)["accuracy"])
        parameters = sum(p.numel() for p in model.parameters())
    trained = [rate for rate, end in zip(rates, ends, strict=True) if end >= TRAINED]
    return Outcome(
        # Where no rate trains, the smallest one stands in: nothing can be smaller than what was tried.
        {"rates_that_train": float(len(trained)), "largest_rate": max(trained, default=min(rates))},
        curves=(Series("final accuracy over learning rate", tuple(rates), tuple(ends)),),
        cost={"parameters": parameters},
        conditions={"steps": steps, "batch": BATCH, "rates": len(rates)},
    )
