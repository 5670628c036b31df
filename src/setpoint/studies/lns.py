"""LayerNorm Scaling against Pre-LN: the held-out loss, the stream's growth over depth, and what deep blocks do.

The sign of the first hangs on the embedding: where embeddings start large, branches are damped already. So one study
compares the arms each at its best learning rate and embedding, and another holds the embedding where the paper has it,
at 0.02. Growth is comparable only between models that start alike, so a third study gives every arm the setting that
suits Pre-LN best, and adds Pre-LN with steps larger by as much as the scales are smaller: it says what is not the
scaling but the size of the steps.

Reference: Sun et al., 2025, "The Curse of Depth in Large Language Models", arXiv 2502.05795.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

from setpoint import data
from setpoint.models import Transformer
from setpoint.models.initialize import DepthScaledNormal, Normal
from setpoint.nn import PreNorm, ScaledPreNorm
from setpoint.studies import Arm, Better, Budget, Claim, Context, Outcome, Tuning, study
from setpoint.studies import _language as language
from setpoint.train import Evaluation
from setpoint.types import Series

PRE_LN = Arm("pre-ln", "no scaling", {"block": PreNorm(), "init": Normal()})
LNS = Arm("lns", "norm outputs times 1/sqrt(layer)", {"block": ScaledPreNorm(), "init": Normal()})
SMALL_INIT = Arm(
    "small-init",
    "no scaling, output projections drawn smaller by 1/sqrt(2 depth)",
    {"block": PreNorm(), "init": DepthScaledNormal()},
)
TRAINED_SCALE = Arm(
    "trained-scale", "gains that start at 1/sqrt(layer)", {"block": ScaledPreNorm(learnable=True), "init": Normal()}
)


@dataclass(frozen=True)
class Grown:
    """A trained arm.

    Args:
        model: The network.
        learned: Its training.
        variances: Of the stream, after the embedding and after each block.
    """

    model: Transformer
    learned: language.Learned
    variances: list[float]

    @property
    def metrics(self) -> dict[str, float]:
        """Held-out loss, and the stream's variance after the last block over that after the first."""
        return {"loss": self.learned.loss, "growth": self.variances[-1] / self.variances[1]}

    @property
    def curves(self) -> tuple[Series, ...]:
        """Training loss, and the stream over depth."""
        blocks = tuple(map(float, range(len(self.variances))))
        return self.learned.curve(), Series("variance of the stream over block", blocks, tuple(self.variances))


def grow(arm: Arm, seed: int, budget: Budget, ctx: Context, *, lr: float, std: float) -> Grown:
    """Train an arm and look at its stream."""
    parts = {"block": arm["block"], "init": arm["init"]}
    model = language.model_for(budget, ctx, seed, parts, embedding_std=std)
    learned = language.learn(model, seed, budget, ctx, lr=lr)
    return Grown(model, learned, language.stream(model, budget, ctx))


@study(
    "Does scaling norms by depth lower the loss, each arm at its best?",
    arms=(PRE_LN, LNS, SMALL_INIT, TRAINED_SCALE),
    claims=(
        Claim(
            "Each at its best setting, the scaled model ends with a held-out loss lower by 0.5 % or more.",
            Better(0.005),
            "loss",
            "lns",
            "pre-ln",
            scale="ratio",
            diverged=language.DIVERGED,
        ),
    ),
    tuning=Tuning({"lr": (2e-3, 4e-3, 8e-3), "embedding_std": (0.02, 0.2, 0.63)}, metric="loss"),
    budgets={
        "smoke": Budget(seeds=2, minutes=0.3, options=language.SMOKE),
        "laptop": Budget(seeds=5, minutes=5, options=language.sizes(300, depth=12)),
        "full": Budget(seeds=8, minutes=240, options=language.sizes(5000, depth=24, dim=192, batch=64)),
    },
    data=(language.SOURCE,),
    data_version=language.version,
    takes_data=True,
)
def language_model(arm: Arm, setting: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
    """One training run."""
    grown = grow(arm, seed, budget, ctx, lr=setting["lr"], std=setting["embedding_std"])
    return Outcome(grown.metrics, curves=grown.curves, cost=grown.learned.cost, conditions=language.conditions(budget))


@study(
    "Does it where embeddings start at a scale of 0.02, as published?",
    arms=(PRE_LN, LNS),
    claims=(
        Claim(
            "From small embeddings, each at its best learning rate, the scaled model's loss is lower by 0.5 % or more.",
            Better(0.005),
            "loss",
            "lns",
            "pre-ln",
            scale="ratio",
            diverged=language.DIVERGED,
        ),
    ),
    tuning=Tuning({"lr": (1e-3, 2e-3, 4e-3, 8e-3)}, metric="loss"),
    budgets={
        "smoke": Budget(seeds=2, minutes=0.3, options={**language.SMOKE, "embedding_std": 0.02}),
        "laptop": Budget(seeds=5, minutes=3, options=language.sizes(300, depth=12, embedding_std=0.02)),
        "full": Budget(
            seeds=8, minutes=120, options=language.sizes(5000, depth=24, dim=192, batch=64, embedding_std=0.02)
        ),
    },
    data=(language.SOURCE,),
    data_version=language.version,
    takes_data=True,
)
def small_embedding(arm: Arm, setting: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
    """One training run."""
    grown = grow(arm, seed, budget, ctx, lr=setting["lr"], std=budget["embedding_std"])
    return Outcome(grown.metrics, curves=grown.curves, cost=grown.learned.cost, conditions=language.conditions(budget))


def as_given(_depth: int) -> float:
    """Steps as the budget has them."""
    return 1.0


def larger(depth: int) -> float:
    """The root mean square of the factors that scaled norms lack: of sqrt(layer) over the layers."""
    return sqrt((depth + 1) / 2)


PRE_LN_BEST = {"lr": 8e-3, "embedding_std": 0.2}
"""Where Pre-LN is best at the laptop's sizes, among the settings that the first study tunes over."""


@study(
    "At the setting that suits Pre-LN, does the stream grow less, and do deep blocks matter more?",
    arms=(
        Arm("pre-ln", PRE_LN.does, {**PRE_LN.options, "steps": as_given}),
        Arm("lns", LNS.does, {**LNS.options, "steps": as_given}),
        Arm(
            "larger-steps",
            "no scaling, the learning rate times sqrt(mean of layer)",
            {**PRE_LN.options, "steps": larger},
        ),
    ),
    claims=(
        Claim(
            "The stream's variance grows less from the first block to the last, by a factor of 2 or more.",
            Better(1.0),
            "growth",
            "lns",
            "pre-ln",
            scale="ratio",
            diverged=1e6,
        ),
        Claim(
            "Left out alone, a block of the deeper half costs more loss, by 0.01 nats or more.",
            Better(0.01),
            "deep_block",
            "lns",
            "pre-ln",
            better="higher",
            unit="nats",
            diverged=0.0,
        ),
        Claim(
            "The held-out loss is lower by 0.5 % or more.",
            Better(0.005),
            "loss",
            "lns",
            "pre-ln",
            scale="ratio",
            diverged=language.DIVERGED,
        ),
        Claim(
            "It is lower by 0.5 % or more than with larger steps and no scaling.",
            Better(0.005),
            "loss",
            "lns",
            "larger-steps",
            scale="ratio",
            diverged=language.DIVERGED,
        ),
    ),
    budgets={
        "smoke": Budget(seeds=2, minutes=0.3, options={**language.SMOKE, **PRE_LN_BEST}),
        "laptop": Budget(seeds=5, minutes=5, options=language.sizes(300, depth=12, **PRE_LN_BEST)),
        "full": Budget(seeds=8, minutes=240, options=language.sizes(5000, depth=24, dim=192, batch=64, **PRE_LN_BEST)),
    },
    data=(language.SOURCE,),
    data_version=language.version,
    takes_data=True,
)
def one_setting(arm: Arm, _: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
    """One training run, and the loss without each block of the deeper half."""
    lr = budget["lr"] * arm["steps"](budget["depth"])
    grown = grow(arm, seed, budget, ctx, lr=lr, std=budget["embedding_std"])
    whole = held_out(grown.model, budget, ctx)
    deep = range(budget["depth"] // 2, budget["depth"])
    costs = [without(grown.model, index, budget, ctx) - whole for index in deep]
    blocks = tuple(float(index + 1) for index in deep)
    return Outcome(
        {**grown.metrics, "deep_block": sum(costs) / len(costs)},
        curves=(*grown.curves, Series("loss added (nats per byte) over block left out", blocks, tuple(costs))),
        cost=grown.learned.cost,
        conditions=language.conditions(budget),
    )


def held_out(model: Transformer, budget: Budget, ctx: Context) -> float:
    """Loss on a quarter of the held-out windows."""
    batches = language.corpus(budget["context"], ctx.data).batches(ctx.split, 64, limit=max(1, budget["held_out"] // 4))
    return Evaluation(batches, {"loss": data.next_token_loss})(model)["loss"]


def without(model: Transformer, index: int, budget: Budget, ctx: Context) -> float:
    """The same loss, with a block that hands on what it gets."""
    handle = model.stack.blocks[index].register_forward_hook(lambda _module, given, _output: given[0])
    try:
        return held_out(model, budget, ctx)
    finally:
        handle.remove()


__all__ = ["language_model", "one_setting", "small_embedding"]
