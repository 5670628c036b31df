from __future__ import annotations

import random
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from setpoint.data import Batches, accuracy, images, label_loss, next_token_loss, run_inputs
from setpoint.errors import InputError
from setpoint.train import SGD, AdamW, Constant, Evaluation, NonFiniteLoss, Run, train
from setpoint.train.random import put_seed


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_the_loop_is_the_bare_loop(course: ModuleType) -> None:
    model, twin = course.net(), course.net()
    history = course.run(model, 12, schedule=Constant(), clip=0.5, seed=5)
    optimizer = AdamW(lr=0.01).build(twin)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    put_seed(5)
    losses = []
    for batch, _ in zip(course.batches(), range(12), strict=False):
        optimizer.zero_grad()
        loss = next_token_loss(twin(batch["tokens"]), batch)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        losses.append(loss.item())
    assert history.losses == losses
    assert same(model, twin)


def test_training_learns(course: ModuleType) -> None:
    history = course.run(course.net(0.0), 150)
    assert history.losses[-1] < 0.6 * history.losses[0]
    assert history.steps == list(range(1, 151))
    assert history.items == 150 * 4 * 6
    assert history.items_per_second > 0


def test_accumulated_batches_are_one_large_batch(course: ModuleType) -> None:
    small, large = course.net(0.0), course.net(0.0)
    course.run(small, 6, data=course.batches(4), accumulate=3, optimizer=SGD(lr=0.1))
    pieces = [course.batches(4)[number] for number in range(18)]
    joined = [{k: torch.cat([p[k] for p in pieces[i : i + 3]]) for k in pieces[0]} for i in range(0, 18, 3)]
    course.run(large, 6, data=joined, optimizer=SGD(lr=0.1))
    for a, b in zip(small.parameters(), large.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_every_group_keeps_its_share_of_the_rate(course: ModuleType) -> None:
    model = course.net()
    optimizer = torch.optim.SGD(
        [{"params": model.head.parameters(), "lr": 1.0}, {"params": model.embed.parameters()}], lr=0.1
    )
    seen: list[list[float]] = []

    class Look:
        def on_step(self, run: Run) -> None:
            seen.append([group["lr"] for group in run.optimizer.param_groups])

    history = course.run(model, 4, optimizer=optimizer, schedule=Constant(warmup=4), callbacks=[Look()])
    assert seen == [[pytest.approx(s), pytest.approx(s / 10)] for s in (0.25, 0.5, 0.75, 1.0)]
    assert history.rates == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_an_optimizer_has_its_peak_again_afterwards(course: ModuleType, rate: Any) -> None:
    model = course.net()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    rates = [course.run(model, 5, optimizer=optimizer).rates for _ in range(2)]
    assert rates[0] == rates[1]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_an_optimizer_has_its_peak_again_after_an_error(course: ModuleType) -> None:
    class Break:
        def on_step(self, run: Run) -> None:
            raise KeyboardInterrupt

    model = course.net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(KeyboardInterrupt):
        course.run(model, 5, optimizer=optimizer, callbacks=[Break()])
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_clipping_bounds_the_norm_of_the_gradient(course: ModuleType) -> None:
    norms: list[tuple[float, float]] = []

    class Look:
        def on_step(self, run: Run) -> None:
            after = torch.stack([p.grad.norm() for p in run.model.parameters()]).norm().item()
            norms.append((run.gradient_norm or 0.0, after))

    course.run(course.net(), 3, clip=0.01, callbacks=[Look()])
    assert all(before > 0.01 for before, _ in norms)
    assert all(after == pytest.approx(0.01, rel=1e-3) for _, after in norms)


def test_without_clipping_the_norm_of_the_gradient_is_told_and_the_gradient_kept(course: ModuleType) -> None:
    norms: list[tuple[float | None, float]] = []

    class Look:
        def on_step(self, run: Run) -> None:
            norms.append(
                (run.gradient_norm, torch.stack([p.grad.norm() for p in run.model.parameters()]).norm().item())
            )

    course.run(course.net(), 3, callbacks=[Look()])
    assert all(told == pytest.approx(there) for told, there in norms)


def test_callbacks_are_called_in_order(course: ModuleType) -> None:
    calls: list[str] = []

    class Listen:
        def __getattr__(self, event: str) -> Any:
            if not event.startswith("on_"):
                raise AttributeError(event)
            return lambda run: calls.append(f"{event} {run.step}")

    course.run(course.net(), 2, callbacks=[Listen()], evaluate=lambda model: {"one": 1}, evaluate_every=1)
    assert calls == [
        *("on_start 0", "on_step_start 0", "on_backward 0", "on_step 1", "on_evaluate 1"),
        *("on_step_start 1", "on_backward 1", "on_step 2", "on_evaluate 2", "on_end 2"),
    ]


def test_a_callback_can_end_the_run(course: ModuleType) -> None:
    class Stop:
        def on_step(self, run: Run) -> None:
            run.stop = run.step == 3

    history = course.run(course.net(), 10, callbacks=[Stop()], evaluate=lambda model: {"one": 1.0})
    assert history.steps == [1, 2, 3]
    assert history.final == {"step": 3, "one": 1.0}


def test_how_often_one_evaluates_does_not_change_the_run(course: ModuleType) -> None:
    model, twin = course.net(), course.net()

    def noisy(model: nn.Module) -> dict[str, float]:
        model.eval()
        return {"draw": torch.rand(()).item() + np.random.rand() + random.random()}

    often = course.run(model, 6, evaluate=noisy, evaluate_every=1)
    assert course.run(twin, 6).losses == often.losses
    assert same(model, twin)
    assert [e["step"] for e in often.evaluations] == [1, 2, 3, 4, 5, 6]


def test_evaluation_weighs_batches_by_their_size(course: ModuleType) -> None:
    model = course.net()
    whole = Batches(course.batches().make, 44, 44, seed=None)
    parts = Batches(course.batches().make, 44, 13, seed=None)
    metrics = {"loss": next_token_loss, "accuracy": accuracy}
    a, b = Evaluation(whole, metrics)(model), Evaluation(parts, metrics)(model)
    assert a == pytest.approx(b, rel=1e-5)
    assert model.training
    assert course.run(model, 1, evaluate=parts).final.keys() == {"step", "loss"}


def test_the_world_is_as_it_was_afterwards(course: ModuleType) -> None:
    model = course.net().eval()
    model.head.train()
    put_seed(1)
    expected = [torch.rand(2).tolist(), np.random.rand(), random.random()]
    put_seed(1)
    course.run(model, 3)
    assert [torch.rand(2).tolist(), np.random.rand(), random.random()] == expected
    assert not model.training
    assert model.head.training
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_seeds_change_dropout_and_repeat(course: ModuleType) -> None:
    runs = [course.run(course.net(), 5, seed=seed).losses for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_bfloat16_trains_in_mixed_precision(course: ModuleType) -> None:
    seen: set[torch.dtype] = set()
    model = course.net()
    model.blocks[0][0].register_forward_hook(lambda m, a, output: seen.add(output.dtype))
    history = course.run(model, 5, precision="bf16-mixed")
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert history.losses == pytest.approx(course.run(course.net(), 5).losses, rel=0.02)


def test_images_train_with_labels() -> None:
    digits = images("digits")
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    history = train(
        model,
        digits.batches("train", 64),
        label_loss,
        steps=60,
        optimizer=AdamW(lr=0.02),
        evaluate=Evaluation(digits.batches("valid", 100), {"accuracy": accuracy}),
        accelerator="cpu",
        progress=False,
    )
    assert history.final["accuracy"] > 0.85
    assert history.items == 60 * 64


def test_a_compiled_model_trains_the_model_inside(course: ModuleType) -> None:
    model = course.net(0.0)
    plain = course.run(course.net(0.0), 4).losses
    history = course.run(torch.compile(model, backend="eager"), 4)
    assert history.losses == pytest.approx(plain, rel=1e-5)
    assert not same(model, course.net(0.0))


def test_progress_reports_every_step(course: ModuleType) -> None:
    told: list[tuple[int, int, str]] = []
    course.run(course.net(), 3, progress=lambda *a: told.append(a), evaluate=lambda m: {"loss": 2.0}, evaluate_every=2)
    assert [(done, total) for done, total, _ in told] == [(1, 3), (2, 3), (3, 3)]
    assert "tokens/s" in told[0][2]
    assert "held-out loss 2.0000" in told[1][2]


class Exploding(nn.Module):
    """Divides by a number that an update takes to zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.last = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(x)))


def test_a_non_finite_loss_stops_the_run_with_a_check(course: ModuleType, tmp_path: Path) -> None:
    model = Exploding()
    good = (torch.randn(8, 4), torch.zeros(8, dtype=torch.long))
    bad = (torch.full((8, 4), float("inf")), good[1])
    before: dict[str, torch.Tensor] = {}
    quiet: dict[str, Any] = {"accelerator": "cpu", "progress": False}

    class Keep:
        def on_step(self, run: Run) -> None:
            before.update({name: value.clone() for name, value in run.model.state_dict().items()})

    with pytest.raises(NonFiniteLoss, match=r"stopped in step 3: the loss is nan \(learning rate") as caught:
        train(model, [good, good, bad], label_loss, steps=9, callbacks=[Keep()], checkpoint=tmp_path, **quiet)
    error = caught.value
    assert error.step == 3
    assert error.history.steps == [1, 2]
    assert error.report is not None
    assert "non-finite" in {finding.code for finding in error.report.findings}
    assert "non-finite" in str(error)
    assert error.batches[0] is not None
    assert "non-finite" in (tmp_path / "non-finite-step-3.html").read_text()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_weights_that_are_already_spoiled_are_named(course: ModuleType) -> None:
    model = course.net()
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    with pytest.raises(NonFiniteLoss, match=r"1 parameters already held non-finite values, head\.bias first"):
        course.run(model, 3)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_non_finite_gradient_stops_before_the_update(course: ModuleType, clip: float | None) -> None:
    def loss(output: torch.Tensor, batch: Any) -> torch.Tensor:
        return next_token_loss(output, batch) + (output * 0).abs().sqrt().sum()  # finite, with an infinite slope

    model, twin = course.net(), course.net()
    with pytest.raises(NonFiniteLoss, match="norm of the gradient is nan"):
        train(model, course.batches(), loss, steps=2, clip=clip, accelerator="cpu", progress=False)
    assert same(model, twin)


def test_user_errors_are_named_and_nothing_changes(course: ModuleType) -> None:
    model, twin = course.net(), course.net()
    stranger = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    wrong = {
        "steps of at least 1": {"steps": 0},
        "accumulate of at least 1": {"accumulate": 0},
        "clip above 0": {"clip": 0.0},
        "holds no parameter of this model": {"optimizer": stranger},
        "strategy of auto, ddp, fsdp": {"strategy": "zero"},
        "endless stream": {"evaluate": course.batches()},
        "evaluate as batches or a callable": {"evaluate": 3},
        "iterable of batches": {"data": 3},
        "holds no batch": {"data": iter(())},
    }
    for message, change in wrong.items():
        with pytest.raises(InputError, match=message):
            course.run(model, **{"steps": 3, **change})
    with pytest.raises(InputError, match="must return a scalar"):
        train(model, course.batches(), lambda o, b: o, steps=1, accelerator="cpu", progress=False)
    with pytest.raises(InputError, match="does not depend"):
        train(model, course.batches(), lambda o, b: torch.ones(()), steps=1, accelerator="cpu", progress=False)
    assert same(model, twin)


def test_data_that_ends_is_started_again_or_named(course: ModuleType) -> None:
    three = [course.batches()[number] for number in range(3)]
    assert course.run(course.net(), 7, data=three).steps[-1] == 7
    with pytest.raises(InputError, match="ended after 3 batches"):
        course.run(course.net(), 7, data=iter(three))


def test_forward_is_what_runs_the_model(course: ModuleType) -> None:
    calls: list[int] = []

    def forward(model: nn.Module, batch: Any) -> Any:
        calls.append(1)
        return run_inputs(model, batch)

    course.run(course.net(), 2, forward=forward, accumulate=2)
    assert len(calls) == 4
