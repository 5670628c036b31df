"""Tracing leaves the model as it was: hooks, modes, random state, buffers and outputs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from setpoint.running import unwrap
from setpoint.surgery import Anatomy


class Net(nn.Module):
    """Batch norm and dropout, which both change something when they run in training mode."""

    seen: Tensor

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.inner = nn.Conv2d(4, 4, 3, padding=1)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(4, 5)
        self.register_buffer("seen", torch.zeros(()))
        self.fails = fails

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        x = self.drop(torch.relu(self.norm(self.conv(x))))
        x = x + self.inner(x)
        if self.fails:
            raise RuntimeError("broken on purpose")
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


def state(model: nn.Module) -> dict[str, Any]:
    """Everything a trace could disturb."""
    return {
        "hooks": [[len(getattr(m, kind)) for kind in HOOKS] for m in model.modules()],
        "modes": [m.training for m in model.modules()],
        "tensors": {name: (id(t), t.clone()) for name, t in (*model.named_parameters(), *model.named_buffers())},
        "gradients": [p.grad for p in model.parameters()],
        "random": (random.getstate(), repr(np.random.get_state()), torch.get_rng_state()),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "grad mode": torch.is_grad_enabled(),
        "functions": [vars(nn.functional)[name] for name in ("has_torch_function", "has_torch_function_unary")],
        "autograd functions": vars(torch.autograd.Function)["apply"],
        "hooks of all modules": len(torch.nn.modules.module._global_forward_hooks),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    torch.testing.assert_close(after["random"][2], before["random"][2], rtol=0, atol=0)
    assert after["random"][:2] == before["random"][:2]
    for name, (identity, tensor) in before["tensors"].items():
        assert after["tensors"][name][0] == identity, name
        assert torch.equal(after["tensors"][name][1], tensor), name
    plain = ("hooks", "modes", "gradients", "fast path", "grad mode", "functions", "autograd functions")
    for key in (*plain, "hooks of all modules"):
        assert after[key] == before[key], key


@pytest.fixture
def image() -> Iterator[Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        yield torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("fails", [True, False], ids=["raising", "passing"])
def test_nothing_is_left_behind(image: Tensor, training: bool, fails: bool) -> None:
    model = Net(fails).train(training)
    model.norm.training = not training  # mixed modes must come back as they were
    before = state(model)
    if fails:
        with pytest.raises(RuntimeError, match="broken on purpose"):
            Anatomy.trace(model, image)
    else:
        Anatomy.trace(model, image)
    assert_same(before, state(model))


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_outputs_are_the_same_bit_for_bit(image: Tensor, training: bool) -> None:
    torch.manual_seed(3)
    traced = Net().train(training)
    torch.manual_seed(3)
    plain = Net().train(training)
    Anatomy.trace(traced, image)
    torch.manual_seed(5)
    after = traced(image)
    torch.manual_seed(5)
    assert torch.equal(after, plain(image))
    assert all(torch.equal(a, b) for a, b in zip(traced.buffers(), plain.buffers(), strict=True))


def test_a_training_model_reads_like_an_eval_model(image: Tensor) -> None:
    model = Net()
    training = Anatomy.trace(model.train(), image)
    evaluated = Anatomy.trace(model.eval(), image)
    assert training.structure == evaluated.structure
    assert training.blocks == evaluated.blocks
    assert training.feeds == evaluated.feeds


def test_own_hooks_stay_and_run(image: Tensor) -> None:
    model, heard = Net().eval(), []
    model.norm.register_forward_hook(lambda *_: heard.append(1))
    before = state(model)
    Anatomy.trace(model, image)
    assert_same(before, state(model))
    model(image)
    assert len(heard) == 2


def test_encoder_fast_path_is_restored() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    x = torch.linspace(-1, 1, 80).reshape(2, 5, 8)
    with torch.no_grad():
        expected = model(x)
        Anatomy.trace(model, x)
        assert torch.equal(model(x), expected)
    assert torch.backends.mha.get_fastpath_enabled()


def test_batches_as_tensor_tuple_mapping_and_own_forward(image: Tensor) -> None:
    model = Net().eval()
    read = [
        Anatomy.trace(model, image),
        Anatomy.trace(model, (image,)),
        Anatomy.trace(model, {"x": image}),
        Anatomy.trace(model, {"pixels": image}, forward=lambda m, b: m(b["pixels"])),
    ]
    assert all(anatomy.blocks == read[0].blocks for anatomy in read)
    assert len(read[0].blocks) == 1


def test_a_compiled_wrapper_is_looked_through(image: Tensor) -> None:
    model = Net().eval()
    compiled: Any = torch.compile(model, backend="eager")
    assert unwrap(compiled) is model
    assert Anatomy.trace(compiled, image).feeds == Anatomy.trace(model, image).feeds


def test_data_parallel_wrappers_are_looked_through(image: Tensor, tmp_path: Path) -> None:
    model = Net().eval()
    truth = Anatomy.trace(model, image)
    assert Anatomy.trace(nn.DataParallel(model), image).blocks == truth.blocks
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped: Any = torch.compile(nn.parallel.DistributedDataParallel(model), backend="eager")
        assert unwrap(wrapped) is model
        assert Anatomy.trace(wrapped, image).blocks == truth.blocks
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("fails", [True, False], ids=["raising", "passing"])
def test_nothing_is_left_behind_a_scripted_part(image: Tensor, fails: bool) -> None:
    model = Net(fails).eval()
    model.inner = torch.jit.script(model.inner)
    before = state(model)
    if fails:
        with pytest.raises(RuntimeError, match="broken on purpose"):
            Anatomy.trace(model, image)
    else:
        anatomy = Anatomy.trace(model, image)
        assert [part.name for part in anatomy.unread] == ["inner"]
        assert [(b.role, b.writer) for block in anatomy.blocks for b in block.branches] == [("other", None)]
        assert [part.name for part in anatomy.unwritten] == ["inner"]
    assert_same(before, state(model))


def test_bfloat16_is_read_like_float32() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    x = torch.linspace(-1, 1, 160).reshape(2, 5, 16)
    full = Anatomy.trace(model, x)
    half = Anatomy.trace(model.bfloat16(), x.bfloat16())
    assert half.feeds == full.feeds
    assert half.blocks == full.blocks
