"""Peri-LN against Pre-LN: final loss, and what happens at a learning rate that is too high.

Most of what Peri-LN gains over Pre-LN at this size comes from the norm on the embedding, so Pre-LN with that norm is an
arm of its own. What the claim about the stream can say is growth *during training*: at initialization Peri-LN's stream
is the larger one here, since each of its branches adds a vector of unit size.

A run has failed if it diverged or ended without having learned more than the frequencies of bytes.

Reference: Kim et al., 2025, "Peri-LN", arXiv 2502.02732.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from setpoint.nn import OutputNorm, PeriNorm, PreNorm
from setpoint.studies import Arm, Better, Budget, Claim, Context, NotWorse, Outcome, Tuning, study
from setpoint.studies import _language as language
from setpoint.types import Series

ARMS = (
    Arm("pre-ln", "norm at each branch's input", {"block": PreNorm()}),
    Arm("pre-ln-embed", "the same, and a norm on the embedding", {"block": PreNorm(embed_norm=True)}),
    Arm("peri-ln", "norms at input and output of each branch, and on the embedding", {"block": PeriNorm()}),
    Arm("output-ln", "norm at each branch's output, and on the embedding", {"block": OutputNorm(embed_norm=True)}),
)


def run(
    arm: Arm, seed: int, budget: Budget, ctx: Context, *, lr: float, std: float, clip: float | None
) -> tuple[language.Learned, list[float], list[float]]:
    """Train an arm; the stream's variance before and after."""
    model = language.model_for(budget, ctx, seed, {"block": arm["block"]}, embedding_std=std)
    before = language.stream(model, budget, ctx)
    learned = language.learn(model, seed, budget, ctx, lr=lr, clip=clip)
    return learned, before, language.stream(model, budget, ctx)


def profile(name: str, variances: list[float]) -> Series:
    """Variance of the stream over depth."""
    return Series(f"{name} over block", tuple(map(float, range(len(variances)))), tuple(variances))


@study(
    "Does Peri-LN end as good as Pre-LN, each at its best?",
    arms=ARMS,
    claims=(
        Claim(
            "Each at its best setting, Peri-LN ends within 1 % of the held-out loss of Pre-LN.",
            NotWorse(0.01),
            "loss",
            "peri-ln",
            "pre-ln",
            scale="ratio",
            diverged=language.DIVERGED,
        ),
        Claim(
            "It ends lower by 1 % or more than Pre-LN that has a norm on the embedding too.",
            Better(0.01),
            "loss",
            "peri-ln",
            "pre-ln-embed",
            scale="ratio",
            diverged=language.DIVERGED,
        ),
    ),
    tuning=Tuning({"lr": (2e-3, 4e-3, 8e-3, 1.6e-2), "embedding_std": (0.02, 0.2, 0.63)}, metric="loss"),
    budgets={
        "smoke": Budget(seeds=2, minutes=0.3, options=language.SMOKE),
        "laptop": Budget(seeds=5, minutes=5, options=language.sizes(300)),
        "full": Budget(seeds=8, minutes=240, options=language.sizes(5000, depth=12, dim=192, batch=64)),
    },
    data=(language.SOURCE,),
    data_version=language.version,
    takes_data=True,
)
def best_loss(arm: Arm, setting: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
    """One training run at the tuned setting."""
    lr, std = setting["lr"], setting["embedding_std"]
    learned, before, after = run(arm, seed, budget, ctx, lr=lr, std=std, clip=1.0)
    return Outcome(
        {"loss": learned.loss, "growth": after[-1] / before[-1]},
        curves=(learned.curve(), profile("variance of the stream", after)),
        cost=learned.cost,
        conditions=language.conditions(budget),
    )


@study(
    "Is it steadier at a learning rate that is too high, without clipping?",
    arms=ARMS,
    claims=(
        Claim(
            "The stream's variance after the last block grows less in training, by a factor of 2 or more.",
            Better(1.0),
            "growth",
            "peri-ln",
            "pre-ln-embed",
            scale="ratio",
            diverged=1e6,
        ),
        Claim(
            "There are fewer loss spikes, by 1 in 100 steps or more.",
            Better(1.0),
            "spikes",
            "peri-ln",
            "pre-ln-embed",
            unit="in 100 steps",
            diverged=100,
        ),
        Claim("Fewer runs fail, by one in five or more.", Better(0.2), "failed", "peri-ln", "pre-ln", diverged=1),
        Claim(
            "Fewer runs fail, by one in five or more, than with a norm on the embedding alone.",
            Better(0.2),
            "failed",
            "peri-ln",
            "pre-ln-embed",
            diverged=1,
        ),
        Claim(
            "The held-out loss is lower by 1 % or more.",
            Better(0.01),
            "loss",
            "peri-ln",
            "pre-ln-embed",
            scale="ratio",
            diverged=language.DIVERGED,
        ),
    ),
    budgets={
        "smoke": Budget(seeds=2, minutes=0.3, options={**language.SMOKE, "lr": 0.02}),
        "laptop": Budget(seeds=5, minutes=5, options=language.sizes(300, lr=0.02)),
        "full": Budget(seeds=8, minutes=240, options=language.sizes(5000, depth=12, dim=192, batch=64, lr=0.02)),
    },
    data=(language.SOURCE,),
    data_version=language.version,
    takes_data=True,
)
def stress(arm: Arm, _: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
    """One training run at a learning rate beyond the best, without clipping, from embeddings that suit Pre-LN."""
    learned, before, after = run(arm, seed, budget, ctx, lr=budget["lr"], std=0.2, clip=None)
    bar = language.unigram(budget["context"], ctx.data) - language.STUCK
    return Outcome(
        {
            "loss": learned.loss,
            "spikes": 100 * learned.spikes / budget["steps"],
            "failed": float(learned.loss >= bar),
            "growth": after[-1] / before[-1],
        },
        curves=(learned.curve(), profile("variance of the stream", after)),
        cost=learned.cost,
        conditions=language.conditions(budget),
    )
