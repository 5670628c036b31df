"""A layer with example inputs, and the few ways in which the checks of `check_layer` run it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from setpoint.running import tensors_of

SEED = 7


class Broken(Exception):
    """A check failed; the message says what was seen and what to do."""


@dataclass(frozen=True, slots=True)
class Case:
    """What is checked.

    Args:
        make: Makes a fresh layer.
        inputs: Positional arguments of its call.
        batch_axis: The axis of every input tensor that counts examples, None if there is none.
        feature_axis: The axis of the first input whose size is fixed, None if none is.
    """

    make: Callable[[], nn.Module]
    inputs: tuple[Any, ...]
    batch_axis: int | None = 0
    feature_axis: int | None = -1

    def layer(self) -> nn.Module:
        """A fresh layer in training mode, whose parameters are not at the special values of an initialisation."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            layer = self.make().train()
        if not isinstance(layer, nn.Module):
            raise TypeError(f"expected a function that makes a torch.nn.Module, got one that makes {type(layer)}")
        scramble(layer)
        return layer

    def floats(self, inputs: tuple[Any, ...] | None = None) -> list[Tensor]:
        """The floating-point tensors among the inputs."""
        return [t for t in tensors_of(self.inputs if inputs is None else inputs) if t.is_floating_point()]


@dataclass(slots=True)
class Run:
    """Outputs, and the gradients of a fixed weighted sum of them."""

    outputs: list[Tensor]
    input_gradients: list[Tensor | None]
    parameter_gradients: dict[str, Tensor | None]

    @property
    def gradients(self) -> list[Tensor]:
        """All gradients that there are."""
        found = [*self.input_gradients, *self.parameter_gradients.values()]
        return [g for g in found if g is not None]


def scramble(layer: nn.Module, by: float = 0.1) -> None:
    """Add a fixed pattern to every floating-point parameter, so that gains of 1 and biases of 0 can't hide a fault."""
    with torch.no_grad():
        for index, parameter in enumerate(layer.parameters()):
            if parameter.is_floating_point():
                parameter.add_(by * pattern(parameter, index))


def pattern(like: Tensor, offset: int = 0) -> Tensor:
    """Numbers between -1 and 1 in the shape, dtype and place of a tensor; the same ones every time."""
    steps = torch.arange(like.numel(), dtype=torch.float64, device="cpu")
    return torch.cos(1.3 * steps + offset).reshape(like.shape).to(like.device, like.dtype)


def cast(inputs: tuple[Any, ...], change: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
    """The inputs with every floating-point tensor changed."""
    return tree_map_only(Tensor, lambda t: change(t) if t.is_floating_point() else t, inputs)  # type: ignore[no-any-return]


def each(inputs: tuple[Any, ...], change: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
    """The inputs with every tensor changed."""
    return tree_map_only(Tensor, change, inputs)  # type: ignore[no-any-return]


def outputs_of(layer: Callable[..., Any], inputs: tuple[Any, ...]) -> list[Tensor]:
    """The floating-point tensors that a call returns; what is drawn at random is the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        found = [t for t in tensors_of(layer(*inputs)) if t.is_floating_point()]
    if not found:
        raise Broken("its call returns no floating-point tensor: return one, or a tuple with one in it")
    return found


def run(layer: nn.Module, inputs: tuple[Any, ...], call: Callable[..., Any] | None = None) -> Run:
    """Forward and backward; ``call`` stands in for the layer where that is wrapped."""
    leaves = cast(inputs, lambda t: t.detach().clone(memory_format=torch.preserve_format).requires_grad_())
    layer.zero_grad()
    outputs = outputs_of(layer if call is None else call, leaves)
    loss(outputs).backward()  # type: ignore[no-untyped-call]
    given = [t.grad for t in tensors_of(leaves) if t.is_floating_point()]
    return Run([o.detach() for o in outputs], given, {name: p.grad for name, p in layer.named_parameters()})


def loss(outputs: list[Tensor]) -> Tensor:
    """A sum of all outputs with weights that differ, so that no gradient cancels by symmetry."""
    return torch.stack([(o.double() * pattern(o).double()).sum() for o in outputs]).sum()


def expect_close(got: Run | list[Tensor], wanted: Run | list[Tensor], tolerance: float, what: str) -> None:
    """Every tensor within ``tolerance`` of the largest entry of its counterpart."""
    if isinstance(got, Run) and isinstance(wanted, Run):
        expect_close(got.outputs, wanted.outputs, tolerance, what)
        expect_close(got.gradients, wanted.gradients, tolerance, f"{what} (gradients)")
        return
    assert isinstance(got, list)
    assert isinstance(wanted, list)
    if len(got) != len(wanted):
        raise Broken(f"{what}: expected {len(wanted)} tensors, got {len(got)}")
    for a, b in zip(got, wanted, strict=True):
        if a.shape != b.shape:
            raise Broken(f"{what}: expected the shape {tuple(b.shape)}, got {tuple(a.shape)}")
        if not b.numel():
            continue
        off = float((a.detach().double() - b.detach().double()).abs().max())
        scale = float(b.detach().double().abs().max()) or 1.0
        if not off <= tolerance * scale:
            raise Broken(f"{what}: off by {off / scale:.1e} of the largest entry, expected at most {tolerance:.0e}")


def expect_no_nan(tensors: list[Tensor], what: str, *, finite: bool = True) -> None:
    """No NaN, and with ``finite`` no infinity either."""
    for tensor in tensors:
        bad = ~torch.isfinite(tensor) if finite else torch.isnan(tensor)
        if bool(bad.any()):
            raise Broken(f"{what}: {int(bad.sum())} of {bad.numel()} numbers are {'not finite' if finite else 'NaN'}")
