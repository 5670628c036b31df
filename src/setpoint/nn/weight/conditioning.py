"""Weight conditioning: rows of unit length, recomputed from the weight at every use.

A matrix whose rows differ much in length has a large condition number, the ratio of its largest to its smallest
singular value. Dividing every row by its length, ``W_c = E W`` with ``E = diag(1 / ||W_i||)``, is within a factor
``sqrt(out)`` of the best that any scaling of rows can do (Van der Sluis, 1969), and a better conditioned weight bounds
the curvature of the loss (Saratchandran, Wang and Lucey, 2024, arXiv 2409.03424). There are no new parameters.

Rows of unit length also change the *scale* of a layer: torch's own start has rows of length 0.58, He's of 1.41. Compare
with a network whose rows were rescaled once at the start before you credit the conditioning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeVar, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.nn.norm.functional import wide
from setpoint.nn.weight.reparametrize import put, put_everywhere
from setpoint.nn.weight.units import ROWS, Units, inverse_norms, units_of
from setpoint.nn.weight.weightnorm import LAYERS

Module = TypeVar("Module", bound=nn.Module)
Mode = Literal["row", "column", "both"]
"""What gets unit length: the weights of an output unit, those of an input, or first the ones and then the others."""


class WeightConditioning(nn.Module):
    """The parametrization behind `condition_weight`.

    Args:
        mode: ``"row"`` divides the weights of each output unit by their length, ``"column"`` those of each input,
            ``"both"`` rows first and then the columns of what that gives, so that scaling W changes nothing.
        detach_preconditioner: Take the lengths as constants in the backward pass.
        eps: A row or column of at most this length counts as zero, and stays zero.
        units: Where the weight keeps its output units.

    Raises:
        InputError: Another ``mode``, or ``eps`` not above 0.

    Reference:
        Saratchandran, Wang and Lucey, 2024, "Weight Conditioning for Smooth Optimization of Neural Networks", arXiv
        2409.03424.

    Example:
        >>> WeightConditioning()(torch.tensor([[3.0, 4.0], [0.0, 0.1]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 1.0000]])
    """

    def __init__(
        self,
        mode: Mode = "row",
        detach_preconditioner: bool = False,
        eps: float = 1e-12,
        units: Units = ROWS,
    ) -> None:
        super().__init__()
        if mode not in get_args(Mode):
            raise InputError(f"expected mode to be one of {', '.join(get_args(Mode))}, got {mode!r}")
        if not eps > 0:
            raise InputError(f"expected eps above 0, got {eps!r}; the default is 1e-12")
        self.mode = mode
        self.detach_preconditioner = detach_preconditioner
        self.eps = eps
        self.units = units

    def forward(self, weight: Float[Tensor, "outputs inputs ..."]) -> Float[Tensor, "outputs inputs ..."]:
        """The conditioned weight; norms in float32 for half precision."""
        matrix = self.units.split(wide(weight))
        rows, columns = tuple(range(2, matrix.dim())), (1,)
        for dims in {"row": (rows,), "column": (columns,), "both": (rows, columns)}[self.mode]:
            scale = inverse_norms(matrix, dims, self.eps)
            matrix = matrix * (scale.detach() if self.detach_preconditioner else scale)
        return self.units.join(matrix).to(weight.dtype)

    def extra_repr(self) -> str:
        """Mode, and what the backward pass takes for constant."""
        return f"mode={self.mode!r}, detach_preconditioner={self.detach_preconditioner}, eps={self.eps}"


def condition_weight(
    module: Module,
    name: str = "weight",
    mode: Mode = "row",
    detach_preconditioner: bool = False,
    eps: float = 1e-12,
) -> Module:
    """Have a layer multiply by its weight with rows of unit length; the weight stays the trained parameter.

    The layer computes something else from here on. `fold_weights` makes the conditioned weight a plain one, for export.
    Among several parametrizations of one weight, those that were put on later act later.

    Args:
        module: A layer, changed in place. A matrix of a convolution is ``(out_channels, in_channels / groups *
            kernel)``, one for each group.
        name: The weight.
        mode: ``"row"``, ``"column"`` or ``"both"``.
        detach_preconditioner: Take the lengths as constants in the backward pass: ``dW = E dW_c``.
        eps: A row of at most this length counts as zero, and stays zero.

    Returns:
        The module.

    Raises:
        InputError: No such weight, or a vector; it is conditioned already; a table of embeddings, whose rows are no
            units that act together: register a `WeightConditioning` yourself, or use `FixNormEmbedding`.

    Reference:
        Saratchandran, Wang and Lucey, 2024, arXiv 2409.03424.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> _ = layer.weight.data.copy_(torch.tensor([[0.0, 2.0], [-4.0, 0.0]]))
        >>> condition_weight(layer).weight.detach()
        tensor([[ 0.,  1.],
                [-1.,  0.]])
    """
    return put(module, name, _made(module, name, mode, detach_preconditioner, eps))


def condition_model(
    model: Module,
    filter: Callable[[str, nn.Module], bool] | None = None,
    mode: Mode = "row",
    detach_preconditioner: bool = False,
    eps: float = 1e-12,
    types: Sequence[type[nn.Module]] = LAYERS,
) -> Module:
    """`condition_weight` on every linear layer and convolution but the last, whose rows set the scale of the logits.

    Args:
        model: Changed in place.
        filter: ``filter(name, module)`` says whether a layer is conditioned; left out, all but the one registered last.
        mode, detach_preconditioner, eps: As `condition_weight` takes them.
        types: Classes of layers.

    Returns:
        The model. Weights that are shared stay shared.

    Raises:
        InputError: No layer is chosen, or one can't be conditioned; the model is then as it was.

    Example:
        >>> model = condition_model(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)))
        >>> [type(module).__name__ for module in model]
        ['ParametrizedLinear', 'Tanh', 'Linear']
    """
    layers = [name for name, module in model.named_modules() if isinstance(module, tuple(types))]
    chosen = filter if filter is not None else lambda name, _: name != layers[-1]
    return put_everywhere(
        model,
        lambda name, module: isinstance(module, tuple(types)) and chosen(name, module),
        lambda module: _made(module, "weight", mode, detach_preconditioner, eps),
    )


def condition_number(weight: Float[Tensor, "outputs inputs ..."], rank: int | None = None) -> float:
    """The largest singular value over the ``rank``-th one.

    Args:
        weight: A matrix, or a weight of a convolution, whose axes after the first are taken together.
        rank: Which singular value to divide by, from 1; left out, the last that is above rounding: those below
            ``max(out, in) * machine epsilon * largest`` count as zero, so that a dead row doesn't make it infinite.

    Returns:
        The condition number on the numerical rank, at least 1.

    Raises:
        InputError: A vector, a weight that is zero or not finite, or a ``rank`` that it does not have.

    Example:
        >>> condition_number(torch.tensor([[1.0, 0.0], [0.0, 100.0]]))
        100.0
    """
    if weight.dim() < 2 or not weight.numel():
        raise InputError(f"expected a weight with two axes or more, got shape {tuple(weight.shape)}")
    matrix = wide(weight.detach()).flatten(1)
    if not bool(matrix.isfinite().all()) or not bool(matrix.any()):
        raise InputError("expected a finite weight that is not all zero; it has no condition number")
    values = torch.linalg.svdvals(matrix)
    above = int((values > max(matrix.shape) * torch.finfo(matrix.dtype).eps * values[0]).sum())
    if rank is not None and not 1 <= rank <= above:
        raise InputError(f"expected rank between 1 and the numerical rank {above}, got {rank!r}")
    return float(values[0] / values[(rank or above) - 1])


def _made(module: nn.Module, name: str, mode: Mode, detach: bool, eps: float) -> WeightConditioning:
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        raise InputError(
            f"{type(module).__name__}.{name} is a table, whose rows are looked up one by one; for rows of unit length "
            "use FixNormEmbedding"
        )
    return WeightConditioning(mode, detach, eps, units_of(module, name))
