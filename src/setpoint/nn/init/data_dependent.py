"""Data-dependent initialization: lengths and biases from one batch, so that every unit starts with mean 0, deviation 1.

Salimans and Kingma (2016, section 3, arXiv 1602.07868) start a network under weight normalization so: directions
``v ~ N(0, 0.05²)``, one pass with ``g = 1`` and ``b = 0``, and from each unit's pre-activations t over the batch
``g = 1 / std(t)`` and ``b = -mean(t) / std(t)``. Layers are done in the order in which they run, each on the outputs of
those that are done already.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.nn.norm.functional import wide
from setpoint.nn.norm.mean_only_batchnorm import _MeanOnlyBatchNorm
from setpoint.nn.weight.reparametrize import kinds_on
from setpoint.nn.weight.weightnorm import WeightNorm
from setpoint.running import Forward, kept_modes, run_batch

Module = TypeVar("Module", bound=nn.Module)
_Layer = nn.Linear | nn.modules.conv._ConvNd


@torch.no_grad()
def data_dependent_init(
    model: Module,
    batch: Any,
    std: float = 0.05,
    *,
    forward: Forward | None = None,
    generator: torch.Generator | None = None,
) -> Module:
    """Start every weight-normalized layer anew, so that its outputs on a batch have mean 0 and standard deviation 1.

    Dropout is off meanwhile and batch norms use their running averages; mean-only batch norms, which belong to the
    method, use the batch's mean and take it into their average.

    Args:
        model: With linear layers or convolutions under `weight_norm`; others are left alone. Their directions, lengths
            and biases are overwritten. Without a bias the mean stays what it is.
        batch: Inputs, a hundred examples or more: lengths from few are noisy. A mapping is passed as keywords, a tuple
            or list as positions, anything else as it is.
        std: Of the normal numbers that directions are drawn from. Not of the outputs; it sets the pace at which
            directions turn, ``||v|| = std * sqrt(fan_in)``.
        forward: ``forward(model, batch)``, if calling takes more than the batch.
        generator: For the draw; left out, torch's own.

    Returns:
        The model.

    Raises:
        InputError: No such layer, one that did not run on this batch, or a unit whose outputs are all equal there, so
            that no length gives it a deviation of 1. The model is then as it was.

    Reference:
        Salimans and Kingma, 2016, "Weight Normalization", section 3, arXiv 1602.07868.

    Example:
        >>> from setpoint.nn import apply_weight_norm
        >>> model = apply_weight_norm(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 1)))
        >>> x = torch.randn(256, 8)
        >>> y = data_dependent_init(model, x)(x)
        >>> bool(y.mean().abs() < 1e-5), bool((y.std(correction=0) - 1).abs() < 1e-4)
        (True, True)
    """
    if not std > 0:
        raise InputError(f"expected std above 0, got {std!r}; the paper uses 0.05")
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _Layer) and kinds_on(module, "weight")[:1] == [WeightNorm]
    }
    if not layers:
        raise InputError(
            "expected linear layers or convolutions under weight normalization, found none; use apply_weight_norm"
        )
    waiting = dict(layers)
    touched = [*model.buffers(), *(p for layer in layers.values() for p in layer.parameters())]
    with _as_it_was_on_error(touched), kept_modes(model):
        for module in model.modules():
            module.training = isinstance(module, _MeanOnlyBatchNorm)
        for layer in layers.values():
            _draw(layer, std, generator)
        hooks = [
            layer.register_forward_hook(partial(_standardize, name=name, waiting=waiting))
            for name, layer in layers.items()
        ]
        try:
            run_batch(model, batch) if forward is None else forward(model, batch)
        finally:
            for hook in hooks:
                hook.remove()
        if waiting:
            raise InputError(f"{', '.join(waiting)} did not run on this batch, so there is nothing to start it from")
    return model


def _parts(layer: nn.Module) -> tuple[Tensor, Tensor]:
    parametrizations: Any = layer.parametrizations
    return parametrizations.weight.original0, parametrizations.weight.original1


def _draw(layer: nn.Module, std: float, generator: torch.Generator | None) -> None:
    g, v = _parts(layer)
    v.normal_(0.0, std, generator=generator)
    g.fill_(1.0)
    if isinstance(layer.bias, Tensor):
        layer.bias.zero_()


def _standardize(layer: nn.Module, _: Any, output: Tensor, *, name: str, waiting: dict[str, nn.Module]) -> Tensor:
    """Set length and bias by the first output, and pass on what the layer gives with them."""
    if waiting.pop(name, None) is None:
        return output  # it runs a second time, with its new parameters
    axis = -1 if isinstance(layer, nn.Linear) else -1 - len(layer.kernel_size)  # type: ignore[arg-type]
    t = wide(output).movedim(axis, -1).flatten(0, -2)
    deviation = t.std(0, correction=0)
    rounding = 8 * torch.finfo(t.dtype).eps * t.abs().amax(0)  # equal numbers differ from their mean by as much
    still = ~(deviation > rounding) | ~deviation.isfinite()
    if bool(still.any()):
        raise InputError(
            f"{name or 'the layer'}: {int(still.sum())} of {len(still)} units give one value on all of this batch, or "
            "none that is finite; use a larger batch of real inputs"
        )
    g, _v = _parts(layer)
    g.copy_((g.flatten() / deviation).view_as(g))
    if isinstance(layer.bias, Tensor):
        layer.bias.copy_(-t.mean(0) / deviation)
    y = t / deviation if layer.bias is None else (t - t.mean(0)) / deviation
    moved = output.movedim(axis, -1)
    return y.view(moved.shape).movedim(-1, axis).to(output.dtype)


@contextmanager
def _as_it_was_on_error(tensors: list[Tensor]) -> Iterator[None]:
    """The tensors get their values back if anything goes wrong."""
    kept = [tensor.clone() for tensor in tensors]
    try:
        yield
    except BaseException:
        for tensor, value in zip(tensors, kept, strict=True):
            tensor.copy_(value)
        raise
