"""Moving a norm's gain and shift into what reads it, and a scale into what it multiplies.

A weight W that reads ``gain * x + shift`` gives the same as ``W diag(gain)`` on x with ``W shift`` added to its bias.
That is exact if, and only if, every reader of the norm is a weight, and nobody else reads that weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from setpoint.surgery.editing import parameter
from setpoint.types import Edit, NormSite, Refusal, Use

if TYPE_CHECKING:
    from setpoint.surgery.anatomy import Anatomy


def cannot_fold(anatomy: Anatomy, site: NormSite) -> Refusal | None:
    """Why a norm's gain and shift can't go into its readers, None if they can.

    Args:
        anatomy: Of the model.
        site: One of its norms.
    """
    for use in site.uses:
        if not use.is_weight:
            return Refusal(site.name, f"its output is read by {use.op} in {use.module or 'the model itself'}, not only"
                           " by weights")  # fmt: skip
        if not use.foldable:
            via = ", ".join(use.via) or "a product over several axes"
            return Refusal(site.name, f"what lies between it and {use.parameter} ({via}) lets no scale through")
        others = [n.name for n in anatomy.norms.values() for u in n.uses if u.parameter == use.parameter]
        if set(others) != {site.name}:
            return Refusal(use.parameter, f"is read behind {' and '.join(sorted(set(others)))}, so neither folds alone")
        if any(table.parameter == use.parameter for table in anatomy.embeddings):
            return Refusal(use.parameter, "is the token table as well (a tied head), which a fold would change")
    return None if site.uses else Refusal(site.name, "nothing was seen to read its output")


def fold_norm(model: nn.Module, site: NormSite) -> list[Edit]:
    """Fold a norm's gain and shift into every weight that reads it; the norm keeps gain 1 and shift 0.

    Args:
        model: The model.
        site: One of its norms; `cannot_fold` must have said None.

    Returns:
        The edits.

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
    seen: set[str] = set()
    for use in site.uses:
        if use.parameter not in seen:
            seen.add(use.parameter)
            edits += _into_reader(model, site, use)
    if site.gain is not None and site.gain_parameter:
        stored = parameter(model, site.gain_parameter).detach()
        edits.append(Edit(site.gain_parameter, stored + (1.0 - site.gain).to(stored), "its gain is in the readers"))
    if site.shift is not None and site.shift_parameter:
        stored = parameter(model, site.shift_parameter).detach()
        edits.append(Edit(site.shift_parameter, torch.zeros_like(stored), "its shift is in the readers"))
    return edits


def _into_reader(model: nn.Module, site: NormSite, use: Use) -> list[Edit]:
    assert use.input_axis is not None
    weight = parameter(model, use.parameter).detach()
    wide = weight.double().movedim(use.input_axis, -1)
    gain, shift = (_met(vector, use, wide.shape[-1], fill) for vector, fill in ((site.gain, 1.0), (site.shift, 0.0)))
    edits: list[Edit] = []
    if gain is not None:
        edits.append(Edit(use.parameter, (wide * gain).movedim(-1, use.input_axis).to(weight), f"gain of {site.name}"))
    if shift is not None and bool(shift.any()):
        product = weight.double() * _along(shift, weight, use.input_axis)
        added = product.movedim(use.output_axis, 0).flatten(1).sum(1)
        name = use.bias or bias_name(use.parameter)
        parent, _, last = name.rpartition(".")
        old = getattr(model.get_submodule(parent), last, None)
        edits.append(Edit(name, (added + old.detach().double() if old is not None else added).to(weight),
                          f"shift of {site.name}"))  # fmt: skip
    return edits


def _met(vector: Tensor | None, use: Use, width: int, fill: float) -> Tensor | None:
    """The norm's vector in the order in which the reader's input axis meets it."""
    if vector is None:
        return None
    vector = vector.detach().double()
    if use.slice is None:
        return vector if vector.numel() == width else vector.repeat(width // vector.numel())
    index = torch.tensor(list(use.slice), device=vector.device)
    return torch.where(index >= 0, vector[index.clamp(min=0)], torch.tensor(fill, dtype=vector.dtype))


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
