"""What norms cost, forward and backward, beside copying the bytes that they must move.

A norm with its backward reads its input and writes its output, then reads input and gradient and writes a gradient:
five passes. The baseline does just that, ``a.copy_(x)`` and ``torch.add(x, g, out=c)``, into memory that is there. All
variants take turns in one process, so that whatever else the machine does falls on all alike. The baseline runs twice a
round; if its two medians are not within 2 %, the ratios say nothing, and are given as not measurable here. With
``--clock cpu`` processor time of all threads is counted, which a busy machine disturbs less (least with one thread).
The layers take new memory for their results and the copy does not; to leave out what the system asks for that, start
with ``MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000``.

The aim, at 4096 x 1024 in float32 on two cores: 1.3 x the copy, and never slower than torch's own layer or a peer's.
x-transformers is timed where it is installed.

    python benchmarks/norms.py [--rounds 25] [--threads 2] [--rows 4096] [--width 1024] [--clock wall|cpu] [--profile]
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from statistics import median
from time import perf_counter, process_time

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from setpoint.nn import CRMSNorm, DyT, LayerNorm, RMSNorm

AIM, TRUST = 1.3, 0.02
COPY, CONTROL = "copy, five passes", "copy (again)"


def copying(x: Tensor, gradient: Tensor) -> Callable[[], None]:
    out, back = torch.empty_like(x), torch.empty_like(x)

    def run() -> None:
        out.copy_(x)
        torch.add(x, gradient, out=back)

    return run


def training(
    layer: Callable[[Tensor], Tensor], parameters: list[Tensor], x: Tensor, gradient: Tensor
) -> Callable[[], None]:
    wanted = [x, *parameters]

    def run() -> None:
        torch.autograd.grad(layer(x), wanted, gradient)

    return run


def layers(width: int) -> dict[str, dict[str, nn.Module]]:
    """Family -> who -> layer; the family's first entry is setpoint's."""
    found: dict[str, dict[str, nn.Module]] = {
        "LayerNorm": {"setpoint": LayerNorm(width), "torch": nn.LayerNorm(width)},
        "RMSNorm": {"setpoint": RMSNorm(width), "torch": nn.RMSNorm(width, eps=1e-5)},
        "CRMSNorm": {"setpoint": CRMSNorm(width)},
        "DyT": {"setpoint": DyT(width)},
    }
    if find_spec("x_transformers"):
        peer = import_module("x_transformers.x_transformers")
        found["LayerNorm"]["x-transformers"] = peer.LayerNorm(width)
        found["RMSNorm"]["x-transformers"] = peer.RMSNorm(width)
        found["DyT"]["x-transformers"] = peer.DynamicTanh(width)
    return found


def variants(width: int, x: Tensor, gradient: Tensor) -> dict[tuple[str, str, str], Callable[[], None]]:
    """(family, who, eager or compiled) -> one forward and backward."""
    made = {}
    for family, by in layers(width).items():
        for who, layer in by.items():
            parameters = list(layer.parameters())
            compiled = torch.compile(layer, fullgraph=True, dynamic=False)
            made[family, who, "eager"] = training(layer, parameters, x, gradient)
            made[family, who, "compiled"] = training(compiled, parameters, x, gradient)
    return made


def spread(taken: list[float]) -> str:
    low, high = sorted(taken)[len(taken) // 4], sorted(taken)[-1 - len(taken) // 4]
    return f"{low * 1e3:6.1f} .. {high * 1e3:<6.1f}"


def main() -> None:
    """Print medians, ratios to the copy, and whether the aims are met."""
    parser = argparse.ArgumentParser(description="What norms cost beside copying the bytes that they must move.")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--profile", action="store_true", help="also say where the time of setpoint's layers goes")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    clock = {"wall": perf_counter, "cpu": process_time}[arguments.clock]
    x = torch.randn(arguments.rows, arguments.width, requires_grad=True)
    gradient = torch.randn(arguments.rows, arguments.width)
    copy = copying(x.detach(), gradient)
    runs: dict[tuple[str, ...], Callable[[], None]] = {(COPY,): copy, **variants(arguments.width, x, gradient)}
    runs[(CONTROL,)] = copy
    for run in runs.values():
        run()
        run()
    gc.disable()
    times: dict[tuple[str, ...], list[float]] = {name: [] for name in runs}
    for turn in range(arguments.rounds):
        order = list(runs.items())
        for name, run in order if turn % 2 else reversed(order):  # who follows whom changes from round to round
            start = clock()
            run()
            times[name].append(clock() - start)
    report(times, arguments)
    if arguments.profile:
        for name, run in runs.items():
            if "setpoint" in name:
                profiled(" ".join(name), run)


def report(times: dict[tuple[str, ...], list[float]], arguments: argparse.Namespace) -> None:
    middle = {name: median(taken) for name, taken in times.items()}
    drift = middle[(CONTROL,)] / middle[(COPY,)] - 1
    base = (middle[(CONTROL,)] + middle[(COPY,)]) / 2
    print(
        f"{arguments.rows} x {arguments.width} float32, {arguments.threads} threads, {arguments.rounds} rounds, "
        f"{arguments.clock} time, torch {torch.__version__}"
    )
    print(f"{'':48s}{'median ms':>10s}  {'middle half':17s}{'x copy':>7s}")
    for name, taken in times.items():
        ratio = middle[name] / base
        words = "  ".join(f"{part:14s}" for part in name)
        print(f"{words:48s}{middle[name] * 1e3:10.2f}  {spread(taken):17s}{ratio:7.2f}")
    print(f"control: the copy differs from itself by {drift:+.1%}")
    if abs(drift) > TRUST:
        print(f"not measurable here: the control has to be within {TRUST:.0%}; run again on a quieter machine")
        return
    for family in dict.fromkeys(name[0] for name in times if len(name) == 3):
        for how in ("eager", "compiled"):
            own = middle[family, "setpoint", how]
            others = {n[1]: m for n, m in middle.items() if n[0] == family and n[-1] == how and n[1] != "setpoint"}
            verdict = "met" if own <= AIM * base else "missed"
            line = f"{family} {how}: {own / base:.2f} x the copy, aim {AIM}: {verdict}"
            if others:
                best = min(others, key=others.__getitem__)
                line += f"; {own / others[best]:.2f} x the best other ({best})"
            print(line)


def profiled(name: str, run: Callable[[], None]) -> None:
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(5):
            run()
    rows = sorted(seen.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in rows)
    print(f"\n{name}: {total / 5e3:.2f} ms")
    for row in rows[:6]:
        print(f"  {row.self_cpu_time_total / total:5.0%}  {row.self_cpu_time_total / 5e3:6.2f} ms  {row.key[:70]}")


if __name__ == "__main__":
    main()
