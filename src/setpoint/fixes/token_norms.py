"""What the fixes for norms of tokens share that take statistics over a batch: putting them in, and folding them away.

In evaluation such a norm is an affine map, ``scale * x + shift`` for each channel. To find who reads it, a stand-in of
the model is traced in which an RMSNorm with that gain and shift takes its place: readers of norms are what an anatomy
knows, and readers do not depend on what the norm does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.fixes.norm_sites import needs_norms, replaceable, sizes_of
from setpoint.fixing.base import Refused
from setpoint.surgery.copying import share
from setpoint.surgery.editing import commit
from setpoint.surgery.fold import cannot_fold, fold_norm
from setpoint.types import Build, Edit, FixContext, Ref, Refusal

if TYPE_CHECKING:
    from setpoint.surgery import Anatomy


def needs_token_norms(anatomy: Anatomy, layer: type[nn.Module]) -> Refusal | None:
    """Why not every norm of a model can be replaced by one of tokens ``(*, channels)`` that is trained on batches.

    Args:
        anatomy: Of the model.
        layer: What takes their place.
    """
    if "causal" in anatomy.structure:
        return Refusal("", "it is a decoder, where statistics over tokens would show it those yet to come")
    refusal = needs_norms(anatomy, layer)
    if refusal is not None:
        return refusal
    for site in anatomy.norms.values():
        if replaceable(site) and site.axes != (-1,):
            reason = f"normalizes over other axes than the last, and {layer.__name__} takes channels last"
            return Refusal(site.name, reason)
    return None


def replaced(ctx: FixContext, fix: str, layer: type[nn.Module], arguments: Mapping[str, Any]) -> list[Edit]:
    """A layer of ``setpoint.nn`` for every LayerNorm and RMSNorm.

    Args:
        ctx: The fix's context.
        fix: Its id, for messages.
        layer: The class; it is made from ``num_features`` and ``arguments``.
        arguments: The same for all norms.
    """
    return [
        Edit(
            site.name,
            Build(f"setpoint.nn:{layer.__name__}", {"num_features": sizes_of(ctx.model, site, fix)[0], **arguments}),
            "statistics of batches in place of a token's own",
        )
        for site in ctx.anatomy.norms.values()
        if replaceable(site)
    ]


class Foldable(Protocol):
    """A norm that is an affine map in evaluation.

    ``left_behind`` names the part of it that stays when the map is elsewhere, "" if none does.
    """

    num_features: int
    left_behind: ClassVar[str]

    def inference_affine(self) -> tuple[Tensor, Tensor]:
        """``(scale, shift)``, each of ``num_features`` entries."""
        ...


def folded(ctx: FixContext, fix: str, kind: type[Foldable]) -> list[Edit]:
    """Fold the norms of a class into the weights that read them; those with other readers stay as they are.

    Args:
        ctx: The fix's context.
        fix: Its id, for messages.
        kind: The class.

    Raises:
        Refused: Not one of them folds.
    """
    norms = {path: module for path, module in ctx.model.named_modules() if isinstance(module, kind)}
    stand_in = share(ctx.model)
    for path, norm in norms.items():
        scale, shift = norm.inference_affine()
        build = Build("setpoint.nn:RMSNorm", {"normalized_shape": norm.num_features, "bias": True})
        commit(stand_in, [Edit(path, build), Edit(f"{path}.weight", scale), Edit(f"{path}.bias", shift)])
    anatomy = _traced(stand_in, ctx)
    edits: list[Edit] = []
    reasons: list[Refusal] = []
    for path, norm in norms.items():
        site = anatomy.norms.get(path)
        refusal = Refusal(path, "was not seen to run") if site is None else cannot_fold(anatomy, site)
        if refusal is not None or site is None:
            reasons += [refusal] if refusal is not None else []
            continue
        try:
            into = [edit for edit in fold_norm(stand_in, site) if edit.path not in (f"{path}.weight", f"{path}.bias")]
        except InputError as error:
            reasons.append(Refusal(path, str(error)))
            continue
        commit(stand_in, into)  # a weight may read two norms, row by row; the second fold starts from the first
        left = Ref(f"{path}.{norm.left_behind}") if norm.left_behind else Build("torch.nn:Identity")
        edits += [*into, Edit(path, left, "it is in the weights that read it")]
    if not edits:
        raise Refused(fix, reasons[0])
    return edits


def _traced(model: Any, ctx: FixContext) -> Anatomy:
    from setpoint.surgery import Anatomy

    return Anatomy.trace(model, ctx.batches[0], forward=ctx.forward)
