"""Pre-RMSNorm: a trained Pre-LN model, converted, is the same function; and what that does to its speed.

A small GPT with LayerNorms and a head of its own is trained, then converted by the fix. The control replaces the norms
and leaves out what makes the conversion exact, so that a test which passes anything would be seen. The claim about time
is made on plain (eager) inference with torch's stock kernels, old and new model in turn; on two cores about par is to
be expected.

Reference: Jiang, Gu, Zhu and Pan, 2023, arXiv 2305.14858.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import lru_cache
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from setpoint import data
from setpoint.fixing import fix
from setpoint.models import MLP, Transformer
from setpoint.models.position import Learned
from setpoint.nn import LayerNorm, RMSNorm
from setpoint.studies import Arm, Better, Budget, Claim, Context, Equal, Outcome, study
from setpoint.studies import _language as language

GPT = {"norm": LayerNorm, "feed_forward": MLP, "position": Learned()}
PROMPTS, PROMPT, CONTINUATION = 20, 24, 32


@lru_cache(maxsize=2)
def trained(seed: int, sizes: tuple[tuple[str, Any], ...], ctx: Context) -> Transformer:
    """A small GPT with LayerNorms; arms of the same seed that run in one process share it."""
    budget = Budget(2, 1.0, dict(sizes))
    model = language.model_for(budget, ctx, seed, GPT, bias=True, tie_embeddings=False, embedding_std=0.2)
    language.learn(model, seed, budget, ctx, lr=2e-3)
    return model.eval()


def norms_only(model: Transformer) -> Transformer:
    """The norms replaced and nothing centred: what the conversion would be without its first step."""
    changed = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            norm = RMSNorm(module.normalized_shape, eps=module.eps, bias=True)
            norm.load_state_dict(module.state_dict())
            parent, _, last = name.rpartition(".")
            setattr(changed.get_submodule(parent), last, norm)
    return changed


def converted(arm: Arm, model: Transformer, batch: Any) -> nn.Module:
    """The model as an arm has it."""
    if arm["fix"] is None:
        return model
    if arm["fix"] == "norms-only":
        return norms_only(model)
    return fix(model, arm["fix"], [batch], forward=data.run_inputs, timed=False).model


@torch.no_grad()
def continued(model: nn.Module, prompts: Tensor, room: int) -> Tensor:
    """Greedy continuations by ``room`` tokens."""
    tokens = prompts
    for _ in range(room):
        tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), dim=1)
    return tokens


ARMS = (
    Arm("layernorm", "the trained model", {"fix": None}),
    Arm("pre-rmsnorm", "converted to RMSNorm", {"fix": "pre-rmsnorm"}),
    Arm("pre-crmsnorm", "converted to CRMSNorm, the stream one feature narrower", {"fix": "pre-crmsnorm"}),
    Arm("norms-only", "norms replaced, nothing centred", {"fix": "norms-only"}),
)
SIZES = {"depth": 2, "dim": 128, "heads": 4, "context": 64, "batch": 16, "held_out": 512}


@study(
    "Is the converted model the same function?",
    arms=ARMS,
    claims=(
        Claim(
            "After conversion to RMSNorm the held-out loss is the same to 1e-5 nats.",
            Equal(1e-5),
            "loss",
            "pre-rmsnorm",
            "layernorm",
            unit="nats",
            control="norms-only",
        ),
        Claim(
            "After conversion to CRMSNorm the held-out loss is the same to 1e-5 nats.",
            Equal(1e-5),
            "loss",
            "pre-crmsnorm",
            "layernorm",
            unit="nats",
            control="norms-only",
        ),
        Claim(
            "No greedy continuation of twenty prompts differs after conversion to RMSNorm.",
            Equal(0.5),
            "differing",
            "pre-rmsnorm",
            unit="continuations",
        ),
    ),
    budgets={
        "smoke": Budget(2, 0.3, language.SMOKE),
        "laptop": Budget(5, 6, {"steps": 300, **SIZES}),
        "full": Budget(5, 60, {"steps": 3000, **SIZES, "depth": 8, "dim": 512}),
    },
    data=(language.SOURCE,),
    data_version=language.version,
    takes_data=True,
    parameter_slack=0.1,  # a stream that is one feature narrower is what CRMSNorm is about
)
def same_function(arm: Arm, _: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
    """Train, convert, compare."""
    shared = Context("valid", ctx.device, ctx.data)
    model = trained(seed, tuple(sorted(budget.options.items())), shared)
    ctx.progress(1, 2, "trained")
    text = language.corpus(budget["context"], ctx.data)
    held_out = text.batches(ctx.split, 64, limit=budget["held_out"])
    changed = converted(arm, model, held_out[0])
    with torch.no_grad():
        losses = [(float(data.next_token_loss(changed(b["tokens"]), b)), len(b["tokens"])) for b in held_out]
    prompt = min(PROMPT, budget["context"] - 1)
    prompts = text.batches(ctx.split, PROMPTS, limit=PROMPTS)[0]["tokens"][:, :prompt]
    room = min(CONTINUATION, budget["context"] - prompt)
    ctx.progress(2, 2, "compared")
    same = continued(model, prompts, room) == continued(changed, prompts, room)
    return Outcome(
        {
            "loss": sum(loss * count for loss, count in losses) / sum(count for _, count in losses),
            "differing": float((~same.all(dim=1)).sum()),
        },
        cost={"parameters": float(sum(p.numel() for p in changed.parameters()))},
        conditions=language.conditions(budget),
    )


@study(
    "Does it run faster?",
    arms=tuple(arm for arm in ARMS if arm.name.startswith("pre-")),
    claims=(
        Claim(
            "With RMSNorm, inference takes at least 1 % less time.",
            Better(0.01),
            "speed",
            "pre-rmsnorm",
            better="higher",
            scale="ratio",
            steady="restless",
        ),
        Claim(
            "With CRMSNorm, inference takes at least 1 % less time.",
            Better(0.01),
            "speed",
            "pre-crmsnorm",
            better="higher",
            scale="ratio",
            steady="restless",
        ),
    ),
    budgets={
        "smoke": Budget(2, 0.3, {"depth": 2, "dim": 32, "heads": 2, "context": 16, "batch": 2, "rounds": 3}),
        "laptop": Budget(6, 5, {"depth": 6, "dim": 384, "heads": 6, "context": 256, "batch": 4, "rounds": 30}),
        "full": Budget(10, 30, {"depth": 12, "dim": 768, "heads": 12, "context": 1024, "batch": 16, "rounds": 50}),
    },
    data=(language.SOURCE,),
    data_version=language.version,
    takes_data=True,
    alone=True,
    parameter_slack=0.1,
)
def speed(arm: Arm, _: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
    """Old, new and old again, in turn."""
    model = language.model_for(budget, ctx, seed, GPT, bias=True, tie_embeddings=False).eval()
    batch = language.corpus(budget["context"], ctx.data).batches("valid", budget["batch"], limit=budget["batch"])[0]
    changed = converted(arm, model, batch)
    times: dict[str, list[float]] = {"old": [], "new": [], "again": []}
    runs = {"old": model, "new": changed, "again": model}
    with torch.inference_mode():
        for turn in range(budget["rounds"] + 2):
            for name, network in runs.items():
                start = perf_counter()
                network(batch["tokens"])
                if turn > 1:
                    times[name].append(perf_counter() - start)
            ctx.progress(turn + 1, budget["rounds"] + 2, "timing")
    old, new, again = (median(times[name]) for name in ("old", "new", "again"))
    return Outcome(
        {"speed": (old + again) / 2 / new, "restless": again / old - 1},
        cost={"milliseconds": new * 1e3, "parameters": float(sum(p.numel() for p in changed.parameters()))},
        conditions={name: budget[name] for name in ("depth", "dim", "context", "batch")},
    )
