"""EvoNorm on handwritten digits: batches of two, where batch norm's late layers have next to no statistics, and of 32.

A convolutional network halves its maps until they have one pixel, so that the last batch norm sees as many values per
channel as there are images. Every arm is trained on the same number of *samples* at its own best learning rate. S0 is a
SiLU of learned slope over the deviation of a group of channels; group norm with SiLU is what it has to be held against,
and group norm with ReLU tells how much of a gain is the activation's.

Reference: Liu, Brock, Simonyan and Le, 2020, "Evolving Normalization-Activation Layers", arXiv 2004.02967.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from setpoint.nn import EvoNorm2dB0, EvoNorm2dS0
from setpoint.studies import Arm, Better, Budget, Claim, Context, Outcome, study
from setpoint.studies._digits import GUESS, as_accurate, rates, trained
from setpoint.studies.batchnorm import version

GROUP_SIZE = 8

Unit = Callable[[int], nn.Module]


def pair(norm: Unit, activation: type[nn.Module], channels: int) -> nn.Module:
    """A norm and an activation."""
    return nn.Sequential(norm(channels), activation())


def groups(channels: int) -> nn.Module:
    """Group norm with as many channels in a group as EvoNorm has here."""
    return nn.GroupNorm(channels // GROUP_SIZE, channels)


ARMS = (
    Arm("batch-relu", "batch norm and ReLU", {"unit": partial(pair, nn.BatchNorm2d, nn.ReLU)}),
    Arm("group-relu", "group norm and ReLU", {"unit": partial(pair, groups, nn.ReLU)}),
    Arm("group-silu", "group norm and SiLU", {"unit": partial(pair, groups, nn.SiLU)}),
    Arm("s0", "EvoNorm-S0", {"unit": partial(EvoNorm2dS0, group_size=GROUP_SIZE)}),
    Arm("b0", "EvoNorm-B0", {"unit": EvoNorm2dB0}),
)


def network(unit: Unit) -> nn.Sequential:
    """Four convolutions on maps of 8, 4, 2 and 1 pixels a side."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    for inputs, outputs, stride in ((1, 32, 1), (32, 32, 2), (32, 64, 2), (64, 64, 2)):
        convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        layers += [convolution, unit(outputs)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 10))


def outcome(size: int, arm: Arm, setting: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
    """One training run at a batch size."""
    return trained(partial(network, arm["unit"]), size, seed, budget, ctx, lr=setting["lr"], momentum=0.9)


SIZES = {
    "smoke": Budget(seeds=2, minutes=0.3, options={"samples": 128}),
    "laptop": Budget(seeds=5, minutes=10, options={"samples": 7782}),
    "full": Budget(seeds=20, minutes=60, options={"samples": 38910}),
}


FACTORS = (0.25, 1.0, 4.0)


@study(
    "Does EvoNorm-S0 keep the accuracy that batch norm loses with batches of two?",
    arms=ARMS,
    claims=(
        Claim(
            "S0 ends two points more accurate than batch norm with ReLU.",
            Better(0.02),
            "accuracy",
            "s0",
            "batch-relu",
            better="higher",
            diverged=GUESS,
        ),
        as_accurate("It ends as accurate as group norm with ReLU, to a point.", "s0", "group-relu"),
        as_accurate("It ends as accurate as group norm with SiLU, to a point.", "s0", "group-silu"),
    ),
    tuning=rates(0.02, 2, FACTORS),
    budgets=SIZES,
    data=("digits",),
    data_version=version,
)
def batches_of_two(arm: Arm, setting: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
    """One training run with batches of two."""
    return outcome(2, arm, setting, seed, budget, ctx)


@study(
    "Are S0 and B0 as good as batch norm where that has its batches?",
    arms=ARMS,
    claims=(
        as_accurate("B0 ends as accurate as batch norm with ReLU, to a point.", "b0", "batch-relu"),
        as_accurate("So does S0.", "s0", "batch-relu"),
        as_accurate("S0 ends as accurate as group norm with SiLU, to a point.", "s0", "group-silu"),
    ),
    tuning=rates(0.02, 32, FACTORS),
    budgets=SIZES,
    data=("digits",),
    data_version=version,
)
def batches_of_thirty_two(arm: Arm, setting: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
    """One training run with batches of 32."""
    return outcome(32, arm, setting, seed, budget, ctx)
