"""``module:factory``: the user's own model in five lines, and a clear line for what can go wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import setpoint
from setpoint.errors import InputError
from setpoint.loading import batches_for, loss_for

MODULE = """
import torch
from torch import nn

class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
    def forward(self, a, b):
        return self.linear(a) + b

def build():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

def with_batches():
    return build(), [torch.randn(3, 4), torch.randn(3, 4)]

def with_one_batch():
    return build(), torch.randn(3, 4)

def with_loss():
    return build(), [torch.randn(3, 4)], lambda output, batch: output.square().mean()

def pair():
    return Pair(), [(torch.ones(2, 4), torch.ones(2, 4)), {"a": torch.ones(2, 4), "b": torch.ones(2, 4)}]

def needs(width, depth=2):
    return nn.Linear(width, width)

def fails():
    return nn.Linear(4, 4)(torch.randn(2, 5))

def wrong():
    return {"model": build()}

def wrong_tuple():
    return 1, 2

def no_batches():
    return build(), []

def bad_loss():
    return build(), [torch.randn(3, 4)], 0.5

number = 3
ready = build()
"""


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_model.py").write_text(MODULE)
    (tmp_path / "broken_model.py").write_text("import torch\nvalue = 1 / 0\n")
    (tmp_path / "absent_model.py").write_text("import no_such_library\n")
    (tmp_path / "syntax_model.py").write_text("def build(:\n")
    monkeypatch.chdir(tmp_path)
    for name in ("my_model", "broken_model", "absent_model", "syntax_model"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_a_factory_builds_the_users_model() -> None:
    loaded = setpoint.load("my_model:build")
    assert isinstance(loaded.model, nn.Sequential)
    assert not loaded.model.training
    assert (loaded.task, loaded.source, loaded.batches) == ("other", "my_model:build", None)


def test_the_current_directory_is_importable_only_while_loading() -> None:
    before = list(sys.path)
    setpoint.load("my_model:build")
    assert sys.path == before


def test_a_model_that_is_already_built_will_do() -> None:
    assert isinstance(setpoint.load("my_model:ready").model, nn.Sequential)


def test_a_factory_may_bring_its_batches() -> None:
    loaded = setpoint.load("my_model:with_batches")
    batches = batches_for(loaded)
    assert [batch.shape for batch in batches] == [(3, 4), (3, 4)]
    assert loaded.forward(loaded.model, batches[0]).shape == (3, 2)
    assert len(batches_for(setpoint.load("my_model:with_one_batch"))) == 1


def test_a_factory_may_bring_its_loss() -> None:
    loaded = setpoint.load("my_model:with_loss")
    loss = loss_for(loaded)
    assert loss is not None
    assert loss(torch.full((2, 2), 3.0), None) == 9


def test_tuples_are_positional_and_dicts_are_keyword_arguments() -> None:
    loaded = setpoint.load("my_model:pair")
    first, second = batches_for(loaded)
    assert torch.equal(loaded.forward(loaded.model, first), loaded.forward(loaded.model, second))


def test_batches_follow_the_model_into_another_type() -> None:
    loaded = setpoint.load("my_model:with_batches", dtype="float64")
    assert loaded.forward(loaded.model, batches_for(loaded)[0]).dtype == torch.float64


def test_a_model_without_batches_says_how_to_give_them() -> None:
    with pytest.raises(InputError, match=r"let the factory return \(model, batches\)"):
        batches_for(setpoint.load("my_model:build"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("my_modle:build", r"no module 'my_modle' for my_modle:build; it is looked for in"),
        ("my_model:biuld", r"my_model has no 'biuld'; nearest: build"),
        ("my_model:needs", r"my_model:needs needs arguments \(width\)"),
        ("my_model:fails", r"failed while building the model: RuntimeError: .* \(.*line \d+\)"),
        ("my_model:wrong", r"returned a dict; expected a torch\.nn\.Module, \(model, batches\)"),
        ("my_model:wrong_tuple", r"returned a tuple of 2; expected"),
        ("my_model:no_batches", r"returned no batches"),
        ("my_model:bad_loss", r"returned a float as loss"),
        ("my_model:number", r"my_model:number is a int; expected a function"),
        ("broken_model:build", r"could not be imported: ZeroDivisionError: .* \(broken_model\.py, line 2\)"),
        ("absent_model:build", r"could not be imported: ModuleNotFoundError: No module named 'no_such_library'"),
        ("syntax_model:build", r"could not be imported: SyntaxError"),
        ("my_model", r"my_model\.py is Python; name the function .*: my_model:FUNCTION"),
        ("my_model.py", r"my_model\.py is Python; name the function .*: my_model:FUNCTION"),
    ],
)
def test_a_mistake_is_one_line(source: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        setpoint.load(source)
    assert "\n" not in str(error.value)
