"""The watcher as a callback of other people's training loops."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import Tensor

from setpoint.errors import InputError
from setpoint.extras import require
from setpoint.probe.recorder_gradient import gather

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

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
    """For transformers' ``Trainer``: a step is an update, however many batches it accumulates.

    Its callbacks are not told the loss. It is taken from the outputs of the watched model, if those have a ``loss``:
    the sum over the batches of a step where the model was told how many targets the step has, else their mean.
    """
    transformers = require("transformers", "hf", "to watch its Trainer")

    class WatchCallback(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        """Hands the steps of a ``Trainer`` to a watcher."""

        def __init__(self) -> None:
            self._losses: list[Tensor] = []
            self._share = True
            self._hook: RemovableHandle | None = None

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self._leave()  # a run before this one may have ended in an error, of which callbacks are not told

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            watcher.begin(state.global_step)
            if watcher.recording:
                self._losses.clear()
                self._hook = watcher.model.register_forward_hook(self._called, with_kwargs=True)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if watcher.recording:
                losses = gather([float(loss) for loss in self._losses])
                total = sum(map(sum, losses)) / (1 if self._share else max(1, sum(map(len, losses))))
                watcher.finish(total if self._losses else None)
            self._leave()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self._leave()

        def _called(self, model: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:  # noqa: ARG002
            loss = getattr(output, "loss", None)
            if isinstance(loss, Tensor) and loss.requires_grad:
                self._losses.append(loss.detach().mean())
                self._share = kwargs.get("num_items_in_batch") is not None

        def _leave(self) -> None:
            watcher.cancel()
            if self._hook is not None:
                self._hook.remove()
                self._hook = None

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

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:  # noqa: ARG002
            if watcher.recording and trainer.global_step != self._step:
                loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
                watcher.finish(loss)

        def on_exception(self, *_: Any) -> None:
            watcher.cancel()

        def on_train_end(self, *_: Any) -> None:
            watcher.cancel()

    return WatchCallback()
