"""Pre-RMSNorm: a trained Pre-LN model, converted, is the same function; and what that does to its speed.

A small GPT with LayerNorms and a head of its own is trained, then converted by the fix. The control replaces the norms
and leaves out what makes the conversion exact, so that a test which passes anything would be seen.

Time is measured twice, old and new model in turn: on plain (eager) inference, where a layer norm is one kernel and its
replacement may be several, and on compiled inference, where each is a part of a larger kernel. On two cores about par
is to be expected.

Reference: Jiang, Gu, Zhu and Pan, 2023, arXiv 2305.14858.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
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
WARM = 2
"""Rounds that are not timed."""


def trained(seed: int, budget: Budget, ctx: Context) -> Transformer:
    """A small GPT with LayerNorms. Every arm trains it anew, to the same weights: no arm pays for another's model."""
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
            control="norms-only",
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
    model = trained(seed, budget, ctx)
    text = language.corpus(budget["context"], ctx.data)
    held_out = text.batches(ctx.split, 64, limit=budget["held_out"])
    start = perf_counter()
    changed = converted(arm, model, held_out[0])
    seconds_to_convert = perf_counter() - start
    with torch.no_grad():
        losses = [(float(data.next_token_loss(changed(b["tokens"]), b)), len(b["tokens"])) for b in held_out]
    prompt = min(PROMPT, budget["context"] - 1)
    prompts = text.batches(ctx.split, PROMPTS, limit=PROMPTS)[0]["tokens"][:, :prompt]
    room = min(CONTINUATION, budget["context"] - prompt)
    same = continued(model, prompts, room) == continued(changed, prompts, room)
    return Outcome(
        {
            "loss": sum(loss * count for loss, count in losses) / sum(count for _, count in losses),
            "differing": float((~same.all(dim=1)).sum()),
        },
        cost={
            "parameters": float(sum(p.numel() for p in changed.parameters())),
            "seconds_to_convert": seconds_to_convert,
        },
        conditions=language.conditions(budget),
    )


TIMED = tuple(arm for arm in ARMS if arm.name.startswith("pre-"))
FASTER = tuple(
    Claim(
        f"With {norm}, inference takes at least 1 % less time.",
        Better(0.01),
        "speed",
        arm,
        better="higher",
        scale="ratio",
        steady="restless",
    )
    for norm, arm in (("RMSNorm", "pre-rmsnorm"), ("CRMSNorm", "pre-crmsnorm"))
)
TIMES = {
    "smoke": Budget(2, 0.3, {"depth": 1, "dim": 32, "heads": 2, "context": 16, "batch": 2, "rounds": 3}),
    "laptop": Budget(6, 5, {"depth": 6, "dim": 384, "heads": 6, "context": 256, "batch": 4, "rounds": 30}),
    "full": Budget(10, 30, {"depth": 12, "dim": 768, "heads": 12, "context": 1024, "batch": 16, "rounds": 50}),
}


def in_turn(
    arm: Arm, seed: int, budget: Budget, ctx: Context, prepare: Callable[[nn.Module], Callable[[Tensor], Any]]
) -> Outcome:
    """Times of the old model, the new one, and the old one again, one after the other.

    Args:
        arm, seed, budget, ctx: As for a run.
        prepare: Makes of a model what is timed.
    """
    model = language.model_for(budget, ctx, seed, GPT, bias=True, tie_embeddings=False).eval()
    batch = language.corpus(budget["context"], ctx.data).batches("valid", budget["batch"], limit=budget["batch"])[0]
    changed = converted(arm, model, batch)
    old_model, new_model = prepare(model), prepare(changed)
    times: dict[str, list[float]] = {"old": [], "new": [], "again": []}
    runs = {"old": old_model, "new": new_model, "again": old_model}
    with torch.inference_mode():
        for turn in range(budget["rounds"] + WARM):
            for name, network in runs.items():
                start = perf_counter()
                network(batch["tokens"])
                if turn >= WARM:
                    times[name].append(perf_counter() - start)
            ctx.progress(turn + 1, budget["rounds"] + WARM, "timing")
    old, new, again = (median(times[name]) for name in ("old", "new", "again"))
    return Outcome(
        {"speed": (old + again) / 2 / new, "restless": again / old - 1},
        cost={"milliseconds": new * 1e3, "parameters": float(sum(p.numel() for p in changed.parameters()))},
        conditions={name: budget[name] for name in ("depth", "dim", "context", "batch")},
    )


@study(
    "Does it run faster?",
    arms=TIMED,
    claims=FASTER,
    budgets=TIMES,
    data=(language.SOURCE,),
    data_version=language.version,
    takes_data=True,
    alone=True,
    parameter_slack=0.1,
)
def speed(arm: Arm, _: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
    """Plain inference."""
    return in_turn(arm, seed, budget, ctx, lambda model: model)


def with_backend(budget: Budget, backend: str) -> Budget:
    """The same budget, with the compiler's backend that it runs on."""
    return replace(budget, options={**budget.options, "backend": backend})


@study(
    "Does it run faster when both are compiled?",
    arms=TIMED,
    claims=FASTER,
    budgets={
        "smoke": with_backend(TIMES["smoke"], "eager"),  # traces as the real one does and needs no C++ compiler
        "laptop": with_backend(TIMES["laptop"], "inductor"),
        "full": with_backend(TIMES["full"], "inductor"),
    },
    data=(language.SOURCE,),
    data_version=language.version,
    takes_data=True,
    alone=True,
    parameter_slack=0.1,
)
def compiled_speed(arm: Arm, _: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
    """Inference through `torch.compile`; compiling is not in the times."""
    try:
        return in_turn(arm, seed, budget, ctx, lambda model: torch.compile(model, backend=budget["backend"]))
    finally:
        torch.compiler.reset()
