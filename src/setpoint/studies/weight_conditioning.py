"""Weight conditioning on coordinate networks that fit a photograph, as in its paper.

A network of three hidden layers takes a pixel's place to its colour. Conditioned rows have length one, so the layer's
*scale* changes when it is switched on; an arm whose rows are set to length one once, and then trained plainly, tells
how much of the gain that is. Weight normalization has free lengths on the same directions. Each arm has its own
learning rate. The last claim is of the mechanism: condition numbers in the trained network.

Each seed fits a crop of its own, tuning crops of another photograph. Both come with scikit-learn.

Reference: Saratchandran, Wang and Lucey, 2024, "Weight Conditioning for Smooth Optimization of Neural Networks", arXiv
2409.03424.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from hashlib import sha256
from math import log10
from typing import Any

import torch
from torch import Tensor, nn

from setpoint.extras import require
from setpoint.nn import apply_weight_norm, condition_model, condition_number, fold_weights
from setpoint.studies import Arm, Better, Budget, Claim, Context, NotWorse, Outcome, Tuning, study
from setpoint.types import Series

WIDTH = 128


@cache
def photograph(name: str) -> Tensor:
    """Colours between 0 and 1, ``(height, width, 3)``, at half the resolution."""
    require("PIL", "vision", "to read a photograph")
    from sklearn.datasets import load_sample_image

    pixels = torch.tensor(load_sample_image(name)[:426, :640], dtype=torch.float32) / 255
    return pixels.view(213, 2, 320, 2, 3).mean((1, 3))


@cache
def version() -> str:
    """Checksum of the data."""
    return sha256(photograph("flower.jpg").numpy().tobytes()).hexdigest()[:12]


def crop(part: str, seed: int, size: int) -> tuple[Tensor, Tensor]:
    """Places ``(size², 2)`` between -1 and 1, and colours ``(size², 3)``, of a crop that the seed chooses."""
    whole = photograph("china.jpg" if part == "valid" else "flower.jpg")
    numbers = torch.Generator().manual_seed(seed)
    top, left = (int(torch.randint(extent - size, (), generator=numbers)) for extent in whole.shape[:2])
    line = torch.linspace(-1, 1, size)
    places = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1)
    return places.flatten(0, 1), whole[top : top + size, left : left + size].flatten(0, 1)


class Gaussian(nn.Module):
    """``exp(-8 x²)``, an activation of coordinate networks."""

    def forward(self, x: Tensor) -> Tensor:
        """Element-wise."""
        return torch.exp(-8 * x.square())


def plain(model: nn.Module) -> nn.Module:
    """As torch makes it."""
    return model


@torch.no_grad()
def unit_rows(model: nn.Module) -> nn.Module:
    """Rows of length one at the start, in every layer but the last, and free from there."""
    for layer in [m for m in model.modules() if isinstance(m, nn.Linear)][:-1]:
        layer.weight.div_(layer.weight.norm(dim=1, keepdim=True))
    return model


def arms(activation: type[nn.Module]) -> tuple[Arm, ...]:
    """Five ways to hold the weights of the same network."""
    ways: dict[str, tuple[str, Callable[[nn.Module], nn.Module]]] = {
        "plain": ("torch's start, trained plainly", plain),
        "unit": ("rows of length one at the start, trained plainly", unit_rows),
        "weight-norm": ("weight normalization", apply_weight_norm),
        "conditioned": ("rows of length one at every use", condition_model),
        "both": ("rows and then columns of length one at every use", lambda m: condition_model(m, mode="both")),
    }
    return tuple(Arm(name, text, {"change": way, "activation": activation}) for name, (text, way) in ways.items())


def fitted(arm: Arm, setting: Mapping[str, Any], seed: int, budget: Budget, ctx: Context, optimizer: Any) -> Outcome:
    """Fit one crop, all pixels in every step."""
    places, colours = (t.to(ctx.device) for t in crop(ctx.split, seed, budget["size"]))
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs in (2, WIDTH, WIDTH):
        layers += [nn.Linear(inputs, WIDTH), arm["activation"]()]
    model = arm["change"](nn.Sequential(*layers, nn.Linear(WIDTH, 3))).to(ctx.device)
    updates = optimizer(model.parameters(), lr=setting["lr"])
    psnr: list[float] = []
    for step in range(1, budget["steps"] + 1):
        updates.zero_grad()
        error = (model(places) - colours).square().mean()
        error.backward()
        updates.step()
        psnr.append(-10 * log10(max(float(error.detach()), 1e-12)))
        if step % 20 == 0 or step == budget["steps"]:
            ctx.progress(step, budget["steps"], f"{psnr[-1]:.1f} dB")
    parameters = sum(p.numel() for p in model.parameters())
    folded = fold_weights(model) if arm.name not in ("plain", "unit") else model
    hidden = [m.weight for m in folded.modules() if isinstance(m, nn.Linear)][1:-1]
    metrics = {"psnr": psnr[-1]}
    if all(bool(weight.isfinite().all()) for weight in hidden):
        metrics["log_condition"] = sum(log10(condition_number(weight)) for weight in hidden) / len(hidden)
    return Outcome(
        metrics,
        curves=(
            Series("peak signal to noise (dB) over step", tuple(map(float, range(1, len(psnr) + 1))), tuple(psnr)),
        ),
        cost={"parameters": float(parameters)},
        conditions={"steps": budget["steps"], "pixels": budget["size"] ** 2, "width": WIDTH},
    )


CLAIMS = (
    Claim(
        "Each at its best learning rate, conditioning fits 0.3 dB better than torch's start.",
        Better(0.3),
        "psnr",
        "conditioned",
        "plain",
        better="higher",
        unit="dB",
        diverged=0.0,
    ),
    Claim(
        "It fits 0.3 dB better than rows of length one at the start alone.",
        Better(0.3),
        "psnr",
        "conditioned",
        "unit",
        better="higher",
        unit="dB",
        diverged=0.0,
    ),
    Claim(
        "It fits no worse than weight normalization.",
        NotWorse(0.3),
        "psnr",
        "conditioned",
        "weight-norm",
        better="higher",
        unit="dB",
        diverged=0.0,
    ),
    Claim(
        "The condition numbers of the trained hidden layers are half as large or less than with such a start alone.",
        Better(0.3),
        "log_condition",
        "conditioned",
        "unit",
        unit="powers of ten",
        diverged=8.0,
    ),
)
BUDGETS = {
    "smoke": Budget(seeds=2, minutes=0.2, options={"steps": 5, "size": 8}),
    "laptop": Budget(seeds=5, minutes=10, options={"steps": 400, "size": 48}),
    "full": Budget(seeds=20, minutes=60, options={"steps": 2000, "size": 64}),
}


@study(
    "Do conditioned weights let a network of Gaussians fit a photograph better, trained by Adam?",
    arms=arms(Gaussian),
    claims=CLAIMS,
    tuning=Tuning({"lr": (3e-4, 1e-3, 3e-3, 1e-2)}, metric="psnr", better="higher"),
    budgets=BUDGETS,
    data=("photographs of scikit-learn",),
    data_version=version,
    parameter_slack=0.05,
)
def gaussian_adam(arm: Arm, setting: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
    """One fit."""
    return fitted(arm, setting, seed, budget, ctx, torch.optim.Adam)


@study(
    "Do they let a network of ReLU, trained by gradient descent with momentum?",
    arms=arms(nn.ReLU),
    claims=CLAIMS,
    tuning=Tuning({"lr": (3e-3, 1e-2, 3e-2, 1e-1)}, metric="psnr", better="higher"),
    budgets=BUDGETS,
    data=("photographs of scikit-learn",),
    data_version=version,
    parameter_slack=0.05,
)
def relu_sgd(arm: Arm, setting: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
    """One fit."""
    momentum = lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9)  # noqa: E731
    return fitted(arm, setting, seed, budget, ctx, momentum)
