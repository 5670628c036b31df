"""What was loaded: a model, ready to run, and what is needed to feed it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor, nn

    from setpoint.types.fixing import Edit


@dataclass(frozen=True, slots=True)
class Made:
    """How a model that fixes changed is built, as data.

    Args:
        fixes: The shell form of each fix, in order.
        edits: Every module that they put somewhere, in order.
        base: The architecture at first; None while its class and configuration still say it.
    """

    fixes: tuple[str, ...] = ()
    edits: tuple[Edit, ...] = ()
    base: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to run, and what is needed to feed it.

    Args:
        model: The network, in eval mode.
        processor: The tokenizer (text) or image transform (a callable from a PIL image to a ``(3, height, width)``
            tensor), or None for a model of the user's own.
        task: What the outputs mean; decides the default data and loss.
        forward: ``forward(model, batch)`` runs one batch and returns the model's output.
        source: What the user asked for, as typed.
        notes: Facts a reader must know to judge the numbers (for example "weights are 4-bit, dequantized to float32").
        batches: Inputs that came with the model (a user's factory may return them beside it), None otherwise.
        loss: ``loss(output, batch)`` that came with the model in the same way, None otherwise.
        made: How it is built; without edits, as its class makes it.
    """

    model: nn.Module
    processor: Any
    task: Task
    forward: Callable[[nn.Module, Any], Any]
    source: str
    notes: tuple[str, ...] = ()
    batches: Sequence[Any] | None = None
    loss: Callable[[Any, Any], Tensor] | None = None
    made: Made = Made()


Task = Literal["language-model", "encoder", "image-features", "image-classification", "other"]
