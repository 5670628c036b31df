"""The list that every fix must pass, setpoint's own and a stranger's.

A fix is trusted with somebody's trained model. So it must say what it is, plan without touching anything, leave the
original alone, keep its promise about outputs, refuse in words what it can't do, and give back a model that is one in
every respect: it trains, it copies, it is saved and loaded, it keeps its type and its ties.
"""

from __future__ import annotations

import copy
import io
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn

from setpoint.catalog import items
from setpoint.errors import InputError
from setpoint.fixing import Fix, Fixed, Refused, parse, to_text
from setpoint.fixing import fix as apply
from setpoint.loading import restore
from setpoint.running import run_batch, tensors_of
from setpoint.surgery import Anatomy
from setpoint.surgery.comparing import distance, outputs
from setpoint.surgery.editing import ties
from setpoint.testing.probe import ConformanceError
from setpoint.testing.tiny import MAKERS, tiny
from setpoint.types import STAGES, Build, Edit, FixContext, Preserves, Refusal, Stage

ENOUGH = 2
"""On how many kinds of model the whole list is gone through; the others must be accepted or refused in words."""


def check_fix(
    fix: Fix | type[Fix], make: Callable[[], tuple[nn.Module, Any]] | None = None, *, families: Sequence[str] = ()
) -> tuple[str, ...]:
    """Hold a fix to what setpoint asks of every fix.

    Args:
        fix: The fix, or its class if it can be made without arguments.
        make: Gives a fresh model, the same at every call, and a batch; the fix must accept it. Left out, the tiny
            models of `setpoint.testing.tiny` are tried, and it must accept one of them.
        families: Which of those to try; empty for all.

    Returns:
        The names of the models that the whole list was gone through with.

    Raises:
        ConformanceError: (an `AssertionError`) at the first rule that is broken, with what to do about it.

    Example:
        >>> from setpoint.fixes.lns import Scaling
        >>> check_fix(Scaling(), families=["encoder"])
        ('encoder',)
    """
    made = _made(fix)
    _declarations(made)
    makers = _makers(make, families)
    accepted: list[str] = []
    for name, maker in makers.items():
        if _refused(made, name, maker) is None and len(accepted) < ENOUGH and _passes(_Subject(made, name, maker)):
            accepted.append(name)
    _demand(bool(accepted), made, "accepts none of the models it was tried on: pass `make=` one that it is for")
    _refuses_in_words(made)
    return tuple(accepted)


@dataclass(frozen=True, slots=True)
class _Subject:
    """A fix and a model that it accepts."""

    fix: Fix
    name: str
    make: Callable[[], tuple[nn.Module, Any]]

    def demand(self, kept: bool, advice: str) -> None:
        _demand(kept, self.fix, f"on {self.name}: {advice}")

    def applied(self, model: nn.Module, batch: Any, **options: Any) -> Fixed:
        try:
            return apply(model, self.fix, [batch], timed=False, **options)
        except Refused:
            raise
        except InputError as error:
            raise ConformanceError(f"{type(self.fix).__name__} on {self.name}: {error}") from error


def _passes(subject: _Subject) -> bool:
    """The whole list on one model; False if planning showed that the fix is not for it."""
    try:
        for rule in _RULES:
            rule(subject)
    except Refused as refused:
        subject.demand(bool(refused.refusal.reason.strip()), "refuses without a reason")
        return False
    return True


def _demand(kept: bool, fix: Fix, advice: str) -> None:
    if not kept:
        raise ConformanceError(f"{type(fix).__name__} {advice}")


def _makers(
    make: Callable[[], tuple[nn.Module, Any]] | None, families: Sequence[str]
) -> dict[str, Callable[[], tuple[nn.Module, Any]]]:
    if make is not None:
        return {"the given model": make}
    return {family: partial(tiny, family) for family in families or MAKERS}


# before anything runs ------------------------------------------------------------------------------------------------


def _made(fix: Fix | type[Fix]) -> Fix:
    if not isinstance(fix, type):
        return fix
    try:
        return fix()
    except TypeError as error:
        raise ConformanceError(
            f"{fix.__name__} can't be made without arguments ({error}): give every field a default, or pass an instance"
        ) from None


def _declarations(fix: Fix) -> None:
    kind = type(fix)
    for name in ("id", "stage", "preserves", "applies", "plan"):
        _demand(hasattr(fix, name), fix, f"has no {name}: see setpoint.fixing.Fix")
    shape: Any = kind
    frozen = is_dataclass(fix) and shape.__dataclass_params__.frozen
    _demand(frozen, fix, "can be changed after it was made: decorate it with @dataclass(frozen=True)")
    _demand(
        bool(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", fix.id)),
        fix,
        f"has the id {fix.id!r}: use lower-case words joined by hyphens, it is typed at a shell",
    )
    _demand(fix.stage in STAGES, fix, f"has the stage {fix.stage!r}: use one of {', '.join(STAGES)}")
    _demand(
        fix.preserves in get_args(Preserves),
        fix,
        f"preserves {fix.preserves!r}: use one of {', '.join(get_args(Preserves))}",
    )
    doc = kind.__doc__ or ""
    for field in fields(shape):
        explained = re.search(rf"^\s*(\w+, )*{field.name}(, \w+)*:", doc, re.MULTILINE)
        _demand(bool(explained), fix, f"has the field {field.name!r} that its docstring does not explain")
    if fix.id in items():
        _demand(parse(to_text(fix)) == [fix], fix, f"does not come back from its shell form {to_text(fix)!r}")


def _refused(fix: Fix, name: str, make: Callable[[], tuple[nn.Module, Any]]) -> Refusal | None:
    """The fix's answer to a model: the same twice, a place that exists, a reason in words."""
    model, batch = make()
    anatomy = Anatomy.trace(model, batch)
    first, second = fix.applies(anatomy), fix.applies(anatomy)
    _demand(first == second, fix, f"answers {name} differently the second time: use no state and no randomness")
    if first is None:
        return None
    _demand(isinstance(first, Refusal), fix, f"refuses {name} with a {type(first).__name__}: return a Refusal or None")
    _demand(bool(first.reason.strip()), fix, f"refuses {name} without a reason")
    known = {n for n, _ in model.named_modules()} | {n for n, _ in model.named_parameters(remove_duplicate=False)}
    _demand(first.path in known, fix, f"refuses {name} because of {first.path!r}, which it does not have")
    return first


def _refuses_in_words(fix: Fix) -> None:
    """A model with nothing in it is refused, with nothing left to do said, or changed; it never breaks the fix."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    before = _state(model)
    try:
        apply(model, fix, [torch.ones(2, 4)], timed=False, inplace=True)
    except InputError:
        _demand(_state(model) == before, fix, "refused a plain model and left it changed")
    except Exception as error:
        raise ConformanceError(
            f"{type(fix).__name__} broke on a model of two linears ({type(error).__name__}: {error}): return a Refusal"
        ) from error


# with a model that it accepts ----------------------------------------------------------------------------------------


def _state(model: nn.Module) -> list[Any]:
    """Everything about a model that must stay: objects, values, modes, hooks."""
    return [
        [
            (name, id(module), module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
            for name, module in model.named_modules(remove_duplicate=False)
        ],
        [
            (name, id(p), p._version, p.requires_grad, p.detach().double().sum().item())
            for name, p in model.named_parameters(remove_duplicate=False)
        ],
        [(name, b.detach().double().sum().item()) for name, b in model.named_buffers(remove_duplicate=False)],
    ]


def _plans_without_touching(subject: _Subject) -> None:
    model, batch = subject.make()
    before = _state(model)
    plans = []
    for _ in range(2):
        context = FixContext(
            model=model,
            anatomy=Anatomy.trace(model, batch),
            reference=model,
            batches=[batch],
            forward=run_batch,
            generator=torch.Generator().manual_seed(0),
            progress=lambda *_: None,
        )
        plans.append(subject.fix.plan(context))
    subject.demand(_state(model) == before, "planning changed the model: return edits and write into nothing")
    subject.demand(all(isinstance(edit, Edit) for edit in plans[0]), "planned something that is no setpoint.types.Edit")
    subject.demand(bool(plans[0]), "accepts the model and plans nothing: return a Refusal with done=True instead")
    subject.demand(
        _same_edits(*plans),
        "planned something else the second time: draw from ctx.generator alone, and keep no state",
    )


def _same_edits(first: Sequence[Edit], second: Sequence[Edit]) -> bool:
    def same(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor):
            return isinstance(b, Tensor) and torch.equal(a, b)
        return type(a) is type(b) if isinstance(a, nn.Module) else bool(a == b)

    return [e.path for e in first] == [e.path for e in second] and all(
        same(a.value, b.value) for a, b in zip(first, second, strict=True)
    )


def _leaves_the_original(subject: _Subject) -> None:
    model, batch = subject.make()
    model.train()
    before, numbers = _state(model), torch.get_rng_state()
    fixed = subject.applied(model, batch)
    subject.demand(_state(model) == before, "the original model was changed: put new tensors and modules into edits")
    subject.demand(torch.equal(torch.get_rng_state(), numbers), "drew from the global generator: use ctx.generator")
    subject.demand(
        all(module.training for module in fixed.model.modules()), "left parts of a training model in eval mode"
    )
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in fixed.model.modules())
    subject.demand(hooks == 0, "left forward hooks on the model: they are lost when it is saved; put a module around")


def _shares_the_rest(subject: _Subject) -> None:
    model, batch = subject.make()
    fixed = subject.applied(model, batch)
    old = dict(model.named_parameters(remove_duplicate=False))
    new = dict(fixed.model.named_parameters(remove_duplicate=False))
    edited = [edit.path for edit in fixed.edits]
    groups = [{name, first} for name, first in ties(model).items()]
    for name in old.keys() & new.keys():
        if any(_below(place, path) for path in edited for place in _with_ties(name, groups)):
            continue
        if subject.fix.preserves == "retrain":
            subject.demand(torch.equal(new[name], old[name]), f"{name} has other values though no edit names it")
        else:
            subject.demand(new[name] is old[name], f"{name} was copied though no edit names it: it must be shared")
    if subject.fix.preserves == "retrain":  # what is trained afterwards must not drag the original along
        memory = {p.untyped_storage().data_ptr() for p in model.parameters() if p.numel()}
        shared = [
            n for n, p in fixed.model.named_parameters() if p.numel() and p.untyped_storage().data_ptr() in memory
        ]
        subject.demand(
            not shared,
            f"{', '.join(shared[:3])} lie in the original's memory, so training the new model trains the old: clone",
        )
    for name, first in ties(model).items():
        if name in new and first in new and not any(_below(name, path) for path in edited):
            subject.demand(new[name] is new[first], f"{name} and {first} were one tensor and are two: keep ties")


def _with_ties(name: str, groups: Sequence[set[str]]) -> set[str]:
    return {name}.union(*(group for group in groups if name in group))


def _below(name: str, path: str) -> bool:
    return name == path or name.startswith(path + ".")


def _acts_in_place_or_not_at_all(subject: _Subject) -> None:
    model, batch = subject.make()
    copied = subject.applied(model, batch)
    fixed = subject.applied(model, batch, inplace=True)
    subject.demand(fixed.model is model, "inplace=True gave another model")
    gap = distance(outputs(model, batch, run_batch), outputs(copied.model, batch, run_batch))
    subject.demand(gap == 0.0, f"in place and as a copy it gives models whose outputs differ by {gap:.1e}")

    model, batch = subject.make()
    before = _state(model)
    saboteur: Any = _Saboteur(subject.fix.stage)
    try:
        apply(model, [subject.fix, saboteur], [batch], timed=False, inplace=True)
    except InputError:
        subject.demand(_state(model) == before, "the model was changed although a later fix failed")
    else:
        subject.demand(False, "an edit of a place that is not there went unnoticed after it")


@dataclass(frozen=True)
class _Saboteur:
    """A fix that fails half way through its edits."""

    stage: Stage

    id: ClassVar[str] = "saboteur"
    preserves: ClassVar[Preserves] = "approximate"

    def applies(self, anatomy: Anatomy) -> Refusal | None:  # noqa: ARG002
        """None."""
        return None

    def plan(self, ctx: FixContext) -> list[Edit]:
        """A good edit and an impossible one."""
        name, parameter = next(ctx.model.named_parameters())
        return [Edit(name, torch.zeros_like(parameter)), Edit("no.such.place", Build("torch.nn:Identity"))]


def _keeps_its_promise(subject: _Subject) -> None:
    model, batch = subject.make()
    fixed = subject.applied(model, batch)
    gap = distance(outputs(fixed.model, batch, run_batch), outputs(model, batch, run_batch))
    if subject.fix.preserves == "exact":
        subject.demand(gap < 1e-4, f"promises the same outputs, and they moved by {gap:.1e}")
    slow = distance(
        outputs(fixed.model, batch, run_batch, grad=True), outputs(fixed.model, batch, run_batch, grad=False)
    )
    subject.demand(
        slow < 1e-4, f"outputs with and without gradients differ by {slow:.1e}: a fused path reads the old parts"
    )


def _is_deterministic(subject: _Subject) -> None:
    states = []
    for seed in (0, 0):
        model, batch = subject.make()
        states.append(dict(subject.applied(model, batch, seed=seed).model.named_parameters()))
    subject.demand(
        states[0].keys() == states[1].keys() and all(torch.equal(p, states[1][n]) for n, p in states[0].items()),
        "gives another model at the same seed: draw from ctx.generator alone",
    )


def _keeps_type_and_flags(subject: _Subject) -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        model, batch = subject.make()
        model.to(dtype)
        batch = batch.to(dtype) if isinstance(batch, Tensor) and batch.is_floating_point() else batch
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        fixed = subject.applied(model, batch)
        if _finite(model, batch):
            subject.demand(_finite(fixed.model, batch), f"a {dtype} model gives outputs that are not finite afterwards")
        kinds = {p.dtype for p in fixed.model.parameters() if p.is_floating_point()}
        subject.demand(kinds == {dtype}, f"a {dtype} model has parameters of {kinds - {dtype}} afterwards")
        old = dict(model.named_parameters())
        thawed = [
            n for n, p in fixed.model.named_parameters() if n in old and old[n].shape == p.shape and p.requires_grad
        ]
        replaced = [edit.path for edit in fixed.edits if not isinstance(edit.value, Tensor)]
        thawed = [name for name in thawed if not any(_below(name, path) for path in replaced)]
        subject.demand(not thawed, f"{', '.join(thawed[:3])} were frozen and are trained now")


def _finite(model: nn.Module, batch: Any) -> bool:
    with torch.no_grad():
        return all(bool(t.isfinite().all()) for t in tensors_of(run_batch(model, batch)) if t.is_floating_point())


def _gives_a_whole_model(subject: _Subject) -> None:
    model, batch = subject.make()
    fixed = subject.applied(model, batch).model
    expected = outputs(fixed, batch, run_batch)

    def same(other: nn.Module) -> bool:
        return distance(outputs(other, batch, run_batch), expected) == 0.0

    subject.demand(same(copy.deepcopy(fixed)), "a deep copy of the model computes something else")
    buffer = io.BytesIO()
    torch.save(fixed, buffer)
    buffer.seek(0)
    subject.demand(same(torch.load(buffer, weights_only=False)), "the model computes something else after pickling")
    twin = copy.deepcopy(fixed)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.load_state_dict(fixed.state_dict())
    subject.demand(same(twin), "the model computes something else after loading its own state_dict")
    fixed.train()
    loss = sum((t.float().square().mean() for t in _floats(run_batch(fixed, batch))), torch.zeros(()))
    loss.backward()  # type: ignore[no-untyped-call]
    grads = [p.grad for p in fixed.parameters() if p.grad is not None]
    subject.demand(bool(grads) and all(bool(g.isfinite().all()) for g in grads), "the model can't be trained")


def _floats(output: Any) -> Iterator[Tensor]:
    return (t for t in tensors_of(output) if t.is_floating_point() and t.requires_grad)


def _comes_back_from_disk(subject: _Subject) -> None:
    model, batch = subject.make()
    fixed = subject.applied(model, batch)
    with tempfile.TemporaryDirectory() as folder:
        try:
            saved = fixed.save(Path(folder) / "model")
        except InputError as error:
            raise ConformanceError(
                f"{type(subject.fix).__name__} on {subject.name}: can't be saved: {error}"
            ) from error
        fresh, _ = subject.make()
        with torch.no_grad():
            for parameter in fresh.parameters():
                parameter.zero_()
        again = restore(saved, fresh)
    gap = distance(outputs(again, batch, run_batch), outputs(fixed.model, batch, run_batch))
    subject.demand(gap == 0.0, f"outputs differ by {gap:.1e} after saving and loading: put all state into edits")


_RULES: tuple[Callable[[_Subject], None], ...] = (
    _plans_without_touching,
    _leaves_the_original,
    _keeps_its_promise,
    _shares_the_rest,
    _acts_in_place_or_not_at_all,
    _is_deterministic,
    _keeps_type_and_flags,
    _gives_a_whole_model,
    _comes_back_from_disk,
)
