"""ScaleNorm: every norm of a model becomes ``g x / ||x||`` with one learned number g, to be trained from there.

Where a LayerNorm or RMSNorm over the last axis stands, a `setpoint.nn.ScaleNorm` of the same width takes its place.
What the old norms had learned, a gain and a shift for each channel, is not kept. Batch norms stay.

Reference: Nguyen and Salazar, 2019, "Transformers without Tears", arXiv 1910.05895.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from setpoint.fixes.fields import expect_positive
from setpoint.fixes.norm_sites import needs_norms, replaceable, sizes_of
from setpoint.fixing.base import Refused
from setpoint.nn import ScaleNorm
from setpoint.types import Build, Edit, FixContext, NormSite, Preserves, Refusal, Stage

if TYPE_CHECKING:
    from setpoint.surgery import Anatomy


@dataclass(frozen=True)
class ScaleNorms:
    """Replace every LayerNorm and RMSNorm by ScaleNorm; the model must be trained afterwards.

    Args:
        eps: The smallest norm that is divided by.
        learnable: Learn a length for every norm. Without, lengths are fixed at sqrt(width) but for norms that the head
            reads, whose length sets the range of the logits.

    Reference:
        Nguyen and Salazar, 2019, arXiv 1910.05895.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from setpoint import fix
        >>> layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
        >>> stack = nn.TransformerEncoder(layer, 1, norm=nn.LayerNorm(16), enable_nested_tensor=False)
        >>> fix(stack, ScaleNorms(), [torch.randn(1, 4, 16)]).model.norm
        ScaleNorm(16, eps=1e-05, scale=4, learnable=True)
    """

    eps: float = 1e-5
    learnable: bool = True

    id: ClassVar[str] = "scalenorm"
    stage: ClassVar[Stage] = "transform"
    preserves: ClassVar[Preserves] = "retrain"

    def __post_init__(self) -> None:
        expect_positive(eps=self.eps)

    def applies(self, anatomy: Anatomy) -> Refusal | None:
        """It needs norms over the last axis that are modules of their own."""
        refusal = needs_norms(anatomy, ScaleNorm)
        if refusal is not None:
            return refusal
        for site in anatomy.norms.values():
            if replaceable(site) and site.axes != (-1,):
                return Refusal(site.name, "normalizes over other axes than the last, and ScaleNorm over the last alone")
        return None

    def plan(self, ctx: FixContext) -> list[Edit]:
        """A ScaleNorm for every norm that is none yet."""
        anatomy: Anatomy = ctx.anatomy
        edits = []
        for site in anatomy.norms.values():
            if not replaceable(site) or isinstance(ctx.model.get_submodule(site.name), ScaleNorm):
                continue
            arguments = {
                "dim": sizes_of(ctx.model, site, self.id)[0],
                "eps": self.eps,
                "learnable": self.learnable or _last(anatomy, site),
            }
            edits.append(Edit(site.name, Build("setpoint.nn:ScaleNorm", arguments), "one length in place of a norm"))
        if not edits:
            raise Refused(self.id, Refusal("", "its norms are ScaleNorms already; there is nothing to do", done=True))
        return edits


def _last(anatomy: Anatomy, site: NormSite) -> bool:
    return anatomy.head is not None and anatomy.head.module in site.feeds
