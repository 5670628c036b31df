"""Pre-normalizers: norms that stay in the range of float16 on a device that has nothing wider; exact.

Every LayerNorm and RMSNorm becomes a `setpoint.nn.LpNorm` with the same gain, shift and eps, which divides a vector by
its mean absolute entry before it takes squares. Outputs are the same. Do it in float32, then convert to float16: on
hardware that computes in float16 alone, large entries of the stream (massive activations, late layers) no longer
overflow where they are squared.

Reference: Xu, Jin et al., 2023, "Conformer-Based Speech Recognition On Extreme Edge-Computing Devices", arXiv
2312.10359.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from setpoint.errors import InputError
from setpoint.fixes.norm_sites import cannot_replace, kept_affine, sizes_of
from setpoint.fixing.base import Refused
from setpoint.nn import LpNorm
from setpoint.nn.norm.lpnorm import KINDS, Prenorm
from setpoint.types import Build, Edit, FixContext, NormSite, Preserves, Refusal, Stage

if TYPE_CHECKING:
    from setpoint.surgery import Anatomy


@dataclass(frozen=True)
class Prenormalize:
    """Replace every LayerNorm and RMSNorm by one that divides before it squares; exact.

    Args:
        kind: What it divides by: ``mad``, ``max`` or ``guaranteed``, as `setpoint.nn.LpNorm` explains.

    Reference:
        Xu, Jin et al., 2023, arXiv 2312.10359.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from setpoint import fix
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
        >>> fix(model, Prenormalize(), [torch.randn(3, 4)]).model[1].prenorm
        'mad'
    """

    kind: Prenorm = "mad"

    id: ClassVar[str] = "prenormalize"
    stage: ClassVar[Stage] = "transform"
    preserves: ClassVar[Preserves] = "exact"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"expected kind to be one of {', '.join(KINDS)}, got {self.kind!r}")

    def applies(self, anatomy: Anatomy) -> Refusal | None:
        """It needs norms over features; whether all can be replaced is seen in planning, where modules are."""
        if any(_over_features(site) for site in anatomy.norms.values()):
            return None
        return Refusal("", "it has no LayerNorm or RMSNorm; there is nothing to replace")

    def plan(self, ctx: FixContext) -> list[Edit]:
        """The same norm with a pre-normalizer, for every norm that has none of this kind."""
        modules = dict(ctx.model.named_modules())
        edits: list[Edit] = []
        for site in ctx.anatomy.norms.values():
            norm = modules.get(site.name)
            if not _over_features(site) or (isinstance(norm, LpNorm) and norm.prenorm == self.kind):
                continue
            if isinstance(norm, LpNorm):
                eps = norm.eps
            else:
                refusal = cannot_replace(ctx.anatomy, [site.name])
                if refusal is not None:
                    raise Refused(self.id, refusal)
                assert site.eps is not None
                eps = site.eps
            arguments = {
                "normalized_shape": sizes_of(ctx.model, site, self.id),
                "eps": eps,
                "elementwise_affine": site.gain is not None,
                "bias": site.shift is not None,
                "center": site.centred,
                "prenorm": self.kind,
            }
            edits.append(Edit(site.name, Build("setpoint.nn:LpNorm", arguments), "divides before it squares"))
            edits += kept_affine(ctx.model, site)
        if not edits:
            raise Refused(self.id, Refusal("", "its norms have this pre-normalizer already", done=True))
        return edits


def _over_features(site: NormSite) -> bool:
    return site.kind in ("layer", "rms")
