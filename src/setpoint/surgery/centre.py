"""Taking the mean over features out of whatever writes to a residual stream.

A sum of vectors with zero mean has zero mean. So if every writer's output is centred, the stream is, and a norm that
removes the mean has nothing left to remove. For a weight this is a projection of its *output* axis: ``W - mean(W)``
over outputs, and the same for the bias.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from setpoint.surgery.editing import parameter
from setpoint.types import Edit, Writer


def centred(tensor: Tensor, axis: int) -> Tensor:
    """The tensor with zero mean along an axis, computed in float64 so that no mean leaks through rounding.

    >>> centred(torch.tensor([[1.0, 2.0], [3.0, 6.0]]), 0)
    tensor([[-1., -2.],
            [ 1.,  2.]])
    """
    wide = tensor.detach().double()
    return (wide - wide.mean(axis, keepdim=True)).to(tensor)


def centre_writers(model: nn.Module, writers: Iterable[Writer]) -> list[Edit]:
    """Centre what weights and bare parameters add to the stream.

    A learned factor behind a weight (LayerScale's gamma) is multiplied into it first and becomes 1: it is the product
    that must have zero mean.

    Args:
        model: The model.
        writers: Writers with ``linear`` True. One weight may write several times (shared blocks).

    Returns:
        The edits.
    """
    edits: dict[str, Edit] = {}
    for writer in writers:
        made = writer.projection
        if made.parameter in edits:
            continue
        gamma = parameter(model, writer.scale).detach().double().flatten() if writer.scale else None
        for name, axis in ((made.parameter, made.output_axis), (made.bias, -1)):
            if not name:
                continue
            tensor = parameter(model, name)
            wide = tensor.detach().double()
            if gamma is not None:
                wide = (wide.movedim(axis, -1) * gamma).movedim(-1, axis)
            edits[name] = Edit(name, (wide - wide.mean(axis, keepdim=True)).to(tensor), "writes no mean to the stream")
        if gamma is not None and writer.scale not in edits:
            ones = torch.ones_like(parameter(model, writer.scale).detach())
            edits[writer.scale] = Edit(writer.scale, ones, f"multiplied into {made.parameter}")
    return list(edits.values())


def drop_last(edits: Iterable[Edit], axes: dict[str, int]) -> list[Edit]:
    """Edits of centred tensors without their last entry, which is minus the sum of the others.

    Args:
        edits: From `centre_writers`.
        axes: Parameter name -> its output axis; what is not named stays as it is.
    """
    narrow: list[Edit] = []
    for edit in edits:
        assert isinstance(edit.value, Tensor)
        if edit.path in axes:
            axis = axes[edit.path]
            kept = edit.value.narrow(axis, 0, edit.value.shape[axis] - 1).clone()
            narrow.append(Edit(edit.path, kept, "the last entry is minus the sum of the others"))
        else:
            narrow.append(edit)
    return narrow
