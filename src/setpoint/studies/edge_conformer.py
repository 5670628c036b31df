"""Pre-normalizers: does a norm hold in float16 arithmetic, on activations of a pretrained model, by dividing first?

The residual stream of SmolLM2-135M in front of each of its 30 blocks, on slices of text that share nothing, goes
through an RMS norm without a weight in float16: the result of each operation is rounded, as on a device that has
nothing wider. (A sum is one operation, wider inside; a device that rounds there too does worse.) The same vectors in
float64 are the truth. A token counts as lost where the vector that comes out is off by more than 5 % of its length. The
plain norm fails where squares overflow, at massive activations and in late blocks.

Reference: Xu, Jin et al., 2023, "Conformer-Based Speech Recognition On Extreme Edge-Computing Devices", arXiv
2312.10359.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from setpoint.nn import lp_norm
from setpoint.studies import Arm, Better, Budget, Claim, Context, Equal, Outcome, study
from setpoint.studies.massive_refined import package_version, slice_of, smollm2
from setpoint.types import Series

LOST = 0.05
"""Error over length beyond which a token counts as lost."""


@cache
@torch.no_grad()
def streams(slice_: int, windows: int, tokens: int, source: Path | None) -> Tensor:
    """What enters each block on a slice of text, in float16: shape ``(blocks, windows * tokens, dim)``."""
    found = []
    for ids in slice_of(slice_, windows, tokens, source):
        states = smollm2().model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
        found.append(torch.cat(states[:-1]))  # the last one is behind the final norm
    return torch.cat(found, dim=1).half()


@study(
    "Does a norm hold in float16 arithmetic on a pretrained model's activations once it divides before it squares?",
    arms=(
        Arm("plain", "the norm as it is written down", {"prenorm": None}),
        Arm("mad", "divided by the mean absolute entry first", {"prenorm": "mad"}),
        Arm("max", "divided by the largest entry first", {"prenorm": "max"}),
        Arm("guaranteed", "by the mean absolute entry and the bound for a spike", {"prenorm": "guaranteed"}),
    ),
    claims=(
        Claim(
            "Divided by the mean absolute entry first, the share of lost tokens is smaller by 0.05 or more.",
            Better(0.05),
            "lost",
            "mad",
            "plain",
            unit="of the tokens",
        ),
        Claim(
            "Divided by the mean absolute entry first, at most 1 % of the tokens are lost.",
            Equal(0.01),
            "lost",
            "mad",
            unit="of the tokens",
            control="plain",
        ),
        Claim(
            "With the bound for a spike too, at most 1 % of the tokens are lost.",
            Equal(0.01),
            "lost",
            "guaranteed",
            unit="of the tokens",
            control="plain",
        ),
        Claim(
            "The median error is smaller than after dividing by the largest entry, by a factor of 1.5 or more.",
            Better(0.5),
            "median_error",
            "mad",
            "max",
            scale="ratio",
        ),
    ),
    budgets={
        "smoke": Budget(2, 3, {"windows": 1, "tokens": 24}),
        "laptop": Budget(8, 5, {"windows": 2, "tokens": 128}),
        "full": Budget(20, 60, {"windows": 8, "tokens": 1024}),
    },
    data_version=package_version,
    takes_data=True,
    replicate="slice",
)
def float16(arm: Arm, _: Mapping[str, Any], slice_: int, budget: Budget, ctx: Context) -> Outcome:
    """The norm of one arm on one slice of text."""
    x = streams(slice_, budget["windows"], budget["tokens"], ctx.data)
    width = x.shape[-1]
    truth = lp_norm(x.double(), width, center=False, prenorm=None)
    got = lp_norm(x, width, center=False, prenorm=arm["prenorm"]).double()
    off = ((got - truth).norm(dim=-1) / truth.norm(dim=-1)).nan_to_num(nan=torch.inf)
    lost = (off > LOST).double().mean(-1)
    ctx.progress(1, 1, f"{lost.mean():.1%} of the tokens lost")
    return Outcome(
        {"lost": float(lost.mean()), "median_error": float(off.median())},
        curves=(Series("share of lost tokens over block", tuple(map(float, range(len(x)))), tuple(lost.tolist())),),
        conditions={"vectors": off.numel(), "width": width},
    )
