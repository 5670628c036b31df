"""The watcher as a callback of other people's training loops."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from setpoint.errors import InputError
from setpoint.extras import require

if TYPE_CHECKING:
    from setpoint.watching.watcher import Watcher


def _lightning() -> Any:
    """Lightning under either of its names."""
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            return import_module(name)
        except ModuleNotFoundError:
            continue
    raise InputError("Lightning is not installed; install it with: pip install lightning")


def trainer_callback(watcher: Watcher) -> Any:
    """For transformers' ``Trainer``: a step is an update, however many batches it accumulates."""
    transformers = require("transformers", "hf", "to watch its Trainer")

    class WatchCallback(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        """Hands the steps of a ``Trainer`` to a watcher."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            watcher.begin(state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            watcher.finish()

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            watcher.cancel()

    return WatchCallback()


def lightning_callback(watcher: Watcher) -> Any:
    """For Lightning's ``Trainer``: a step is an update, however many batches it accumulates."""
    pytorch = _lightning()

    class WatchCallback(pytorch.Callback):  # type: ignore[misc, name-defined]
        """Hands the steps of a ``Trainer`` to a watcher."""

        def __init__(self) -> None:
            self._step = -1

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step != self._step:  # the first batch of an update
                self._step = trainer.global_step
                watcher.begin(self._step)

        def on_before_optimizer_step(self, *_: Any) -> None:
            watcher.backward()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:  # noqa: ARG002
            if watcher.recording and trainer.global_step != self._step:
                loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
                watcher.finish(loss)

        def on_exception(self, *_: Any) -> None:
            watcher.cancel()

        def on_train_end(self, *_: Any) -> None:
            watcher.cancel()

    return WatchCallback()
