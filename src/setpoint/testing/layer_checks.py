"""The checks of `check_layer`: each a function of a case that returns, or says what is broken."""

from __future__ import annotations

import inspect
import pickle
import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from setpoint.running import tensors_of
from setpoint.testing.layer_case import (
    Broken,
    Case,
    Run,
    cast,
    each,
    expect_close,
    expect_no_nan,
    loss,
    outputs_of,
    run,
    scramble,
)
from setpoint.testing.pair import gradients_on_two

SAME = 2e-5
"""How far two float32 computations of one thing may lie apart, relative to the largest entry."""

HALF_TOLERANCE = {torch.bfloat16: 1.5e-1, torch.float16: 2e-2}
LARGE = {torch.float32: 1e15, torch.float16: 3e4}
MANY = 150
"""The most numbers of which derivatives are taken entry by entry; beyond it, along random directions."""


# numbers -------------------------------------------------------------------------------------------------------------


def gradients(case: Case) -> None:
    """Outputs and gradients are finite, and every parameter and floating-point input gets a gradient."""
    made = run(case.layer(), case.inputs)
    expect_no_nan(made.outputs + made.gradients, "example inputs")
    for name, gradient in made.parameter_gradients.items():
        if gradient is None:
            raise Broken(f"the parameter {name!r} gets no gradient: use it in every call, or make it a buffer")
    if any(gradient is None for gradient in made.input_gradients):
        raise Broken("an input gets no gradient: don't detach it")


def dtypes(case: Case) -> None:
    """In float64, bfloat16 and float16 the output has the input's dtype and is near the float64 result."""
    exact = run(case.layer().double(), cast(case.inputs, Tensor.double))
    _near(exact, exact, torch.float64, 0.0)
    _near(run(case.layer(), case.inputs), exact, torch.float32, 1e-3)
    for dtype, tolerance in HALF_TOLERANCE.items():
        rounded = cast(case.inputs, lambda t, dtype=dtype: t.to(dtype))  # type: ignore[misc]
        layer = case.layer().to(dtype)
        near = run(deepcopy(layer).double(), cast(rounded, Tensor.double))
        _near(run(layer, rounded), near, dtype, tolerance)


def _near(got: Run, wanted: Run, dtype: torch.dtype, tolerance: float) -> None:
    for output in got.outputs:
        if output.dtype != dtype:
            raise Broken(f"{dtype} inputs give {output.dtype} outputs: cast back at the end, as in y.to(x.dtype)")
    expect_no_nan(got.outputs + got.gradients, f"{dtype} inputs")
    expect_close(got, wanted, tolerance, f"{dtype} against float64")


def autocast(case: Case) -> None:
    """Under autocast to bfloat16, forward and backward are finite and near float32."""
    layer = case.layer()
    plain = run(layer, case.inputs)

    def call(*args: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return layer(*args)

    mixed = run(layer, case.inputs, call)
    expect_no_nan(mixed.outputs + mixed.gradients, "under autocast")
    expect_close(mixed, plain, HALF_TOLERANCE[torch.bfloat16], "under autocast against float32")


def large(case: Case) -> None:
    """Inputs of 1e15 in float32, and near the top of float16, give no NaN."""
    for dtype, size in LARGE.items():
        inputs = cast(case.inputs, lambda t, s=size, d=dtype: (t / t.abs().max() * s).to(d))  # type: ignore[misc]
        made = run(case.layer().to(dtype), inputs)
        expect_no_nan(made.outputs + made.gradients, f"{dtype} inputs of {size:.0e}", finite=False)


def constant(case: Case) -> None:
    """Inputs that are all zero, or all one number, give finite outputs and gradients."""
    for value in (0.0, 3.7):
        made = run(case.layer(), cast(case.inputs, lambda t, v=value: torch.full_like(t, v)))  # type: ignore[misc]
        expect_no_nan(made.outputs + made.gradients, f"inputs that are all {value}")


def gradcheck(case: Case) -> None:
    """First derivatives agree with finite differences in float64."""
    function, arguments = _function(case)
    fast = sum(a.numel() for a in arguments) > MANY
    torch.autograd.gradcheck(function, arguments, fast_mode=fast, check_undefined_grad=False)


def forward_mode(case: Case) -> None:
    """Forward-mode derivatives agree with finite differences in float64."""
    function, arguments = _function(case)
    options: dict[str, Any] = {
        "check_forward_ad": True,
        "check_backward_ad": False,
        "check_undefined_grad": False,
        "check_batched_grad": False,
    }
    torch.autograd.gradcheck(function, arguments, fast_mode=True, **options)


def gradgradcheck(case: Case) -> None:
    """Second derivatives agree with finite differences in float64."""
    function, arguments = _function(case)
    torch.autograd.gradgradcheck(function, arguments, fast_mode=True)


def _function(case: Case) -> tuple[Callable[..., Any], list[Tensor]]:
    """The layer as a function of its floating-point inputs and parameters, in float64."""
    layer = case.layer().double()
    inputs = cast(case.inputs, Tensor.double)
    given = case.floats(inputs)
    names = [name for name, _ in layer.named_parameters()]
    arguments = [t.detach().clone().requires_grad_() for t in (*given, *layer.parameters())]

    def function(*tensors: Tensor) -> Any:
        ahead = iter(tensors[: len(given)])
        replaced = cast(inputs, lambda _: next(ahead))
        call = lambda *args: functional_call(layer, dict(zip(names, tensors[len(given) :], strict=True)), args)  # noqa: E731
        return tuple(outputs_of(call, replaced))

    return function, arguments


# shapes and strides --------------------------------------------------------------------------------------------------


def batch_of_one(case: Case) -> None:
    """One example alone gives finite outputs and gradients, of the batch's shape but for the one axis."""
    _batch(case, 1)


def empty_batch(case: Case) -> None:
    """No example at all gives an empty output, forward and backward."""
    _batch(case, 0)


def _batch(case: Case, size: int) -> None:
    if case.batch_axis is None:
        return
    axis = case.batch_axis
    whole = outputs_of(case.layer(), case.inputs)
    made = run(case.layer(), each(case.inputs, lambda t: t.narrow(axis, 0, size)))
    expect_no_nan(made.outputs + made.gradients, f"a batch of {size}")
    for output, full in zip(made.outputs, whole, strict=True):
        if output.dim() != full.dim() or output.numel() * _examples(case) != full.numel() * size:
            raise Broken(
                f"a batch of {size}: the whole batch gives {tuple(full.shape)}, it gives {tuple(output.shape)}"
            )


def _examples(case: Case) -> int:
    assert case.batch_axis is not None
    return int(tensors_of(case.inputs)[0].shape[case.batch_axis])


def strides(case: Case) -> None:
    """Inputs that are views with gaps or with axes in another order give the same numbers, as do expanded gradients."""
    layer = case.layer()
    wanted = outputs_of(layer, case.inputs)

    def gaps(t: Tensor) -> Tensor:
        return torch.stack([t, t], -1)[..., 0] if t.dim() else t

    def turned(t: Tensor) -> Tensor:
        return t.movedim(-1, 0).contiguous().movedim(0, -1) if t.dim() > 1 else t

    for what, change in {"gaps in memory": gaps, "axes in another order": turned}.items():
        changed = each(case.inputs, change)
        expect_close(outputs_of(layer, changed), wanted, SAME, f"inputs with {what}")
    made = run(layer, each(case.inputs, gaps))
    expect_no_nan(made.gradients, "inputs with gaps in memory")
    leaves = cast(case.inputs, lambda t: t.detach().clone().requires_grad_())
    torch.stack([o.sum() for o in outputs_of(layer, leaves)]).sum().backward()  # type: ignore[no-untyped-call]


def channels_last(case: Case) -> None:
    """Image inputs in the channels-last format give the same numbers."""
    if not any(t.dim() == 4 for t in case.floats()):
        return
    layer = case.layer()
    wanted = run(layer, case.inputs)
    changed = cast(case.inputs, lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t)
    expect_close(run(layer, changed), wanted, SAME, "channels-last inputs")


# life of a module ----------------------------------------------------------------------------------------------------


def state_dict(case: Case) -> None:
    """A fresh layer that loads the state of another computes the same."""
    layer = case.layer()
    outputs_of(layer, case.inputs)  # lets buffers move on
    layer.eval()
    fresh = case.layer().eval()
    scramble(fresh, by=0.5)
    state = layer.state_dict()
    fresh.load_state_dict(state)
    expect_close(outputs_of(fresh, case.inputs), outputs_of(layer, case.inputs), 0.0, "after loading its state")
    for name, value in fresh.state_dict().items():
        if isinstance(value, Tensor) and not torch.equal(value, state[name]):
            raise Broken(f"{name!r} is not what was loaded: keep state in parameters and buffers")


def copying(case: Case) -> None:
    """A deep copy and a pickled copy compute the same and share no tensor."""
    layer = case.layer()
    outputs_of(layer, case.inputs)
    layer.eval()
    wanted = outputs_of(layer, case.inputs)
    for what, copy in {"deepcopy": deepcopy(layer), "pickle": pickle.loads(pickle.dumps(layer))}.items():
        expect_close(outputs_of(copy, case.inputs), wanted, 0.0, f"a copy by {what}")
        places = {t.data_ptr() for t in layer.state_dict().values() if isinstance(t, Tensor) and t.numel()}
        if any(t.data_ptr() in places for t in copy.state_dict().values() if isinstance(t, Tensor) and t.numel()):
            raise Broken(
                f"a copy by {what} shares memory with the layer: keep no tensor outside parameters and buffers"
            )


def meta(case: Case) -> None:
    """It can be made on the meta device, and gives there the shapes that it gives elsewhere."""
    with torch.device("meta"):
        layer = case.make().train()
    layer.to("meta")
    got = outputs_of(layer, each(case.inputs, lambda t: t.to("meta")))
    wanted = outputs_of(case.layer(), case.inputs)
    for a, b in zip(got, wanted, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype or a.device.type != "meta":
            raise Broken(f"on meta it gives {tuple(a.shape)} {a.dtype} {a.device}, else {tuple(b.shape)} {b.dtype}")
    real = layer.to_empty(device="cpu")
    real.load_state_dict(case.layer().state_dict())


def representation(case: Case) -> None:
    """It prints what it was made with."""
    layer = case.layer()
    required = [
        p.name
        for p in inspect.signature(type(layer)).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    shown = layer.extra_repr().strip()
    if required and not shown and not any(True for _ in layer.children()):
        raise Broken(f"extra_repr() says nothing: show {', '.join(required)}")
    if "\n" in shown:
        raise Broken("extra_repr() has several lines: keep it to one")


def reset_parameters(case: Case) -> None:
    """What has parameters of its own can be reset, and the reset leaves nothing of the old values."""
    for name, module in case.layer().named_modules():
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        if not callable(getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)):
            raise Broken(f"{name or 'it'} has parameters and no reset_parameters(): write one and call it in __init__")
    states = []
    for by in (0.3, -0.7):
        layer = case.layer()
        scramble(layer, by)
        reset = getattr(layer, "reset_parameters", None)
        if reset is None:
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            reset()
        states.append({name: p.detach() for name, p in layer.named_parameters()})
    for name, value in states[0].items():
        if not torch.equal(value, states[1][name]):
            raise Broken(f"reset_parameters() leaves something of the old value in {name!r}: set every entry")


def modes(case: Case) -> None:
    """In eval two calls agree and buffers stay; train() and eval() reach every part."""
    layer = case.layer()
    outputs_of(layer, case.inputs)
    if any(module.training for module in layer.eval().modules()):
        raise Broken("eval() leaves a part in training mode: don't override train() without calling super")
    before = {name: b.clone() for name, b in layer.named_buffers()}
    first = outputs_of(layer, case.inputs)
    torch.rand(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        second = [t for t in tensors_of(layer(*case.inputs)) if t.is_floating_point()]
    expect_close(second, first, 0.0, "two calls in eval")
    for name, buffer in layer.named_buffers():
        if not torch.equal(buffer, before[name]):
            raise Broken(f"a call in eval changes the buffer {name!r}: write to it in training only")


def state(case: Case) -> None:
    """A call writes to nothing but buffers: no attribute, no parameter, no input."""
    layer = case.layer()
    outputs_of(layer, case.inputs)  # what is made lazily by the first call is made now
    attributes = {name: _attributes(module) for name, module in layer.named_modules()}
    parameters = {name: p.detach().clone() for name, p in layer.named_parameters()}
    inputs = each(case.inputs, Tensor.clone)
    outputs_of(layer, inputs)
    for given, kept in zip(tensors_of(inputs), tensors_of(case.inputs), strict=True):
        if not torch.equal(given, kept):
            raise Broken("a call changes its input: use operations that don't end in _ on what comes in")
    for name, parameter in layer.named_parameters():
        if not torch.equal(parameter, parameters[name]):
            raise Broken(f"a call changes the parameter {name!r}: leave that to the optimizer")
    outputs_of(layer, cast(inputs, lambda t: t + 1.0))
    for name, module in layer.named_modules():
        for key, value in _attributes(module).items():
            if key not in attributes[name] or not _alike(value, attributes[name][key]):
                raise Broken(
                    f"a call changes the attribute {key!r}: keep state in buffers, which are saved and moved with the "
                    "layer, or pass it as an argument"
                )


def _attributes(module: nn.Module) -> dict[str, Any]:
    own = {"_parameters", "_buffers", "_modules"}
    return {key: value for key, value in vars(module).items() if key not in own and not key.endswith("_hooks")}


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b
    return a is b or bool(a == b)


def errors(case: Case) -> None:
    """A wrong size is refused with a ValueError that names the expected and the given one."""
    axis = case.feature_axis
    if axis is None:
        return
    first, *rest = case.inputs
    size = first.shape[axis]
    wrong = torch.cat([first, first], axis).narrow(axis, 0, size + 1)
    try:
        case.layer()(wrong, *rest)
    except ValueError as error:
        numbers = set(re.findall(r"\d+", str(error)))
        if not {str(size), str(size + 1)} <= numbers:
            raise Broken(f"a size of {size + 1} instead of {size} is refused with {str(error)!r}: name both") from error
    except Exception as error:
        raise Broken(
            f"a size of {size + 1} instead of {size} raises {type(error).__name__} ({str(error)[:80]!r}): raise "
            "setpoint.errors.InputError, a ValueError, that names the expected and the given shape"
        ) from error
    else:
        raise Broken(f"a size of {size + 1} instead of {size} on axis {axis} is taken without a word: refuse it")


# other ways to run ---------------------------------------------------------------------------------------------------


def compile(case: Case) -> None:
    """`torch.compile` needs one graph, forward and backward, and gives the same numbers."""
    _compiled(case, "aot_eager")


def inductor(case: Case) -> None:
    """The same with generated code; it takes a C++ compiler and seconds."""
    _compiled(case, "inductor")


def _compiled(case: Case, backend: str) -> None:
    layer = case.layer()
    wanted = run(layer, case.inputs)
    torch._dynamo.reset()
    try:
        fresh = case.layer()
        compiled = torch.compile(fresh, fullgraph=True, backend=backend)
        expect_close(run(fresh, case.inputs, compiled), wanted, SAME, f"compiled with {backend}")
    finally:
        torch._dynamo.reset()


def export(case: Case) -> None:
    """`torch.export` gives a program that computes the same."""
    layer = case.layer().eval()
    program = torch.export.export(layer, case.inputs)
    expect_close(outputs_of(program.module(), case.inputs), outputs_of(layer, case.inputs), SAME, "exported")


def vectorize(case: Case) -> None:
    """`torch.func.vmap` over inputs and over parameters agrees with a loop, and `torch.func.grad` with autograd."""
    layer = case.layer().eval()
    shifted = [case.inputs, cast(case.inputs, lambda t: 1.5 * t + 0.1)]
    wanted = [torch.stack(pair) for pair in zip(*(outputs_of(layer, i) for i in shifted), strict=True)]
    tensors = [tensors_of(i) for i in shifted]
    stacked = [torch.stack(pair) for pair in zip(*tensors, strict=True)]

    def call(*given: Tensor) -> tuple[Tensor, ...]:
        ahead = iter(given)
        return tuple(t for t in tensors_of(layer(*each(case.inputs, lambda _: next(ahead)))) if t.is_floating_point())

    expect_close(list(vmap(call)(*stacked)), wanted, SAME, "vmap over inputs")
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    if not parameters:
        return
    several = {name: torch.stack([p, 1.5 * p + 0.1]) for name, p in parameters.items()}

    def with_parameters(given: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        made = functional_call(layer, dict(given), case.inputs)
        return tuple(t for t in tensors_of(made) if t.is_floating_point())

    loop = [with_parameters({name: p[i] for name, p in several.items()}) for i in range(2)]
    stacked_loop = [torch.stack(pair) for pair in zip(*loop, strict=True)]
    expect_close(list(vmap(with_parameters)(several)), stacked_loop, SAME, "vmap over parameters")
    got = grad(lambda given: loss(list(with_parameters(given))))(parameters)
    autograd = run(layer, case.inputs).parameter_gradients
    for name, gradient in got.items():
        expect_close([gradient], [torch.zeros_like(gradient) if (g := autograd[name]) is None else g], SAME, "grad")


def checkpointing(case: Case) -> None:
    """Recomputing it in the backward pass gives the same gradients."""
    layer = case.layer()
    wanted = run(layer, case.inputs)
    again = case.layer()
    call = lambda *args: checkpoint(again, *args, use_reentrant=False)  # noqa: E731
    expect_close(run(again, case.inputs, call), wanted, SAME, "with activation checkpointing")


def ddp(case: Case) -> None:
    """Two processes train it with DistributedDataParallel; its gradients are the mean of theirs."""
    layer = case.layer()
    if case.batch_axis is None or not any(p.requires_grad for p in layer.parameters()):
        return
    axis, size = case.batch_axis, _examples(case) // 2
    halves = [each(case.inputs, lambda t, at=at: t.narrow(axis, at * size, size)) for at in (0, 1)]  # type: ignore[misc]
    alone = [run(deepcopy(layer), half).parameter_gradients for half in halves]
    for rank, (outcome, problem) in enumerate(gradients_on_two(layer, halves)):
        if outcome is None:
            raise Broken(f"process {rank} fails: {problem}")
        for name, gradient in outcome.items():
            mean = sum(a for one in alone if (a := one[name]) is not None) / 2
            assert isinstance(mean, Tensor)
            expect_close([gradient], [mean], SAME, f"the gradient of {name!r} on process {rank}")


CHECKS: Mapping[str, Callable[[Case], None]] = {
    check.__name__: check
    for check in (
        gradients,
        dtypes,
        autocast,
        large,
        constant,
        gradcheck,
        forward_mode,
        gradgradcheck,
        batch_of_one,
        empty_batch,
        strides,
        channels_last,
        state_dict,
        copying,
        meta,
        representation,
        reset_parameters,
        modes,
        state,
        errors,
        compile,
        vectorize,
        checkpointing,
        ddp,
    )
}
"""Name -> check, in the order in which they run."""

SLOW_CHECKS: Mapping[str, Callable[[Case], None]] = {"inductor": inductor, "export": export}
"""Those of the second tier."""
