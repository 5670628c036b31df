"""What a fix is given and gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from setpoint.progress import Progress, unheard

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Stage = Literal["transform", "quantize", "compensate", "tune"]
"""When a fix acts; fixes of one call run in this order, whatever order they were named in."""

STAGES: tuple[Stage, ...] = ("transform", "quantize", "compensate", "tune")


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a fix does not accept a model.

    Args:
        path: The place in the model, "" for the model as a whole.
        reason: In plain words, with what to do where there is something to do.
        done: The model already is as the fix would make it; not an error, there is only nothing left to do. A model
            with nothing for the fix to act on is not done.
    """

    path: str
    reason: str
    done: bool = False

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}" if self.path else self.reason


@dataclass(frozen=True, slots=True)
class Ref:
    """In a `Build`: the module that stands at ``path`` when the edit is made."""

    path: str


@dataclass(frozen=True, slots=True)
class Build:
    """A module as data, so that a saved model can be rebuilt with no code of its own.

    Args:
        target: ``module:attribute`` of a class in setpoint or torch.nn, e.g. ``"setpoint.nn:RMSNorm"``.
        arguments: Its keyword arguments: plain values, a `Ref` to a module that the new one wraps, or a `Build`.
    """

    target: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Edit:
    """One change to a model: put ``value`` at the qualified name ``path``.

    Args:
        path: Where; a new name may be given to a parameter that the module has no value for yet.
        value: A `Build` (a new module), a tensor (parameter or buffer), a `Ref` (a module that stands elsewhere), or a
            module as it is. A model with a module given as it is can't be saved.
        why: What for, in a few words.
    """

    path: str
    value: Build | Ref | nn.Module | Tensor
    why: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class FixContext:
    """What a fix may use while it plans.

    Args:
        model: The model as it stands at this stage, to be read and never written.
        anatomy: Fresh, of that model.
        reference: The model as it was before any fix.
        batches: Real inputs.
        forward: ``forward(model, batch)``.
        generator: The only source of randomness.
        progress: ``progress(done, total, text)``.
        resume: A folder for partial results, None to keep none.
        note: ``note(text)`` tells the user what was left as it was, and why.
    """

    model: nn.Module
    anatomy: Any
    reference: nn.Module
    batches: Sequence[Any]
    forward: Callable[[nn.Module, Any], Any]
    generator: torch.Generator
    progress: Progress
    resume: Path | None = None
    note: Callable[[str], None] = unheard


@dataclass(frozen=True, slots=True)
class Change:
    """What fixes did to a model, measured.

    Args:
        parameters, bytes: ``(before, after)``; a tensor that stands at two places counts once.
        difference: Largest absolute output difference on real inputs; ``relative`` divides by the largest output.
        divergence: Mean KL of the logits in nats, None without a head.
        perplexity: ``(before, after)``, None unless it is a language model.
        time: Forward time after over before, None where this machine could not tell (two timings of the same model
            differed by more than 2 %).
        exact: ``(float64, native)`` relative differences where exactness was claimed and held, None otherwise.
    """

    parameters: tuple[int, int]
    bytes: tuple[int, int]
    difference: float
    relative: float
    divergence: float | None = None
    perplexity: tuple[float, float] | None = None
    time: float | None = None
    exact: tuple[float, float] | None = None
