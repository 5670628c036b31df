"""Moving a norm's gain and shift into what reads it, and a scale into what it multiplies.

A weight W that reads ``gain * x + shift`` gives the same as ``W diag(gain)`` on x with ``W shift`` added to its bias.
That is exact if, and only if, every reader of the norm is a weight, and nobody else reads those rows of it: of a packed
projection, the queries may read one norm, keys and values another.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.surgery.editing import parameter
from setpoint.types import Edit, NormSite, Refusal, Use

if TYPE_CHECKING:
    from setpoint.surgery.anatomy import Anatomy

Rows = range | tuple[int, ...] | None


def cannot_fold(anatomy: Anatomy, site: NormSite) -> Refusal | None:
    """Why a norm's gain and shift can't go into its readers, None if they can.

    Args:
        anatomy: Of the model.
        site: One of its norms.
    """
    for vector, name, word in ((site.gain, site.gain_parameter, "gain"), (site.shift, site.shift_parameter, "shift")):
        if vector is not None and not name:
            return Refusal(site.name, f"its {word} is no parameter of its own, so it would still be there after a fold")
        if name and any(
            n.name != site.name and name in (n.gain_parameter, n.shift_parameter) for n in anatomy.norms.values()
        ):
            return Refusal(name, f"is the {word} of another norm too, which a fold would change")
    return cannot_scale_readers(anatomy, site)


def cannot_scale_readers(anatomy: Anatomy, site: NormSite) -> Refusal | None:
    """Why a factor on a norm's output can't go into what reads it, None if it can.

    Args:
        anatomy: Of the model.
        site: One of its norms.
    """
    for use in site.uses:
        if not use.is_weight:
            return Refusal(
                site.name, f"its output is read by {use.op} in {use.module or 'the model itself'}, not only by weights"
            )
        if not use.foldable:
            via = ", ".join(use.via) or "a product over several axes"
            return Refusal(site.name, f"what lies between it and {use.parameter} ({via}) lets no scale through")
        others = [p for p in anatomy.products[use.parameter] if p.norms != {site.name} and _overlap(p.rows, use.rows)]
        if others:
            norms = sorted({name for product in others for name in product.norms} - {site.name})
            behind = f"is read behind {' and '.join([site.name, *norms])}" if norms else "reads what is no norm as well"
            return Refusal(use.parameter, f"{behind}, so neither folds alone")
        if any(u.slice != use.slice and u.parameter == use.parameter and _overlap(u.rows, use.rows) for u in site.uses):
            return Refusal(use.parameter, f"reads different channels of {site.name} with the same rows")
        if any(table.parameter == use.parameter for table in anatomy.embeddings):
            return Refusal(use.parameter, "is the token table as well (a tied head), which a fold would change")
    return None if site.uses else Refusal(site.name, "nothing was seen to read its output")


def _overlap(a: Rows, b: Rows) -> bool:
    return a is None or b is None or not set(a).isdisjoint(b)


def fold_norm(model: nn.Module, site: NormSite) -> list[Edit]:
    """Fold a norm's gain and shift into every weight that reads it; the norm keeps gain 1 and shift 0.

    Args:
        model: The model.
        site: One of its norms; `cannot_fold` must have said None.

    Returns:
        The edits.

    Raises:
        setpoint.errors.InputError: A shift that a reader has no bias for, or that misses zeros around a feature map.

    Example:
        >>> from setpoint.surgery import Anatomy
        >>> from setpoint.surgery.editing import commit
        >>> model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2))
        >>> with torch.no_grad():
        ...     _ = model[0].weight.fill_(3.0), model[0].bias.fill_(0.5)
        >>> x = torch.randn(5, 4)
        >>> before, anatomy = model(x), Anatomy.trace(model, x)
        >>> _ = commit(model, fold_norm(model, anatomy.norms["0"]))
        >>> torch.allclose(model(x), before, atol=1e-6), model[0].weight.tolist()
        (True, [1.0, 1.0, 1.0, 1.0])
    """
    edits: list[Edit] = []
    for name in dict.fromkeys(use.parameter for use in site.uses):
        edits += _into_reader(model, site, [use for use in site.uses if use.parameter == name])
    if site.gain is not None:
        stored = parameter(model, site.gain_parameter).detach()
        edits.append(Edit(site.gain_parameter, stored + (1.0 - site.gain).to(stored), "its gain is in the readers"))
    if site.shift is not None:
        stored = parameter(model, site.shift_parameter).detach()
        edits.append(Edit(site.shift_parameter, torch.zeros_like(stored), "its shift is in the readers"))
    return edits


def scale_readers(model: nn.Module, site: NormSite, factor: float) -> list[Edit]:
    """Multiply every weight that reads a norm by what multiplied the norm's output.

    Args:
        model: The model.
        site: One of its norms; `cannot_scale_readers` must have said None.
        factor: The factor.

    Returns:
        The edits.
    """
    scaled = replace(site, gain=torch.tensor(factor, dtype=torch.float64), shift=None)
    names = dict.fromkeys(use.parameter for use in site.uses)
    return [e for name in names for e in _into_reader(model, scaled, [u for u in site.uses if u.parameter == name])]


def _into_reader(model: nn.Module, site: NormSite, uses: list[Use]) -> list[Edit]:
    """Edits of one weight and its bias; each row is folded once, however often it is read."""
    first = uses[0]
    weight = parameter(model, first.parameter).detach()
    wide = weight.double()
    scaled, added = wide.clone(), wide.new_zeros(weight.shape[first.output_axis])
    for use in uses:
        axis = use.input_axis
        assert axis is not None
        read = torch.zeros_like(added, dtype=torch.bool)
        read[slice(None) if use.rows is None else list(use.rows)] = True
        rows = _along(read, weight, use.output_axis)
        gain, shift = (
            _met(vector, use, weight.shape[axis], fill) for vector, fill in ((site.gain, 1.0), (site.shift, 0.0))
        )
        if gain is not None and axis == use.output_axis:  # a depthwise convolution: its rows are its channels
            scaled = wide * _along(gain, weight, axis)
        elif gain is not None:
            scaled = torch.where(rows, wide * _along(gain, weight, axis), scaled)
        if shift is not None:
            product = wide * _along(shift, weight, axis)
            added = torch.where(read, product.movedim(use.output_axis, 0).flatten(1).sum(1), added)
    edits: list[Edit] = []
    if site.gain is not None:
        edits.append(Edit(first.parameter, scaled.to(weight), f"gain of {site.name}"))
    if site.shift is not None and bool(site.shift.any()):
        name = _bias_of(model, site, uses)
        old = getattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
        edits.append(
            Edit(
                name, (added + old.detach().double() if old is not None else added).to(weight), f"shift of {site.name}"
            )
        )
    return edits


def _bias_of(model: nn.Module, site: NormSite, uses: list[Use]) -> str:
    """Name of the bias that a shift goes into, there or left out; the same in all uses of a weight."""
    use = uses[0]
    weight, reader = parameter(model, use.parameter), model.get_submodule(use.module)
    if weight.dim() > 2 and not _reads_no_zeros(reader):
        raise InputError(
            f"expected readers of {site.name} that take its shift in a bias, got {use.parameter} of shape "
            f"{tuple(weight.shape)}, which reads zeros around a feature map or has no one bias; drop the shift first"
        )
    name = use.bias or bias_name(use.parameter)
    parent, _, last = name.rpartition(".")
    owner = model.get_submodule(parent)
    left_out = last in owner._parameters and owner._parameters[last] is None
    takes_one = owner is reader or isinstance(reader, nn.MultiheadAttention)
    if any(other.bias != use.bias for other in uses) or not (use.bias or (left_out and takes_one)):
        raise InputError(
            f"expected a bias in every product with {use.parameter} for the shift of {site.name}, got one without; "
            f"give the module a parameter {last!r} that it adds there"
        )
    return name


def _reads_no_zeros(reader: nn.Module) -> bool:
    """Whether a module is a convolution that puts no zeros around or between what it reads."""
    if not isinstance(reader, nn.modules.conv._ConvNd) or reader.transposed:
        return False
    padding = reader.padding
    return reader.padding_mode != "zeros" or padding == "valid" or (padding != "same" and not any(padding))


def _met(vector: Tensor | None, use: Use, width: int, fill: float) -> Tensor | None:
    """The norm's vector, or one number for all channels, in the order in which the reader's input axis meets it."""
    if vector is None:
        return None
    vector = vector.detach().double().flatten()
    if use.slice is None:
        return vector.expand(width)
    index = torch.tensor(list(use.slice), device=vector.device)
    filling = torch.tensor(fill, dtype=vector.dtype, device=vector.device)
    return torch.where(index >= 0, vector[index.clamp(min=0) if vector.numel() > 1 else 0], filling)


def _along(vector: Tensor, like: Tensor, axis: int) -> Tensor:
    shape = [1] * like.dim()
    shape[axis] = -1
    return vector.reshape(shape)


def bias_name(weight: str) -> str:
    """Where a bias would stand beside a weight that has none.

    >>> bias_name("h.0.fc.weight"), bias_name("attn.in_proj_weight")
    ('h.0.fc.bias', 'attn.in_proj_bias')
    """
    return weight.removesuffix("weight") + "bias"


def fold_scale(model: nn.Module, names: tuple[str, ...], factor: float | Tensor) -> list[Edit]:
    """Multiply parameters by a factor, for instance a norm's gain and shift by what multiplied its output.

    Args:
        model: The model.
        names: Qualified names of the parameters.
        factor: A number, or a tensor that broadcasts against each.

    Returns:
        The edits.
    """
    return [
        Edit(name, (parameter(model, name).detach().double() * factor).to(parameter(model, name)), "scale folded in")
        for name in names
    ]
