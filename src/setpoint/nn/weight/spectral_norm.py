"""Spectral normalization: a weight divided by its largest singular value, so that the layer is 1-Lipschitz.

``w = v / sigma(v)`` (Miyato, Kataoka, Koyama and Yoshida, 2018, arXiv 1802.05957). One step of power iteration a
training call follows the largest singular value; in evaluation the estimate stands still.
"""

from __future__ import annotations

from typing import TypeVar

from torch import nn
from torch.nn.utils import parametrizations

from setpoint.errors import InputError
from setpoint.nn.weight.reparametrize import kinds_on
from setpoint.nn.weight.units import expect_weight

Module = TypeVar("Module", bound=nn.Module)


def spectral_norm(
    module: Module, name: str = "weight", n_power_iterations: int = 1, eps: float = 1e-12, dim: int | None = None
) -> Module:
    """Divide a weight by its largest singular value at every use: `torch.nn.utils.parametrizations.spectral_norm`.

    Args:
        module: A layer, changed in place.
        name: The weight; one of a convolution is taken as a matrix of its output units.
        n_power_iterations: Steps of power iteration a training call.
        eps: Added where vectors of the iteration are normalized.
        dim: The axis that counts output units; left out, torch finds it.

    Returns:
        The module. `setpoint.nn.fold_weights` makes the weight a plain one.

    Raises:
        InputError: No such weight; it is under spectral norm already, or under weight normalization, whose length this
            would undo.

    Reference:
        Miyato, Kataoka, Koyama and Yoshida, 2018, "Spectral Normalization for Generative Adversarial Networks", arXiv
        1802.05957.

    Example:
        >>> import torch
        >>> layer = spectral_norm(nn.Linear(4, 3), n_power_iterations=50)
        >>> torch.linalg.matrix_norm(layer.eval().weight, 2).detach()
        tensor(1...)
    """
    expect_weight(module, name)
    for kind in kinds_on(module, name):
        if kind.__name__ in ("_SpectralNorm", "WeightNorm", "_WeightNorm"):
            raise InputError(
                f"{type(module).__name__}.{name} has a {kind.__name__.lstrip('_')} already, and spectral norm "
                "fixes the scale; choose one, fold_weights(model) takes away what is there"
            )
    return parametrizations.spectral_norm(module, name, n_power_iterations, eps, dim)  # type: ignore[return-value]
