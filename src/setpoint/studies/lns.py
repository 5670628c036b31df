"""LayerNorm Scaling against Pre-LN: the stream's growth over depth, and the held-out loss.

The sign of the second hangs on the embedding: where embeddings are large, branches are damped already. So learning rate
and embedding are tuned for each arm. Two more arms say what the gain is not: Pre-LN with smaller output projections at
the start, and the scale as the start of a trained gain.

Reference: Sun et al., 2025, "The Curse of Depth in Large Language Models", arXiv 2502.05795.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from setpoint.models.initialize import DepthScaledNormal, Normal
from setpoint.nn import PreNorm, ScaledPreNorm
from setpoint.studies import Arm, Better, Budget, Claim, Context, Outcome, Tuning, study
from setpoint.studies import _language as language
from setpoint.types import Series


@study(
    "Does scaling norms by depth keep the stream small and lower the loss?",
    arms=(
        Arm("pre-ln", "no scaling", {"block": PreNorm(), "init": Normal()}),
        Arm("lns", "norm outputs times 1/sqrt(layer)", {"block": ScaledPreNorm(), "init": Normal()}),
        Arm(
            "small-init",
            "no scaling, output projections drawn smaller by 1/sqrt(2 depth)",
            {"block": PreNorm(), "init": DepthScaledNormal()},
        ),
        Arm(
            "trained-scale",
            "gains that start at 1/sqrt(layer)",
            {"block": ScaledPreNorm(learnable=True), "init": Normal()},
        ),
    ),
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
        Claim(
            "The stream's variance grows less from the first to the last block, by a factor of 2 or more.",
            Better(1.0),
            "growth",
            "lns",
            "pre-ln",
            scale="ratio",
            diverged=1e6,
        ),
    ),
    tuning=Tuning({"lr": (1e-3, 2e-3, 4e-3, 8e-3), "embedding_std": (0.02, 0.2, 0.63)}, metric="loss"),
    budgets={
        "smoke": Budget(seeds=2, minutes=0.3, options=language.SMOKE),
        "laptop": Budget(seeds=5, minutes=10, options=language.sizes(300, depth=12)),
        "full": Budget(seeds=8, minutes=240, options=language.sizes(5000, depth=24, dim=192, batch=64)),
    },
    data=(language.SOURCE,),
    data_version=language.version,
    takes_data=True,
)
def language_model(arm: Arm, setting: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
    """One training run."""
    parts = {"block": arm["block"], "init": arm["init"]}
    model = language.model_for(budget, ctx, seed, parts, embedding_std=setting["embedding_std"])
    learned = language.learn(model, seed, budget, ctx, lr=setting["lr"])
    variances = language.stream(model, budget, ctx)
    return Outcome(
        {"loss": learned.loss, "growth": variances[-1] / variances[1]},
        curves=(
            learned.curve(),
            Series("variance of the stream over block", tuple(map(float, range(len(variances)))), tuple(variances)),
        ),
        cost=learned.cost,
        conditions=language.conditions(budget),
    )
