"""Maps on their way to layers deep inside a model."""

from __future__ import annotations

from threading import Thread

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from setpoint.errors import InputError
from setpoint.nn import Conditioned, condition, conditioned, keep_conditions, nearest


class Reads(nn.Module):
    """Multiplies by a map, in the size of its input."""

    def __init__(self, name: str = "mask") -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return x * nearest(condition(self.name, "Reads"), x.shape[2:])


class Checkpointed(nn.Module):
    def __init__(self, block: nn.Module, **options: object) -> None:
        super().__init__()
        self.block = block
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False, **self.options)


def network(*names: str) -> nn.Sequential:
    """A convolution that halves the size, a layer for each name, another convolution."""
    torch.manual_seed(0)
    readers = [Reads(name) for name in names or ("mask",)]
    return nn.Sequential(nn.Conv2d(1, 2, 2, stride=2), *readers, nn.Conv2d(2, 1, 1))


X = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(1))
A = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(2))
B = 1 - A


def by_hand(model: nn.Sequential, *maps: Tensor) -> Tensor:
    x = model[0](X)
    for values in maps:
        x = x * values[:, :, ::2, ::2]
    return model[-1](x)


def gradient(model: nn.Module, y: Tensor) -> Tensor:
    model.zero_grad()
    y.square().sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


# who finds which map -------------------------------------------------------------------------------------------------


def test_map_reaches_the_layer_in_its_size() -> None:
    model = network()
    with conditioned(mask=A):
        y = model(X)
    torch.testing.assert_close(y, by_hand(model, A))


def test_several_maps_go_each_to_its_layer() -> None:
    model = network("mask", "segmap")
    with conditioned(mask=A, segmap=B):
        y = model(X)
    torch.testing.assert_close(y, by_hand(model, A, B))


def test_inner_maps_go_first_and_outer_ones_stay() -> None:
    model = network("mask", "segmap")
    with conditioned(mask=A, segmap=A):
        with conditioned(segmap=B):
            torch.testing.assert_close(model(X), by_hand(model, A, B))
        torch.testing.assert_close(model(X), by_hand(model, A, A))
        with conditioned(segmap=None), pytest.raises(InputError, match="the map 'segmap', found only mask"):
            model(X)


def test_nothing_is_left_behind_even_after_an_error() -> None:
    model = network()
    with pytest.raises(RuntimeError, match="broke"), conditioned(mask=A):
        raise RuntimeError("broke")
    with pytest.raises(InputError, match=r"Reads: expected the map 'mask', found none; .*conditioned\(mask=...\)"):
        model(X)


def test_each_thread_has_maps_of_its_own() -> None:
    seen = []

    def look() -> None:
        try:
            condition("mask", "Reads")
        except InputError as error:
            seen.append(str(error))

    with conditioned(mask=A):
        thread = Thread(target=look)
        thread.start()
        thread.join()
    assert "found none" in seen[0]


def test_what_is_no_tensor_is_refused() -> None:
    with pytest.raises(TypeError, match="a tensor as mask, got list"), conditioned(mask=[1.0]):  # type: ignore[arg-type]
        pass


# a module whose maps are arguments -----------------------------------------------------------------------------------


def test_conditioned_module_takes_maps_as_keywords_and_passes_the_rest() -> None:
    model = network()
    wrapped = Conditioned(model, "mask")
    torch.testing.assert_close(wrapped(X, mask=A), by_hand(model, A))
    torch.testing.assert_close(wrapped(input=X, mask=A), by_hand(model, A))
    assert [*wrapped.state_dict()] == [f"module.{name}" for name in model.state_dict()]
    assert repr(wrapped).startswith("Conditioned(\n  'mask'\n")


def test_conditioned_module_says_which_map_is_missing() -> None:
    with pytest.raises(
        InputError, match=r"the map 'mask' as a keyword, got masks; call the model as in model\(x, mask"
    ):
        Conditioned(network(), "mask")(X, masks=A)
    with pytest.raises(InputError, match="names of maps, such as 'mask'"):
        Conditioned(network())


# other ways to run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [False, True], ids=["around", "inside"])
@pytest.mark.parametrize("recomputed", [False, True], ids=["plain", "checkpointed"])
def test_compiled_code_is_one_graph_and_follows_the_map(wrapped: bool, recomputed: bool) -> None:
    model = network()
    layer = Checkpointed(model) if recomputed else model
    torch._dynamo.reset()
    try:
        compiled = torch.compile(Conditioned(layer, "mask") if wrapped else layer, fullgraph=True, backend="aot_eager")
        for values in (A, B):
            if wrapped:
                y = compiled(X, mask=values)
            else:
                with conditioned(mask=values):
                    y = compiled(X)
            torch.testing.assert_close(y, by_hand(model, values))
            torch.testing.assert_close(gradient(model, y), gradient(model, by_hand(model, values)))
    finally:
        torch._dynamo.reset()


def test_second_map_needs_no_second_compilation() -> None:
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    torch._dynamo.reset()
    try:
        compiled = torch.compile(Conditioned(network(), "mask"), fullgraph=True, backend=counter)
        compiled(X, mask=A)
        compiled(X, mask=B)
        assert counter.frame_count == 1
    finally:
        torch._dynamo.reset()


def test_exported_program_has_the_map_as_an_input() -> None:
    model = network()
    program = torch.export.export(Conditioned(model, "mask"), (X,), {"mask": A})
    torch.testing.assert_close(program.module()(X, mask=B), by_hand(model, B))


def test_checkpointing_keeps_the_maps_of_each_call() -> None:
    model = network()
    recomputed = Checkpointed(model, context_fn=keep_conditions)
    with conditioned(mask=A):
        first = recomputed(X)
    with conditioned(mask=B):
        second = recomputed(X)
        got = gradient(model, first + 2 * second)
    torch.testing.assert_close(got, gradient(model, by_hand(model, A) + 2 * by_hand(model, B)))


def test_checkpointing_keeps_the_maps_through_two_backward_passes() -> None:
    model = network()
    with conditioned(mask=A):
        y = Checkpointed(model, context_fn=keep_conditions)(X).square().sum()
    y.backward(retain_graph=True)
    y.backward()
    got = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(got, 2 * gradient(model, by_hand(model, A)))


def test_checkpointing_around_the_whole_conditioned_module_needs_nothing() -> None:
    model = network()
    y = checkpoint(Conditioned(model, "mask"), X, mask=A, use_reentrant=False)
    torch.testing.assert_close(gradient(model, y), gradient(model, by_hand(model, A)))


def test_checkpointing_without_contexts_is_refused_even_where_some_map_is_in_place() -> None:
    with conditioned(mask=A):
        y = Checkpointed(network())(X)
    with pytest.raises(InputError, match=r"context_fn=setpoint\.nn\.keep_conditions"):
        y.sum().backward(retain_graph=True)
    with conditioned(mask=B), pytest.raises(InputError, match=r"context_fn=setpoint\.nn\.keep_conditions"):
        y.sum().backward()


# sizes ---------------------------------------------------------------------------------------------------------------


def test_labels_stay_labels_at_every_size() -> None:
    board = torch.tensor([[0, 3], [3, 0]])[None, None]
    for size in ((4, 4), (3, 5), (1, 1)):
        grown = nearest(board, torch.Size(size))
        assert grown.dtype == torch.long
        assert grown.shape == (1, 1, *size)
        assert set(grown.unique().tolist()) <= {0, 3}
    assert torch.equal(nearest(board, torch.Size((4, 4))), board.repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize("size", [(5, 3), (2, 2), (13, 8)])
def test_nearest_is_interpolate_for_every_dtype(size: tuple[int, int]) -> None:
    wanted = nn.functional.interpolate(A, size, mode="nearest")
    assert torch.equal(nearest(A, torch.Size(size)), wanted)
    assert torch.equal(nearest(A > 0.5, torch.Size(size)), wanted > 0.5)
    assert torch.equal(nearest((9 * A).long(), torch.Size(size)), (9 * wanted).long())
