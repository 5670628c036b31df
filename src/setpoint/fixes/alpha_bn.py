"""α-BN for a model that meets shifted data: batch norms mix the statistics of each test batch into their own.

No training, no labels and no state: every batch norm is wrapped in `setpoint.nn.AlphaBatchNorm`, which leaves its
running averages as they are. What the model computes now depends on the batch, so that predictions for one example
change with its company; the fix says by how much on the batches that it is given. What mixture is best depends on the
shift and on the batch size: strong shifts want far less than 0.9 for the source, and batches of a hundred bear 0.

Reference: You, Li and Zhao, 2021, "Test-time Batch Statistics Calibration for Covariate Shift", arXiv 2110.04065.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from setpoint.fixes.norm_sites import needs_batch_norms
from setpoint.fixing.base import Refused
from setpoint.nn.norm.alpha_bn import AlphaBatchNorm, adaptable, expect_mixture
from setpoint.types import Build, Edit, FixContext, Preserves, Ref, Refusal, Stage

if TYPE_CHECKING:
    from setpoint.surgery import Anatomy


@dataclass(frozen=True)
class AlphaBatchNorms:
    """Mix the statistics of the batch into every batch norm, at test time.

    Args:
        source_weight: Weight of the running averages, from 0 (the batch's alone) to 1 (as before).
        prior: Weigh by the size of the batch instead: the running averages count like that many examples.
        unbiased: Divide the batch's squares by n - 1 instead of n.

    Reference:
        You, Li and Zhao, 2021, arXiv 2110.04065.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from setpoint import fix
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
        >>> type(fix(model, AlphaBatchNorms(0.5), [torch.randn(8, 3, 8, 8)]).model[1]).__name__
        'AlphaBatchNorm'
    """

    source_weight: float = 0.9
    prior: float | None = None
    unbiased: bool = False

    id: ClassVar[str] = "alpha-bn"
    stage: ClassVar[Stage] = "transform"
    preserves: ClassVar[Preserves] = "approximate"

    def __post_init__(self) -> None:
        expect_mixture(self.source_weight, self.prior)

    def applies(self, anatomy: Anatomy) -> Refusal | None:
        """It needs batch norms."""
        return needs_batch_norms(anatomy, "adapt")

    def plan(self, ctx: FixContext) -> list[Edit]:
        """A wrapper around every batch norm that keeps running averages."""
        norms = adaptable(ctx.model)
        if not norms:
            if ctx.anatomy.has(AlphaBatchNorm):
                raise Refused(self.id, Refusal("", "its batch norms are adapted already", done=True))
            raise Refused(self.id, Refusal("", "none of its batch norms keeps running averages"))
        seen: dict[int, str] = {}
        edits = []
        for path, norm in norms.items():
            if not path:
                raise Refused(self.id, Refusal(path, "is itself a batch norm; use setpoint.nn.AlphaBatchNorm"))
            if seen.setdefault(id(norm), path) != path:
                continue  # putting a module at one of its places puts it at all of them
            arguments = {
                "norm": Ref(path),
                "source_weight": self.source_weight,
                "prior": self.prior,
                "unbiased": self.unbiased,
            }
            edits.append(Edit(path, Build("setpoint.nn:AlphaBatchNorm", arguments), "the batch's statistics mix in"))
        return edits
