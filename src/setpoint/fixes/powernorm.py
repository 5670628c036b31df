"""Power normalization: put it in the place of every norm, and fold it away when the model is trained.

`PowerNorms` replaces LayerNorm and RMSNorm by `setpoint.nn.PowerNorm`, to be trained from there; what the old norms had
learned is not kept. `PowerFolding` is for inference with a model that was trained so: all but the scaling of groups is
then an affine map, which goes into the weights that read it, and outputs stay.

In training its statistics are taken over a batch and all its tokens, padding included where the model's code passes no
mask on. In a language model that includes tokens yet to come, so decoders are refused: the paper's keep their layer
norm.

Reference: Shen, Yao, Gholami, Mahoney and Keutzer, 2020, "PowerNorm: Rethinking Batch Normalization in Transformers",
arXiv 2003.07845.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING, ClassVar

from setpoint.errors import InputError
from setpoint.fixes.norm_sites import needs, replaceable, sizes_of
from setpoint.fixes.token_norms import folded, needs_token_norms, replaced
from setpoint.fixing.base import Refused
from setpoint.nn import PowerNorm
from setpoint.types import Edit, FixContext, Preserves, Refusal, Stage

if TYPE_CHECKING:
    from setpoint.surgery import Anatomy


@dataclass(frozen=True)
class PowerNorms:
    """Replace every LayerNorm and RMSNorm of an encoder by PowerNorm; the model must be trained afterwards.

    Args:
        warmup_iters: Training calls that use the batch's own statistics; the length of the learning rate's warm-up.
        group_num: Groups of channels that each token is scaled in; None for as many as there are attention heads.

    Reference:
        Shen et al., 2020, arXiv 2003.07845.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from setpoint import fix
        >>> layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
        >>> stack = nn.TransformerEncoder(layer, 1, norm=nn.LayerNorm(16), enable_nested_tensor=False)
        >>> fix(stack, PowerNorms(), [torch.randn(1, 4, 16)]).model.norm.scaling
        GroupScaling(16, group_num=2, eps=1e-05)
    """

    warmup_iters: int = 4000
    group_num: int | None = None

    id: ClassVar[str] = "powernorm"
    stage: ClassVar[Stage] = "transform"
    preserves: ClassVar[Preserves] = "retrain"

    def __post_init__(self) -> None:
        if self.warmup_iters < 0 or (self.group_num is not None and self.group_num < 1):
            raise InputError(
                f"expected warmup_iters of at least 0 and group_num above 0, got {self.warmup_iters} and "
                f"{self.group_num}"
            )

    def applies(self, anatomy: Anatomy) -> Refusal | None:
        """It needs norms over the last axis that are modules of their own, and attention that looks both ways."""
        return needs_token_norms(anatomy, PowerNorm)

    def plan(self, ctx: FixContext) -> list[Edit]:
        """A PowerNorm for every norm."""
        widths = {sizes_of(ctx.model, site, self.id)[0] for site in ctx.anatomy.norms.values() if replaceable(site)}
        groups = self.group_num
        if groups is None:
            groups = gcd(*widths, *(site.num_heads for site in ctx.anatomy.attention)) if ctx.anatomy.attention else 1
        elif any(width % groups for width in widths):
            reason = f"its widths {', '.join(map(str, sorted(widths)))} do not divide into {groups} groups"
            raise Refused(self.id, Refusal("", reason))
        return replaced(ctx, self.id, PowerNorm, {"warmup_iters": self.warmup_iters, "group_num": groups})


@dataclass(frozen=True)
class PowerFolding:
    """Fold every PowerNorm into the weights that read it; what is left is its scaling of groups; exact.

    A norm that something else reads too, or whose reader is the tied token table, stays as it is.

    Reference:
        Shen et al., 2020, arXiv 2003.07845.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from setpoint import fix
        >>> model = nn.Sequential(PowerNorm(8), nn.Linear(8, 2))
        >>> fix(model, PowerFolding(), [torch.randn(3, 8)]).model[0]
        GroupScaling(8, group_num=1, eps=1e-05)
    """

    id: ClassVar[str] = "powernorm-fold"
    stage: ClassVar[Stage] = "transform"
    preserves: ClassVar[Preserves] = "exact"

    def applies(self, anatomy: Anatomy) -> Refusal | None:
        """It needs PowerNorms."""
        return needs(anatomy, PowerNorm, "PowerNorm", "fold")

    def plan(self, ctx: FixContext) -> list[Edit]:
        """Weights and biases that read a norm, and the scaling of groups in its place."""
        return folded(ctx, self.id, PowerNorm)
