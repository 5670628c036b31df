"""Unified normalization on a byte-level language model: layer norm's quality at batch norm's cost of inference?

A decoder of two blocks, each norm at its best learning rate, judged by held-out loss in evaluation mode, where unified
normalization is an affine map that folds away. Its gradient's scale is fixed for the first 1,000 calls by the official
code, so runs are twice as long as that.

Reference: Yang, Zhang, Lan, Yang, Li, Tan, Xiao and Pu, 2022, "Unified Normalization for Accelerating and Stabilizing
Transformers", arXiv 2208.01313.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from setpoint.nn import LayerNorm, UnifiedNorm
from setpoint.studies import Arm, Better, Budget, Claim, Context, Outcome, study
from setpoint.studies import _language as language
from setpoint.studies._token_statistics import (
    TUNING,
    WARMUP,
    TokenBatchNorm,
    budgets,
    nothing,
    run,
    within_a_percent,
)


@study(
    "Does unified normalization train as well as layer norm, where batch norm does not?",
    arms=(
        Arm("layernorm", "LayerNorm at every place", {"norm": LayerNorm}),
        Arm("batchnorm", "batch norm over batch and time", {"norm": TokenBatchNorm}),
        Arm("unified", "UnifiedNorm with a window of 4", {"norm": partial(UnifiedNorm, warmup_iters=WARMUP)}),
        Arm("none", "no norm anywhere", {"norm": nothing}),
    ),
    claims=(
        Claim(
            "Each at its best learning rate, UnifiedNorm ends at least 1 % below the held-out loss of batch norm.",
            Better(0.01),
            "loss",
            "unified",
            "batchnorm",
            scale="ratio",
            diverged=language.DIVERGED,
        ),
        within_a_percent(
            "Each at its best learning rate, UnifiedNorm ends within 1 % of the held-out loss of LayerNorm.", "unified"
        ),
    ),
    tuning=TUNING,
    budgets=budgets(2000, 10, batch=8),
    data=(language.SOURCE,),
    data_version=language.version,
    takes_data=True,
)
def language_model(arm: Arm, setting: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
    """One training run."""
    return run(arm, setting, seed, budget, ctx)
