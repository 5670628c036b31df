"""Autograd functions with a backward of their own, inside norms that are read by what they do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from setpoint.nn import DyT, RMSNorm
from setpoint.surgery import Anatomy


def batch() -> Tensor:
    return torch.linspace(-3, 3, 160).sin().reshape(2, 5, 16)


def test_a_norm_of_setpoint_with_a_backward_of_its_own_is_read() -> None:
    def with_gradients(model: nn.Module, x: Tensor) -> Any:
        with torch.enable_grad():
            return model(x)

    model = nn.Sequential(RMSNorm(16), nn.Linear(16, 16), DyT(16), nn.Linear(16, 4))
    anatomy = Anatomy.trace(model, batch(), forward=with_gradients)
    assert anatomy.unread == ()
    assert anatomy.norms["0"].kind == "rms"


def test_a_custom_function_inside_a_norm_that_was_read_is_not_unread() -> None:
    class Root(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return torch.rsqrt(x)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            return grads[0]

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.linspace(0.5, 2, 16))

        def forward(self, x: Tensor) -> Tensor:
            return x * Root.apply(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight  # type: ignore[no-any-return, no-untyped-call]

    anatomy = Anatomy.trace(nn.Sequential(Norm(), nn.Linear(16, 4)), batch())
    assert (anatomy.norms["0"].kind, anatomy.norms["0"].eps) == ("rms", 1e-6)
    assert anatomy.unread == ()
