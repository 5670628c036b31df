"""Layer normalization in recurrent networks, where batch statistics can't be had naturally.

The plain LSTM is the normalized one with its three norms taken out: the same weights, the same start, the same gates.
A step of the normalized cell costs more, so the cost is reported beside the gain per step.

The second study takes the paper's reason: the summed inputs of a recurrent network grow or shrink from step to step,
and with them the gradient; normalized, they can be scaled as one likes. It measures over how many decades the gradient
at the first of a hundred steps spreads when weights are scaled, with the norm where the paper has it, on the sum
``W_hh h + W_xh x``. That takes the scale out of *all* weights together, as the paper says, but not that of the
recurrent ones alone, beside which the input's share of the sum changes; a norm on the recurrent product by itself,
as in the paper's LSTM, is the third arm.

Reference: Ba, Kiros and Hinton, 2016, "Layer Normalization", arXiv 1607.06450.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import log10
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from setpoint.nn import LNLSTM, LayerNorm
from setpoint.studies import Arm, Better, Budget, Claim, Context, Equal, Outcome, Tuning, study
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
    tuning=Tuning({"lr": (5e-3, 1e-2, 2e-2, 4e-2, 8e-2)}, metric="loss", seeds=2),
    budgets={
        "smoke": Budget(2, 0.3, {"steps": 20, "dim": 16, "context": 12, "batch": 4, "held_out": 8}),
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
    middle = losses[len(losses) * 9 // 20 : len(losses) // 2]  # the last twentieth of the first half
    return Outcome(
        {"loss": learned.loss, "halfway": mean(middle)},
        curves=(learned.curve(),),
        cost=learned.cost,
        conditions=language.conditions(budget),
    )


SCALES = (0.5, 1.0, 2.0)


def first_gradient(place: str, recurrent: float, inward: float, steps: int, width: int, seed: int) -> float:
    """Size, as log10, of the gradient of the last hidden state's mean square at the first input of a tanh network.

    Args:
        place: What is normalized: ``"nothing"``, ``"sum"`` of the two products, or the ``"recurrent"`` product.
        recurrent, inward: Scales of the weights from hidden state and from input.
        steps: Length of the sequence.
        width: Width of input and hidden state.
        seed: Of weights and inputs.
    """
    generator = torch.Generator().manual_seed(seed)
    w_hh, w_xh = torch.randn(2, width, width, generator=generator, dtype=torch.float64) / width**0.5
    inputs = torch.randn(steps, width, generator=generator, dtype=torch.float64)
    normalized = nn.LayerNorm(width, dtype=torch.float64)
    first = inputs[0].clone().requires_grad_()
    hidden = torch.zeros(width, dtype=torch.float64)
    for x in (first, *inputs[1:]):
        from_hidden, from_input = recurrent * w_hh @ hidden, inward * w_xh @ x
        if place == "recurrent":
            from_hidden = normalized(from_hidden)
        summed = from_hidden + from_input
        hidden = torch.tanh(normalized(summed) if place == "sum" else summed)
    (gradient,) = torch.autograd.grad(hidden.square().mean(), first)
    return log10(max(float(gradient.norm()), 1e-300))


@study(
    "Does it make the gradient of a recurrent network independent of the scale of its weights?",
    arms=(
        Arm("rnn", "tanh network of 64 units", {"norm": "nothing"}),
        Arm("ln-rnn", "the same, the sum of its two products normalized at each step", {"norm": "sum"}),
        Arm("ln-recurrent", "the same, only its recurrent product normalized", {"norm": "recurrent"}),
    ),
    claims=(
        Claim(
            "With all weights at scales 0.5, 1 and 2 the gradient at the first step stays within a decade.",
            Equal(1.0),
            "decades_all",
            "ln-rnn",
            unit="decades",
            control="rnn",
        ),
        Claim(
            "With the recurrent weights alone at these scales it spreads by fewer decades, two or more.",
            Better(2.0),
            "decades_recurrent",
            "ln-rnn",
            "rnn",
            unit="decades",
        ),
        Claim(
            "With the recurrent weights alone at these scales it stays within a decade.",
            Equal(1.0),
            "decades_recurrent",
            "ln-rnn",
            unit="decades",
            control="rnn",
        ),
        Claim(
            "With the recurrent weights alone at these scales and their product normalized it stays within a decade.",
            Equal(1.0),
            "decades_recurrent",
            "ln-recurrent",
            unit="decades",
            control="rnn",
        ),
    ),
    budgets={
        "smoke": Budget(2, 0.1, {"length": 10, "width": 16}),
        "laptop": Budget(20, 1, {"length": 100, "width": 64}),
        "full": Budget(100, 5, {"length": 100, "width": 64}),
    },
)
def gradient_range(arm: Arm, _: Mapping[str, Any], seed: int, budget: Budget, ctx: Context) -> Outcome:
    """Gradients with all weights scaled, and with the recurrent ones scaled."""
    length, width = budget["length"], budget["width"]
    together = tuple(first_gradient(arm["norm"], scale, scale, length, width, seed) for scale in SCALES)
    ctx.progress(1, 2, "all weights scaled")
    alone = tuple(first_gradient(arm["norm"], scale, 1.0, length, width, seed) for scale in SCALES)
    ctx.progress(2, 2, "recurrent weights scaled")
    return Outcome(
        {
            "decades_all": max(together) - min(together),
            "decades_recurrent": max(alone) - min(alone),
        },
        curves=(
            Series("gradient at the first step (log10) over scale of all weights", SCALES, together),
            Series("gradient at the first step (log10) over scale of the recurrent weights", SCALES, alone),
        ),
        conditions={"length": length, "width": width},
    )
