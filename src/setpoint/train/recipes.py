"""Optimizers and learning-rate schedules as plain data, so that a run can be written down and repeated.

A recipe builds its optimizer when the model is where it will train (sharded, on its device), with the groups of
`setpoint.optim.decay_groups`. A schedule is a function of the step: it has no state to save.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from setpoint.errors import InputError
from setpoint.optim.decay import decay_groups


class Recipe(Protocol):
    """Builds an optimizer for a model."""

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer, over the parameters that require a gradient."""


@dataclass(frozen=True, slots=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv:1711.05101), in torch's fused form.

    Args:
        lr: Peak learning rate.
        betas: Decay of the two running means.
        eps: Added to the root of the second.
        weight_decay: On matrices only; norms, biases and marked parameters are left alone.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer."""
        groups = decay_groups(model, self.weight_decay)
        kinds = {parameter.device.type for group in groups for parameter in group["params"]}
        fused = kinds <= {"cpu", "cuda"} and all(p.is_floating_point() for group in groups for p in group["params"])
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=fused)


@dataclass(frozen=True, slots=True)
class SGD:
    """Stochastic gradient descent.

    Args:
        lr: Peak learning rate.
        momentum: 0 for none.
        nesterov: Nesterov's form of momentum.
        weight_decay: On matrices only.
    """

    lr: float = 0.1
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer."""
        groups = decay_groups(model, self.weight_decay)
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov)


class Schedule(Protocol):
    """The learning rate of a step as a share of the peak."""

    def __call__(self, step: int, steps: int) -> float:
        """For step number ``step``, counted from 0, of ``steps``."""


@dataclass(frozen=True, slots=True)
class Constant:
    """The peak throughout, after a linear warm-up.

    Args:
        warmup: An int is steps, a float the share of all steps.

    >>> [Constant(warmup=4)(step, 8) for step in range(6)]
    [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    """

    warmup: int | float = 0

    def __post_init__(self) -> None:
        _check(warmup=self.warmup)

    def __call__(self, step: int, steps: int) -> float:
        """The share of the peak."""
        return _warm(step, _count(self.warmup, steps))


@dataclass(frozen=True, slots=True)
class Cosine:
    """A linear warm-up, then half a cosine down to a floor (Loshchilov and Hutter 2017, arXiv:1608.03983).

    Args:
        warmup: An int is steps, a float the share of all steps.
        final: Share of the peak that the last step has.

    >>> [round(Cosine(warmup=1, final=0.0)(step, 6), 3) for step in range(6)]
    [1.0, 1.0, 0.854, 0.5, 0.146, 0.0]
    """

    warmup: int | float = 0.1
    final: float = 0.1

    def __post_init__(self) -> None:
        _check(warmup=self.warmup, final=self.final)

    def __call__(self, step: int, steps: int) -> float:
        """The share of the peak."""
        warm = _count(self.warmup, steps)
        if step < warm:
            return _warm(step, warm)
        way = (step - warm) / max(1, steps - 1 - warm)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * min(1.0, way))) / 2


@dataclass(frozen=True, slots=True)
class WSD:
    """Warm-up, stable, decay: the peak for most of the run, then linearly down (Hu et al. 2024, arXiv:2404.06395).

    Args:
        warmup: An int is steps, a float the share of all steps.
        decay: Length of the last phase, in the same way.
        final: Share of the peak that the last step has.

    >>> [WSD(warmup=2, decay=4, final=0.0)(step, 10) for step in range(10)]
    [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """

    warmup: int | float = 0.1
    decay: int | float = 0.2
    final: float = 0.0

    def __post_init__(self) -> None:
        _check(warmup=self.warmup, decay=self.decay, final=self.final)

    def __call__(self, step: int, steps: int) -> float:
        """The share of the peak."""
        warm, falling = _count(self.warmup, steps), _count(self.decay, steps)
        left = max(0, steps - 1 - step)
        if step < warm or left >= falling:
            return _warm(step, warm)
        return self.final + (1 - self.final) * left / falling


def _warm(step: int, warm: int) -> float:
    return min(1.0, (step + 1) / warm) if warm else 1.0


def _count(length: int | float, steps: int) -> int:
    return length if isinstance(length, int) else round(length * steps)


def _check(**lengths: int | float) -> None:
    for name, length in lengths.items():
        if length < 0 or (isinstance(length, float) and length > 1):
            raise InputError(f"expected {name} as a number of steps (int) or a share from 0.0 to 1.0, got {length!r}")
