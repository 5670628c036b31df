"""`check`: point it at a network and learn what is wrong with its signals.

One recorded pass over real inputs (`setpoint.probe.record`), every probe over what was recorded, and, if asked for
with ``deep``, interventions that run passes of their own. The model is as it was afterwards.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from setpoint import __version__
from setpoint.errors import InputError
from setpoint.loading import batches_for, describe_data, load, loss_for
from setpoint.placing import as_batches, device_named, dtype_named, follow
from setpoint.probe import registry
from setpoint.probe.base import Subject
from setpoint.probe.recorder import record
from setpoint.probe.remedies import fitting
from setpoint.progress import Progress, unseen
from setpoint.report import ModelInfo, Report
from setpoint.running import tensors_of, untouched
from setpoint.surgery import Anatomy
from setpoint.types import Loaded

Loss = Callable[[Any, Any], Tensor]


def check(
    model: nn.Module | Loaded | str | Path,
    batches: Iterable[Any] | Mapping[str, Any] | Tensor | None = None,
    *,
    data: str | Path | None = None,
    loss: Loss | bool = False,
    deep: bool = False,
    probes: Collection[str] = (),
    ignore: Collection[str] = (),
    groups: Mapping[str, Any] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    progress: Progress = unseen,
) -> Report:
    """Measure the signals inside a network on real inputs and say what is wrong with them.

    Args:
        model: A module, something loaded, or anything that `setpoint.load` takes (``"smollm2"``, a folder, a GGUF
            file, ``"module:factory"``).
        batches: What to run: a list of tensors, tuples (positional arguments) or dicts (keyword arguments); one tensor
            or dict is one batch. Left out, a language model reads text and a vision model sees pictures that are on
            every machine.
        data: A text file or a folder of images, instead of the default ones.
        loss: ``loss(output, batch)``, or True for the task's own (next-token cross-entropy for a language model).
            Adds gradients.
        deep: Also run interventions (a massive activation removed, blocks left out, neurons silenced), and take
            exact medians.
        probes: Codes of the findings to look for; empty for all.
        ignore: Ids or codes of findings to leave out.
        groups: Token groups to compare, name -> boolean mask ``(batch, tokens)`` or a callable from batch to mask.
        forward: ``forward(model, batch)``, if calling the model takes more than its batch.
        device: Where to run, e.g. ``"cuda"``; left out, where the model is.
        dtype: What to run in, e.g. ``"bfloat16"``; left out, as the model is.
        progress: ``progress(done, total, text)`` is called along the way.

    Returns:
        The report: ``report.findings``, ``report.trace``, ``report.to_html(path)``, ``report.to_json()``.

    Raises:
        setpoint.errors.InputError: A model that can't be loaded or run, unknown codes, no data.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
        >>> model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        >>> report = check(model, [torch.randn(2, 8, 16)])
        >>> report.worst in (None, "info", "warning", "error")
        True
    """
    chosen = registry.probes_for(_words(probes))
    ignored = _ignored(ignore)
    loaded = _subject(model, forward, device, dtype)
    origin = "the caller's own batches"
    if batches is None:
        origin = describe_data(loaded, data)
        batches = batches_for(loaded, data)
    batches = as_batches(batches)
    if device is not None or dtype is not None:
        batches = [follow(batch, loaded.model) for batch in batches]
    _demand_values(loaded, batches)
    measure = _loss(loss, loaded)

    try:
        progress(0, 0, "reading the structure")
        anatomy = Anatomy.trace(loaded.model, batches[0], forward=loaded.forward)
        trace = record(
            loaded.model,
            batches,
            anatomy=anatomy,
            needs=registry.needs(chosen),
            forward=loaded.forward,
            loss=measure,
            groups=groups,
            task=loaded.task,
            exact=deep,
            progress=progress,
        )
    except InputError:
        raise
    except Exception:
        _blame(loaded, batches, measure)
        raise
    findings = registry.run(chosen, trace)
    not_measured = registry.not_measured(chosen, trace)
    if deep:
        subject = Subject(
            model=loaded.model,
            anatomy=anatomy,
            batches=batches,
            forward=loaded.forward,
            loss=measure or loss_for(loaded),
            progress=progress,
        )
        with untouched(loaded.model):
            findings = registry.deepen(subject, trace, findings, codes=_words(probes))
        not_measured = {**not_measured, **subject.failed}
    findings = [registry.with_remedies(finding, trace.structure) for finding in findings]
    findings = [replace(finding, remedies=fitting(finding.remedies, anatomy)) for finding in findings]
    findings = [finding for finding in findings if not ignored & {finding.id, finding.code}]
    return Report(
        model=_info(loaded),
        findings=tuple(findings),
        trace=trace,
        settings={
            "data": origin,
            "version": __version__,
            "deep": deep,
            "loss": measure is not None,
            "ignored": sorted(ignored),
            "not_measured": not_measured,
            "unread": [f"{part.name}: {part.reason}" for part in anatomy.unread],
        },
    )


def _words(names: Collection[str]) -> frozenset[str]:
    """Codes or ids; a single one may be given as a plain string."""
    return frozenset([names] if isinstance(names, str) else names)


def _ignored(names: Collection[str]) -> frozenset[str]:
    """Ids (``code@place``) and codes to leave out.

    Raises:
        InputError: The code is none that a probe raises, so that nothing would ever be left out.
    """
    for name in _words(names):
        registry.probes_for([name.partition("@")[0]])
    return _words(names)


def _demand_values(loaded: Loaded, batches: Sequence[Any]) -> None:
    """Refuse what holds no numbers: a model on the meta device, a batch of nothing."""
    if any(p.is_meta for p in loaded.model.parameters()):
        raise InputError(f"{loaded.source} has weights on the meta device, which hold no values; load them first")
    for batch in batches:
        tensors = tensors_of(batch)
        if tensors and not any(t.numel() for t in tensors):
            raise InputError(f"a batch is empty: {_outline(batch)}; leave it out or give it at least one row")


def _blame(loaded: Loaded, batches: Sequence[Any], loss: Loss | None) -> None:
    """Run the model again, unwatched: if it fails by itself, say so; if it does not, the fault is in here.

    Raises:
        InputError: The model, or the loss, fails on a batch without anybody measuring.
    """
    with untouched(loaded.model):
        for batch in batches:
            try:
                output = loaded.forward(loaded.model, batch)
            except Exception as error:
                raise InputError(
                    f"{loaded.source} could not be run on a batch that is {_outline(batch)}: {_reason(error)}. "
                    "A tensor is passed as the only argument, a tuple as positional and a dict as keyword arguments; "
                    "for anything else (inputs with labels, say) give forward(model, batch)."
                ) from error
            try:
                if loss is not None:
                    loss(output, batch)
            except Exception as error:
                raise InputError(
                    f"The loss failed on the output of {loaded.source}, {_outline(output)}, and a batch that is "
                    f"{_outline(batch)}: {_reason(error)}. It is called as loss(output, batch)."
                ) from error


def _reason(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__).removesuffix(".")


def _outline(batch: Any) -> str:
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')}{list(batch.shape)}"
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{name}: {_outline(value)}" for name, value in batch.items()) + "}"
    if isinstance(batch, (list, tuple)):
        return "(" + ", ".join(map(_outline, batch)) + ")"
    return type(batch).__name__


def _subject(
    model: nn.Module | Loaded | str | Path,
    forward: Callable[[nn.Module, Any], Any] | None,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
) -> Loaded:
    """The model as asked for; a module that belongs to the caller is copied before it is moved or cast."""
    loaded = model if isinstance(model, Loaded) else load(model)
    if forward is not None:
        loaded = replace(loaded, forward=forward)
    if device is None and dtype is None:
        return loaded
    target = None if device is None else device_named(device)
    kind = None if dtype is None else dtype_named(dtype)
    network = loaded.model if isinstance(model, (str, Path)) else copy.deepcopy(loaded.model)
    return replace(loaded, model=network.to(device=target, dtype=kind))


def _loss(loss: Loss | bool, loaded: Loaded) -> Loss | None:
    if callable(loss):
        return loss
    if not loss:
        return None
    own = loss_for(loaded)
    if own is None:
        raise InputError(
            f"There is no default loss for {loaded.source} ({loaded.task}). Leave --loss out, or give check() a "
            "loss(output, batch) of your own."
        )
    return own


def _info(loaded: Loaded) -> ModelInfo:
    parameters = {id(p): p for p in loaded.model.parameters()}.values()
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in parameters})
    return ModelInfo(
        name=type(loaded.model).__name__,
        source=loaded.source,
        task=loaded.task,
        parameters=sum(p.numel() for p in parameters),
        dtype=", ".join(dtypes) or "none",
        notes=loaded.notes,
    )
