"""Small studies in files of their own, as a user would write them; each run leaves a line in a log."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

STUDY = """
import os, time
import torch
from pathlib import Path
from setpoint.studies import *
from setpoint.types import Series

HERE = Path(__file__).parent
SIZE = Budget(seeds=4, minutes=1, options={"steps": 10})

@study(
    "Is the better arm better?",
    arms=(Arm("plain", "noise", {"shift": 0.0}), Arm("method", "noise, shifted down", {"shift": EFFECT})),
    claims=(
        Claim("Its loss is lower.", Better(0.5), "loss", "method", "plain", unit="nats"),
        Claim("Its loss is no higher.", NotWorse(0.1), "loss", "method", "plain"),
    ),
    tuning=Tuning({"lr": (0.1, 0.2, 0.4)}, metric="loss", options={"steps": 3}),
    budgets={"smoke": SIZE, "laptop": SIZE, "full": SIZE},
    takes_data=True,
)
def shifted(arm, setting, seed, budget, ctx):
    started = time.monotonic()
    while (HERE / "hold").exists() and time.monotonic() < started + 60:
        time.sleep(0.02)
    with open(HERE / "log", "a") as log:
        log.write(f"{ctx.split} {arm.name} {setting['lr']} {seed} {budget['steps']} {os.getpid()} {ctx.data}\\n")
    if (HERE / "die").exists() and arm.name == "method" and seed == 1:
        (HERE / "die").unlink()
        os._exit(9)
    if (HERE / "break").exists() and seed == 1:
        raise RuntimeError("something broke")
    noise = torch.randn(()).item()
    ctx.progress(1, 1, "done")
    base = 3.0 + 0.1 * noise - arm["shift"] + abs(setting["lr"] - (0.1 if arm.name == "plain" else 0.4))
    base += 0.001 * (ctx.split == "valid")
    return Outcome(
        {"loss": base},
        curves=(Series("loss over step", (0.0, 1.0, 2.0), (base + 2, base + 1, base)),),
        cost={"parameters": 10},
        conditions={"steps": budget["steps"]},
    )
"""


@pytest.fixture
def make_study(tmp_path: Path) -> Callable[..., Path]:
    """Write the study into a file; ``effect`` is how much lower the loss of the method is."""

    def make(name: str = "own_study", effect: str = "1.0", source: str = STUDY) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        path = folder / f"{name}.py"
        path.write_text(source.replace("EFFECT", effect))
        return path

    return make


@pytest.fixture
def own_study(make_study: Callable[..., Path]) -> Path:
    return make_study()


@pytest.fixture
def logged() -> Callable[[Path], list[list[str]]]:
    """What each run wrote: split, arm, lr, seed, steps, process, data."""

    def read(study: Path) -> list[list[str]]:
        log = study.parent / "log"
        return [line.split() for line in log.read_text().splitlines()] if log.exists() else []

    return read
