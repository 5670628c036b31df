"""Weight normalization: every unit's weights as a length times a direction.

``w = g v / ||v||``, with a length ``g`` and a vector ``v`` for each output unit, so that an optimizer moves length and
direction apart (Salimans and Kingma, 2016, arXiv 1602.07868). The gradient of ``v`` is orthogonal to ``v``: under plain
gradient steps ``||v||`` only grows, and the direction turns more slowly the longer ``v`` is. Nothing couples the
examples of a batch, so it suits recurrent networks, reinforcement learning and generative models.

torch has the same map (`torch.nn.utils.parametrizations.weight_norm`) and the same names of parameters, so checkpoints
of both load into each other. Here the units of transposed, grouped and GPT-2's layers are found by themselves, norms
are in float32 for half precision, a unit of zeros stays zero instead of turning to NaN, and the paper's companions are
there: `data_dependent_init` and `MeanOnlyBatchNorm2d`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import parametrize

from setpoint.errors import InputError
from setpoint.nn.norm.functional import wide
from setpoint.nn.weight.reparametrize import fold, kinds_on, put, put_everywhere
from setpoint.nn.weight.units import ROWS, Units, expect_weight, inverse_norms, units_of
from setpoint.optim.decay import no_weight_decay

Module = TypeVar("Module", bound=nn.Module)

EPS = 1e-12
"""A vector of at most this length counts as zero."""
LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, nn.modules.conv._ConvNd)
"""What `apply_weight_norm` and its like take unless told otherwise: linear layers and convolutions of every kind."""


def normalized_weight(
    g: Float[Tensor, "*lengths"], v: Float[Tensor, "outputs inputs ..."], units: Units | None = ROWS
) -> Float[Tensor, "outputs inputs ..."]:
    """``g v / ||v||`` for every output unit.

    Args:
        g: Lengths, in a shape that broadcasts against ``v``.
        v: Directions, in the shape of the weight. Half precision is computed in float32 and cast back.
        units: Where ``v`` keeps its units; None for one norm over all of it.

    Returns:
        A weight of the shape and dtype of ``v``; a unit whose ``||v||`` is at most 1e-12 is zero.

    Example:
        >>> normalized_weight(torch.tensor([[2.0]]), torch.tensor([[3.0, 4.0]]))
        tensor([[1.2000, 1.6000]])
    """
    length, direction = wide(g), wide(v)
    if units is None:
        dims = tuple(range(v.dim()))
        return (direction * (length * inverse_norms(direction, dims, EPS))).to(v.dtype)
    matrix = units.split(direction)
    factor = units.split(length) * inverse_norms(matrix, tuple(range(2, matrix.dim())), EPS)
    return units.join(matrix * factor).to(v.dtype)


class WeightNorm(nn.Module):
    """The parametrization behind `weight_norm`: from ``(g, v)`` to the weight, and back.

    Args:
        units: Where the weight keeps its output units; None for one norm over all of it.

    Reference:
        Salimans and Kingma, 2016, "Weight Normalization", arXiv 1602.07868.

    Example:
        >>> g, v = WeightNorm().right_inverse(torch.tensor([[3.0, 4.0]]))
        >>> g, WeightNorm()(g, v)
        (tensor([[5.]]), tensor([[3., 4.]]))
    """

    def __init__(self, units: Units | None = ROWS) -> None:
        super().__init__()
        self.units = units

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        """The weight."""
        return normalized_weight(g, v, self.units)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """``(g, v)`` with ``v`` the weight itself and ``g`` its lengths."""
        if self.units is None:
            return torch.linalg.vector_norm(wide(weight)).to(weight.dtype), weight
        matrix = self.units.split(wide(weight))
        norms = torch.linalg.vector_norm(matrix, dim=tuple(range(2, matrix.dim())), keepdim=True)
        return self.units.join(norms).to(weight.dtype), weight

    def extra_repr(self) -> str:
        """Where units are."""
        return "one norm" if self.units is None else f"dim={self.units.dim}, groups={self.units.groups}"


def weight_norm(module: Module, name: str = "weight", dim: int | Literal["output"] | None = "output") -> Module:
    """Write a weight as a length times a direction for every output unit; the layer computes what it did.

    The weight is replaced by ``parametrizations.weight.original0`` (g, which is not weight-decayed) and ``original1``
    (v), named as torch names them. A checkpoint with ``weight_g`` and ``weight_v`` loads too. `fold_weights` or
    `remove_weight_norm` make it a plain weight again. Weights that several modules share are for `apply_weight_norm`.

    Args:
        module: A layer, changed in place; make the optimizer afterwards.
        name: The weight, of shape ``(out, in, *kernel)`` or as the layer keeps it; ``"weight_ih_l0"`` for an LSTM.
        dim: The axis that counts output units: found from the layer, or given; None for one norm over all of it.

    Returns:
        The module. A unit whose weights are all zero has no direction, and stays zero.

    Raises:
        InputError: No such weight; it is normalized already, or under spectral norm, which fixes the scale that ``g``
            would learn; ``dim`` is no axis of it.

    Reference:
        Salimans and Kingma, 2016, "Weight Normalization", arXiv 1602.07868.

    Example:
        >>> layer = weight_norm(nn.Conv2d(3, 8, 3))
        >>> layer.parametrizations.weight.original0.shape
        torch.Size([8, 1, 1, 1])
    """
    return _register(module, name, _made(module, name, dim))


def apply_weight_norm(model: Module, types: Sequence[type[nn.Module]] = LAYERS) -> Module:
    """`weight_norm` on the weight of every layer of the given types; a weight that is shared stays shared.

    Args:
        model: Changed in place; make the optimizer afterwards.
        types: Classes of layers.

    Returns:
        The model.

    Raises:
        InputError: No such layer, or one that `weight_norm` refuses; the model is then as it was.

    Example:
        >>> model = apply_weight_norm(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
        >>> sum(p.numel() for p in model.parameters()) - (3 * 4 + 4 + 4 * 2 + 2)  # a length for every unit
        6
    """
    return put_everywhere(
        model,
        lambda _, module: isinstance(module, tuple(types)),
        lambda module: _made(module, "weight", "output"),
        _register,
    )


def remove_weight_norm(module: Module, name: str = "weight") -> Module:
    """Make a plain weight of one under `weight_norm` again; the layer computes what it did.

    Args:
        module: A layer, changed in place.
        name: The weight.

    Returns:
        The module.

    Raises:
        InputError: The weight is not normalized, or something else is on it too.

    Example:
        >>> type(remove_weight_norm(weight_norm(nn.Linear(3, 2)))).__name__
        'Linear'
    """
    if kinds_on(module, name) != [WeightNorm]:
        raise InputError(
            f"{type(module).__name__}.{name} is not under weight normalization alone; fold_weights takes any "
            "parametrization"
        )
    return fold(module, name)


def _made(module: nn.Module, name: str, dim: int | str | None) -> WeightNorm:
    present = kinds_on(module, name)
    if torch_parametrizations._SpectralNorm in present:
        raise InputError(
            f"{type(module).__name__}.{name} is under spectral norm, which fixes the scale that weight normalization "
            "would learn; choose one"
        )
    if present:
        raise InputError(
            f"{type(module).__name__}.{name} has a {present[0].__name__} already; weight normalization comes first, "
            "and fold_weights(model) takes away what is there"
        )
    weight = expect_weight(module, name)
    if dim is None or dim == "output":
        return WeightNorm(units_of(module, name) if dim == "output" else None)
    if not isinstance(dim, int) or not -weight.dim() <= dim < weight.dim():
        raise InputError(f"expected dim to be an axis of a weight of shape {tuple(weight.shape)}, got {dim!r}")
    return WeightNorm(Units(dim % weight.dim()))


def _register(module: Module, name: str, parametrization: nn.Module) -> Module:
    put(module, name, parametrization)
    parametrizations: Any = module.parametrizations
    no_weight_decay(parametrizations[name], "original0")
    module.register_load_state_dict_pre_hook(_read_old_names)  # type: ignore[no-untyped-call]
    return module


def _read_old_names(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """``weight_g`` and ``weight_v``, as torch's first weight_norm wrote them."""
    if not parametrize.is_parametrized(module):
        return
    parametrizations: Any = module.parametrizations
    for name in parametrizations:
        for old, new in ((f"{name}_g", "original0"), (f"{name}_v", "original1")):
            if prefix + old in state:
                state[f"{prefix}parametrizations.{name}.{new}"] = state.pop(prefix + old)
