"""DyT in place of the norms of a small language model.

The claim is parity: with tanh where a norm was, the model ends about as good. That says something only where a model
without any norm does worse, so that arm is the control. As in the paper's recipe for language models, the embedding
has a learnable factor, in every arm; where it starts is tuned, and for DyT also alpha.

Reference: Zhu, Chen, He, LeCun and Liu, 2025, "Transformers without Normalization", arXiv 2503.10622.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from setpoint.nn import DyT, LayerNorm, RMSNorm
from setpoint.studies import Arm, Budget, Claim, Context, NotWorse, Outcome, Tuning, study
from setpoint.studies import _language as language


def nothing(dim: int) -> nn.Module:  # noqa: ARG001  a norm factory
    """No norm."""
    return nn.Identity()


@study(
    "Does a language model end as good with DyT as with its norms?",
    arms=(
        Arm("rmsnorm", "RMSNorm at every place", {"norm": RMSNorm}),
        Arm("layernorm", "LayerNorm at every place", {"norm": LayerNorm}),
        Arm("dyt", "DyT at every place", {"norm": partial(DyT, bias=False)}, knobs={"alpha": (0.5, 1.0)}),
        Arm("none", "no norm anywhere", {"norm": nothing}),
    ),
    claims=(
        Claim(
            "Each at its best setting, DyT ends within 1 % of the held-out loss of RMSNorm.",
            NotWorse(0.01),
            "loss",
            "dyt",
            "rmsnorm",
            scale="ratio",
            control="none",
            diverged=language.DIVERGED,
        ),
        Claim(
            "Each at its best setting, DyT ends within 1 % of the held-out loss of LayerNorm.",
            NotWorse(0.01),
            "loss",
            "dyt",
            "layernorm",
            scale="ratio",
            control="none",
            diverged=language.DIVERGED,
        ),
    ),
    tuning=Tuning({"lr": (1e-3, 2e-3, 4e-3, 8e-3), "embedding_scale": (1.0, 8.0, 40.0)}, metric="loss"),
    budgets={
        "smoke": Budget(seeds=2, minutes=0.3, options=language.SMOKE),
        "laptop": Budget(seeds=5, minutes=10, options=language.sizes(300)),
        "full": Budget(seeds=10, minutes=240, options=language.sizes(5000, depth=12, dim=256, context=256, batch=64)),
    },
    data=(language.SOURCE,),
    data_version=language.version,
    takes_data=True,
)
def language_model(arm: Arm, setting: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
    """One training run."""
    norm = arm["norm"] if "alpha" not in setting else partial(arm["norm"], alpha_init_value=setting["alpha"])
    model = language.model_for(budget, ctx, seed, {"norm": norm}, embedding_scale=setting["embedding_scale"])
    learned = language.learn(model, seed, budget, ctx, lr=setting["lr"])
    return Outcome(
        {"loss": learned.loss},
        curves=(learned.curve(),),
        cost=learned.cost,
        conditions=language.conditions(budget),
    )
