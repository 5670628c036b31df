"""Two processes that record halves of the data report what one process that saw all of it would."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")

SCRIPT = '''
import json, sys
import torch
import torch.distributed as dist
from torch import nn
from setpoint.probe import CHEAP, Recorder, record
from setpoint.types import Site, Stat, Tap

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 4)
    def forward(self, x):
        x = self.embed(x)
        x = x + self.attention(x, x, x)[0]
        return self.head(x)

SITES = [
    Site("embed", "embedding", Tap("embed", "output")),
    Site("attention", "attention", Tap("attention", "output"), 0),
    Site("stream", "residual", Tap("head", "input"), 0),
    Site("head", "logits", Tap("head", "output")),
]

def loss(output, batch):
    return output.square().mean()

def recorded(rank, world):
    torch.manual_seed(0)
    model, data = Model(), torch.randn(4, 2, 6, 8)
    trace = record(model, list(data[rank * 4 // world : (rank + 1) * 4 // world]), sites=SITES, loss=loss)
    stream, attention = trace.records["stream"], trace.attention["attention"]
    return {
        "tokens": trace.tokens, "sequences": trace.sequences, "count": stream.count, "loss": trace.loss,
        "moments": [stream.mean, stream.variance, stream.fourth_moment, stream.minimum, stream.maximum],
        "median": stream.median, "cosine": stream.cosine, "angle": stream.angle, "gradient": stream.gradient_rms,
        "peaks": [[p.value, p.sequence, p.token, p.channel] for p in stream.peaks],
        "rms": stream.channel_rms.tolist(), "largest": stream.channel_max.tolist(),
        "entropy": attention.entropy.tolist(), "queries": attention.queries,
    }

def looped(rank, world):
    """A loop of one's own under DDP; alone, each batch is what the two processes see together."""
    torch.manual_seed(0)
    model, data = Model(), torch.randn(4, 2, 6, 8)
    wrapped = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    batches = list(data[rank::2]) if world > 1 else [data[:2].flatten(0, 1), data[2:].flatten(0, 1)]
    with Recorder(wrapped, SITES, needs={**CHEAP, "residual": {Stat.MOMENTS, Stat.GRADIENT}}) as recorder:
        for batch in batches:
            loss(wrapped(batch), batch).backward()
            wrapped.zero_grad()
    trace = recorder.trace()
    return {"tokens": trace.tokens, "norms": {n: p.gradient_norm for n, p in trace.parameters.items()}}

def main(rank, world):
    return {"recorded": recorded(rank, world), "looped": looped(rank, world)}

if __name__ == "__main__":
    rank, world, meeting, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    dist.init_process_group("gloo", init_method="file://" + meeting, rank=rank, world_size=world)
    found = main(rank, world)
    if rank == 0:
        json.dump(found, open(out, "w"))
    dist.barrier()
    dist.destroy_process_group()
'''


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """What one process finds, and what the first of two finds."""
    folder = tmp_path_factory.mktemp("distributed")
    script, out = folder / "script.py", folder / "out.json"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), "2", str(folder / "meeting"), str(out)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    alone = runpy.run_path(str(script))["main"](0, 1)
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    return alone, json.loads(out.read_text())


def assert_alike(one: Any, two: Any, place: str = "") -> None:
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for name in one:
            assert_alike(one[name], two[name], f"{place}.{name}")
    elif isinstance(one, list):
        assert len(one) == len(two)
        for i, (a, b) in enumerate(zip(one, two, strict=True)):
            assert_alike(a, b, f"{place}[{i}]")
    else:
        assert one == pytest.approx(two, rel=1e-4), place


@pytest.mark.parametrize("part", ["recorded", "looped"])
def test_two_processes_report_what_one_would(results: tuple[dict[str, Any], dict[str, Any]], part: str) -> None:
    alone, together = results
    assert_alike(alone[part], together[part])
