"""A small network, its data, and a training run of both; tests import it and start it as a script.

python course.py FOLDER STEPS STRATEGY ACCUMULATE [KILL_AT]
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from setpoint.data import Batches, next_token_loss
from setpoint.train import AdamW, Checkpoint, Cosine, History, train


class Net(nn.Module):
    """An embedding, residual blocks with a norm and dropout, a head."""

    def __init__(self, width: int = 8, dropout: float = 0.2) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.GELU(), nn.Dropout(dropout))
            for _ in range(2)
        )
        self.head = nn.Linear(width, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def net(dropout: float = 0.2) -> Net:
    torch.manual_seed(7)
    return Net(dropout=dropout)


def batches(batch_size: int = 4) -> Batches[dict[str, Tensor]]:
    """Sequences that count upwards in steps of 1 to 4, so that the next token can be learned."""
    starts = torch.arange(44)
    tokens = (starts[:, None] + (1 + starts[:, None] % 4) * torch.arange(7)) % 11

    def make(items: Any, _: int) -> dict[str, Tensor]:
        rows = tokens[torch.from_numpy(items)]
        return {"tokens": rows[:, :-1], "targets": rows[:, 1:]}

    return Batches(make, len(tokens), batch_size, seed=3)


def run(model: nn.Module, steps: int = 20, **changes: Any) -> History:
    settings: dict[str, Any] = {
        "optimizer": AdamW(lr=0.01),
        "schedule": Cosine(warmup=4),
        "accelerator": "cpu",
        "progress": False,
        **changes,
    }
    return train(model, settings.pop("data", None) or batches(), next_token_loss, steps=steps, **settings)


def weights(model: nn.Module) -> dict[str, list[float]]:
    whole = {name: getattr(p, "full_tensor", lambda p=p: p)() for name, p in model.state_dict().items()}
    return {name: tensor.flatten().tolist() for name, tensor in whole.items()}


class Killer:
    def __init__(self, step: int) -> None:
        self.at = step

    def on_step(self, run: Any) -> None:
        if run.step == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: str, steps: str, strategy: str, accumulate: str, kill_at: str = "") -> None:
    torch.set_num_threads(1)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    model = net(dropout=0.2 if world == 1 else 0.0)
    history = run(
        model,
        int(steps),
        strategy=strategy,
        devices=world,
        accumulate=int(accumulate),
        clip=0.5,
        checkpoint=Checkpoint(folder, every=5),
        callbacks=[Killer(int(kill_at))] if kill_at else [],
    )
    found = {"losses": history.losses, "weights": weights(model), "tokens": history.items}
    if int(os.environ.get("RANK", "0")) == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
