"""What the training loop costs: `setpoint.train.train` beside a bare loop that makes the same steps.

Both train the same decoder on the same batches with the same optimizer, clipping and schedule. They take turns step by
step in one process: the bare steps run inside a callback of the loop, and the loop's own steps are timed from the end
of one callback to the start of the next, so that whatever else the machine does falls on both alike. A second bare
loop is the control: if its median is not within 2 % of the first, the ratio is not measurable here. Times are of the
process's CPU where one thread is used, since a busy machine disturbs them least, and of the wall beside it. What is
paid once (Fabric, the wrapping of the model) is given apart.

The aim: at most 1.03 x the bare loop.

    python benchmarks/train.py [--steps 120] [--preset 1M] [--batch 8] [--context 128] [--threads 1] [--no-clip]

With ``--no-clip`` neither loop clips; setpoint's still takes the norm of the gradient, to stop where it is not finite.
"""

from __future__ import annotations

import argparse
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch

from setpoint import data
from setpoint.models import Transformer, TransformerConfig
from setpoint.train import AdamW, Cosine, Run, train

AIM, TRUST, WARM = 1.03, 0.02, 10


class Clock:
    """Seconds of the process's CPU and of the wall, since it was last read."""

    def __init__(self) -> None:
        self.read()

    def read(self) -> tuple[float, float]:  # noqa: D102
        now = process_time(), perf_counter()
        then = getattr(self, "then", now)
        self.then = now
        return now[0] - then[0], now[1] - then[1]


class Bare:
    """The same steps, written out."""

    def __init__(self, model: torch.nn.Module, batches: Any, steps: int, clip: float | None) -> None:
        self.model, self.steps, self.step, self.clip = model.train(), steps, 0, clip
        self.batches = iter(batches)
        self.optimizer = AdamW(lr=1e-3).build(model)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.schedule = Cosine()

    def __call__(self) -> float:  # noqa: D102
        batch = next(self.batches)
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-3 * self.schedule(self.step, self.steps)
        self.optimizer.zero_grad()
        loss = data.next_token_loss(self.model(batch["tokens"]), batch)
        loss.backward()
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.step += 1
        return loss.item()


class TakeTurns:
    """A callback that lets two bare loops make a step after each step of the loop."""

    def __init__(self, first: Bare, second: Bare) -> None:
        self.loops = {"bare": first, "bare again": second}
        self.times: dict[str, list[tuple[float, float]]] = {"loop": [], **{name: [] for name in self.loops}}

    def on_start(self, _: Run) -> None:  # noqa: D102
        self.clock = Clock()

    def on_step(self, run: Run) -> None:  # noqa: D102
        self.times["loop"].append(self.clock.read())
        # The order changes, so that no loop always runs on the caches that the same other one left.
        order = list(self.loops) if run.step % 2 else list(self.loops)[::-1]
        for name in order:
            loss = self.loops[name]()
            self.times[name].append(self.clock.read())
            assert loss == run.loss, "the loops must make the same steps"
        self.clock.read()


def compare(arguments: argparse.Namespace) -> None:
    text = data.text("python-stdlib", context=arguments.context)
    config = TransformerConfig.preset(arguments.preset, vocab_size=text.vocab_size, context=arguments.context)

    clip = None if arguments.no_clip else 1.0

    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        return Transformer(config)

    def batches() -> Any:
        return text.batches("train", arguments.batch, seed=0)

    turns = TakeTurns(*(Bare(model(), batches(), arguments.steps, clip) for _ in range(2)))
    start = perf_counter()
    first: list[float] = []

    class Begin:
        def on_start(self, _: Run) -> None:
            first.append(perf_counter() - start)

    train(
        model(),
        batches(),
        data.next_token_loss,
        steps=arguments.steps,
        optimizer=AdamW(lr=1e-3),
        clip=clip,
        callbacks=[Begin(), turns],
        accelerator="cpu",
        progress=False,
    )
    print(f"{'':12} {'CPU ms':>9} {'wall ms':>9} {'x bare':>8}")
    medians = {name: [median(t[i] for t in times[WARM:]) * 1e3 for i in (0, 1)] for name, times in turns.times.items()}
    kind = 0 if arguments.threads == 1 else 1
    pairs = zip(turns.times["loop"][WARM:], turns.times["bare"][WARM:], turns.times["bare again"][WARM:], strict=True)
    ratios = sorted(2 * a[kind] / (b[kind] + c[kind]) for a, b, c in pairs)
    drift = medians["bare again"][kind] / medians["bare"][kind] - 1
    for name, (cpu, wall) in medians.items():
        ratio = f"{median(ratios):8.3f}" if name == "loop" else ""
        print(f"{name:12} {cpu:9.2f} {wall:9.2f} {ratio}")
    low, high = interval(ratios)
    print(f"loop / bare, median of {len(ratios)} pairs: {median(ratios):.3f} (95 % interval {low:.3f} to {high:.3f})")
    print(f"bare against bare {drift:+.1%}; paid once before the first step: {first[0]:.2f} s")
    if abs(drift) > TRUST:
        print(f"aim {AIM:.2f} x: not measurable here (bare against bare is outside ±{TRUST:.0%})")
    else:
        print(f"aim {AIM:.2f} x: {'reached' if median(ratios) <= AIM else 'missed'}")


def interval(ordered: list[float]) -> tuple[float, float]:
    """95 % interval of the median of sorted values, from the binomial distribution."""
    n = len(ordered)
    half = 0.98 * n**0.5
    return ordered[max(0, int(n / 2 - half))], ordered[min(n - 1, int(n / 2 + half) + 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--preset", default="1M")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-clip", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"decoder {arguments.preset}, batch {arguments.batch} x {arguments.context}, {arguments.threads} threads")
    compare(arguments)


if __name__ == "__main__":
    main()
