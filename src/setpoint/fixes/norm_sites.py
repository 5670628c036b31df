"""What fixes that put another layer in the place of every norm ask of a model: which norms, and of what size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from setpoint.fixing.base import Refused
from setpoint.surgery.editing import parameter
from setpoint.types import Edit, NormSite, Refusal

if TYPE_CHECKING:
    from setpoint.surgery import Anatomy


def replaceable(site: NormSite) -> bool:
    """Whether a norm is one over the features of a token: not one over a batch, nor over several groups of channels."""
    return site.kind in ("layer", "rms") or (site.kind == "group" and site.groups == 1)


def refusal_to_replace(anatomy: Anatomy, layer: str) -> Refusal | None:
    """Why the norms of a model can't be replaced: there are none over features, or one is no module of its own.

    Args:
        anatomy: Of the model.
        layer: What would take their place, for the message.
    """
    norms = [site for site in anatomy.norms.values() if replaceable(site)]
    if not norms:
        if any(site.kind == "batch" for site in anatomy.norms.values()):
            return Refusal("", f"its norms are batch norms, which {layer} does not replace")
        return Refusal("", "it has no LayerNorm or RMSNorm; there is nothing to replace", done=True)
    for site in norms:
        if "#" in site.name:
            return Refusal(
                site.name.partition("#")[0], "computes its norm in its own forward, where it can't be replaced"
            )
    return None


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
