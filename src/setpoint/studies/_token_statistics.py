"""The setting of the studies of norms with batch statistics on text: two blocks, and a batch norm of tokens.

Batch statistics let a decoder see tokens yet to come while it trains. Held-out loss is taken in evaluation mode, where
statistics are fixed, so that this can only hurt an arm and never flatter it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from setpoint.nn import BatchNorm1d
from setpoint.studies import Arm, Budget, Claim, Context, NotWorse, Outcome, Tuning
from setpoint.studies import _language as language

WARMUP = 100
"""Training calls before statistics are smoothed."""
TUNING = Tuning({"lr": (1e-3, 2e-3, 4e-3, 8e-3)}, metric="loss")


class TokenBatchNorm(BatchNorm1d):
    """Batch normalization of ``(N, T, C)`` over batch and time."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``(N, T, C)``."""
        return super().forward(x.flatten(0, 1)).view_as(x)


def nothing(_: int) -> nn.Module:
    """No norm."""
    return nn.Identity()


def budgets(steps: int, minutes: float, batch: int = 16) -> dict[str, Budget]:
    """Two blocks of width 64 on windows of 64 bytes."""
    return {
        "smoke": Budget(seeds=2, minutes=0.3, options=language.SMOKE),
        "laptop": Budget(seeds=5, minutes=minutes, options=language.sizes(steps, depth=2, batch=batch)),
        "full": Budget(seeds=10, minutes=60, options=language.sizes(5 * steps, depth=4, dim=128, batch=batch)),
    }


def within_a_percent(text: str, arm: str) -> Claim:
    """An arm's held-out loss is at most 1 % above that of layer norm, where a model without norms fails."""
    return Claim(
        text, NotWorse(0.01), "loss", arm, "layernorm", scale="ratio", control="none", diverged=language.DIVERGED
    )


def run(arm: Arm, setting: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
    """One training run of a decoder with the arm's norm at every place."""
    model = language.model_for(budget, ctx, seed, {"norm": arm["norm"]})
    learned = language.learn(model, seed, budget, ctx, lr=setting["lr"])
    return Outcome(
        {"loss": learned.loss},
        curves=(learned.curve(),),
        cost=learned.cost,
        conditions=language.conditions(budget),
    )
