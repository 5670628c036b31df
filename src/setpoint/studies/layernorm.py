"""Layer normalization in recurrent networks, where batch statistics can't be had naturally.

The plain LSTM is the normalized one with its three norms taken out: the same weights, the same start, the same gates.
A step of the normalized cell costs more, so the cost is reported beside the gain per step. The second study takes the
reason itself: how much the gradient at the first of a hundred steps depends on the scale of the recurrent weights. The
norm stands on the recurrent product there, as in the paper's LSTM; over the sum with the input, whose scale stays, it
takes little of that dependence away (42 decades are left of 48).

Reference: Ba, Kiros and Hinton, 2016, "Layer Normalization", arXiv 1607.06450.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import log10
from typing import Any

import torch
from torch import Tensor, nn

from setpoint.nn import LNLSTM, LayerNorm
from setpoint.studies import Arm, Better, Budget, Claim, Context, Outcome, Tuning, study
from setpoint.studies import _language as language
from setpoint.types import Series


class Recurrent(nn.Module):
    """Bytes to logits through one LSTM."""

    def __init__(self, vocab_size: int, dim: int, norm: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        self.lstm = LNLSTM(dim, dim, batch_first=True, norm_layer=norm)
        self.head = nn.Linear(dim, vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(batch, tokens, vocab)``."""
        hidden, _ = self.lstm(self.embedding(tokens))
        logits: Tensor = self.head(hidden)
        return logits


LSTM = {"dim": 128, "context": 40, "batch": 32, "held_out": 512}


@study(
    "Does an LSTM learn in fewer steps with layer normalization?",
    arms=(
        Arm("lstm", "the same cell without its norms", {"norm": nn.Identity}),
        Arm("ln-lstm", "norms on both products and on the cell's way out", {"norm": LayerNorm}),
    ),
    claims=(
        Claim(
            "Each at its best learning rate, the training loss around step 190 of 400 is lower by 3 % or more.",
            Better(0.03),
            "halfway",
            "ln-lstm",
            "lstm",
            scale="ratio",
            diverged=language.DIVERGED,
        ),
        Claim(
            "Each at its best learning rate, the held-out loss at the end is lower by 1 % or more.",
            Better(0.01),
            "loss",
            "ln-lstm",
            "lstm",
            scale="ratio",
            diverged=language.DIVERGED,
        ),
    ),
    tuning=Tuning({"lr": (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 4e-2)}, metric="loss", seeds=2),
    budgets={
        "smoke": Budget(2, 0.3, {"steps": 6, "dim": 16, "context": 12, "batch": 4, "held_out": 8}),
        "laptop": Budget(6, 9, {"steps": 400, **LSTM}),
        "full": Budget(10, 120, {"steps": 4000, "dim": 512, "context": 128, "batch": 64, "held_out": 2048}),
    },
    data=(language.SOURCE,),
    data_version=language.version,
    takes_data=True,
)
def lstm(arm: Arm, setting: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
    """One training run."""
    torch.manual_seed(seed)
    model = Recurrent(language.corpus(budget["context"], ctx.data).vocab_size, budget["dim"], arm["norm"])
    learned = language.learn(model.to(ctx.device), seed, budget, ctx, lr=setting["lr"])
    losses = learned.history.losses
    middle = losses[len(losses) * 9 // 20 : len(losses) // 2]
    return Outcome(
        {"loss": learned.loss, "halfway": sum(middle) / len(middle)}
        if middle
        else {"loss": learned.loss, "halfway": 0.0},
        curves=(learned.curve(),),
        cost=learned.cost,
        conditions=language.conditions(budget),
    )


def first_gradient(norm: nn.Module, scale: float, steps: int, width: int, seed: int) -> float:
    """Norm of the gradient of the last hidden state's mean square at the first input of a tanh network."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(width, width, generator=generator, dtype=torch.float64) * scale / width**0.5
    inputs = torch.randn(steps, width, generator=generator, dtype=torch.float64)
    first = inputs[0].clone().requires_grad_()
    hidden = torch.zeros(width, dtype=torch.float64)
    for step in range(steps):
        hidden = torch.tanh(norm(weight @ hidden) + (first if step == 0 else inputs[step]))
    (gradient,) = torch.autograd.grad(hidden.square().mean(), first)
    return float(gradient.norm())


@study(
    "Does it make the gradient of a recurrent network independent of the scale of its weights?",
    arms=(
        Arm("rnn", "tanh network of 64 units", {"norm": False}),
        Arm("ln-rnn", "the same, its recurrent product normalized at each step", {"norm": True}),
    ),
    claims=(
        Claim(
            "Over recurrent weights of scale 0.5, 1 and 2 the gradient at the first step spreads by fewer decades, "
            "two or more.",
            Better(2.0),
            "decades",
            "ln-rnn",
            "rnn",
            unit="decades",
        ),
    ),
    budgets={
        "smoke": Budget(2, 0.1, {"length": 10, "width": 16}),
        "laptop": Budget(20, 1, {"length": 100, "width": 64}),
        "full": Budget(100, 5, {"length": 100, "width": 64}),
    },
)
def gradient_range(arm: Arm, _: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
    """Gradients at three scales of the weights."""
    width, scales = budget["width"], (0.5, 1.0, 2.0)
    norm = nn.LayerNorm(width, dtype=torch.float64) if arm["norm"] else nn.Identity()
    norms = [max(first_gradient(norm, scale, budget["length"], width, seed), 1e-300) for scale in scales]
    decades = tuple(log10(value) for value in norms)
    ctx.progress(len(scales), len(scales), "gradients")
    return Outcome(
        {"decades": max(decades) - min(decades)},
        curves=(Series("gradient at the first step (log10) over weight scale", scales, decades),),
        conditions={"length": budget["length"], "width": width},
    )
