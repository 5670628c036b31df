from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from setpoint.errors import InputError
from setpoint.train import SGD, Checkpoint, Constant, Cosine, Run


class Interrupt:
    def __init__(self, step: int) -> None:
        self.at = step

    def on_step(self, run: Run) -> None:
        if run.step == self.at:
            raise KeyboardInterrupt


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulate": 3, "clip": 0.1},
        {"optimizer": SGD(lr=0.1, momentum=0.9), "evaluate": lambda m: {"n": 1}, "evaluate_every": 3},
        {"precision": "bf16-mixed"},
    ],
    ids=["plain", "accumulated", "momentum", "bfloat16"],
)
def test_an_interrupted_run_is_the_uninterrupted_one(
    course: ModuleType, tmp_path: Path, settings: dict[str, Any]
) -> None:
    whole, parts = course.net(), course.net()
    expected = course.run(whole, 20, **settings)
    plan = Checkpoint(tmp_path, every=4)
    for stop in (7, 13):
        with pytest.raises(KeyboardInterrupt):
            course.run(course.net(), 20, checkpoint=plan, callbacks=[Interrupt(stop)], **settings)
    found = course.run(parts, 20, checkpoint=plan, **settings)
    assert found.losses == expected.losses
    assert found.evaluations == expected.evaluations
    assert found.rates == expected.rates
    assert found.items == expected.items
    assert same(whole, parts)


def test_a_run_goes_on_with_the_very_optimizer_that_it_had(course: ModuleType, tmp_path: Path) -> None:
    def fresh() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = course.net()
        return model, torch.optim.AdamW(model.parameters(), lr=0.01)

    whole, own = fresh()
    expected = course.run(whole, 12, optimizer=own)
    parts, own = fresh()
    plan = Checkpoint(tmp_path, every=4)
    with pytest.raises(KeyboardInterrupt):
        course.run(parts, 12, optimizer=own, checkpoint=plan, callbacks=[Interrupt(7)])
    found = course.run(parts, 12, optimizer=own, checkpoint=plan)
    assert (found.losses, found.rates) == (expected.losses, expected.rates)
    assert same(whole, parts)


@pytest.mark.parametrize("change", [{"lr": 0.02}, {"momentum": 0.9}, {"weight_decay": 0.1}], ids=str)
def test_an_optimizer_with_other_settings_is_refused(
    course: ModuleType, tmp_path: Path, change: dict[str, float]
) -> None:
    def run(**settings: float) -> None:
        model = course.net()
        own = torch.optim.SGD(model.parameters(), **{"lr": 0.01, **settings})
        course.run(model, 4, optimizer=own, checkpoint=tmp_path)

    run()
    (name, value), *_ = change.items()
    with pytest.raises(InputError, match=f"with optimizer SGD.*this one has SGD.*{name}={value}"):
        run(**change)
    run()


def loader(workers: int = 0) -> DataLoader[Any]:
    data = TensorDataset(torch.arange(60).view(10, 6) % 11, torch.arange(1, 61).view(10, 6) % 11)
    collate = lambda rows: {"tokens": torch.stack([r[0] for r in rows]), "targets": torch.stack([r[1] for r in rows])}  # noqa: E731
    return DataLoader(data, batch_size=3, shuffle=True, collate_fn=collate, num_workers=workers)


def test_a_shuffled_dataloader_goes_on_where_it_was(course: ModuleType, tmp_path: Path) -> None:
    expected = course.run(course.net(), 15, data=loader())
    with pytest.raises(KeyboardInterrupt):
        course.run(course.net(), 15, data=loader(), checkpoint=Checkpoint(tmp_path, every=3), callbacks=[Interrupt(10)])
    torch.rand(100)  # what the caller draws in between is no matter
    found = course.run(course.net(), 15, data=loader(), checkpoint=Checkpoint(tmp_path, every=3))
    assert found.losses == expected.losses


def start(folder: Path, *arguments: object, processes: int = 1) -> subprocess.CompletedProcess[str]:
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [str(Path(__file__).with_name("course.py")), str(folder), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=240)


def found_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "found.json").read_text())


def test_a_killed_process_loses_at_most_the_steps_since_its_checkpoint(tmp_path: Path, course: ModuleType) -> None:
    killed = start(tmp_path, 14, "auto", 1, 12)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000005", "step-00000010"]
    assert start(tmp_path, 14, "auto", 1).returncode == 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = course.net()
        expected = course.run(whole, 14, clip=0.5)
    finally:
        torch.set_num_threads(threads)
    assert found_in(tmp_path)["losses"] == expected.losses
    assert found_in(tmp_path)["weights"] == course.weights(whole)


def test_a_kill_while_writing_leaves_the_checkpoint_before(
    course: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    course.run(course.net(), 4, schedule=Constant(), checkpoint=Checkpoint(tmp_path, every=2))

    def half(path: str, *_: Any, **__: Any) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lightning_fabric.fabric.Fabric.save", lambda self, path, state: half(path))
        with pytest.raises(KeyboardInterrupt):
            course.run(course.net(), 8, schedule=Constant(), checkpoint=Checkpoint(tmp_path, every=2))
    assert [p.name for p in sorted(tmp_path.glob("step-*"))] == ["step-00000002", "step-00000004"]
    history = course.run(course.net(), 8, schedule=Constant(), checkpoint=Checkpoint(tmp_path, every=2))
    assert history.steps == list(range(1, 9))
    assert not list(tmp_path.glob(".*"))


def test_a_finished_run_is_not_run_again(course: ModuleType, tmp_path: Path) -> None:
    first, second = course.net(), course.net()
    history = course.run(first, 6, checkpoint=tmp_path)
    calls: list[int] = []

    class Count:
        def on_step(self, run: Run) -> None:
            calls.append(run.step)

    assert course.run(second, 6, checkpoint=tmp_path, callbacks=[Count()]) == history
    assert not calls
    assert same(first, second)


def test_a_constant_rate_can_be_trained_further(course: ModuleType, tmp_path: Path) -> None:
    expected = course.run(course.net(), 9, schedule=Constant(warmup=2))
    course.run(course.net(), 5, schedule=Constant(warmup=2), checkpoint=tmp_path)
    found = course.run(course.net(), 9, schedule=Constant(warmup=2), checkpoint=tmp_path)
    assert found.losses == expected.losses


def test_other_settings_are_refused_and_named(course: ModuleType, tmp_path: Path) -> None:
    course.run(course.net(), 6, checkpoint=tmp_path)
    for change, message in (
        ({"steps": 8}, "a run with steps 6, this one has 8"),
        ({"schedule": Cosine(warmup=3)}, "with schedule Cosine"),
        ({"seed": 4}, "with seed 0"),
        ({"data": course.batches(5)}, "with data of 44 items in batches of 4"),
        ({"optimizer": SGD()}, "can't be gone on with|with optimizer AdamW"),
    ):
        with pytest.raises(InputError, match=message):
            course.run(course.net(), **{"steps": 6, "checkpoint": tmp_path, **change})
    with pytest.raises(InputError, match="can't be gone on with"):
        course.run(torch.nn.Sequential(course.net()), 6, checkpoint=tmp_path)


def test_without_resume_a_run_starts_over(course: ModuleType, tmp_path: Path) -> None:
    course.run(course.net(), 6, checkpoint=tmp_path)
    history = course.run(course.net(), 3, checkpoint=tmp_path, resume=False)
    assert history.steps == [1, 2, 3]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000002", "step-00000003"]


def test_a_checkpoint_with_another_form_of_history_is_named(
    course: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("setpoint.train.checkpoints.asdict", lambda history: {"losses": history.losses, "tokens": 96})
        course.run(course.net(), 2, checkpoint=tmp_path)
    with pytest.raises(InputError, match=r"step-00000002 can't be gone on with.*'tokens'.*resume=False"):
        course.run(course.net(), 2, checkpoint=tmp_path)


def test_a_damaged_checkpoint_is_named(course: ModuleType, tmp_path: Path) -> None:
    course.run(course.net(), 2, checkpoint=Checkpoint(tmp_path, keep=1))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"step-00000002 can't be gone on with.*resume=False"):
        course.run(course.net(), 4, checkpoint=tmp_path)


def test_checkpoints_hold_no_code(course: ModuleType, tmp_path: Path) -> None:
    course.run(course.net(), 2, checkpoint=tmp_path)
    content = torch.load(max(tmp_path.iterdir()), weights_only=True)
    assert set(content["model"]) == set(course.net().state_dict())


def test_callbacks_go_on_too(course: ModuleType, tmp_path: Path) -> None:
    class Count:
        def __init__(self) -> None:
            self.seen = torch.zeros(())

        def on_step(self, run: Run) -> None:
            self.seen += run.step

        def state_dict(self) -> dict[str, Any]:
            return {"seen": self.seen}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.seen = state["seen"]

    plan = Checkpoint(tmp_path, every=2)
    with pytest.raises(KeyboardInterrupt):
        course.run(course.net(), 6, checkpoint=plan, callbacks=[Count(), Interrupt(3)])
    count = Count()
    course.run(course.net(), 6, checkpoint=plan, callbacks=[count])
    assert count.seen == sum(range(1, 7))


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_processes_train_as_one_with_twice_the_batches(course: ModuleType, tmp_path: Path, strategy: str) -> None:
    done = start(tmp_path, 12, strategy, 1, processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    one = course.net(dropout=0.0)
    expected = course.run(one, 12, clip=0.5, accumulate=2)
    found = found_in(tmp_path)
    assert found["losses"] == pytest.approx(expected.losses, rel=1e-4)
    assert found["tokens"] == expected.items
    for name, values in course.weights(one).items():
        assert found["weights"][name] == pytest.approx(values, rel=1e-3, abs=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_resume_exactly(course: ModuleType, tmp_path: Path, strategy: str) -> None:
    assert start(tmp_path / "whole", 12, strategy, 2, processes=2).returncode == 0
    assert start(tmp_path / "parts", 12, strategy, 2, 8, processes=2).returncode != 0
    done = start(tmp_path / "parts", 12, strategy, 2, processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert found_in(tmp_path / "parts") == found_in(tmp_path / "whole")
