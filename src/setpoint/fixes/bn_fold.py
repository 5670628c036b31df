"""Batch-norm folding: multiply batch norms into the convolutions and linear layers in front of them; exact.

For inference. In evaluation a batch norm is one factor and one addend for each channel, and the layer in front of it
takes both: ``W' = s W``, ``b' = s b + t``. What is left is a network without normalization layers that computes the
same, which is what quantizers and converters start from. A norm stays where that is not so: behind anything but such a
layer, behind a layer that something else reads too, that runs twice or shares its weight. Notes say which and why.

Reference: Ioffe and Szegedy, 2015, "Batch Normalization", arXiv 1502.03167.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from setpoint.fixes.norm_sites import needs
from setpoint.fixing.base import Refused
from setpoint.nn import FrozenBatchNorm
from setpoint.nn.norm.batchnorm_folding import foldable, folded_tensors
from setpoint.types import Build, Edit, FixContext, Preserves, Refusal, Stage

if TYPE_CHECKING:
    from setpoint.surgery import Anatomy

KINDS = (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm)


@dataclass(frozen=True)
class BatchNormFolding:
    """Fold every batch norm into the layer in front of it, where nothing else reads that layer; exact in evaluation.

    The model is for inference afterwards: it takes no batch statistics any more.

    Reference:
        Ioffe and Szegedy, 2015, arXiv 1502.03167.

    Example:
        >>> import torch
        >>> from setpoint import fix
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        >>> fix(model, BatchNormFolding(), [torch.randn(2, 3, 8, 8)]).model
        Sequential(
          (0): Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))
          (1): Identity()
          (2): ReLU()
        )
    """

    id: ClassVar[str] = "bn-fold"
    stage: ClassVar[Stage] = "transform"
    preserves: ClassVar[Preserves] = "exact"

    def applies(self, anatomy: Anatomy) -> Refusal | None:
        """It needs batch norms."""
        return needs(anatomy, KINDS, "batch norm", "fold")

    def plan(self, ctx: FixContext) -> list[Edit]:
        """Weights and biases with the norm in them, and nothing in its place."""
        modules = dict(ctx.model.named_modules())
        norms = [path for path, module in modules.items() if isinstance(module, KINDS)]
        feeds, reasons = foldable(ctx.model, ctx.batches[0], norms, forward=ctx.forward)
        if not feeds:
            raise Refused(self.id, Refusal(*next(iter(reasons.items()))))
        for path, reason in reasons.items():
            ctx.note(f"{path} stays: {reason}")
        edits: list[Edit] = []
        for path, layer in feeds.items():
            weight, bias = folded_tensors(modules[layer], modules[path])
            edits += [
                Edit(f"{layer}.weight", weight, f"factor of {path}"),
                Edit(f"{layer}.bias", bias, f"addend of {path}"),
                Edit(path, Build("torch.nn:Identity"), f"it is in {layer}"),
            ]
        return edits
