"""`fix`: apply published methods to a model, all or nothing, and say what they did."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.fixing.base import Fix, Refused
from setpoint.fixing.exactness import judge
from setpoint.fixing.measure import change_between
from setpoint.fixing.result import Fixed
from setpoint.fixing.spec import chosen
from setpoint.loading import batches_for, load, loss_for
from setpoint.placing import as_batches
from setpoint.progress import Progress, unseen
from setpoint.running import untouched
from setpoint.surgery import Anatomy
from setpoint.surgery.comparing import double
from setpoint.surgery.copying import editable, in_float64, share, whole
from setpoint.surgery.editing import Undo, commit, rollback
from setpoint.types import STAGES, Edit, FixContext, Loaded

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
        retrain: ``retrain(model)`` trains the model after fixes that change its function.
        untrained_ok: Give the model back although such a fix leaves it untrained. A module of yours needs neither; a
            trained checkpoint is refused without.
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
        InputError: An unknown fix, a model that it does not fit (with the place and the reason), a promise not kept.

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
    if trains and retrain is None and not (untrained_ok or own):
        raise InputError(
            f"{', '.join(trains)} changes what the model computes, and {loaded.source} is trained: give data to train "
            "it on afterwards (--retrain DATA; in Python retrain=), or take it untrained (--untrained-ok; "
            "untrained_ok=True)"
        )
    inner = editable(loaded.model)
    inputs = as_batches(batches if batches is not None else batches_for(loaded, data))

    copied = whole if trains else share  # what is trained must not drag the original along
    reference = copied(inner) if inplace else inner
    work = inner if inplace else copied(inner)
    undo: Undo = []
    trained = False
    try:
        notes, edits, exact = _apply(wanted, work, _Run(reference, inputs, loaded, seed, resume, progress), undo)
        if trains and retrain is not None:
            progress(len(wanted), len(wanted), "training")
            trained = True
            retrain(work)
        elif trains and edits:
            notes.append(f"{', '.join(trains)} changed what the model computes: train it before use")
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
                exact=exact,
                timed=timed,
            )
    except BaseException:
        rollback(undo)
        if inplace and trained:
            _restore(inner, reference)
        raise
    return Fixed(
        model=work,
        change=change,
        fixes=tuple(wanted),
        edits=tuple(edits),
        loaded=replace(loaded, model=work),
        stock=_stock(reference, work, edits),
        notes=tuple(notes),
    )


def _stock(reference: nn.Module, work: nn.Module, edits: Sequence[Edit]) -> bool:
    """Whether values of weights are all that differs."""
    shapes = [
        {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)} for model in (reference, work)
    ]
    return all(isinstance(edit.value, Tensor) for edit in edits) and shapes[0] == shapes[1]


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

    def plan(self, each: Fix, model: nn.Module, anatomy: Anatomy, inputs: Sequence[Any]) -> list[Edit]:
        """A fix's edits for a model; the same seed each time, so that float64 and the own type draw alike."""
        generator = torch.Generator().manual_seed(self.seed)
        forward, progress = self.loaded.forward, self.progress
        return each.plan(FixContext(model, anatomy, self.reference, inputs, forward, generator, progress, self.resume))


def _apply(
    wanted: Sequence[Fix], work: nn.Module, run: _Run, undo: Undo
) -> tuple[list[str], list[Edit], tuple[float, float] | None]:
    """Make every fix on ``work``, re-reading the structure before each; steps to undo it all go into ``undo``."""
    notes: list[str] = []
    edits: list[Edit] = []
    judged: list[tuple[float, float]] = [(0.0, 0.0)]
    for index, each in enumerate(wanted):
        run.progress(index, len(wanted), f"{each.id}: reading the structure")
        anatomy = _trace(work, run.inputs[0], run.loaded)
        try:
            refusal = each.applies(anatomy)
            if refusal is not None:
                raise Refused(each.id, refusal)
            run.progress(index, len(wanted), f"{each.id}: planning")
            planned = run.plan(each, work, anatomy, run.inputs)
        except Refused as refused:
            if not refused.refusal.done:
                raise
            notes.append(f"{each.id}: {refused.refusal}")
            continue
        before = share(work) if each.preserves == "exact" else None
        undo += commit(work, planned)
        edits += planned
        if before is not None:
            run.progress(index, len(wanted), f"{each.id}: comparing outputs")
            judged.append(_judged(each, before, work, run))
    if any(each.preserves != "exact" for each in wanted):
        return notes, edits, None
    return notes, edits, (max(wide for wide, _ in judged), max(native for _, native in judged))


def _judged(each: Fix, before: nn.Module, after: nn.Module, run: _Run) -> tuple[float, float]:
    old = in_float64(before)
    new = share(old)
    inputs = [double(batch) for batch in run.inputs]
    with _runs(f"the model does not run after {each.id}, so the change was undone"):
        commit(new, run.plan(each, new, _trace(new, inputs[0], run.loaded), inputs))
        return judge(each.id, (old, new), (before, after), run.inputs, run.loaded.forward)
