"""What `fix(…, "pre-rmsnorm")` does to a GPT-2 of the small shape: logits, and inference time, both models compiled.

    python benchmarks/fix.py [--rounds 30] [--tokens 256] [--eager] [--layers 12]

The weights are drawn at random and shaken, since the shape decides the time and an identity does not depend on values.
Logits are compared in float32, as the largest difference over the largest logit. Times are taken in one run: each round
runs the old, the new and the old model again, and gives one ratio of the new to the mean of the old ones around it. The
ratio's interval is a bootstrap of the median over rounds. The old model against itself is the control: if the median of
that ratio is not within 2 % of 1, the figure is not measurable here.

Aims: logits within 1e-4; the upper end of the interval at most 1.02.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from setpoint import fix

LOGITS, TIME, TRUST = 1e-4, 1.02, 0.02


def gpt2_small(layers: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=layers, use_cache=False))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # gains away from 1 and biases away from 0, as trained models have them
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "wte" in name:
                parameter.add_(0.02)  # a table with a mean, so that centring has something to do
    return model.eval()


def bootstrap(ratios: list[float], draws: int = 2000) -> tuple[float, float]:
    """95 % interval of the median."""
    chance = random.Random(0)
    medians = sorted(median(chance.choices(ratios, k=len(ratios))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws)]


def timed(run: Callable[[], Any]) -> float:
    start = perf_counter()
    run()
    return perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--eager", action="store_true", help="Do not compile.")
    arguments = parser.parse_args()

    model = gpt2_small(arguments.layers)
    tokens = torch.randint(0, 50257, (arguments.batch, arguments.tokens))
    start = perf_counter()
    fixed = fix(model, "pre-rmsnorm", [tokens], timed=False)
    print(f"fixed in {perf_counter() - start:.1f} s; {fixed.change.parameters[0]:,} parameters, still tied: "
          f"{fixed.model.lm_head.weight is model.transformer.wte.weight}")  # fmt: skip
    with torch.inference_mode():
        old, new = (m(tokens).logits for m in (model, fixed.model))
        relative = float((new - old).abs().max() / old.abs().max())
        print(
            f"logits: {relative:.1e} relative in float32 (aim {LOGITS:.0e}: {'met' if relative < LOGITS else 'MISSED'})"
        )
        assert fixed.change.exact is not None
        print(f"in float64, made in float64: {fixed.change.exact[0]:.1e}")
        compare(model, fixed.model, tokens, arguments)


def compare(model: nn.Module, changed: nn.Module, tokens: Tensor, arguments: argparse.Namespace) -> None:
    before, after = (m if arguments.eager else torch.compile(m, dynamic=False) for m in (model, changed))
    for each in (before, after, before, after):
        each(tokens)
    rounds = [
        (timed(lambda: before(tokens)), timed(lambda: after(tokens)), timed(lambda: before(tokens)))
        for _ in range(arguments.rounds)
    ]
    ratios = [2 * new / (a + b) for a, new, b in rounds]
    control = median(b / a for a, _, b in rounds)
    low, high = bootstrap(ratios)
    how = "eager" if arguments.eager else "compiled"
    print(f"time ({how}, {arguments.batch} x {arguments.tokens} tokens, {torch.get_num_threads()} threads): "
          f"{1000 * median(a for a, _, _ in rounds):.1f} ms before")  # fmt: skip
    if abs(control - 1) > TRUST:
        print(f"ratio: not measurable here (the old model against itself: {control:.3f})")
        return
    met = "met" if high <= TIME else "MISSED"
    print(f"ratio: {median(ratios):.3f} [{low:.3f}, {high:.3f}], control {control:.3f} (aim {TIME}: {met})")


if __name__ == "__main__":
    main()
