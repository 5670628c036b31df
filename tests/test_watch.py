from __future__ import annotations

import copy
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import setpoint
from setpoint.errors import InputError
from setpoint.probe import record
from setpoint.train import SGD, train
from setpoint.watching import JsonLines, Observation, TensorBoard, Watcher, watch


def encoder(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16), enable_nested_tensor=False)


def inputs(count: int = 12) -> list[Tensor]:
    return list(torch.randn(count, 2, 6, 16, generator=torch.Generator().manual_seed(1)))


def loss_of(output: Tensor, batch: Any = None) -> Tensor:
    return output.square().mean()


def hooks(model: nn.Module) -> int:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    parameters = sum(len(p._post_accumulate_grad_hooks or {}) for p in model.parameters())
    return parameters + sum(len(getattr(module, name)) for module in model.modules() for name in names)


def loop(
    model: nn.Module, watcher: Watcher | None, batches: list[Tensor], look: Callable[[int], Any] = hash
) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []

    def one(batch: Tensor) -> Tensor:
        loss = loss_of(model(batch))
        look(len(losses))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    for batch in batches:
        if watcher is None:
            loss = one(batch)
        else:
            with watcher.step() as seen:
                loss = seen.loss = one(batch)
        losses.append(loss.item())
    return losses


def test_watching_does_not_change_training() -> None:
    watched, plain = encoder(dropout=0.1), encoder(dropout=0.1)
    torch.manual_seed(3)
    expected = loop(plain, None, inputs())
    torch.manual_seed(3)
    assert loop(watched, watch(watched, every=3), inputs()) == expected


def test_hooks_are_there_on_recorded_steps_only() -> None:
    model, seen = encoder(), {}
    loop(model, watch(model, every=3), inputs(7), lambda step: seen.update({step: hooks(model)}))
    assert [step for step, count in seen.items() if count] == [0, 3, 6]
    assert hooks(model) == 0


def test_steps_are_counted_from_where_a_run_goes_on() -> None:
    model, seen = encoder(), []
    watcher = watch(model, every=10, on=lambda observation: seen.append(observation.step))
    for number in range(18, 22):
        with watcher.step(number):
            loss_of(model(inputs()[0])).backward()
    assert seen == [20]


def test_a_recorded_step_is_what_record_measures() -> None:
    model = encoder()
    expected = record(model, [inputs()[0]], loss=loss_of)
    watcher = watch(model, every=100)
    loop(model, watcher, inputs(1))
    assert watcher.latest is not None
    trace = watcher.latest.trace
    assert trace.loss == pytest.approx(expected.loss)
    shared = set(trace.records) & set(expected.records)
    assert len(shared) > 5
    for name in shared:
        found, given = trace.records[name], expected.records[name]
        assert found.tokens == given.tokens, name
        if found.rms is not None and given.rms is not None:
            assert found.rms == pytest.approx(given.rms, rel=1e-5), name
        if given.gradient_rms is not None:
            assert found.gradient_rms == pytest.approx(given.gradient_rms, rel=1e-4), name
    assert {p.block for p in trace.parameters.values()} == {None, 0, 1}
    for name, parameter in expected.parameters.items():
        assert trace.parameters[name].block == parameter.block, name
        assert trace.parameters[name].gradient_norm == pytest.approx(parameter.gradient_norm, rel=1e-4), name


def test_the_first_recording_sees_the_roots_own_sites_too() -> None:
    model = encoder()
    seen: list[Observation] = []
    loop(model, watch(model, every=2, on=seen.append), inputs(3))
    assert set(seen[0].trace.records) == set(seen[1].trace.records)
    assert seen[0].scalars().keys() == seen[1].scalars().keys()


def test_json_lines_hold_numbers_and_findings(tmp_path: Path) -> None:
    model, path = encoder(), tmp_path / "deep" / "run.jsonl"
    loop(model, watch(model, every=4, on=path), inputs(9))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 4, 8]
    assert lines[0]["scalars"]["loss"] > lines[2]["scalars"]["loss"]
    assert any(name.endswith("/gradient_rms") for name in lines[0]["scalars"])
    assert any(name.endswith("/entropy") for name in lines[0]["scalars"])
    assert all({"code", "severity", "evidence"} <= set(finding) for line in lines for finding in line["findings"])


def test_a_run_that_goes_back_rewrites_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    model = encoder()
    loop(model, watch(model, every=2, on=path), inputs(6))
    with path.open("a") as file:
        file.write('{"step": 6, "sca')  # killed while it wrote
    seen: list[Observation] = []
    loop(model, watch(model, every=1, on=seen.append), inputs(3))
    again = JsonLines(path)
    again(seen[2])
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 2]


@pytest.mark.parametrize(
    "content",
    [
        '{"model_type": "gpt2"}',
        '{"step": 3, "prompt": "a"}\n',
        "notes\n",
        '{"step": 1, "sca\n{"step": 2, "scalars": {}, "findings": []}\n',
    ],
)
def test_a_file_that_holds_something_else_is_left_as_it_is(tmp_path: Path, content: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(content)
    model = encoder()
    with pytest.raises(InputError, match=r"mine\.jsonl holds something else than observations \(line 1\)"):
        loop(model, watch(model, every=1, on=path), inputs(1))
    assert path.read_text() == content


def many() -> list[Tensor]:
    """Batches of 1,280 tokens: enough to call a unit dead."""
    return list(torch.randn(5, 32, 40, 16, generator=torch.Generator().manual_seed(1)))


def dead(model: nn.Module) -> nn.Module:
    """Half of the hidden units of a block never fire."""
    with torch.no_grad():
        model.layers[0].linear1.bias[:16] = -50.0
    return model


def test_alarms_are_findings_and_are_raised_once(caplog: pytest.LogCaptureFixture) -> None:
    model = dead(encoder())
    with caplog.at_level(logging.WARNING, "setpoint.watch"):
        watcher = watch(model, every=2)
        loop(model, watcher, many())
    codes = [alarm.finding.code for alarm in watcher.alarms]
    assert codes.count("dead-units") == 1
    assert watcher.alarms[0].step == 0
    assert sum("dead-units" in message for message in caplog.messages) == 1


def test_probes_and_ignore_choose_the_alarms() -> None:
    model = dead(encoder())
    only = watch(model, every=1, probes={"rank-collapse"})
    loop(model, only, inputs(1))
    assert {finding.code for finding in only.latest.findings} <= {"rank-collapse"}
    none = watch(model, every=1, ignore={"dead-units"})
    loop(model, none, many()[:1])
    assert "dead-units" not in {alarm.finding.code for alarm in none.alarms}


def test_setpoints_loop_takes_the_watcher_as_a_callback() -> None:
    model, steps = encoder(), []
    watcher = watch(model, every=3, on=lambda seen: steps.append((seen.step, seen.loss)))
    history = train(
        model,
        inputs(4),
        loss_of,
        forward=lambda m, batch: m(batch),
        steps=8,
        optimizer=SGD(lr=0.05),
        callbacks=[watcher],
        evaluate=lambda m: {"loss": loss_of(m(inputs()[0])).item()},
        evaluate_every=1,
        accelerator="cpu",
        progress=False,
    )
    assert [step for step, _ in steps] == [0, 3, 6]
    assert [loss for _, loss in steps] == pytest.approx([history.losses[step] for step in (0, 3, 6)])
    assert watcher.latest.trace.sequences == 2  # the evaluations between the steps are not in it
    assert hooks(model) == 0


def test_gradients_are_whole_and_unclipped_in_setpoints_loop() -> None:
    model, twin = encoder(), encoder()
    watcher = watch(model, every=10)
    settings = {"accumulate": 3, "clip": 1e-3, "accelerator": "cpu", "progress": False}
    train(model, inputs(3), loss_of, steps=1, callbacks=[watcher], **settings)
    torch.stack([loss_of(twin(batch)) for batch in inputs(3)]).mean().backward()
    for name, parameter in twin.named_parameters():
        found = watcher.latest.trace.parameters[name].gradient_norm
        assert found == pytest.approx(parameter.grad.norm().item(), rel=1e-4), name
    assert watcher.latest.trace.sequences == 6


SCRIPT = """
import json, os, runpy, sys
from setpoint.surgery import Anatomy
from setpoint.train import SGD, train
from setpoint.watching import watch

tests = runpy.run_path(sys.argv[1])
world = int(os.environ.get("WORLD_SIZE", "1"))
model, seen = tests["encoder"](), []

def note(observation):
    trace = observation.trace
    seen.append([observation.step, observation.loss, trace.sequences, observation.scalars()])

anatomy = Anatomy.trace(model, tests["inputs"](1)[0]) if sys.argv[2] == "fsdp" else None
watcher = watch(model, every=2, on=note, anatomy=anatomy)
train(model, tests["inputs"](8), tests["loss_of"], steps=4, optimizer=SGD(lr=0.05), clip=1e-3, accumulate=2 // world,
      strategy=sys.argv[2] if world > 1 else "auto", devices=world, callbacks=[watcher],
      accelerator="cpu", progress=False)
if os.environ.get("RANK", "0") == "0":
    print(json.dumps(seen))
else:
    assert not seen
"""


def test_a_sharded_model_needs_its_structure_from_before() -> None:
    class FSDPLinear(nn.Linear):
        """Named as a sharded module is."""

    with pytest.raises(InputError, match=r"anatomy=Anatomy\.trace"), watch(FSDPLinear(2, 2)).step():
        pass


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_are_watched_as_one(tmp_path: Path, strategy: str) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    script = [str(tmp_path / "script.py"), __file__, strategy]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    found = []
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]):
        command = [sys.executable, *launcher, *script]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=240)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(json.loads(done.stdout.splitlines()[-1]))
    for one, two in zip(*found, strict=True):
        assert one[:1] + one[2:3] == two[:1] + two[2:3]
        assert one[3].keys() == two[3].keys()
        for name, value in one[3].items():
            assert two[3][name] == pytest.approx(value, rel=2e-3, abs=1e-5), name


def test_an_error_in_a_step_leaves_no_hook() -> None:
    model = encoder()
    watcher = watch(model, every=1)

    def fails(step: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        loop(model, watcher, inputs(1), fails)
    assert hooks(model) == 0
    assert not watcher.recording


def test_compiled_models_are_watched_inside() -> None:
    model = encoder()
    compiled = torch.compile(model, backend="eager")
    watcher = watch(compiled, every=2)
    loop(compiled, watcher, inputs(4))
    assert watcher.latest.step == 2
    assert len(watcher.latest.trace.records) > 5


def test_transformers_trainer_takes_it_as_a_callback(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    rows = [{"input_ids": (torch.arange(8) + i) % 50, "labels": (torch.arange(8) + i) % 50} for i in range(16)]
    seen: list[Observation] = []
    watcher = watch(model, every=2, on=seen.append)
    batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 5}
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    arguments = transformers.TrainingArguments(str(tmp_path), **batches, **quiet)
    transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[watcher.for_trainer()]).train()
    assert [observation.step for observation in seen] == [0, 2, 4]
    assert seen[1].trace.sequences == 4
    assert hooks(model) == 0


@pytest.mark.parametrize("told", [True, False], ids=["told its targets", "not told"])
def test_transformers_trainer_is_seen_with_its_loss_and_with_gradients_before_they_are_clipped(
    tmp_path: Path, told: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    model = transformers.GPT2LMHeadModel(config)
    model.accepts_loss_kwargs = told
    twin = copy.deepcopy(model)
    tokens = torch.arange(8)[None] + torch.arange(4)[:, None]
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    watcher = watch(model, every=1)
    batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 1}
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    arguments = transformers.TrainingArguments(str(tmp_path), max_grad_norm=1e-3, **batches, **quiet)
    trained = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[watcher.for_trainer()]).train()
    assert watcher.latest.loss == pytest.approx(trained.training_loss, rel=1e-5)
    loss = twin(input_ids=tokens, labels=tokens).loss
    (loss * 7 / 8 if told else loss).backward()  # the Trainer counts the first token of a row as a target too
    for name, parameter in twin.named_parameters():
        found = watcher.latest.trace.parameters[name].gradient_norm
        assert found == pytest.approx(parameter.grad.norm().item(), rel=1e-4), name


def test_an_accumulating_and_clipping_loop_of_ones_own_is_seen_with_whole_gradients() -> None:
    model, twin = encoder(), encoder()
    watcher = watch(model, every=1)
    with watcher.step():
        for batch in inputs(3):
            (loss_of(model(batch)) / 3).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    torch.stack([loss_of(twin(batch)) for batch in inputs(3)]).mean().backward()
    for name, parameter in twin.named_parameters():
        found = watcher.latest.trace.parameters[name].gradient_norm
        assert found == pytest.approx(parameter.grad.norm().item(), rel=1e-4), name


def test_lightning_takes_it_as_a_callback() -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = encoder()

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return loss_of(self.net(batch))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module, seen = Module(), []
    watcher = watch(module.net, every=2, on=seen.append)
    trainer = lightning.Trainer(
        max_steps=5, accumulate_grad_batches=2, callbacks=[watcher.for_lightning()], logger=False, accelerator="cpu",
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(inputs(), batch_size=None))
    assert [observation.step for observation in seen] == [0, 2, 4]
    assert seen[1].trace.sequences == 4
    assert seen[1].loss is not None
    assert hooks(module.net) == 0


def test_tensorboard_gets_curves_and_findings(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = dead(encoder())
    loop(model, watch(model, every=2, on=tmp_path / "board"), many())
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [0, 2, 4]
    assert any("dead-units" in tag for tag in events.Tags()["tensors"])


def test_a_writer_of_ones_own_is_used() -> None:
    class Writer:
        def __init__(self) -> None:
            self.tags: set[str] = set()

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            self.tags.add(tag)

        def add_text(self, tag: str, text: str, step: int) -> None:
            pass

        def flush(self) -> None:
            pass

    writer, model = Writer(), encoder()
    loop(model, watch(model, every=1, on=[TensorBoard(writer)]), inputs(1))
    assert "loss" in writer.tags


def test_user_errors_are_named(tmp_path: Path) -> None:
    model = encoder()
    with pytest.raises(InputError, match="every of at least 1"):
        watch(model, every=0)
    with pytest.raises(InputError, match="no finding called"):
        watch(model, probes={"rank-colapse"})
    with pytest.raises(InputError, match=r"\.jsonl file or a folder"):
        watch(model, on="run.csv")
    with pytest.raises(InputError, match=r"\.jsonl file or a folder"):
        watch(model, on="config.json")
    with pytest.raises(InputError, match="got int"):
        watch(model, on=3)
    with pytest.raises(InputError, match="was not called in step 0"), watch(model, every=1).step():
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write observations"):
        loop(model, watch(model, every=1, on=tmp_path / "file" / "run.jsonl"), inputs(1))


def test_watch_is_at_the_front_door() -> None:
    assert setpoint.watch is watch
