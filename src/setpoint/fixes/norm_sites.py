"""What fixes ask of a model: layers to act on, and norms to replace by another layer, which ones and of what size.

A model with nothing for a fix to act on is refused. It is called done, and left as it is, only where the layer stands
in it that the fix would put in.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import TYPE_CHECKING

from torch import nn

from setpoint.fixing.base import Refused
from setpoint.surgery.editing import parameter
from setpoint.types import Block, Edit, NormSite, Refusal

if TYPE_CHECKING:
    from setpoint.surgery import Anatomy

MOVED = "moves axes or computes something before it normalizes, so no other norm can be put in its place"
"""Reason to leave a module whose norm is not over its own input."""


def replaceable(site: NormSite) -> bool:
    """Whether a norm is one over the features of a token: not one over a batch, nor over several groups of channels."""
    return site.kind in ("layer", "rms") or (site.kind == "group" and site.groups == 1)


def needs(
    anatomy: Anatomy, kind: type[nn.Module] | tuple[type[nn.Module], ...], what: str, verb: str
) -> Refusal | None:
    """A refusal of a model without modules of a class.

    Args:
        anatomy: Of the model.
        kind: The class, or several.
        what: A word for such modules.
        verb: What there is nothing to do with then.
    """
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return None if anatomy.has(*kinds) else Refusal("", f"it has no {what}; there is nothing to {verb}")


def needs_batch_norms(anatomy: Anatomy, verb: str, *layers: type[nn.Module]) -> Refusal | None:
    """A refusal of a model without batch norms.

    Args:
        anatomy: Of the model.
        verb: What there is nothing to do with then.
        layers: What takes their place; a model that has it is done.
    """
    if any(site.kind == "batch" for site in anatomy.norms.values()):
        return None
    reason = f"it has no batch norm (they may have been folded); there is nothing to {verb}"
    return Refusal("", reason, done=anatomy.has(*layers))


def needs_norms(anatomy: Anatomy, layer: type[nn.Module]) -> Refusal | None:
    """Why the norms of a model can't be replaced: there are none over features, or one is no module of its own.

    Args:
        anatomy: Of the model.
        layer: What takes their place; a model that has it and no such norm is done.
    """
    norms = [site for site in anatomy.norms.values() if replaceable(site)]
    if not norms:
        if any(site.kind == "batch" for site in anatomy.norms.values()):
            return Refusal("", f"its norms are batch norms, which {layer.__name__} does not replace")
        reason = "it has no LayerNorm or RMSNorm; there is nothing to replace"
        return Refusal("", reason, done=anatomy.has(layer))
    return next(filter(None, map(_no_module_for, norms)), None)


def _no_module_for(site: NormSite) -> Refusal | None:
    """Why no module can take a norm's place: its own module does more than hold it."""
    module, inside, _ = site.name.partition("#")
    if inside:
        return Refusal(module, "computes its norm in its own forward, where it can't be replaced")
    return None if site.as_given else Refusal(module, MOVED)


def cannot_replace(anatomy: Anatomy, names: Collection[str]) -> Refusal | None:
    """Norms that are no module of their own, or that could not be read exactly, can't be replaced by equals."""
    for name in names:
        site = anatomy.norms[name]
        if (refusal := _no_module_for(site)) is not None:
            return refusal
        if site.eps is None:
            return Refusal(name, "its epsilon could not be read, so no equal norm can be put in its place")
        hidden = any(
            value is not None and not stored
            for value, stored in ((site.gain, site.gain_parameter), (site.shift, site.shift_parameter))
        )
        if hidden or any(use.op and use.module == name for use in site.uses):
            return Refusal(
                name,
                "does more than normalize and apply parameters of its own, so no equal norm can be put in its place; "
                "if it scales its output, fold the factor first (lns-fold)",
            )
    return None


def stack_of(block: Block) -> str:
    """The stack that a block is of: an encoder and a decoder are counted apart."""
    return re.sub(r"\d+", "#", block.name)


def sizes_of(model: nn.Module, site: NormSite, fix: str) -> list[int]:
    """The sizes that a norm normalizes over.

    Raises:
        Refused: They could not be read.
    """
    if site.gain is not None:
        return list(site.gain.shape)
    module = model.get_submodule(site.name)
    found = getattr(module, "normalized_shape", getattr(module, "num_channels", None))
    if found is None:
        raise Refused(fix, Refusal(site.name, "the width that it normalizes over could not be read"))
    return [found] if isinstance(found, int) else list(found)


def channels_last(site: NormSite) -> bool:
    """Whether the gain of a norm runs along the last axes; that of a group norm runs along axis 1."""
    return site.kind != "group" and site.axes[-1] == -1


def kept_affine(model: nn.Module, site: NormSite) -> list[Edit]:
    """The gain and shift of a norm as ``weight`` and ``bias`` of the one that took its place.

    The parameters themselves where they are the gain and shift as they stand (Gemma stores gain - 1).
    """
    edits = []
    for name, value, stored in (
        ("weight", site.gain, site.gain_parameter),
        ("bias", site.shift, site.shift_parameter),
    ):
        if value is not None:
            own = parameter(model, stored)
            same = own.shape == value.shape and bool((own.detach() == value).all())
            edits.append(Edit(f"{site.name}.{name}", own if same else value, "kept"))
    return edits
