"""What recording costs: a plain forward pass, the same again, recorded, and with every activation cached.

The four take turns in one process, so that whatever else the machine does falls on all alike. The second plain pass
is the control: if its median is not within 2 % of the first, the ratios say nothing and are given as not measurable
here. Beside them what does not depend on the machine: bytes moved and calls made per site.

Memory is given twice. *Tensors* is the most that torch's allocator had handed out at once during the pass, from its
own log: the same in every run, and what the aim is judged by. *Resident* is the highest resident size of a process of
its own, counted from just before the pass; it also moves by tens of megabytes with what the system had taken out of
memory before (pages of the weights and of the libraries come back during the pass).

The aim, for SmolLM2-135M at 1 × 512 tokens with all cheap statistics on: at most 1.10 × the plain pass and less than
64 MB more memory. The cache is what TransformerLens' ``run_with_cache`` does: a hook on every module that keeps its
output; with transformer-lens installed, that is timed too, on its own model.

    python benchmarks/recorder.py [--rounds 9] [--tokens 512] [--threads 2] [--sites]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from setpoint.loading import batches_for, load
from setpoint.probe import Recorder, registry
from setpoint.probe.recorder_attention import attention_rows
from setpoint.probe.stat_observe import Later, Stream, observe, settle_all
from setpoint.probe.stat_scratch import Scratch
from setpoint.probe.statistics import Peaks, SiteStatistics
from setpoint.surgery import Anatomy
from setpoint.types import Loaded, Site, Stat

AIM, AIM_MEGABYTES, TRUST = 1.10, 64, 0.02
MEGA = 1 << 20
NEEDS = registry.needs(registry.probes_for())
"""What `setpoint check` records: the statistics that all probes together read."""

# Reads and writes of a site's values (in float32) for each statistic, beyond what others at the site need anyway.
MOVES = {Stat.MOMENTS: 3, Stat.TAILS: 3, Stat.MEDIAN: 1, Stat.CHANNELS: 3, Stat.ZEROS: 1, Stat.COSINE: 2, Stat.STEP: 6}


class Cache:
    """Keeps the output of every module, detached, for as long as it is entered."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.kept, self.handles = model, {}, []  # type: ignore[var-annotated]

    def __enter__(self) -> Cache:
        for name, module in self.model.named_modules():
            self.handles.append(module.register_forward_hook(self._keep(name)))
        return self

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                self.kept[name] = output.detach()
            elif isinstance(output, tuple):
                self.kept[name] = [t.detach() for t in output if isinstance(t, Tensor)]

        return hook

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    @property
    def bytes(self) -> int:
        """Bytes of the outputs it holds, each storage once."""
        tensors = [t for kept in self.kept.values() for t in (kept if isinstance(kept, list) else [kept])]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())


def variants(loaded: Loaded, batch: Any, sites: tuple[Site, ...]) -> dict[str, Callable[[], Any]]:
    def plain() -> None:
        loaded.forward(loaded.model, batch)

    def recorded() -> Recorder:
        with Recorder(loaded.model, sites, needs=NEEDS) as recorder:
            loaded.forward(loaded.model, batch)
        return recorder

    def cached() -> Cache:
        with Cache(loaded.model) as cache:
            loaded.forward(loaded.model, batch)
        return cache

    return {"plain": plain, "plain again": plain, "recorded": recorded, "all cached": cached}


def peak_resident() -> int:
    """Highest resident size since the last reset, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def prepare(tokens: int) -> tuple[Loaded, Any, tuple[Site, ...]]:
    loaded = load("smollm2")
    (batch,) = batches_for(loaded, tokens=tokens, count=1)
    sites = Anatomy.trace(loaded.model, batch, forward=loaded.forward).sites()
    return loaded, batch, sites


def tensors_at_peak(run: Callable[[], Any]) -> float:
    """Megabytes of tensors that a run holds at once at its peak, beyond those that stood before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        kept = run()
    results = watched.profiler.kineto_results
    changes = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    del kept
    return max(accumulate((size for _, size in changes), initial=0)) / MEGA


def memory_of(name: str, tokens: int) -> None:
    """Run in a process of its own: how far one pass raises the resident size above where it stood."""
    loaded, batch, sites = prepare(tokens)
    run = variants(loaded, batch, sites)
    run["plain"]()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what loading left in the allocator's hands would hide new memory
    reset_peak()
    before = peak_resident()
    kept = run[name]()
    print(peak_resident() - before)
    del kept


def memory(name: str, arguments: argparse.Namespace) -> float | None:
    """Megabytes, or None where the system can't tell."""
    command = [sys.executable, __file__, "--memory-of", name, "--tokens", str(arguments.tokens)]
    done = subprocess.run([*command, "--threads", str(arguments.threads)], capture_output=True, text=True, check=False)
    return int(done.stdout.split()[-1]) / MEGA if done.returncode == 0 else None


def timed(run: Callable[[], Any]) -> float:
    start = perf_counter()
    run()
    return perf_counter() - start


def best(run: Callable[[], Any], repeats: int = 50) -> float:
    """Microseconds of the quickest of many repeats."""
    return min(timed(run) for _ in range(repeats)) * 1e6


def per_site(loaded: Loaded, batch: Any, sites: tuple[Site, ...]) -> None:
    """Bytes moved and microseconds for one site of each role, alone and warm."""
    recorder = Recorder(loaded.model, sites, needs=NEEDS)
    with recorder, torch.no_grad():
        loaded.forward(loaded.model, batch)
    widths = {}
    for record in recorder.trace().records.values():
        widths[record.site.role] = (record.tokens, record.count // record.tokens)
    counts = Counter(site.role for site in sites if NEEDS.get(site.role))
    print(f"\n{'role':12} {'sites':>5} {'values':>16} {'moved/site':>11} {'us/site':>8} {'ms in all':>10}")
    scratch = Scratch()
    for role, (tokens, width) in widths.items():
        values, before = torch.randn(tokens, width), torch.randn(tokens, width)
        statistics = SiteStatistics(NEEDS[role], Peaks(8))
        stream = Stream(before, before.square().sum(1)) if role == "residual" else None

        def once(v: Tensor = values, s: SiteStatistics = statistics, b: Stream | None = stream) -> None:
            later: Later = []
            observe(v, len(v), s, scratch, stream=b, later=later)
            settle_all(later, scratch)

        cost = best(once)
        moved = sum(MOVES.get(stat, 0) for stat in NEEDS[role]) * values.nbytes / MEGA
        total = cost * counts[role] / 1e3
        shape = f"{tokens} x {width}"
        print(f"{role:12} {counts[role]:5} {shape:>16} {moved:8.1f} MB {cost:8.0f} {total:10.1f}")
    config = loaded.model.config
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q, k = torch.randn(1, heads, tokens, head_dim), torch.randn(1, kv_heads, tokens, head_dim)
    cost = best(lambda: attention_rows(q, k, causal=True, rows=32))
    logits = 32 * heads * tokens * 4 * 13 / MEGA
    shape = f"{heads} x 32 x {tokens}"
    total = cost * counts["attention"] / 1e3
    print(f"{'attention':12} {counts['attention']:5} {shape:>16} {logits:8.1f} MB {cost:8.0f} {total:10.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--sites", action="store_true", help="only the cost of each kind of site")
    parser.add_argument("--memory-of", metavar="VARIANT", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    if arguments.memory_of:
        memory_of(arguments.memory_of, arguments.tokens)
        return

    loaded, batch, sites = prepare(arguments.tokens)
    print(f"SmolLM2-135M, 1 x {arguments.tokens} tokens, {arguments.threads} threads, {len(sites)} sites")
    if not arguments.sites:
        compare(loaded, batch, sites, arguments)
    per_site(loaded, batch, sites)


def compare(loaded: Loaded, batch: Any, sites: tuple[Site, ...], arguments: argparse.Namespace) -> None:
    runs = variants(loaded, batch, sites)
    lens = transformer_lens(arguments.tokens)
    runs.update(lens)
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(max(7, arguments.rounds)):
        for name, run in runs.items():
            gc.collect()  # so that nobody pays for what an earlier run left behind
            times[name].append(timed(run))
    medians = {name: median(found) for name, found in times.items()}
    base = median([*times["plain"], *times["plain again"]])
    drift = medians["plain again"] / medians["plain"] - 1
    trusted = abs(drift) <= TRUST
    held = runs["all cached"]().bytes / MEGA
    tensors = {name: tensors_at_peak(run) for name, run in runs.items() if name not in lens}
    print(f"\n{'':24} {'median s':>9} {'x plain':>8} {'tensors MB':>10} {'resident MB':>11}")
    for name, found in medians.items():
        ratio = f"{found / base:8.3f}" if trusted and name not in lens else ""
        peak = memory(name, arguments) if name not in lens and name != "plain again" else None
        most = f"{tensors[name]:10.1f}" if name in tensors else ""
        print(f"{name:24} {found:9.3f} {ratio:>8} {most:>10} {'' if peak is None else f'{peak:11.1f}'}")
    print(f"plain against plain {drift:+.1%}; the cache holds {held:.0f} MB of outputs")
    if lens:
        print(f"transformer-lens: caching is {medians['lens cached'] / medians['lens plain']:.3f} x its own plain pass")
    if trusted:
        reached = "reached" if medians["recorded"] / base <= AIM else "missed"
        print(f"aim {AIM:.2f} x: {reached}")
    else:
        print(f"ratios: not measurable here (plain against plain is outside ±{TRUST:.0%})")
    more = tensors["recorded"] - tensors["plain"]
    reached = "reached" if more < AIM_MEGABYTES else "missed"
    print(f"aim for memory, less than {AIM_MEGABYTES} MB more than plain: {more:.1f} MB more, {reached}")


def transformer_lens(tokens: int) -> dict[str, Callable[[], Any]]:
    """TransformerLens' own plain pass and its run_with_cache, on a network of the same shape; empty if absent."""
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError:
        return {}
    config = HookedTransformerConfig(
        n_layers=30, d_model=576, n_heads=9, n_key_value_heads=3, d_head=64, d_mlp=1536, n_ctx=2048, d_vocab=49152,
        act_fn="silu", gated_mlp=True, normalization_type="RMS", positional_embedding_type="rotary", rotary_dim=64,
    )  # fmt: skip
    model, ids = HookedTransformer(config), torch.randint(0, 49152, (1, tokens))
    return {"lens plain": lambda: model(ids), "lens cached": lambda: model.run_with_cache(ids)}


if __name__ == "__main__":
    main()
