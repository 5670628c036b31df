"""What depends on the massive activations that a recording found.

The intervention of Owen et al. (2025, arXiv 2503.22329): at the first block whose output holds them, and only there,
the entries are set to zero, or to their mean over other sequences. Where zero ruins a model and the mean doesn't,
the entries work as fixed biases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from setpoint.probe.base import Intervention, Subject
from setpoint.probe.interventions.hooks import caught, edited
from setpoint.probe.interventions.massive import Entry, entries_where, group_means, set_entries
from setpoint.probe.interventions.outcome import Bench, ChangedPass, Outcome, level
from setpoint.probe.massive import MassiveActivation, Run
from setpoint.types import Block, Finding, Record, Tap, Task, Trace


@dataclass(frozen=True)
class MassiveDependence(Intervention):
    """What depends on a massive activation: set to zero, set to its mean over other sequences, and a control.

    At the first block that holds it, and only there, the massive entries are replaced; the control sets a random other
    channel of the same tokens to zero. The entries are those of the recording: massive beside the median that was
    measured there. Damage is the rise of the loss (perplexity for a language model), or how far
    the output moves when there is no loss.

    Args:
        noticeable: Rise of the loss, or relative change of the output, from which the model is said to depend
            on the entry (Owen et al., 2025, find either nothing or orders of magnitude; setpoint: 5 %).
        most: How many findings of the recording are looked into, largest first.
        batches: Batches to use, at most.
        seed: Chooses the control channel.
    """

    noticeable: float = 0.05
    most: int = 2
    batches: int = 4
    seed: int = 0

    code: ClassVar[str] = MassiveActivation.code
    title: ClassVar[str] = "What depends on the massive activation"
    explanation: ClassVar[str] = MassiveActivation.explanation

    def __call__(self, subject: Subject, trace: Trace) -> list[Finding]:
        """The recording's findings with what the model does without the entry."""
        probe = MassiveActivation()
        pairs = list(zip(probe.runs(trace), probe(trace), strict=True))[: self.most]
        if not pairs:
            return []
        bench = Bench(subject, subject.batches[: self.batches])
        found = []
        for done, (run, finding) in enumerate(pairs):
            if subject.progress is not None:
                subject.progress(done, len(pairs), "removing massive activations")
            record = trace.records[finding.sites[0]]
            found.append(self._deepened(subject, bench, run, finding, record, trace.task))
        return [f for f in found if f is not None]

    def _deepened(
        self, subject: Subject, bench: Bench, run: Run, finding: Finding, record: Record, task: Task
    ) -> Finding | None:
        hidden = [self._stream(subject, batch, record) for batch in bench.batches]
        entries = [_massive(rows, record, run) for rows in hidden]
        if not any(entries):
            return None
        place = _Place.of(record, subject.anatomy.blocks)

        def setting(values: Callable[[int], Sequence[float]], channel: int | None = None) -> ChangedPass:
            def change(index: int) -> AbstractContextManager[None]:
                at = entries[index]
                if channel is not None:
                    at = [
                        replace(e, channel=channel, value=float(hidden[index][e.sequence, e.token, channel]))
                        for e in at
                    ]
                return edited(subject.model, {place.tap: lambda tensor: place.put(tensor, at, values(index))})

            return change

        zero = bench.outcome(setting(lambda i: [0.0] * len(entries[i])))
        other = self._control_channel(hidden[0].shape[-1], run)
        control = bench.outcome(setting(lambda i: [0.0] * len(entries[i]), other))
        means = _other_means(entries)
        mean = None if means is None else bench.outcome(setting(lambda i: means[i]))
        return _reported(finding, zero, mean, control, other, task, self.noticeable)

    @staticmethod
    def _stream(subject: Subject, batch: Any, record: Record) -> Tensor:
        """The stream at a site, shape ``(sequences, positions, channels)``."""
        tap = record.site.tap
        with torch.no_grad(), caught(subject.model, [tap]) as tensors:
            subject.forward(subject.model, batch)
        return as_rows(tensors[tap], record.site.channel_axis).float()

    def _control_channel(self, width: int, run: Run) -> int:
        order = torch.randperm(width, generator=torch.Generator().manual_seed(self.seed))
        return next(int(c) for c in order if int(c) not in run.channels)


@dataclass(frozen=True)
class _Place:
    """Where entries of the stream are set.

    A module's output is the stream itself. Where the stream can be caught as some module's input only, because it is
    summed in the model's own forward, changing that input would leave what passes by on the skip path as it was; the
    branch that was added last is changed instead, by what its sum lacks.

    Args:
        tap: The tensor that is changed.
        axis: Its channel axis.
        adds: Whether it is a summand of the stream.
    """

    tap: Tap
    axis: int
    adds: bool

    @classmethod
    def of(cls, record: Record, blocks: Sequence[Block]) -> _Place:
        site = record.site
        block = next((b for b in blocks if b.index == site.block), None)
        last = block.branches[-1] if block is not None and block.branches else None
        if site.tap.side == "input" and last is not None and last.writes is not None and not last.after_norms:
            return cls(last.writes, site.channel_axis, adds=True)
        return cls(site.tap, site.channel_axis, adds=False)

    def put(self, tensor: Tensor, entries: Sequence[Entry], values: Sequence[float]) -> Tensor:
        """The tensor with which the stream's entries take these values."""
        rows = as_rows(tensor, self.axis)
        if self.adds:
            lacks = [value - entry.value for entry, value in zip(entries, values, strict=True)]
            values = [float(rows[e.sequence, e.token, e.channel]) + d for e, d in zip(entries, lacks, strict=True)]
        shape = tensor.movedim(self.axis, -1).shape
        return set_entries(rows, entries, values).reshape(shape).movedim(-1, self.axis)


def as_rows(hidden: Tensor, axis: int) -> Tensor:
    """A stream as the recorder counts it: ``(sequences, positions, channels)``.

    >>> as_rows(torch.ones(2, 8, 5, 4), 1).shape, as_rows(torch.ones(3, 8), -1).shape
    (torch.Size([2, 20, 8]), torch.Size([3, 1, 8]))
    """
    moved = hidden.movedim(axis, -1)
    return moved[:, None] if moved.ndim == 2 else moved.flatten(1, -2)


def _massive(rows: Tensor, record: Record, run: Run) -> list[Entry]:
    """Massive entries of the run's channels, beside the median of the recording."""
    probe = MassiveActivation()
    limit = max(probe.absolute, probe.relative * (record.median or 0.0))
    return [e for e in entries_where(rows, rows.abs() > limit) if e.channel in run.channels]


def _other_means(entries: Sequence[Sequence[Entry]]) -> list[list[float]] | None:
    """For each entry the mean of its group over the *other* sequences; None when there is only one sequence."""
    sequences = {(b, e.sequence) for b, batch in enumerate(entries) for e in batch}
    if len(sequences) < 2:
        return None
    values = []
    for b, batch in enumerate(entries):
        row = []
        for e in batch:
            rest = [o for d, other in enumerate(entries) for o in other if (d, o.sequence) != (b, e.sequence)]
            row.append(group_means(rest).get((e.starting, e.channel), 0.0))
        values.append(row)
    return values


def _reported(
    finding: Finding,
    zero: Outcome,
    mean: Outcome | None,
    control: Outcome,
    channel: int,
    task: Task,
    noticeable: float,
) -> Finding:
    relies = zero.rise > noticeable
    constant = mean is not None and mean.rise <= noticeable
    if zero.before is None:
        said = f" The output moves by {zero.figure(task)} when it is zero"
    else:
        name = "Perplexity" if task == "language-model" else "Loss"
        said = f" {name} {level(zero.before, task)} becomes {zero.figure(task)} when it is zero"
    if mean is not None:
        said += f", {mean.figure(task)} when it is its mean over other sequences"
    said += f", {control.figure(task)} when channel {channel} of the same tokens is zero instead (a control)."
    verdict = (
        " This model relies on it, but only as on a constant: its mean does as well."
        if relies and constant
        else " This model relies on it."
        if relies
        else " This model does not rely on it."
    )
    numbers: Mapping[str, float | int | str] = {
        **finding.numbers,
        **_figures("zero", zero),
        **(_figures("mean", mean) if mean is not None else {}),
        **_figures("control", control),
        "control_channel": channel,
        "relies": "yes" if relies else "no",
    }
    return replace(finding, evidence=finding.evidence + said + verdict, numbers=numbers)


def _figures(name: str, outcome: Outcome) -> dict[str, float | int | str]:
    if outcome.before is None or outcome.after is None:
        return {f"{name}_moved": outcome.moved}
    return {"loss": outcome.before, f"{name}_loss": outcome.after}
