"""DyT in place of the norms of a small language model.

The claim is parity: with tanh where a norm was, the model ends about as good. That says something only where a model
without any norm, at its own best setting, does worse by more than the margin; that model is the control. So the setting
is found by a rule: of a ladder (8 blocks, 16 blocks, twice the steps, a vision transformer) the first rung on which the
control fails. Here that is the first, once two things are as in the paper's language models. The head has a matrix
of its own: tied to the embedding, it has to grow, and with it, times the factor on the embedding, what tanh is to
squash. And matrices keep the size of what they read, which N(0, 0.02²) does at the paper's width of 4096 and not at 64,
where nothing grows and no norm is needed: there the model without norms was ahead of those with them.

As in the paper, the embedding has a learnable factor, in every arm; where it starts is tuned, and for DyT also alpha.

The second study asks what squashing is for: how large a learning rate the model stands with it, and without.

Reference: Zhu, Chen, He, LeCun and Liu, 2025, "Transformers without Normalization", arXiv 2503.10622.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from setpoint.models import Transformer
from setpoint.models.initialize import XavierNormal
from setpoint.nn import DyT, LayerNorm, RMSNorm
from setpoint.nn.block import NormFactory
from setpoint.studies import Arm, Better, Budget, Claim, Context, NotWorse, Outcome, Tuning, study
from setpoint.studies import _language as language

RATES = [0.002 * 2**k for k in range(9)]


def nothing(dim: int) -> nn.Module:  # noqa: ARG001  a norm factory
    """No norm."""
    return nn.Identity()


def squashing(dim: int, alpha: float = 0.5) -> nn.Module:
    """DyT as it replaces an RMSNorm: without a bias."""
    return DyT(dim, alpha_init_value=alpha, bias=False)


def model_for(norm: NormFactory, scale: float, seed: int, budget: Budget, ctx: Context) -> Transformer:
    """The model of both studies."""
    parts = {"norm": norm, "init": XavierNormal()}
    return language.model_for(budget, ctx, seed, parts, embedding_scale=scale, tie_embeddings=False)


RMSNORM = Arm("rmsnorm", "RMSNorm at every place", {"norm": RMSNorm})
NONE = Arm("none", "no norm anywhere", {"norm": nothing})


@study(
    "Does a language model end as good with DyT as with its norms?",
    arms=(
        RMSNORM,
        Arm("layernorm", "LayerNorm at every place", {"norm": LayerNorm}),
        Arm("dyt", "DyT at every place", {"norm": squashing}, knobs={"alpha": (0.25, 0.5, 1.0)}),
        NONE,
    ),
    claims=tuple(
        Claim(
            f"Each at its best setting, DyT ends within 1 % of the held-out loss of {name}.",
            NotWorse(0.01),
            "loss",
            "dyt",
            baseline,
            scale="ratio",
            control="none",
            diverged=language.DIVERGED,
        )
        for name, baseline in (("RMSNorm", "rmsnorm"), ("LayerNorm", "layernorm"))
    ),
    tuning=Tuning({"lr": (4e-3, 8e-3, 1.6e-2), "embedding_scale": (3.0, 9.0, 27.0, 81.0)}, metric="loss"),
    budgets={
        "smoke": Budget(seeds=2, minutes=0.3, options=language.SMOKE),
        "laptop": Budget(seeds=5, minutes=6, options=language.sizes(300)),
        "full": Budget(seeds=10, minutes=240, options=language.sizes(5000, depth=12, dim=256, context=256, batch=64)),
    },
    data=(language.SOURCE,),
    data_version=language.version,
    takes_data=True,
)
def language_model(arm: Arm, setting: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
    """One training run."""
    norm = partial(arm["norm"], alpha=setting["alpha"]) if arm.knobs else arm["norm"]
    model = model_for(norm, setting["embedding_scale"], seed, budget, ctx)
    learned = language.learn(model, seed, budget, ctx, lr=setting["lr"])
    return Outcome(
        {"loss": learned.loss},
        curves=(learned.curve(),),
        cost=learned.cost,
        conditions=language.conditions(budget),
    )


@study(
    "Does squashing let it train at larger learning rates than no norm does?",
    arms=(RMSNORM, Arm("dyt", "DyT at every place", {"norm": squashing}), NONE),
    claims=(
        Claim(
            "The largest of nine learning rates (0.002 to 0.512, doubling) that trains is at least twice as large "
            "with DyT as without a norm.",
            Better(1.0),
            "largest_rate",
            "dyt",
            "none",
            better="higher",
            scale="ratio",
        ),
        Claim(
            "The largest of these rates that trains is no smaller with DyT than half of that with RMSNorm.",
            NotWorse(0.5),
            "largest_rate",
            "dyt",
            "rmsnorm",
            better="higher",
            scale="ratio",
            control="none",
        ),
    ),
    # Each arm gets the start of the embedding's factor with which it does best over all rates.
    tuning=Tuning(
        {"embedding_scale": (3.0, 9.0, 27.0, 81.0)}, metric="mean_loss", options={"rates": RATES[::2]}, widen=1
    ),
    budgets={
        "smoke": Budget(seeds=2, minutes=0.3, options={**language.SMOKE, "rates": [1e-3, 4e-3]}),
        "laptop": Budget(seeds=4, minutes=6, options=language.sizes(100, rates=RATES)),
        "full": Budget(seeds=8, minutes=240, options=language.sizes(2000, depth=12, dim=256, batch=64, rates=RATES)),
    },
    data=(language.SOURCE,),
    data_version=language.version,
    takes_data=True,
)
def learning_rates(arm: Arm, setting: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
    """The same model trained once at each learning rate."""
    cost: dict[str, float] = {}

    def run(rate: float, _index: int) -> float:
        model = model_for(arm["norm"], setting["embedding_scale"], seed, budget, ctx)
        learned = language.learn(model, seed, budget, ctx, lr=rate)
        cost.update(learned.cost)
        return learned.loss

    metrics, curve = language.largest_rate(budget["rates"], budget, ctx, run)
    return Outcome(metrics, curves=(curve,), cost=cost, conditions=language.conditions(budget))
