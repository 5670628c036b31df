"""`fix`: apply published methods to a model, all or nothing, and say what they did."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.fixing.base import Fix, NotExact, Refused
from setpoint.fixing.exactness import judge
from setpoint.fixing.measure import change_between
from setpoint.fixing.result import Fixed
from setpoint.fixing.spec import chosen, to_text
from setpoint.loading import batches_for, load, loss_for
from setpoint.loading.history import remember
from setpoint.placing import as_batches
from setpoint.progress import Progress, unheard, unseen
from setpoint.running import untouched
from setpoint.surgery import Anatomy
from setpoint.surgery.comparing import all_finite, double, outputs
from setpoint.surgery.copying import at_home, editable, in_float64, share, whole
from setpoint.surgery.editing import Undo, commit, rollback
from setpoint.types import STAGES, Edit, FixContext, Loaded, Made, Refusal

Retrain = Callable[[nn.Module], None]


def fix(
    model: nn.Module | Loaded | str | Path,
    fixes: str | Fix | Sequence[str | Fix],
    batches: Iterable[Any] | None = None,
    *,
    data: str | Path | None = None,
    inplace: bool = False,
    retrain: Retrain | None = None,
    untrained_ok: bool = False,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    seed: int = 0,
    timed: bool = True,
    resume: Path | None = None,
    progress: Progress = unseen,
) -> Fixed:
    """Change a model by published methods and measure what that did.

    Either every fix is applied or the model stays as it was. A fix that promises the same outputs is held to it on real
    inputs, in float64 and in the model's own type.

    Args:
        model: A module, something loaded, or anything that `setpoint.load` takes.
        fixes: Text (``"pre-rmsnorm"``, ``"dyt:alpha=0.5"``, several separated by commas), a fix, or several of either.
            They run by stage, and within a stage in the order given.
        batches: Real inputs to read the structure from and to judge by; left out, as `setpoint.check` finds them.
        data: A text file or a folder of images, instead of the default inputs.
        inplace: Change the model itself. Optimizers that were built for it before are stale.
        retrain: ``retrain(model)`` trains the model after fixes that change its function; wherever it trains, the model
            comes back to the device that it was on.
        untrained_ok: Give the model back although such a fix leaves it untrained. A module that you hand over needs
            neither; one that is loaded, by a name, from a folder or from a factory, may have been trained and is
            refused without.
        forward: ``forward(model, batch)``, if calling takes more than the batch.
        loss: ``loss(output, batch)`` in nats per token, for perplexities; left out, the task's own.
        seed: For fixes that draw numbers.
        timed: Whether to compare forward times.
        resume: A folder for partial results of long fixes.
        progress: ``progress(done, total, text)`` is called along the way.

    Returns:
        ``.model``, ``.change`` and ``.save(folder)``. The model is a copy that shares every unchanged parameter with
        the original (and nothing, if a fix wants it trained afterwards).

    Raises:
        InputError: An unknown fix, a model that it does not fit (with the place and the reason), a promise not kept;
            outputs that are not finite, before or after; ``retrain`` with nothing to train for.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
        >>> stack = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16), enable_nested_tensor=False)
        >>> model = nn.Sequential(nn.Linear(4, 16), stack, nn.Linear(16, 3))
        >>> fixed = fix(model, "pre-rmsnorm", [torch.randn(2, 5, 4)])
        >>> type(fixed.model[1].norm).__name__, fixed.change.exact[0] < 1e-9
        ('RMSNorm', True)
    """
    wanted = sorted(chosen(fixes), key=lambda each: STAGES.index(each.stage))  # stable: named order within a stage
    loaded = model if isinstance(model, Loaded) else load(model)
    if forward is not None:
        loaded = replace(loaded, forward=forward)
    own = isinstance(model, nn.Module)
    trains = [each.id for each in wanted if each.preserves == "retrain"]
    if retrain is not None:
        refuse_needless_training(wanted)
    if trains and retrain is None and not (untrained_ok or own):
        raise InputError(
            f"{', '.join(trains)} changes what the model computes, and {loaded.source} may have been trained: give "
            "data to train it on afterwards (--retrain DATA; in Python retrain=), or take it untrained "
            "(--untrained-ok; untrained_ok=True)"
        )
    inner = editable(loaded.model)
    inputs = as_batches(batches if batches is not None else batches_for(loaded, data))
    _refuse_unmeasurable(inner, inputs, loaded)

    copied = whole if trains else share  # what is trained must not drag the original along
    reference = copied(inner) if inplace else inner
    work = inner if inplace else copied(inner)
    undo: Undo = []
    trained = False
    try:
        done = _apply(wanted, work, _Run(reference, inputs, loaded, seed, resume, progress), undo)
        notes = done.notes
        changed = [each.id for each in done.changed if each.preserves == "retrain"]
        if retrain is not None:
            if not changed:
                raise InputError(f"there is nothing to train for: {'; '.join(notes)}; leave --retrain out")
            progress(len(wanted), len(wanted), "training")
            trained = True
            with at_home(work):
                retrain(work)
        elif changed:
            notes.append(f"{', '.join(changed)} changed what the model computes: train it before use")
        if inplace:
            notes.append("the model itself was changed: optimizers built for it before are stale")
        progress(len(wanted), len(wanted), "measuring the change")
        with _runs(f"the model does not run after {', '.join(each.id for each in wanted)}"):
            change = change_between(
                reference,
                work,
                inputs,
                loaded.forward,
                anatomy=_trace(reference, inputs[0], loaded),
                loss=loss or (loss_for(loaded) if loaded.task == "language-model" else None),
                exact=done.exact,
                timed=timed,
            )
        if not math.isfinite(change.difference):
            names = ", ".join(each.id for each in wanted)
            raise InputError(f"after {names} the outputs are not finite, or of other shapes; the change was undone")
    except BaseException:
        rollback(undo)
        if inplace and trained:
            _restore(inner, reference)
        raise
    made = _made(loaded, wanted, done.edits)
    remember(work, made)
    return Fixed(
        model=work,
        change=change,
        fixes=tuple(wanted),
        edits=tuple(done.edits),
        loaded=replace(loaded, model=work, made=made),
        notes=tuple(notes),
    )


def refuse_needless_training(fixes: Sequence[Fix]) -> None:
    """Say before anything is done that no fix asks for the training that was asked for.

    Raises:
        InputError: None of them changes what the model computes.
    """
    if all(each.preserves != "retrain" for each in fixes):
        kept = ", ".join(f"{each.id} is {each.preserves}" for each in fixes)
        raise InputError(f"there is nothing to train for: {kept}; leave --retrain out (in Python: retrain=)")


def _made(loaded: Loaded, fixes: Sequence[Fix], edits: Sequence[Edit]) -> Made:
    """How the model is built: what earlier fixes did, then these. Tensors are with the model, so they are left out."""
    before = loaded.made
    modules = (edit for edit in edits if not isinstance(edit.value, Tensor))
    return replace(before, fixes=(*before.fixes, *map(to_text, fixes)), edits=(*before.edits, *modules))


def _restore(model: nn.Module, reference: nn.Module) -> None:
    """Undo a training that was cut short: only then has a tensor of the model been written into."""
    with torch.no_grad():
        for tensors in (nn.Module.parameters, nn.Module.buffers):
            for mine, kept in zip(tensors(model), tensors(reference), strict=True):
                mine.copy_(kept)


@contextmanager
def _runs(otherwise: str) -> Iterator[None]:
    """Errors of a model's own code, as one line that says what did not run."""
    try:
        yield
    except InputError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AssertionError, AttributeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{otherwise}: {reason}") from error


def _refuse_unmeasurable(model: nn.Module, inputs: Sequence[Any], loaded: Loaded) -> None:
    """NaN stays NaN whatever a fix does, so that a change of such outputs can't be told."""
    for number, batch in enumerate(inputs, start=1):
        with _runs(f"{loaded.source} could not be run on batch {number} of {len(inputs)}"):
            given = outputs(model, batch, loaded.forward)
        if not all_finite(given):
            raise InputError(
                f"the outputs of {loaded.source} are not finite before the fix, so nothing can be measured; setpoint "
                "check names the place where that starts"
            )


def _trace(model: nn.Module, batch: Any, loaded: Loaded) -> Anatomy:
    try:
        return Anatomy.trace(model, batch, forward=loaded.forward)
    except InputError:
        raise
    except Exception:  # the model's own, if it fails unwatched as well
        with _runs(f"{loaded.source} could not be run on the first batch"), untouched(model):
            loaded.forward(model, batch)
        raise


@dataclass(frozen=True, slots=True)
class _Run:
    """What every fix of one call shares."""

    reference: nn.Module
    inputs: Sequence[Any]
    loaded: Loaded
    seed: int
    resume: Path | None
    progress: Progress

    def plan(
        self,
        each: Fix,
        model: nn.Module,
        anatomy: Anatomy,
        inputs: Sequence[Any],
        note: Callable[[str], None] = unheard,
    ) -> list[Edit]:
        """A fix's edits for a model; the same seed each time, so that float64 and the own type draw alike."""
        generator = torch.Generator().manual_seed(self.seed)
        forward, progress, resume = self.loaded.forward, self.progress, self.resume
        return each.plan(FixContext(model, anatomy, self.reference, inputs, forward, generator, progress, resume, note))


@dataclass(slots=True)
class _Done:
    """What was done so far.

    Args:
        notes: For the user.
        edits: Those that were made.
        changed: The fixes that found something to change.
        judged: What the judge of exactness saw for each; None as soon as one fix does not promise it.
    """

    notes: list[str] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)
    changed: list[Fix] = field(default_factory=list)
    judged: list[tuple[float, float]] | None = field(default_factory=lambda: [(0.0, 0.0)])

    @property
    def exact(self) -> tuple[float, float] | None:
        """Largest differences, in float64 and in the model's own type."""
        return (max(wide for wide, _ in self.judged), max(own for _, own in self.judged)) if self.judged else None


def _apply(wanted: Sequence[Fix], work: nn.Module, run: _Run, undo: Undo) -> _Done:
    """Make every fix on ``work``, re-reading the structure before each; steps to undo it all go into ``undo``."""
    done = _Done(judged=[(0.0, 0.0)] if all(each.preserves == "exact" for each in wanted) else None)
    for index, each in enumerate(wanted):
        run.progress(index, len(wanted), f"{each.id}: reading the structure")
        anatomy = _trace(work, run.inputs[0], run.loaded)
        try:
            refusal = each.applies(anatomy)
            if refusal is not None:
                raise Refused(each.id, refusal)
            run.progress(index, len(wanted), f"{each.id}: planning")
            planned = run.plan(each, work, anatomy, run.inputs, partial(_note, done.notes, each.id))
        except Refused as refused:
            if not refused.refusal.done:
                raise
            done.notes.append(f"{each.id}: {refused.refusal}")
            continue
        before = share(work) if each.preserves == "exact" else None
        undo += commit(work, planned)
        done.edits += planned
        done.changed.append(each)
        if before is not None:
            run.progress(index, len(wanted), f"{each.id}: comparing outputs")
            seen = _judged(each, before, work, run)
            if done.judged is not None:
                done.judged.append(seen)
    return done


def _note(notes: list[str], fix: str, text: str) -> None:
    notes.append(f"{fix}: {text}")


def _judged(each: Fix, before: nn.Module, after: nn.Module, run: _Run) -> tuple[float, float]:
    old = in_float64(before)
    new = share(old)
    inputs = [double(batch) for batch in run.inputs]
    commit(new, run.plan(each, new, _trace(new, inputs[0], run.loaded), inputs))
    try:
        with _runs("does not run afterwards, so the change was undone; its code may rest on a size that changed"):
            return judge(each.id, (old, new), (before, after), run.inputs, run.loaded.forward)
    except (NotExact, Refused):
        raise
    except InputError as error:
        place = _place_of(error.__cause__, new) or _place_of(error.__cause__, after)
        raise Refused(each.id, Refusal(place, str(error) if place else f"it {error}")) from error


def _place_of(error: BaseException | None, model: nn.Module) -> str:
    """The innermost module of a model whose code an error came from, "" if none."""
    names = {id(module): name for name, module in model.named_modules()}
    place, trace = "", error.__traceback__ if error is not None else None
    while trace is not None:
        first = trace.tb_frame.f_code.co_varnames[:1]  # ``self`` of a method, whatever it is called
        place = names.get(id(trace.tb_frame.f_locals.get(*first)), place) if first else place
        trace = trace.tb_next
    return place
