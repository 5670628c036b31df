"""The watcher: hooks on the recorded steps, nothing at all on the others."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.probe import Recorder, registry
from setpoint.probe.recorder import block_finder, with_gradients
from setpoint.running import plain_execution, unwrap
from setpoint.surgery import Anatomy
from setpoint.types import Finding
from setpoint.watching.gradients import WholeGradients
from setpoint.watching.observation import Observation
from setpoint.watching.sinks import Sink, sinks_for

if TYPE_CHECKING:
    from setpoint.train import Run

_LOG = logging.getLogger("setpoint.watch")


@dataclass(frozen=True, slots=True)
class Alarm:
    """A finding of severity warning or error, and the step at which it was first seen."""

    step: int
    finding: Finding


@dataclass(slots=True)
class Seen:
    """What `Watcher.step` gives to the loop; set ``loss`` and it is kept with the observation."""

    loss: Tensor | float | None = None


def watch(
    model: nn.Module,
    *,
    every: int = 50,
    on: str | Path | Sink | Iterable[str | Path | Sink] | None = None,
    probes: Collection[str] = (),
    ignore: Collection[str] = (),
    anatomy: Anatomy | None = None,
) -> Watcher:
    """Record the signals of a model at every N-th step of its training, and raise alarms.

    The structure of the model is read once, from the inputs of the first recorded step. On a recorded step the same
    statistics are taken as by `setpoint.check`, in train mode, and gradients with them; on all other steps the model
    carries no hook. With several processes every one of them must watch, and the first of them writes.

    Args:
        model: The network whose forward is called (inside a LightningModule, the network and not the module).
        every: Steps from one recording to the next; the first step is recorded.
        on: A ``.jsonl`` file, a folder for TensorBoard, a callable that is given each `Observation`, or several.
        probes: Codes of the findings to look for; empty for all.
        ignore: Ids or codes of findings to leave out.
        anatomy: The structure, if it was read before: ``Anatomy.trace(model, batch)``. A model that ``fsdp`` shards
            before its first step needs it.

    Returns:
        The watcher; see `setpoint.watching` for the ways to use it.

    Raises:
        InputError: Unknown codes, ``every`` below 1, something that can't be written to.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> watcher = watch(model, every=2)
        >>> for _ in range(4):
        ...     with watcher.step() as seen:
        ...         seen.loss = model(torch.randn(16, 4)).square().mean()
        ...         seen.loss.backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        >>> watcher.latest.step, "parameters/gradient_norm" in watcher.latest.scalars()
        (2, True)
    """
    if every < 1:
        raise InputError(f"expected every of at least 1 step, got {every}")
    return Watcher(model, every=every, sinks=sinks_for(on), probes=probes, ignore=ignore, anatomy=anatomy)


class Watcher:
    """What `watch` returns: a step to put around a loop's own, and a callback of setpoint's loop.

    Args:
        model: The network.
        every: Steps from one recording to the next.
        sinks: Called with each observation, in the main process.
        probes: Codes of the findings to look for; empty for all.
        ignore: Ids or codes of findings to leave out.
        anatomy: The structure, None to read it at the first recorded step.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int,
        sinks: Collection[Sink] = (),
        probes: Collection[str] = (),
        ignore: Collection[str] = (),
        anatomy: Anatomy | None = None,
    ) -> None:
        self.model = unwrap(model)
        self.every = every
        self.alarms: list[Alarm] = []
        self.latest: Observation | None = None
        self._sinks = tuple(sinks)
        self._probes = registry.probes_for(probes)
        self._needs = with_gradients(registry.needs(self._probes))
        self._ignore = frozenset(ignore)
        self._anatomy = anatomy
        self._stack: ExitStack | None = None
        self._recorder: Recorder | None = None
        self._parameters: WholeGradients | None = None
        self._recorded = -1
        self._steps = 0

    # -- a loop of one's own ------------------------------------------------------------------------------------------

    @contextmanager
    def step(self, number: int | None = None) -> Iterator[Seen]:
        """Around one training step: forward, backward and update.

        Args:
            number: Which step it is, counted from 0, for a run that goes on from a checkpoint; the watcher counts
                when None.
        """
        seen = Seen()
        self._steps = self._steps if number is None else number
        self.begin(self._steps)
        try:
            yield seen
        except BaseException:
            self.cancel()
            raise
        self.finish(seen.loss)
        self._steps += 1

    # -- callbacks ----------------------------------------------------------------------------------------------------

    def on_step_start(self, run: Run) -> None:
        """Called by `setpoint.train.train`."""
        self.begin(run.step)

    def on_step(self, run: Run) -> None:
        """Called by `setpoint.train.train`."""
        self.finish(run.loss)

    def on_end(self, run: Run) -> None:  # noqa: ARG002
        """Called by `setpoint.train.train`, also when a step failed."""
        self.cancel()

    def for_trainer(self) -> Any:
        """The watcher as a callback of transformers' ``Trainer``."""
        from setpoint.watching.adapters import trainer_callback

        return trainer_callback(self)

    def for_lightning(self) -> Any:
        """The watcher as a callback of Lightning's ``Trainer``."""
        from setpoint.watching.adapters import lightning_callback

        return lightning_callback(self)

    # -- recording ----------------------------------------------------------------------------------------------------

    @property
    def recording(self) -> bool:
        """Whether a step is being recorded."""
        return self._stack is not None

    def begin(self, step: int) -> None:
        """Announce a step, counted from 0; hooks the model if it is one to be recorded."""
        if self._stack is not None or step % self.every:
            return
        self._recorded = step
        with ExitStack() as stack:
            self._parameters = WholeGradients(self.model)
            if self._anatomy is None:
                _refuse_sharded(self.model)
                stack.enter_context(plain_execution())  # compiled code would pass the hook by
                self._catch_inputs(stack)
            else:
                self._recorder = stack.enter_context(self._new_recorder(self._anatomy))
            self._stack = stack.pop_all()

    def finish(self, loss: Tensor | float | None = None) -> Observation | None:
        """Close a step; the observation if it was recorded, else None."""
        if self._stack is None:
            return None
        recorder = self._close()
        if recorder is None or self._anatomy is None:
            raise InputError(
                f"The model given to watch ({type(self.model).__name__}) was not called in step {self._recorded}; "
                "watch the network whose forward runs."
            )
        blocks = self._anatomy.blocks
        trace = recorder.trace(
            blocks=len(blocks),
            block_of=block_finder([(block.name, block.index) for block in blocks]),
            loss=float(loss.detach()) if isinstance(loss, Tensor) else loss,
            structure=self._anatomy.structure,
        )
        findings = registry.run(self._probes, trace)
        kept = [finding for finding in findings if not self._ignore & {finding.id, finding.code}]
        treated = tuple(registry.with_remedies(finding, trace.structure) for finding in kept)
        self.latest = Observation(self._recorded, trace, treated, trace.loss)
        self._raise_alarms(self.latest)
        if not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0:
            for sink in self._sinks:
                sink(self.latest)
        return self.latest

    def cancel(self) -> None:
        """Leave a step without recording it; every hook is removed."""
        self._close()

    def _close(self) -> Recorder | None:
        stack, recorder = self._stack, self._recorder
        self._stack = self._recorder = None
        if stack is not None:
            stack.close()
        return recorder

    def _new_recorder(self, anatomy: Anatomy) -> Recorder:
        return Recorder(self.model, anatomy.sites(), needs=self._needs, parameters=self._parameters)

    def _catch_inputs(self, stack: ExitStack) -> None:
        """Read the structure from the first call of the model, and record that very call."""
        hooks = self.model._forward_pre_hooks

        def arrived(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            handle.remove()
            inputs = {name: value for name, value in kwargs.items() if name != "labels"}
            self._anatomy = Anatomy.trace(model, args, forward=lambda m, a: m(*a, **inputs))
            before = set(hooks)
            assert self._stack is not None  # the hook is there between begin and finish only
            self._recorder = self._stack.enter_context(self._new_recorder(self._anatomy))
            # This call collected its hooks before the recorder came; run the new ones for it.
            for key in [key for key in hooks if key not in before]:
                hooks[key](model, args, kwargs)

        handle = self.model.register_forward_pre_hook(arrived, with_kwargs=True)
        stack.callback(handle.remove)

    def _raise_alarms(self, seen: Observation) -> None:
        known = {alarm.finding.id: alarm.finding.severity for alarm in self.alarms}
        for finding in seen.findings:
            if finding.severity != "info" and known.get(finding.id) != finding.severity:
                self.alarms.append(Alarm(seen.step, finding))
                _LOG.warning("step %d: %s %s: %s", seen.step, finding.severity, finding.id, finding.evidence)


def _refuse_sharded(model: nn.Module) -> None:
    if any(
        "FSDP" in kind.__name__ or "FullySharded" in kind.__name__ for m in model.modules() for kind in type(m).__mro__
    ):
        raise InputError(
            "The structure of a sharded model can't be read; read it before and pass it on: "
            "watch(model, anatomy=Anatomy.trace(model, batch), …)."
        )
