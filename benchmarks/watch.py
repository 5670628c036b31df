"""What watching costs: a recorded step beside plain ones, and what that comes to at ``every=50``.

A decoder is trained by a bare loop under `setpoint.watch`; every fourth step is recorded, so that recorded and plain
steps alternate and whatever else the machine does falls on all alike. The cost of a recorded step over the plain ones
around it, divided by 50, is the overhead; it holds everything that a recorded step does: hooks, statistics, gradients,
probes, remedies, and the line that is written. Plain steps are their own control: the median of those before a
recorded step against those after must be within 2 %, else the figure is not measurable here. Times are of the
process's CPU where one thread is used, else of the wall. The first recording also reads the structure of the model; it
is paid once and given apart.

The aim: under 1 %.

    python benchmarks/watch.py [--steps 160] [--preset 1M] [--batch 8] [--context 128] [--threads 1]
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

import torch

from setpoint import data, watch
from setpoint.models import Transformer, TransformerConfig
from setpoint.train import AdamW

AIM, TRUST, WARM, EVERY = 0.01, 0.02, 8, 50


def steps(arguments: argparse.Namespace, folder: Path) -> tuple[list[float], list[float]]:
    """Seconds of each step: by the clock that the ratio is taken with, and by the wall."""
    text = data.text("python-stdlib", context=arguments.context)
    torch.manual_seed(0)
    config = TransformerConfig.preset(arguments.preset, vocab_size=text.vocab_size, context=arguments.context)
    model = Transformer(config).train()
    optimizer = AdamW(lr=1e-3).build(model)
    watcher = watch(model, every=4, on=folder / "run.jsonl")
    batches = iter(text.batches("train", arguments.batch, seed=0))
    clock = process_time if arguments.threads == 1 else perf_counter
    times, walls = [], []
    for _ in range(arguments.steps):
        batch = next(batches)
        start, wall = clock(), perf_counter()
        with watcher.step() as seen:
            optimizer.zero_grad()
            seen.loss = data.next_token_loss(model(batch["tokens"]), batch)
            seen.loss.backward()
            optimizer.step()
        times.append(clock() - start)
        walls.append(perf_counter() - wall)
    return times, walls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--preset", default="1M")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    logging.getLogger("setpoint.watch").setLevel(logging.ERROR)
    torch.set_num_threads(arguments.threads)
    print(f"decoder {arguments.preset}, batch {arguments.batch} x {arguments.context}, {arguments.threads} threads")
    with tempfile.TemporaryDirectory() as folder:
        times, walls = steps(arguments, Path(folder))
    places = range(WARM, arguments.steps - 2, 4)
    before, after = [times[i - 1] for i in places], [times[i + 2] for i in places]
    shares = sorted(2 * times[i] / (times[i - 1] + times[i + 2]) - 1 for i in places)
    drift = median(after) / median(before) - 1
    middle, n = median(shares) / EVERY, len(shares)
    low, high = shares[max(0, int(n / 2 - 0.98 * n**0.5))], shares[min(n - 1, int(n / 2 + 0.98 * n**0.5) + 1)]
    print(f"plain {median(before) * 1e3:.2f} ms, recorded {median(times[i] for i in places) * 1e3:.2f} ms")
    print(f"the first recording, with the reading of the structure: {walls[0]:.2f} s (wall)")
    print(f"at every={EVERY}: {middle:.2%} (95 % interval {low / EVERY:.2%} to {high / EVERY:.2%}, {n} recorded steps)")
    print(f"plain against plain {drift:+.1%}")
    if abs(drift) > TRUST:
        print(f"aim under {AIM:.0%}: not measurable here (plain against plain is outside ±{TRUST:.0%})")
    else:
        print(f"aim under {AIM:.0%}: {'reached' if middle < AIM else 'missed'}")


if __name__ == "__main__":
    main()
