"""Each check of `check_layer` is shown a layer with the one fault that it is there for, and has to name it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.testing import LAYER_CHECKS, ConformanceError, check_layer
from setpoint.testing.layer_case import Case
from setpoint.testing.layer_checks import CHECKS, SLOW_CHECKS

INPUTS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Scale(nn.Module):
    """A gain per channel: the smallest layer that has everything."""

    def __init__(self, dim: int = 6) -> None:
        super().__init__()
        self.dim = dim
        self.weight = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and x.shape[-1] != self.dim:
            raise InputError(f"Scale: expected an input of shape (*, {self.dim}), got {tuple(x.shape)}")
        return self.compute(x)

    def compute(self, x: Tensor) -> Tensor:
        return x * self.weight

    def extra_repr(self) -> str:
        return f"{self.dim}"


def all_but(*checks: str) -> dict[str, str]:
    return {name: "not looked at here" for name in LAYER_CHECKS if name not in checks}


def with_compute(compute: Callable[[Any, Tensor], Tensor], **more: Any) -> type[Scale]:
    return type("Wrong", (Scale,), {"compute": compute, **more})


class WrongSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 3


class WrongCurvature(torch.autograd.Function):
    """The first derivative of x³ is right; as its backward detaches, the second comes out as zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * 3 * x.detach() ** 2


class NoVmap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def remembers(self: Any, x: Tensor) -> Tensor:
    self.last = float(x.detach().sum()) if x.device.type == "cpu" else 0.0
    return x * self.weight


def overflows_in_half(self: Any, x: Tensor) -> Tensor:
    """Goes through float16 wherever a product comes out in less than float32."""
    product = x @ torch.eye(6, dtype=x.dtype)
    narrow = product if product.dtype == x.dtype else (product * 1e6).half().float()
    return narrow * self.weight


def counts_in_eval(self: Any, x: Tensor) -> Tensor:
    self.calls += 1
    return x * self.weight


def reads_memory(self: Any, x: Tensor) -> Tensor:
    return x.as_strided(x.shape, (6, 1)) * self.weight if x.numel() else x * self.weight


class Counting(Scale):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    compute = counts_in_eval


class Forgetful(Scale):
    """Keeps what matters in an attribute, which a state dict does not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = float(torch.rand(()) * 0 + Forgetful.made)
        Forgetful.made += 1.0

    made = 1.0

    def compute(self, x: Tensor) -> Tensor:
        return x * self.weight * self.factor


class Sharing(Scale):
    """A tensor of the module lives on in its copies."""

    def __deepcopy__(self, memo: Any) -> Sharing:
        copy = Sharing()
        copy.weight = self.weight
        return copy


class Eager(Scale):
    """Looks at numbers while it is made."""

    def __init__(self) -> None:
        super().__init__()
        self.size = int(self.weight.sum().item())


class Mute(Scale):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)

    def extra_repr(self) -> str:
        return ""


class HalfReset(Scale):
    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.weight[:3] = 1.0


class Awake(Scale):
    def train(self, mode: bool = True) -> Awake:
        return super().train(True)


class OnlyOnCpu(Scale):
    def compute(self, x: Tensor) -> Tensor:
        return x * self.weight + (0.0 if float(x.detach().sum()) < 1e9 else 1.0)


class Unused(Scale):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Parameter(torch.ones(2))


class Image(nn.Module):
    """Wrong for images whose channels lie last in memory."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (2.0 if x.is_contiguous() else 3.0)


def always_new(self: Any, x: Tensor) -> Tensor:
    """A function of how often it was called, as a recomputation is."""
    self.__dict__.setdefault("count", []).append(1)
    return x * self.weight * torch.ones_like(x).mul(float(len(self.count))) * x


FAULTS: dict[str, tuple[type[nn.Module] | Callable[[], nn.Module], str]] = {
    "gradients": (Unused, "the parameter 'spare' gets no gradient"),
    "dtypes": (with_compute(lambda self, x: (x * self.weight).float()), "float64 inputs give torch.float32 outputs"),
    "autocast": (with_compute(overflows_in_half), "under autocast: .* of 24 numbers are not finite"),
    "large": (with_compute(lambda self, x: x.exp() / x.exp().sum() * self.weight), r"inputs of 1e\+15: .* are NaN"),
    "constant": (with_compute(lambda self, x: (x - x.mean()) / x.std() * self.weight), "inputs that are all 0.0"),
    "gradcheck": (with_compute(lambda self, x: WrongSlope.apply(x) * self.weight), "GradcheckError"),
    "forward_mode": (with_compute(lambda self, x: WrongSlope.apply(x) * self.weight), "check 'forward_mode' with"),
    "gradgradcheck": (with_compute(lambda self, x: WrongCurvature.apply(x) * self.weight), "GradcheckError"),
    "batch_of_one": (with_compute(lambda self, x: x.squeeze(0) * self.weight), r"a batch of 1: the whole batch gives"),
    "empty_batch": (with_compute(lambda self, x: x * (1 / x.shape[0]) * self.weight), "ZeroDivisionError"),
    "strides": (with_compute(reads_memory), "inputs with gaps in memory: off by"),
    "channels_last": (Image, "channels-last inputs: off by"),
    "state_dict": (Forgetful, "after loading its state: off by"),
    "copying": (Sharing, "a copy by deepcopy shares memory"),
    "meta": (Eager, "fails the check 'meta' with"),
    "representation": (lambda: Mute(6), r"extra_repr\(\) says nothing: show dim"),
    "reset_parameters": (HalfReset, "leaves something of the old value in 'weight'"),
    "modes": (Awake, r"eval\(\) leaves a part in training mode"),
    "state": (with_compute(remembers), "a call changes the attribute 'last'"),
    "errors": (type("Wrong", (Scale,), {"forward": Scale.compute}), "a size of 7 instead of 6 raises RuntimeError"),
    "compile": (OnlyOnCpu, "fails the check 'compile' with"),
    "vectorize": (with_compute(lambda self, x: NoVmap.apply(x) * self.weight), "fails the check 'vectorize' with"),
    "checkpointing": (with_compute(always_new), "with activation checkpointing .gradients.: off by"),
    "inductor": (OnlyOnCpu, "fails the check 'inductor' with"),
    "export": (OnlyOnCpu, "fails the check 'export' with"),
}  # fmt: skip


def test_there_is_a_fault_for_every_check() -> None:
    assert {*FAULTS, "ddp"} == set(LAYER_CHECKS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("check", FAULTS)
def test_planted_fault_is_caught_by_its_check(check: str) -> None:
    make, message = FAULTS[check]
    inputs = torch.randn(2, 3, 4, 5) if check == "channels_last" else INPUTS
    with pytest.raises(ConformanceError, match=message):
        check_layer(make, inputs, except_=all_but(check), slow=True)


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(name, marks=pytest.mark.slow if name in SLOW_CHECKS else ())
        for name in FAULTS
        if name != "channels_last"
    ],
)
def test_sound_layer_passes_each_check(check: str) -> None:
    ({**CHECKS, **SLOW_CHECKS}[check])(Case(Scale, (INPUTS,)))


def test_in_place_layer_is_caught_writing_to_its_input() -> None:
    wrong = with_compute(lambda self, x: x.mul_(2.0) * self.weight)
    with pytest.raises(ConformanceError, match="a call changes its input"):
        check_layer(wrong, INPUTS, except_=all_but("state"))


def test_layer_that_counts_in_eval_is_caught() -> None:
    with pytest.raises(ConformanceError, match="a call in eval changes the buffer 'calls'"):
        check_layer(Counting, INPUTS, except_=all_but("modes"))


def test_error_that_does_not_name_the_sizes_is_caught() -> None:
    def refuse(self: Any, x: Tensor) -> Tensor:
        raise ValueError("bad shape")

    with pytest.raises(ConformanceError, match="'bad shape': name both"):
        check_layer(type("Wrong", (Scale,), {"forward": refuse}), INPUTS, except_=all_but("errors"))


def test_layer_that_takes_any_size_is_caught_unless_said() -> None:
    wrong = type("Wrong", (Scale,), {"forward": lambda self, x: x * self.weight.mean()})
    with pytest.raises(ConformanceError, match="is taken without a word"):
        check_layer(wrong, INPUTS, except_=all_but("errors"))
    check_layer(wrong, INPUTS, feature_axis=None, except_=all_but("errors"))


def test_two_processes_agree_with_one_and_find_what_one_does_not() -> None:
    check_layer(nn.Linear(6, 5), INPUTS, except_=all_but("ddp"))
    idle = nn.Linear(6, 5)
    idle.register_parameter("spare", nn.Parameter(torch.ones(2)))
    with pytest.raises(ConformanceError, match="process 0 fails: RuntimeError: Expected to have finished reduction"):
        check_layer(idle, INPUTS, except_=all_but("ddp"))
    check_layer(nn.Linear(6, 5), INPUTS, except_=all_but("ddp"))


def test_torch_layers_pass_the_whole_list_but_for_their_errors() -> None:
    check_layer(nn.Linear(6, 5), INPUTS, except_={"errors": "torch raises a RuntimeError"})


def test_waiver_needs_a_reason_and_a_name_that_exists() -> None:
    with pytest.raises(InputError, match="no check is called 'grad_check'; did you mean 'gradcheck'"):
        check_layer(Scale, INPUTS, except_={"grad_check": "why not"})
    with pytest.raises(InputError, match="expected a reason for leaving out 'ddp'"):
        check_layer(Scale, INPUTS, except_={"ddp": " "})


def test_checks_leave_the_random_state_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    check_layer(lambda: nn.Dropout(0.5), INPUTS, feature_axis=None, except_=all_but("gradients", "state", "copying"))
    assert torch.equal(torch.get_rng_state(), before)
