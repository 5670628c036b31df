"""`setpoint.check` in Python: what goes in, what comes out, and that the model is as it was."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import setpoint
from setpoint import checkup
from setpoint.errors import InputError


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def net(depth: int = 4, width: int = 32) -> nn.Sequential:
    return nn.Sequential(*(Block(width) for _ in range(depth)))


def test_a_fresh_network_has_nothing_worse_than_a_note() -> None:
    assert setpoint.check(net(), [torch.randn(2, 16, 32)]).worst in (None, "info")


def test_a_branch_that_grows_with_depth_is_found() -> None:
    model = net(8)
    with torch.no_grad():
        for depth, block in enumerate(model):
            block.down.weight.mul_(4.0 * 2**depth)
    report = setpoint.check(model, [torch.randn(2, 16, 32)])
    assert "variance-growth" in {finding.code for finding in report.findings}


def test_the_model_is_as_it_was() -> None:
    model = net().train()
    batch = torch.randn(2, 16, 32)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before, random = model(batch), torch.get_rng_state()
    setpoint.check(model, [batch], loss=lambda output, _: output.square().mean(), deep=True)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(batch), before)


def test_a_loss_brings_gradients() -> None:
    report = setpoint.check(net(), [torch.randn(2, 16, 32)], loss=lambda output, _: output.square().mean())
    assert report.trace.loss is not None
    assert all(record.gradient_norm is not None for record in report.trace.parameters.values())


def test_a_dtype_is_tried_on_a_copy_and_batches_go_along() -> None:
    model = net()
    report = setpoint.check(model, [torch.randn(2, 16, 32)], dtype="bfloat16")
    assert report.model.dtype == "bfloat16"
    assert next(model.parameters()).dtype == torch.float32


def test_ignored_findings_are_left_out() -> None:
    model = net()
    with torch.no_grad():
        model[1].down.weight.fill_(float("inf"))
    found = setpoint.check(model, [torch.randn(2, 16, 32)])
    identity = next(f.id for f in found.findings if f.code == "non-finite")
    again = setpoint.check(model, [torch.randn(2, 16, 32)], ignore=[identity])
    assert identity not in {finding.id for finding in again.findings}


def test_an_ignored_code_that_nothing_raises_is_an_error() -> None:
    with pytest.raises(InputError, match=r"no finding called 'dead-unit'.*dead-units"):
        setpoint.check(net(), [torch.randn(2, 16, 32)], ignore=["dead-unit@0"])


def test_one_code_may_be_a_plain_string() -> None:
    model = net()
    with torch.no_grad():
        model[1].down.weight.fill_(float("inf"))
    batch = torch.randn(2, 16, 32)
    assert {f.code for f in setpoint.check(model, [batch], probes="non-finite").findings} == {"non-finite"}
    assert "non-finite" not in {f.code for f in setpoint.check(model, [batch], ignore="non-finite").findings}


def test_a_bare_tensor_or_dict_is_one_batch() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    x = torch.randn(2, 16, 32)
    whole = setpoint.check(net(), [x]).trace
    assert setpoint.check(net(), x).trace.sequences == whole.sequences == 2
    assert setpoint.check(Keyword(), {"x": x}).trace.sequences == 2


@pytest.mark.parametrize("given", [3, "text"])
def test_batches_of_another_kind_are_named(given: object) -> None:
    with pytest.raises(InputError, match="expected batches as a list of tensors, tuples or dicts"):
        setpoint.check(net(), given)  # type: ignore[arg-type]


def test_named_tuples_stay_named_tuples_on_the_way_to_a_dtype() -> None:
    class Pair(NamedTuple):
        x: Tensor
        scale: Tensor

    seen: list[type] = []

    def forward(model: nn.Module, batch: Pair) -> Tensor:
        seen.append(type(batch))
        return model(batch.x * batch.scale)

    setpoint.check(net(), [Pair(torch.randn(2, 16, 32), torch.ones(1))], forward=forward, dtype="bfloat16")
    assert set(seen) == {Pair}


def test_a_model_without_values_and_a_batch_of_nothing_are_refused() -> None:
    with pytest.raises(InputError, match="meta device"):
        setpoint.check(net().to("meta"), [torch.randn(2, 16, 32)])
    with pytest.raises(InputError, match=r"a batch is empty: float32\[0, 16, 32\]"):
        setpoint.check(net(), [torch.randn(0, 16, 32)])


def test_a_report_prints_as_its_table_and_shows_as_one_line() -> None:
    model = net()
    with torch.no_grad():
        model[1].down.weight.fill_(float("inf"))
    report = setpoint.check(model, [torch.randn(2, 16, 32)])
    assert repr(report).startswith("Report(Sequential: non-finite")
    assert "\n" not in repr(report)
    assert "severity" in str(report)
    assert len(str(report).splitlines()) < 60
    change = setpoint.diff(report, report)
    assert "Nothing changed." in str(change)
    assert repr(change) == "ReportDiff(Sequential → Sequential: 0 new, 0 gone, 0 changed)"


def test_no_batches_is_an_error_that_says_what_to_give() -> None:
    with pytest.raises(InputError, match="at least one batch"):
        setpoint.check(net(), [])


def test_the_batch_that_does_not_fit_is_named() -> None:
    with pytest.raises(InputError, match=r"could not be run on a batch that is float32\[2, 16, 33\]"):
        setpoint.check(net(), [torch.randn(2, 16, 32), torch.randn(2, 16, 33)])


@pytest.mark.parametrize("error", [AttributeError, AssertionError, ZeroDivisionError, StopIteration])
def test_whatever_the_model_raises_is_the_models(error: type[Exception]) -> None:
    class Broken(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise error("half done")

    with pytest.raises(InputError, match=r"could not be run.*half done"):
        setpoint.check(Broken(4, 4), [torch.randn(2, 4)])


def test_a_loss_that_fails_is_named_as_the_loss() -> None:
    def loss(output: Tensor, batch: Tensor) -> Tensor:
        return output @ torch.zeros(7)

    with pytest.raises(InputError, match=r"The loss failed on the output of Sequential.*loss\(output, batch\)"):
        setpoint.check(net(), [torch.randn(2, 16, 32)], loss=loss)


def test_a_fault_of_our_own_is_not_blamed_on_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise ValueError("a mistake in the recorder")

    monkeypatch.setattr(checkup, "record", broken)
    with pytest.raises(ValueError, match=r"^a mistake in the recorder$") as caught:
        setpoint.check(net(), [torch.randn(2, 16, 32)])
    assert not isinstance(caught.value, InputError)


def test_unknown_codes_get_the_nearest() -> None:
    with pytest.raises(InputError, match="variance-growth"):
        setpoint.check(net(), [torch.randn(2, 16, 32)], probes=["variance-grow"])


def test_the_page_is_written(tmp_path: Path) -> None:
    path = setpoint.check(net(), [torch.randn(2, 16, 32)]).to_html(tmp_path / "r.html")
    assert path.read_text().lstrip().lower().startswith("<!doctype html>")
