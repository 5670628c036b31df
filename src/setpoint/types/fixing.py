"""What a fix is given and gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a fix does not accept a model: the place in the model and the reason."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Edit:
    """One change to a model: put ``value`` (a module, parameter or buffer) at the qualified name ``path``."""

    path: str
    value: nn.Module | Tensor
    why: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class FixContext:
    """What a fix may use while it plans.

    Args:
        anatomy: Fresh, of the model as it stands at this stage.
        reference: The model as it was before any fix.
        batches: Real inputs.
        forward: ``forward(model, batch)``.
        generator: The only source of randomness.
        progress: ``progress(done, total, text)``.
        resume: A folder for partial results, None to keep none.
    """

    anatomy: Any
    reference: nn.Module
    batches: Sequence[Any]
    forward: Callable[[nn.Module, Any], Any]
    generator: torch.Generator
    progress: Callable[[int, int, str], None]
    resume: Path | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """What a fix did, measured.

    Args:
        parameters, bytes: ``(before, after)``.
        difference: Largest absolute output difference on real inputs; ``relative`` divides by the largest output.
        divergence: Mean KL of the logits in nats, None without a head.
        perplexity: ``(before, after)``, None without a head.
        time: Forward time after over before.
    """

    parameters: tuple[int, int]
    bytes: tuple[int, int]
    difference: float
    relative: float
    divergence: float | None = None
    perplexity: tuple[float, float] | None = None
    time: float | None = None
