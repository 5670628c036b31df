"""Pre-LN against Post-LN: which learning rates train without a warm-up, and what is left of the gap with one.

Both have LayerNorm and Xavier initialization, as in the paper's analysis. Gradients are not clipped: clipping hides
what the claim is about. The scale of the embedding is tuned for each arm in both studies.

Reference: Xiong et al., 2020, "On Layer Normalization in the Transformer Architecture", arXiv 2002.04745.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from setpoint.models.initialize import XavierNormal
from setpoint.nn import LayerNorm, Placement, PostNorm, PreNorm
from setpoint.studies import Arm, Better, Budget, Claim, Context, NotWorse, Outcome, Tuning, study
from setpoint.studies import _language as language

RATES = [1e-3 * 2**k for k in range(10)]
"""Up to 0.512, where Pre-LN no longer trains either. For a seed with which the last of them still trains, the ratio of
largest rates is a lower bound."""


def trained(
    block: Placement, seed: int, budget: Budget, ctx: Context, *, lr: float, warmup: float, std: float
) -> language.Learned:
    """One training run without clipping."""
    parts = {"block": block, "norm": LayerNorm, "init": XavierNormal()}
    model = language.model_for(budget, ctx, seed, parts, embedding_std=std)
    return language.learn(model, seed, budget, ctx, lr=lr, warmup=warmup, clip=None)


@study(
    "Does the norm inside the branch widen the range of learning rates that train without a warm-up?",
    arms=(
        Arm("post-ln", "the norm behind each addition", {"block": PostNorm()}),
        Arm("pre-ln", "the norm at the branch's input, one more after the last block", {"block": PreNorm()}),
    ),
    claims=(
        Claim(
            "Without a warm-up, the largest of ten learning rates (0.001 to 0.512, doubling) that trains is larger.",
            Better(1.0),
            "largest_rate",
            "pre-ln",
            "post-ln",
            better="higher",
            scale="ratio",
        ),
        Claim(
            "Without a warm-up, the best of these rates gives a lower held-out loss.",
            Better(0.01),
            "best_loss",
            "pre-ln",
            "post-ln",
            scale="ratio",
        ),
    ),
    # Each arm gets the embedding with which it does best over all rates; the range and the best rate both count.
    tuning=Tuning({"embedding_std": (0.02, 0.2, 0.63)}, metric="mean_loss"),
    budgets={
        "smoke": Budget(seeds=2, minutes=0.3, options={**language.SMOKE, "rates": [1e-3, 4e-3]}),
        "laptop": Budget(seeds=3, minutes=10, options=language.sizes(200, rates=RATES)),
        "full": Budget(seeds=8, minutes=240, options=language.sizes(3000, depth=12, dim=192, batch=64, rates=RATES)),
    },
    data=(language.SOURCE,),
    data_version=language.version,
    takes_data=True,
)
def without_warmup(arm: Arm, setting: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
    """The same model trained once at each learning rate."""
    cost: dict[str, float] = {}
    std = setting["embedding_std"]

    def run(rate: float, _index: int) -> float:
        learned = trained(arm["block"], seed, budget, ctx, lr=rate, warmup=0.0, std=std)
        cost.update(learned.cost)
        return learned.loss

    metrics, curve = language.largest_rate(budget["rates"], budget, ctx, run)
    return Outcome(metrics, curves=(curve,), cost=cost, conditions=language.conditions(budget))


@study(
    "Does Pre-LN without a warm-up end as good as Post-LN with one?",
    arms=(
        Arm("post-ln-warmup", "Post-LN, warm-up over the first fifth", {"block": PostNorm(), "warmup": 0.2}),
        Arm("pre-ln", "Pre-LN, no warm-up", {"block": PreNorm(), "warmup": 0.0}),
        Arm("post-ln", "Post-LN, no warm-up", {"block": PostNorm(), "warmup": 0.0}),
    ),
    claims=(
        Claim(
            "Each at its best setting, Pre-LN without a warm-up ends within 1 % of Post-LN with one.",
            NotWorse(0.01),
            "loss",
            "pre-ln",
            "post-ln-warmup",
            scale="ratio",
            control="post-ln",
            diverged=language.DIVERGED,
        ),
    ),
    tuning=Tuning({"lr": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3), "embedding_std": (0.02, 0.2, 0.63)}, metric="loss"),
    budgets={
        "smoke": Budget(seeds=2, minutes=0.3, options=language.SMOKE),
        "laptop": Budget(seeds=5, minutes=8, options=language.sizes(300)),
        "full": Budget(seeds=8, minutes=240, options=language.sizes(5000, depth=12, dim=192, batch=64)),
    },
    data=(language.SOURCE,),
    data_version=language.version,
    takes_data=True,
    parameter_slack=0.05,
)
def with_warmup(arm: Arm, setting: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
    """One training run."""
    lr, std = setting["lr"], setting["embedding_std"]
    learned = trained(arm["block"], seed, budget, ctx, lr=lr, warmup=arm["warmup"], std=std)
    return Outcome(
        {"loss": learned.loss}, curves=(learned.curve(),), cost=learned.cost, conditions=language.conditions(budget)
    )
