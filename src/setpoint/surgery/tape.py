"""One forward pass, written down.

A tape is a list of *nodes* (one per operation), *values* (one per tensor, or per version of a tensor that is written
in place) and *calls* (one per module call). It is recorded by a ``TorchFunctionMode`` that sees every call into torch
before it is dispatched, and by forward hooks that know which module is running.

Two things need care. Functions written in Python (``F.layer_norm``, ``F.multi_head_attention_forward``) hand
themselves to the mode whole; `open_composites` lets their bodies run, so that the mode sees what they are made of.
And tensors are recognised by identity, so the tape holds every one of them until it is dropped: trace a small batch.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from setpoint.running import Forward, run_batch, tensors_of
from setpoint.surgery.ops import NO_VALUE, plain_name, raw_name, writes_in_place


@dataclass(slots=True, eq=False)
class Value:
    """A tensor at one moment: what a node made of it, or a parameter, buffer, input or constant."""

    index: int
    tensor: Tensor
    kind: str
    name: str = ""
    producer: Node | None = None
    floating: bool = True


@dataclass(slots=True, eq=False)
class Node:
    """One operation: its plain name, the call that made it, and the values that went in and came out."""

    op: str
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: list[Value]
    outputs: list[Value]
    call: Call
    in_place: bool = False


@dataclass(slots=True, eq=False)
class Call:
    """One call of a module; ``ordinal`` counts the calls of the same module from 0."""

    name: str
    module: nn.Module | None
    ordinal: int
    parent: Call | None
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    children: list[Call] = field(default_factory=list)
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def ancestors(self) -> Iterator[Call]:
        """This call and those around it, innermost first."""
        call: Call | None = self
        while call is not None:
            yield call
            call = call.parent


class Tape(TorchFunctionMode):
    """Records one forward pass of ``model``; use `record`, which also leaves the model as it was."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.values: list[Value] = []
        self.nodes: list[Node] = []
        self.calls: list[Call] = []
        self.outputs: list[Value] = []
        self.opaque: list[tuple[str, str]] = []
        self.followed: list[tuple[str, str]] = []  # autograd functions made of torch
        self._known: dict[int, Value] = {}
        self._kept = {id(t) for m in model.modules() for a in vars(m).values() for t in _tensors_in(a)}
        self._names: dict[Any, str] = {}
        self._counts: dict[str, int] = {}
        self._top = Call("", None, 0, None)
        self._stack: list[Call] = [self._top]
        for kind, named in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
            for name, tensor in named:
                self._add(tensor, kind, name)

    # values ----------------------------------------------------------------------------------------------------------

    def _add(self, tensor: Tensor, kind: str, name: str = "", producer: Node | None = None) -> Value:
        value = Value(len(self.values), tensor, kind, name, producer, tensor.is_floating_point() or tensor.is_complex())
        self.values.append(value)
        self._known[id(tensor)] = value
        return value

    def value_of(self, tensor: Tensor, kind: str = "constant") -> Value:
        """The current value of a tensor; one that was never seen is entered as ``kind``."""
        return self._known.get(id(tensor)) or self._add(tensor, kind)

    def _read(self, tensor: Tensor, reader: str, kind: str) -> Value:
        """The value of an argument; one that came from nowhere is noted, since what made it can't be followed."""
        known = self._known.get(id(tensor))
        if known is None and tensor.is_floating_point() and tensor.numel() > 1 and id(tensor) not in self._kept:
            reason = "reads a tensor that no call seen here made (a scripted function, or a constant kept elsewhere)"
            self.opaque.append((reader, reason))
        return known or self._add(tensor, kind)

    # operations ------------------------------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the call and write it down."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        raw = self._names.get(func)
        if raw is None:
            raw = self._names[func] = raw_name(func)
        if raw in NO_VALUE or (raw == "requires_grad_"):
            return result
        changed = self._changed(raw, args, kwargs)
        outputs = [result] if isinstance(result, Tensor) else [] if result is None else tensors_of(result)
        if not outputs and changed is None:
            return result
        self._enter(plain_name(raw), func, args, kwargs, outputs, changed)
        return result

    def _changed(self, raw: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        out = kwargs.get("out")
        if isinstance(out, Tensor):
            return out
        if kwargs.get("inplace") is True or (writes_in_place(raw) and args and isinstance(args[0], Tensor)):
            return args[0] if args and isinstance(args[0], Tensor) else None
        return None

    def _enter(
        self,
        op: str,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        outputs: list[Tensor],
        changed: Tensor | None,
    ) -> None:
        inputs = [self._read(t, self._stack[-1].name, "constant") for t in tensors_of(args, kwargs)]
        fresh = [t for t in outputs if id(t) not in self._known]
        if changed is not None and all(t is not changed for t in fresh):
            fresh.insert(0, changed)
        if not fresh:  # for example dropout in eval mode: the same tensor comes back
            return
        call = self._stack[-1]
        node = Node(op, func, args, kwargs, inputs, [], call, changed is not None)
        shared = self._aliases(changed) if changed is not None else []
        node.outputs = [self._add(t, "op", producer=node) for t in fresh]
        self.nodes.append(node)
        call.nodes.append(node)
        for old in shared:
            alias = Node("alias_write", None, (), {}, [old, node.outputs[0]], [], call, True)
            alias.outputs = [self._add(old.tensor, "op", producer=alias)]
            self.nodes.append(alias)
            call.nodes.append(alias)

    def _aliases(self, changed: Tensor) -> list[Value]:
        """Current values of other tensors in the memory that an in-place op just wrote."""
        try:
            storage = changed.untyped_storage()._cdata
            return [
                value
                for value in list(self._known.values())
                if value.kind in ("op", "input")
                and value.tensor is not changed
                and value.tensor.untyped_storage()._cdata == storage
            ]
        except (
            NotImplementedError,
            RuntimeError,
        ):  # a tensor subclass or layout without storage has no aliases to find
            return []

    # module calls ----------------------------------------------------------------------------------------------------

    def _before(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ordinal = self._counts.get(name, 0)
            self._counts[name] = ordinal + 1
            call = Call(name, module, ordinal, self._stack[-1], args=args, kwargs=kwargs)
            given = tensors_of(args, kwargs)
            if self._stack[-1] is self._top:
                call.inputs = [self.value_of(t, "input") for t in given]
            else:
                call.inputs = [self._read(t, name, "input") for t in given]
            self._stack[-1].children.append(call)
            self._stack.append(call)
            self.calls.append(call)

        return hook

    def _after(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            while len(self._stack) > 1:
                call = self._stack.pop()
                if call.module is module:
                    break
            else:
                return
            made = tensors_of(output)
            if any(v.floating for v in call.inputs) and self._enter_unseen(call, made, args, kwargs, name):
                self.opaque.append((name, "its output comes from code that runs outside torch's Python calls"))
            call.outputs = [self.value_of(t) for t in made]

        return hook

    def _enter_unseen(
        self, call: Call, made: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], owner: str | None
    ) -> bool:
        """Enter results that no seen call made, as made by one op from the arguments and ``owner``'s parameters."""
        unseen = [t for t in made if id(t) not in self._known]
        if not unseen:
            return False
        node = Node("opaque", None, args, kwargs, [self.value_of(t) for t in tensors_of(args, kwargs)], [], call)
        if owner is not None:
            node.inputs += [v for v in self.values if v.kind == "parameter" and _inside(v.name, owner)]
        node.outputs = [self._add(t, "op", producer=node) for t in unseen]
        self.nodes.append(node)
        call.nodes.append(node)
        return True

    def enter_function(self, function: type, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Note a call of an autograd function that is not torch's own; the backward of a stranger's is unknown."""
        call, name = self._stack[-1], function.__name__
        if self._enter_unseen(call, tensors_of(result), args, kwargs, None):
            self.opaque.append((call.name, f"the autograd function {name} computes outside torch's Python calls"))
        elif not function.__module__.startswith("setpoint."):
            self.followed.append(
                (call.name, f"the autograd function {name} has a backward of its own (its forward was followed)")
            )

    def _scripted(self, names: dict[int, str]) -> Callable[..., None]:
        """A hook for all modules that enters calls of scripted ones, which take no hooks of their own."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            name = names.get(id(module))
            if name is None:
                return
            self._before(name)(module, args, kwargs)
            call = self._stack.pop()
            self._enter_unseen(call, tensors_of(output), args, kwargs, name)
            call.outputs = [self.value_of(t) for t in tensors_of(output)]
            self.opaque.append((name, "a ScriptModule, whose operations can't be seen"))

        return hook

    def attach(self) -> list[RemovableHandle]:
        """Hook every module; the handles take the hooks off again."""
        handles: list[RemovableHandle] = []
        scripted: dict[int, str] = {}
        for name, module in self.model.named_modules():
            if any(_inside(name, outer) for outer in scripted.values()):
                continue
            if isinstance(module, torch.jit.ScriptModule):
                scripted[id(module)] = name
                continue
            handles.append(module.register_forward_pre_hook(self._before(name), with_kwargs=True))
            handles.append(module.register_forward_hook(self._after(name), with_kwargs=True, always_call=True))
        if scripted:
            handles.append(register_module_forward_hook(self._scripted(scripted), with_kwargs=True))
        return handles


def _tensors_in(attribute: Any) -> list[Tensor]:
    """Tensors that a module keeps as an attribute, in a list or in a dict."""
    if isinstance(attribute, dict):
        attribute = list(attribute.values())
    found = attribute if isinstance(attribute, list | tuple) else [attribute]
    return [item for item in found if isinstance(item, Tensor)]


def _inside(name: str, outer: str) -> bool:
    return outer == "" or name == outer or name.startswith(outer + ".")


# leaving the model as it was -----------------------------------------------------------------------------------------

_PYTHON_WRAPPERS = ("torch.nn.functional", "torch.functional", "torch._tensor", "torch.nn.modules.activation")
_CHECKS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


@contextmanager
def open_composites() -> Iterator[None]:
    """Let torch functions written in Python run their bodies in this thread instead of handing themselves over.

    With a ``TorchFunctionMode`` active, ``F.multi_head_attention_forward`` reaches the mode as one call and what it
    does inside is never seen. Within this context its ``linear``, ``softmax`` and so on reach the mode one by one.
    """
    owner = threading.get_ident()
    replaced: list[tuple[Any, str, Any]] = []

    def quiet(original: Callable[..., bool]) -> Callable[..., bool]:
        def check(*args: Any) -> bool:
            return threading.get_ident() != owner and original(*args)

        return check

    try:
        for module_name in _PYTHON_WRAPPERS:
            module = sys.modules[module_name]
            for check in _CHECKS:
                original = module.__dict__.get(check)
                if original is not None:
                    setattr(module, check, quiet(original))
                    replaced.append((module, check, original))
        yield
    finally:
        for module, check, original in replaced:
            setattr(module, check, original)


@contextmanager
def noted_functions(tape: Tape) -> Iterator[None]:
    """Tell the tape of every autograd function that this thread applies, torch's own apart."""
    owner = threading.get_ident()
    original = vars(Function)["apply"]

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        result = original.__func__(cls, *args, **kwargs)
        if threading.get_ident() == owner and not cls.__module__.startswith("torch."):
            tape.enter_function(cls, args, kwargs, result)
        return result

    Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        Function.apply = original  # type: ignore[method-assign]


def record(model: nn.Module, batch: Any, forward: Forward | None = None) -> Tape:
    """Run one batch and return what happened; the model must be unwrapped and inside `untouched`."""
    tape = Tape(model)
    handles = tape.attach()
    try:
        with open_composites(), noted_functions(tape), tape:
            output = (forward or run_batch)(model, batch)
        tape.outputs = [tape.value_of(t) for t in tensors_of(output)]
    finally:
        for handle in handles:
            handle.remove()
    return tape
