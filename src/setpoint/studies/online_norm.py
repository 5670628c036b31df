"""Online normalization on handwritten digits: batches of one and two, where batch norm has no statistics, and of 32.

A ReLU network of three hidden layers of 100 units is trained by plain gradient descent on the same number of *samples*
at each batch size, every arm at its own best learning rate. The claims are the paper's: online normalization trains
where batch norm can't, and is as good where it can. Layer norm knows no batch either, so being better than no
normalization at a batch of one says little; it is the arm to be held against there.

Reference: Chiley et al., 2019, "Online Normalization for Training Neural Networks", arXiv 1905.05894, section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from setpoint.nn import BatchNorm1d, LayerNorm, OnlineNorm1d
from setpoint.studies import Arm, Better, Budget, Claim, Context, Outcome, study
from setpoint.studies._digits import GUESS, as_accurate, rates, trained
from setpoint.studies.batchnorm import version

WIDTH = 100


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
    """One training run at a batch size."""
    return trained(partial(network, arm["norm"]), size, seed, budget, ctx, lr=setting["lr"])


FACTORS = (0.25, 1.0, 4.0, 16.0)


def more_accurate(text: str, by: float, than: str) -> Claim:
    """Online normalization is better by so much than another arm."""
    return Claim(text, Better(by), "accuracy", "online", than, better="higher", diverged=GUESS)


@study(
    "Does it train with batches of two, where batch norm's statistics are noise?",
    arms=(PLAIN, LAYER, BATCH, ONLINE, FAST),
    claims=(
        more_accurate("It ends more accurate than batch norm, by two points or more.", 0.02, "batchnorm"),
        as_accurate("It ends as accurate as layer norm, to a point.", "online", "layernorm"),
    ),
    tuning=rates(0.04, 2, FACTORS),
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
        as_accurate("It ends as accurate as layer norm, to a point.", "online", "layernorm"),
    ),
    tuning=rates(0.04, 1, FACTORS),
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
    claims=(as_accurate("It ends as accurate as batch norm, to a point.", "online", "batchnorm"),),
    tuning=rates(0.04, 32, FACTORS),
    budgets=SIZES,
    data=("digits",),
    data_version=version,
)
def batches_of_thirty_two(arm: Arm, setting: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
    """One training run with batches of 32."""
    return outcome(32, arm, setting, seed, budget, ctx)
