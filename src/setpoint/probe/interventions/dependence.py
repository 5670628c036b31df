"""What depends on the massive activations that a recording found.

The intervention of Owen et al. (2025, arXiv 2503.22329): at the first block whose output holds them, and only there,
the entries are set to zero, or to their mean over other sequences. Where zero ruins a model and the mean doesn't,
the entries work as fixed biases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from setpoint.probe.base import Intervention, Subject
from setpoint.probe.interventions.hooks import caught, edited
from setpoint.probe.interventions.massive import Entry, group_means, massive_entries, set_entries
from setpoint.probe.interventions.outcome import Bench, Change, Outcome, level
from setpoint.probe.massive import MassiveActivation, Run
from setpoint.types import Finding, Tap, Task, Trace


@dataclass(frozen=True)
class MassiveDependence(Intervention):
    """What depends on a massive activation: set to zero, set to its mean over other sequences, and a control.

    At the first block that holds it, and only there, the massive entries are replaced; the control sets a random other
    channel of the same tokens to zero. Damage is the rise of the loss (perplexity for a language model), or how far
    the output moves when there is no loss.

    Args:
        noticeable: Rise of the loss in nats, or relative change of the output, from which the model is said to depend
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
            tap = trace.records[finding.sites[0]].site.tap
            if tap.side == "output":
                found.append(self._deepened(subject, bench, run, finding, tap, trace.task))
        return [f for f in found if f is not None]

    def _deepened(
        self, subject: Subject, bench: Bench, run: Run, finding: Finding, tap: Tap, task: Task
    ) -> Finding | None:
        entries = self._entries(subject, bench, run, tap)
        if not any(entries):
            return None

        def setting(values: Callable[[int], Sequence[float]], channel: int | None = None) -> Change:
            def change(index: int) -> AbstractContextManager[None]:
                at = [e if channel is None else replace(e, channel=channel) for e in entries[index]]
                return edited(subject.model, {tap: lambda hidden: set_entries(hidden, at, values(index))})

            return change

        zero = bench.outcome(setting(lambda i: [0.0] * len(entries[i])))
        other = self._control_channel(subject, bench, tap, run)
        control = bench.outcome(setting(lambda i: [0.0] * len(entries[i]), other))
        means = _other_means(entries)
        mean = None if means is None else bench.outcome(setting(lambda i: means[i]))
        return _reported(finding, zero, mean, control, other, task, self.noticeable)

    def _entries(self, subject: Subject, bench: Bench, run: Run, tap: Tap) -> list[list[Entry]]:
        """Massive entries of the run's channels, per batch."""
        probe = MassiveActivation()
        found = []
        for batch in bench.batches:
            with torch.no_grad(), caught(subject.model, [tap]) as tensors:
                subject.forward(subject.model, batch)
            massive, _, _ = massive_entries(tensors[tap], probe.absolute, probe.relative)
            found.append([e for e in massive if e.channel in run.channels])
        return found

    def _control_channel(self, subject: Subject, bench: Bench, tap: Tap, run: Run) -> int:
        with torch.no_grad(), caught(subject.model, [tap]) as tensors:
            subject.forward(subject.model, bench.batches[0])
        width = int(tensors[tap].shape[-1])
        order = torch.randperm(width, generator=torch.Generator().manual_seed(self.seed))
        return next(int(c) for c in order if int(c) not in run.channels)


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
