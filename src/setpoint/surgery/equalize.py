"""Moving scale and bias between two weights that follow each other, and joining weights that read the same.

Between two weights stands an element-wise function f. If f(s x) = s f(x) for s > 0 (no function, ReLU, leaky ReLU), a
channel can be made smaller in the first weight and as much larger in the second, and the product stays. In a gated
feed-forward the ungated half is multiplied in, so it can be rescaled whatever the activation. ReLU6, GELU and SiLU are
not homogeneous: through them this is not exact, and is refused.

Reference: Nagel, van Baalen, Blankevoort and Welling, 2019, "Data-Free Quantization Through Weight Equalization and
Bias Correction", arXiv 1906.04721.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.surgery.editing import parameter
from setpoint.types import AttentionSite, Edit, FeedForwardSite, Projection, Refusal

HOMOGENEOUS = frozenset({"", "identity", "relu", "leaky_relu", "prelu"})
"""Activations through which a positive scale passes."""


def cannot_equalize(site: FeedForwardSite) -> Refusal | None:
    """Why a feed-forward's channels can't be rescaled exactly, None if they can.

    Args:
        site: From an anatomy.
    """
    if site.up is None or site.down is None:
        return Refusal(site.name, "its weights could not be read")
    if site.experts > 1 or (site.up.rows is not None and not isinstance(site.up.rows, range)):
        return Refusal(site.name, "its weights are fused over experts or interleaved")
    if site.gate is None and site.activation not in HOMOGENEOUS:
        return Refusal(site.name, f"{site.activation} is not positively homogeneous, so no scale passes through it")
    return None


def equalize(model: nn.Module, site: FeedForwardSite) -> list[Edit]:
    """Give each hidden channel of a feed-forward the same range in the weight that makes it and the one that reads it.

    With ranges r1 (largest magnitude in the channel's row of the first weight) and r2 (in its column of the second),
    the channel is divided by ``sqrt(r1 / r2)`` in the first and multiplied by it in the second; both ranges become
    ``sqrt(r1 r2)``. Channels that are zero on one side stay.

    Args:
        model: The model.
        site: `cannot_equalize` must have said None.

    Returns:
        The edits.

    Example:
        >>> from setpoint.surgery import Anatomy
        >>> from setpoint.surgery.editing import commit
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, 4)
        ...     def forward(self, x):
        ...         return x + self.down(self.up(self.norm(x)).relu())
        >>> model, x = nn.Sequential(nn.Linear(4, 4), Block()), torch.randn(3, 5, 4)
        >>> site = Anatomy.trace(model, x).blocks[0].branches[0].feed_forward
        >>> before = model(x)
        >>> _ = commit(model, equalize(model, site))
        >>> rows, columns = model[1].up.weight.abs().amax(1), model[1].down.weight.abs().amax(0)
        >>> torch.allclose(model(x), before, atol=1e-6), torch.allclose(rows, columns)
        (True, True)
    """
    assert site.up is not None
    assert site.down is not None
    ranges = _range(_rows(model, site.up), 0), _range(_columns(model, site.down), 1)
    usable = (ranges[0] > 0) & (ranges[1] > 0)
    factors = torch.where(usable, (ranges[0] / ranges[1]).sqrt(), torch.ones_like(ranges[0]))
    return rescale(model, site.up, site.down, factors)


def rescale(model: nn.Module, first: Projection, second: Projection, factors: Tensor) -> list[Edit]:
    """Divide channels by factors where they are made, and multiply by them where they are read.

    Args:
        model: The model.
        first: Makes the channels (its ``rows``, if it is fused).
        second: Reads them.
        factors: Positive, one for each channel.

    Returns:
        The edits.

    Raises:
        InputError: A factor that is not positive and finite.
    """
    if not bool((factors > 0).all() and factors.isfinite().all()):
        raise InputError("expected positive, finite factors, one for each channel")
    factors = factors.double()
    edits = [_multiplied(model, first.parameter, first.output_axis, 1.0 / factors, first.rows)]
    if first.bias:
        edits.append(_multiplied(model, first.bias, 0, 1.0 / factors, first.rows))
    edits.append(_multiplied(model, second.parameter, 1 - second.output_axis, factors, None))
    return edits


def absorb_bias(model: nn.Module, first: Projection, second: Projection, amount: Tensor) -> list[Edit]:
    """Move a part of the first weight's bias through a ReLU into the bias of the second.

    ``relu(x - c) = relu(x) - c`` wherever x >= c, so ``c`` may leave the first bias and come back as ``W2 c``. Exact
    only on inputs where no channel falls below its ``amount``: a fix that uses it is approximate.

    Args:
        model: The model.
        first: Makes the channels; it has a bias.
        second: Reads them behind the ReLU; it has a bias.
        amount: What is taken from each channel, 0 or more.

    Returns:
        The edits.

    Raises:
        InputError: An amount below 0, or a weight without a bias.
    """
    if not first.bias or not second.bias:
        raise InputError(f"expected weights with biases, got {first.parameter} and {second.parameter}")
    if not bool((amount >= 0).all()):
        raise InputError("expected amounts from 0 on, one for each channel")
    amount = amount.double()
    old, new = parameter(model, first.bias), parameter(model, second.bias)
    lowered = old.detach().double().clone()
    index = _index(first.rows, len(lowered))
    lowered[index] -= amount
    raised = new.detach().double() + _columns(model, second) @ amount
    return [
        Edit(first.bias, lowered.to(old), "what the next weight adds back"),
        Edit(second.bias, raised.to(new), f"bias of {first.parameter}"),
    ]


def merge_qkv(model: nn.Module, site: AttentionSite) -> tuple[Tensor, Tensor | None]:
    """Queries', keys' and values' weights as one.

    Args:
        model: The model.
        site: One of its attentions.

    Returns:
        Weight ``(query + key + value features, inputs)`` as `nn.Linear` has it, and bias (zeros where one of the three
        has none), None if none of them has one.

    Raises:
        InputError: One of the three could not be read.

    Example:
        >>> from setpoint.surgery import Anatomy
        >>> from setpoint.models import Transformer, TransformerConfig
        >>> model = Transformer(TransformerConfig(vocab_size=32, dim=16, depth=1, num_heads=4, num_kv_heads=2))
        >>> site = Anatomy.trace(model, torch.randint(0, 32, (1, 8))).attention[0]
        >>> weight, bias = merge_qkv(model, site)
        >>> weight.shape, bias
        (torch.Size([32, 16]), None)
    """
    parts = [site.q, site.k, site.v]
    found = [part for part in parts if part is not None]
    if len(found) < 3:
        raise InputError(f"{site.name}: the weights of its queries, keys and values could not all be read")
    weight = torch.cat([_rows(model, part).to(parameter(model, part.parameter)) for part in found])
    if not any(part.bias for part in found):
        return weight, None
    return weight, torch.cat([_bias(model, part) for part in found])


def _index(rows: range | tuple[int, ...] | None, size: int) -> Tensor:
    return torch.tensor(list(range(size) if rows is None else rows))


def _rows(model: nn.Module, made: Projection) -> Tensor:
    """``(channels, inputs)`` in float64, of the rows that play the role."""
    weight = parameter(model, made.parameter).detach().double().movedim(made.output_axis, 0)
    return weight[_index(made.rows, len(weight))].flatten(1)


def _columns(model: nn.Module, made: Projection) -> Tensor:
    """``(outputs, channels)`` in float64."""
    return parameter(model, made.parameter).detach().double().movedim(made.output_axis, 0)


def _bias(model: nn.Module, made: Projection) -> Tensor:
    weight = parameter(model, made.parameter)
    size = weight.shape[made.output_axis]
    bias = parameter(model, made.bias).detach() if made.bias else torch.zeros(size).to(weight)
    return bias[_index(made.rows, size)]


def _range(weight: Tensor, axis: int) -> Tensor:
    return weight.abs().amax(1 - axis)


def _multiplied(model: nn.Module, name: str, axis: int, factors: Tensor, rows: range | tuple[int, ...] | None) -> Edit:
    tensor = parameter(model, name)
    wide = tensor.detach().double().movedim(axis, -1).clone()
    index = _index(rows, wide.shape[-1])
    wide[..., index] *= factors
    return Edit(name, wide.movedim(-1, axis).to(tensor), "rescaled against its neighbour")
