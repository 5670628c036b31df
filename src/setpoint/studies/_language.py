"""The setting that the studies of transformers share: a byte-level language model on the standard library's sources.

Small enough for two cores, deep enough (eight blocks and more) that where norms stand matters. Everything that is not
the arm is the same: data, initialization, order of batches, optimizer, steps. Learning rate and the scale of the
embedding are tuned for each arm, since the sign of several claims hangs on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import log
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from setpoint import data
from setpoint.data import TokenData
from setpoint.models import Transformer, TransformerConfig
from setpoint.probe import record
from setpoint.studies import Budget, Context, Diverged
from setpoint.train import AdamW, Cosine, History, NonFiniteLoss, train
from setpoint.types import Series, SiteRole, Stat

SOURCE = "python-stdlib"
MEASURED: dict[SiteRole, frozenset[Stat]] = {role: frozenset({Stat.MOMENTS}) for role in ("embedding", "residual")}
STUCK = 0.02
"""A model that is not this much better, in nats, than the frequencies of single bytes has not learned."""
DIVERGED = log(256)
"""What a run that diverged counts as: the loss, in nats, of a guess among 256 bytes that are equally likely. `learn`
gives no loss above it, so that diverging is never milder than a bad loss."""
SPIKE = 0.5
"""A step whose loss is this much above the median of the steps before it is a spike, in nats."""


@cache
def corpus(context: int, source: Path | None = None) -> TokenData:
    """The text, or the user's, as bytes."""
    return data.text(source or SOURCE, context=context)


def version() -> str:
    """Fingerprint of the text that studies run on by default."""
    return corpus(64).fingerprint[:12]


@cache
def unigram(context: int, source: Path | None = None) -> float:
    """Entropy of single bytes in the training text, in nats: what a model reaches that has learned no order."""
    text = corpus(context, source)
    counts = torch.bincount(torch.from_numpy(text.train[:1_000_000].astype("int64")), minlength=text.vocab_size)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * share.log()).sum())


def sizes(steps: int, **others: Any) -> dict[str, Any]:
    """Options of a budget: 8 blocks of width 64 on windows of 64 bytes, unless said otherwise."""
    return {"steps": steps, "depth": 8, "dim": 64, "heads": 4, "context": 64, "batch": 16, "held_out": 512, **others}


SMOKE = sizes(6, depth=2, dim=16, heads=2, context=16, batch=4, held_out=8)


def model_for(budget: Budget, ctx: Context, seed: int, parts: Mapping[str, Any], **config: Any) -> Transformer:
    """A fresh backbone.

    Args:
        budget: Gives depth, width and context.
        ctx: Gives the corpus, and so the vocabulary.
        seed: Of the initialization.
        parts: Objects for `Transformer`: block, norm, feed_forward, …
        config: Further fields of `TransformerConfig`.
    """
    torch.manual_seed(seed)
    chosen = TransformerConfig(
        vocab_size=corpus(budget["context"], ctx.data).vocab_size,
        context=budget["context"],
        dim=budget["dim"],
        depth=budget["depth"],
        num_heads=budget["heads"],
        **config,
    )
    return Transformer(chosen, **parts).to(ctx.device)


@dataclass(frozen=True)
class Learned:
    """A training run, measured.

    Args:
        model: As trained.
        history: Its course.
        loss: Held-out loss, in nats per byte.
    """

    model: nn.Module
    history: History
    loss: float

    def curve(self) -> Series:
        """Training loss over step, each point the mean of ten steps, or of a third of the run if that is shorter."""
        losses = self.history.losses
        every = max(1, min(10, len(losses) // 3))
        ends = range(every, len(losses) + 1, every)
        means = tuple(sum(losses[end - every : end]) / every for end in ends)
        return Series("training loss (nats per byte) over step", tuple(map(float, ends)), means)

    @property
    def spikes(self) -> float:
        """Steps whose loss is far above the median of the twenty before."""
        losses = self.history.losses
        return float(sum(loss > median(losses[i - 20 : i]) + SPIKE for i, loss in enumerate(losses) if i >= 20))

    @property
    def cost(self) -> dict[str, float]:
        """Parameters and time per step."""
        return {
            "parameters": float(sum(p.numel() for p in self.model.parameters())),
            "seconds_per_step": self.history.seconds / max(1, len(self.history.steps)),
        }


def learn(
    model: nn.Module,
    seed: int,
    budget: Budget,
    ctx: Context,
    *,
    lr: float,
    warmup: float = 0.1,
    clip: float | None = 1.0,
    callbacks: Sequence[Any] = (),
) -> Learned:
    """Train a language model and measure it on the split that the context names.

    Args:
        model: From tokens to logits; trained in place.
        seed: Order of the batches.
        budget: Gives steps, batch, and how many held-out windows are read.
        ctx: Gives split, corpus and progress.
        lr: Peak learning rate of AdamW.
        warmup: Share of the steps with a rising learning rate; a cosine follows.
        clip: Largest gradient norm, None for no clipping.
        callbacks: As for `setpoint.train.train`.

    Raises:
        Diverged: The loss stopped being finite, or the held-out loss is worse than that of a uniform guess.
    """
    text = corpus(budget["context"], ctx.data)
    try:
        history = train(
            model,
            text.batches("train", budget["batch"], seed=seed),
            data.next_token_loss,
            steps=budget["steps"],
            optimizer=AdamW(lr=lr),
            schedule=Cosine(warmup=warmup),
            clip=clip,
            accelerator=torch.device(ctx.device).type,
            seed=seed,
            evaluate=text.batches(ctx.split, 64, limit=budget["held_out"]),
            callbacks=callbacks,
            progress=ctx.progress,
        )
    except NonFiniteLoss as error:
        raise Diverged(str(error)) from error
    loss, guess = history.final["loss"], log(text.vocab_size)
    if not loss <= guess:
        raise Diverged(f"the held-out loss is {loss:.3f} nats, a uniform guess has {guess:.3f}")
    return Learned(model, history, loss)


def conditions(budget: Budget) -> dict[str, float | int | str]:
    """What is the same in every arm."""
    return {
        name: budget.options[name] for name in ("steps", "batch", "context", "depth", "dim") if name in budget.options
    }


def stream(model: nn.Module, budget: Budget, ctx: Context) -> list[float]:
    """Variance of the residual stream on held-out text: after the embedding, then after each block."""
    batches = list(corpus(budget["context"], ctx.data).batches("valid", 16, limit=16))
    trace = record(model, batches, needs=MEASURED, forward=data.run_inputs)
    sites = [r for r in trace.records.values() if r.site.role in MEASURED]
    return [float(r.variance or 0.0) for r in sorted(sites, key=lambda r: -1 if r.site.block is None else r.site.block)]


def largest_rate(
    rates: Sequence[float], budget: Budget, ctx: Context, run: Callable[[float, int], float]
) -> tuple[dict[str, float], Series]:
    """Train once at each learning rate and see which of them work.

    Args:
        rates: Rising learning rates.
        budget: Gives the context.
        ctx: Gives the corpus.
        run: ``run(rate, index)`` gives a held-out loss, and may raise `Diverged`.

    Returns:
        ``rates_that_train``, ``largest_rate``, ``best_loss``, and ``mean_loss`` over all rates, where one that doesn't
        train counts as the bar it missed; and the held-out loss over the rate.
    """
    bar = unigram(budget["context"], ctx.data) - STUCK
    losses = []
    for index, rate in enumerate(rates):
        try:
            losses.append(run(rate, index))
        except Diverged:
            losses.append(float("inf"))
    trained = [rate for rate, loss in zip(rates, losses, strict=True) if loss < bar]
    worst = log(corpus(budget["context"], ctx.data).vocab_size)
    return (
        # Where no rate trains, the step below the smallest stands in: nothing that was tried can be smaller.
        {
            "rates_that_train": float(len(trained)),
            "largest_rate": max(trained, default=rates[0] * rates[0] / rates[1]),
            "best_loss": min(min(losses), worst),
            "mean_loss": sum(min(loss, bar) for loss in losses) / len(losses),
        },
        Series(
            "held-out loss (nats per byte) over learning rate",
            tuple(rates),
            tuple(loss if loss < worst else None for loss in losses),
        ),
    )


__all__ = [
    "DIVERGED",
    "SMOKE",
    "Learned",
    "conditions",
    "corpus",
    "largest_rate",
    "learn",
    "model_for",
    "sizes",
    "stream",
    "unigram",
    "version",
]
