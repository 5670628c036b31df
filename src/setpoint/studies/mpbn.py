"""Membrane potential batch normalization in spiking networks on handwritten digits.

A spiking network of eight convolutions over a few time steps sees a tenth of the digits, so that there is something to
gain. Behind each convolution comes batch norm over time and batch, or nothing, and then neurons that are plain or
normalize their potential. After one time step a second norm stands on the first one's output and should do nothing;
over four the potential is a sum that the first norm has not seen. Each arm has its own learning rate. What folding
changes in the predictions is a figure too.

Reference: Guo et al., 2023, "Membrane Potential Batch Normalization for Spiking Neural Networks", arXiv 2308.08359.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from setpoint.nn import LIF, MPBNLIF, OverTime
from setpoint.nn.spiking import Neuron
from setpoint.studies import Arm, Better, Budget, Claim, Context, Equal, NotWorse, Outcome, Tuning, study
from setpoint.studies.batchnorm import split, version
from setpoint.types import Series

WIDTH, DEPTH = 24, 8
BATCH = 32
IMAGES = 128
"""How many are trained on."""
GUESS = 0.1


def plain(_channels: int) -> Neuron:
    """Neurons without a norm."""
    return LIF()


ARMS = (
    Arm("none", "no normalization", {"norm": False, "neuron": plain}),
    Arm("conv-bn", "batch norm behind each convolution", {"norm": True, "neuron": plain}),
    Arm("mpbn", "batch norm behind each convolution and on each potential", {"norm": True, "neuron": MPBNLIF}),
    Arm("mpbn-alone", "batch norm on each potential", {"norm": False, "neuron": MPBNLIF}),
)


class Spiking(nn.Module):
    """Convolutions with spiking neurons, and a linear readout averaged over time.

    Args:
        time: Time steps; each sees the same image.
        norm: Have batch norm behind each convolution.
        neuron: Makes neurons from a number of channels.
    """

    def __init__(self, time: int, norm: bool, neuron: Callable[[int], Neuron]) -> None:
        super().__init__()
        self.time = time
        layers: list[nn.Module] = []
        for index in range(DEPTH):
            convolution = nn.Conv2d(WIDTH if index else 1, WIDTH, 3, 2 if index in (2, 5) else 1, 1, bias=not norm)
            layers.append(OverTime(nn.Sequential(convolution, nn.BatchNorm2d(WIDTH)) if norm else convolution))
            layers.append(neuron(WIDTH))
        self.layers = nn.Sequential(*layers)
        self.readout = nn.Linear(WIDTH * 4, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits for flattened images ``(N, 64)``."""
        x = images.view(-1, 1, 8, 8).expand(self.time, -1, -1, -1, -1)
        logits: Tensor = self.readout(self.layers(x).flatten(2)).mean(0)
        return logits


def folded(model: Spiking) -> Spiking:
    """The same network, in place, with the norms of potentials in thresholds."""
    for name, layer in model.layers.named_children():
        if isinstance(layer, MPBNLIF):
            setattr(model.layers, name, layer.fold())
    return model


def outcome(time: int, arm: Arm, setting: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
    """One training run over so many time steps."""
    images, labels, held, labels_held = (part.to(ctx.device) for part in split(ctx.split))
    numbers = torch.Generator().manual_seed(seed)
    few = torch.randperm(len(images), generator=numbers)[:IMAGES]
    images, labels = images[few], labels[few]
    torch.manual_seed(seed)
    model = Spiking(time, arm["norm"], arm["neuron"]).to(ctx.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=setting["lr"])
    losses = []
    for step in range(1, budget["steps"] + 1):
        batch = torch.randint(IMAGES, (BATCH,), generator=numbers)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
        if step % 10 == 0 or step == budget["steps"]:
            ctx.progress(step, budget["steps"], f"loss {losses[-1]:.3f}")
    model.eval()
    with torch.no_grad():
        before = model(held)
        changed = (folded(model)(held) - before).abs().max()
    right = float((before.argmax(1) == labels_held).float().mean())
    return Outcome(
        {
            "accuracy": right,
            "error": 1 - right,
            "held_out_loss": float(F.cross_entropy(before, labels_held)),
            "changed_by_folding": float(changed),
        },
        curves=(Series("training loss over step", tuple(map(float, range(1, len(losses) + 1))), tuple(losses)),),
        cost={"parameters": float(sum(p.numel() for p in model.parameters()))},
        conditions={"steps": budget["steps"], "batch": BATCH, "images": IMAGES, "time steps": time},
    )


SIZES = {
    "smoke": Budget(seeds=2, minutes=0.5, options={"steps": 3}),
    "laptop": Budget(seeds=5, minutes=10, options={"steps": 200}),
    "full": Budget(seeds=20, minutes=60, options={"steps": 1000}),
}
RATES = Tuning({"lr": (1e-3, 3e-3, 1e-2)}, metric="held_out_loss", seeds=2)


@study(
    "Does normalizing the potential help a spiking network over four time steps?",
    arms=ARMS,
    claims=(
        Claim(
            "It ends one point more accurate than with batch norm behind the convolutions alone.",
            Better(0.01),
            "accuracy",
            "mpbn",
            "conv-bn",
            better="higher",
            diverged=GUESS,
        ),
        Claim(
            "Without batch norm behind the convolutions it ends as accurate as with that alone, to a point.",
            NotWorse(0.01),
            "accuracy",
            "mpbn-alone",
            "conv-bn",
            better="higher",
            diverged=GUESS,
        ),
        Claim(
            "It ends five points more accurate than without any.",
            Better(0.05),
            "accuracy",
            "mpbn",
            "none",
            better="higher",
            diverged=GUESS,
        ),
    ),
    tuning=RATES,
    budgets=SIZES,
    data=("digits",),
    data_version=version,
    parameter_slack=0.05,
)
def four_steps(arm: Arm, setting: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
    """One training run over four time steps."""
    return outcome(4, arm, setting, seed, budget, ctx)


@study(
    "Does it do anything in a single time step, where it stands on what is normalized already?",
    arms=ARMS,
    claims=(
        Claim(
            "It ends as accurate as with batch norm behind the convolutions alone, to two points.",
            Equal(0.02),
            "accuracy",
            "mpbn",
            "conv-bn",
            better="higher",
            diverged=GUESS,
        ),
    ),
    tuning=RATES,
    budgets=SIZES,
    data=("digits",),
    data_version=version,
    parameter_slack=0.05,
)
def one_step(arm: Arm, setting: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
    """One training run over a single time step."""
    return outcome(1, arm, setting, seed, budget, ctx)
