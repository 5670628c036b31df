"""SmallInit: attention matrices that start as small as those of a feed-forward.

Xavier's normal start gives a d × d matrix of attention the variance 2/(2d), and the feed-forward's (d × 4d) 2/(5d).
Taking 2/(5d) for all of them lets a transformer train without warm-up (Nguyen and Salazar, 2019, arXiv 1910.05895).
"""

from __future__ import annotations

from math import sqrt
from typing import TypeVar

import torch
from torch import nn

from setpoint.errors import InputError

Module = TypeVar("Module", bound=nn.Module)


@torch.no_grad()
def small_init_(module: Module, d: int | None = None, generator: torch.Generator | None = None) -> Module:
    """Draw the weight of a linear layer, or all four of an attention, from N(0, 2/(5d)); biases become 0.

    Args:
        module: A linear layer, or a module whose matrices are all those of one attention, such as
            `torch.nn.MultiheadAttention`. Changed in place.
        d: The width of the model; left out, the input width of each matrix.
        generator: For the draw; left out, torch's own.

    Returns:
        The module.

    Raises:
        InputError: ``d`` below 1, or the module has no matrix.

    Reference:
        Nguyen and Salazar, 2019, "Transformers without Tears", arXiv 1910.05895.

    Example:
        >>> layer = small_init_(nn.Linear(512, 512))
        >>> 0.027 < layer.weight.std() < 0.029
        tensor(True)
    """
    if d is not None and d < 1:
        raise InputError(f"expected d of at least 1, got {d!r}; it is the width of the model")
    matrices = [p for p in module.parameters() if p.dim() == 2]
    if not matrices:
        raise InputError(
            f"expected a linear layer or an attention, got a {type(module).__name__}, which has no matrix to draw"
        )
    for matrix in matrices:
        matrix.normal_(0.0, sqrt(2 / (5 * (d or matrix.shape[1]))), generator=generator)
    for name, parameter in module.named_parameters():
        if name.rpartition(".")[2].endswith("bias"):
            parameter.zero_()
    return module
