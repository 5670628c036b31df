"""Scale-distribution decoupling: does it let a post-norm model train where that fails, and end lower where it trains?

The paper's two claims are stability (post-norm without a warm-up, at high learning rates) and quality. So one study
trains each model once at every learning rate, without a warm-up, and the other compares each at its best. Post-norm and
pre-norm are arms by themselves and with decoupled linear layers, since what decoupling adds to either is the question.

Decoupled layers start as the authors' do: V from N(0, 1/(2.5 d)), alpha at 1/sqrt(2 L) where a layer writes to the
stream. Twelve blocks, as post-norm trains well when it is shallow.

Reference: Wang, Zhuo, Zeng, Zhou, Yang and Li, 2025, "Scale-Distribution Decoupling", arXiv 2502.15499.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from setpoint.models import Transformer
from setpoint.nn import PostNorm, PreNorm, SDDLinear
from setpoint.studies import Arm, Better, Budget, Claim, Context, NotWorse, Outcome, Tuning, study
from setpoint.studies import _language as language

RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
ARMS = (
    Arm("post-norm", "post-norm", {"block": PostNorm(), "decoupled": False}),
    Arm("pre-norm", "pre-norm", {"block": PreNorm(), "decoupled": False}),
    Arm("post-norm-sdd", "post-norm, linear layers decoupled", {"block": PostNorm(), "decoupled": True}),
    Arm("pre-norm-sdd", "pre-norm, linear layers decoupled", {"block": PreNorm(), "decoupled": True}),
)


def decoupled(model: Transformer, depth: int) -> Transformer:
    """Linear layers of attention and feed-forward decoupled, starting as the authors' do; in place."""
    for path, layer in list(model.stack.named_modules()):
        if isinstance(layer, nn.Linear):
            writes = path.endswith(("o_proj", "down_proj"))
            made = SDDLinear(layer.in_features, layer.out_features, alpha_init=(2 * depth) ** -0.5 if writes else 1.0)
            owner, _, name = path.rpartition(".")
            setattr(model.stack.get_submodule(owner), name, made.to(layer.weight.device))
    return model


def trained(arm: Arm, seed: int, budget: Budget, ctx: Context, *, lr: float, std: float) -> language.Learned:
    """One training run without a warm-up."""
    model = language.model_for(budget, ctx, seed, {"block": arm["block"]}, embedding_std=std)
    if arm["decoupled"]:
        decoupled(model, budget["depth"])
    return language.learn(model, seed, budget, ctx, lr=lr, warmup=0.0)


@study(
    "Does post-norm with decoupled layers train without a warm-up at rates where post-norm does not?",
    arms=ARMS,
    claims=(
        Claim(
            "Over all learning rates and without a warm-up, decoupling lowers the held-out loss of post-norm by 2 %.",
            Better(0.02),
            "mean_loss",
            "post-norm-sdd",
            "post-norm",
            scale="ratio",
            diverged=language.DIVERGED,
        ),
        Claim(
            "Over all learning rates, post-norm with decoupling is within 1 % of pre-norm.",
            NotWorse(0.01),
            "mean_loss",
            "post-norm-sdd",
            "pre-norm",
            scale="ratio",
            diverged=language.DIVERGED,
        ),
    ),
    tuning=Tuning({"embedding_std": (0.02, 0.2, 0.63)}, metric="mean_loss"),
    budgets={
        "smoke": Budget(seeds=2, minutes=0.3, options={**language.SMOKE, "rates": [1e-3, 4e-3]}),
        "laptop": Budget(seeds=3, minutes=10, options=language.sizes(100, depth=12, rates=RATES)),
        "full": Budget(seeds=8, minutes=480, options=language.sizes(3000, depth=24, dim=256, batch=64, rates=RATES)),
    },
    data=(language.SOURCE,),
    data_version=language.version,
    takes_data=True,
    parameter_slack=0.05,
)
def over_rates(arm: Arm, setting: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
    """The same model trained once at each learning rate."""
    cost: dict[str, float] = {}

    def run(rate: float, _index: int) -> float:
        learned = trained(arm, seed, budget, ctx, lr=rate, std=setting["embedding_std"])
        cost.update(learned.cost)
        return learned.loss

    metrics, curve = language.largest_rate(budget["rates"], budget, ctx, run)
    return Outcome(metrics, curves=(curve,), cost=cost, conditions=language.conditions(budget))


@study(
    "Does decoupling lower the loss that post-norm and pre-norm end at?",
    arms=ARMS,
    claims=(
        Claim(
            "Each at its best setting, post-norm with decoupling ends 1 % or more below pre-norm.",
            Better(0.01),
            "loss",
            "post-norm-sdd",
            "pre-norm",
            scale="ratio",
            diverged=language.DIVERGED,
        ),
        Claim(
            "Each at its best setting, decoupling lowers the loss of pre-norm by 1 % or more.",
            Better(0.01),
            "loss",
            "pre-norm-sdd",
            "pre-norm",
            scale="ratio",
            diverged=language.DIVERGED,
        ),
    ),
    tuning=Tuning({"lr": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2), "embedding_std": (0.02, 0.2, 0.63)}, metric="loss"),
    budgets={
        "smoke": Budget(seeds=2, minutes=0.3, options=language.SMOKE),
        "laptop": Budget(seeds=4, minutes=10, options=language.sizes(250, depth=12)),
        "full": Budget(seeds=8, minutes=480, options=language.sizes(5000, depth=24, dim=256, batch=64)),
    },
    data=(language.SOURCE,),
    data_version=language.version,
    takes_data=True,
    parameter_slack=0.05,
)
def at_its_best(arm: Arm, setting: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
    """One training run."""
    learned = trained(arm, seed, budget, ctx, lr=setting["lr"], std=setting["embedding_std"])
    return Outcome(
        {"loss": learned.loss}, curves=(learned.curve(),), cost=learned.cost, conditions=language.conditions(budget)
    )
