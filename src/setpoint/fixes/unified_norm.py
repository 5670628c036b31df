"""Unified normalization: put it in the place of every norm, and fold it away when the model is trained.

`UnifiedNorms` replaces LayerNorm and RMSNorm by `setpoint.nn.UnifiedNorm`, to be trained from there; what the old norms
had learned is not kept. `UnifiedFolding` is for inference with a model that was trained so: each norm is then an affine
map, which goes into the weights that read it, and outputs stay.

In training its statistics are taken over a batch and all its tokens, padding included where the model's code passes no
mask on. In a language model that includes tokens yet to come, so decoders are refused.

Reference: Yang, Zhang, Lan, Yang, Li, Tan, Xiao and Pu, 2022, "Unified Normalization for Accelerating and Stabilizing
Transformers", arXiv 2208.01313.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from setpoint.errors import InputError
from setpoint.fixes.norm_sites import needs
from setpoint.fixes.token_norms import folded, needs_token_norms, replaced
from setpoint.nn import UnifiedNorm
from setpoint.types import Edit, FixContext, Preserves, Refusal, Stage

if TYPE_CHECKING:
    from setpoint.surgery import Anatomy


@dataclass(frozen=True)
class UnifiedNorms:
    """Replace every LayerNorm and RMSNorm of an encoder by UnifiedNorm; the model must be trained afterwards.

    Args:
        window_size: Batches to smooth over.
        warmup_iters: Training calls before anything is smoothed; at most the length of the training.
        outlier_filtration: Skip the smoothing where the window is uneven; None for what its authors advise, not in
            models with token embeddings and in all others.

    Reference:
        Yang et al., 2022, arXiv 2208.01313.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from setpoint import fix
        >>> layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
        >>> stack = nn.TransformerEncoder(layer, 1, norm=nn.LayerNorm(16), enable_nested_tensor=False)
        >>> fix(stack, UnifiedNorms(), [torch.randn(1, 4, 16)]).model.norm.outlier_filtration
        True
    """

    window_size: int = 4
    warmup_iters: int = 4000
    outlier_filtration: bool | None = None

    id: ClassVar[str] = "unified-norm"
    stage: ClassVar[Stage] = "transform"
    preserves: ClassVar[Preserves] = "retrain"

    def __post_init__(self) -> None:
        if self.window_size < 1 or self.warmup_iters < 0:
            raise InputError(
                f"expected window_size above 0 and warmup_iters of at least 0, got {self.window_size} and "
                f"{self.warmup_iters}; the paper uses 4 and 4000"
            )

    def applies(self, anatomy: Anatomy) -> Refusal | None:
        """It needs norms over the last axis that are modules of their own, and attention that looks both ways."""
        return needs_token_norms(anatomy, UnifiedNorm)

    def plan(self, ctx: FixContext) -> list[Edit]:
        """A UnifiedNorm for every norm."""
        filtered = not ctx.anatomy.embeddings if self.outlier_filtration is None else self.outlier_filtration
        arguments = {
            "window_size": self.window_size,
            "warmup_iters": self.warmup_iters,
            "outlier_filtration": filtered,
        }
        return replaced(ctx, self.id, UnifiedNorm, arguments)


@dataclass(frozen=True)
class UnifiedFolding:
    """Fold every UnifiedNorm into the weights that read it, and nothing else; exact.

    A norm that something else reads too, or whose reader is the tied token table, stays as it is.

    Reference:
        Yang et al., 2022, arXiv 2208.01313.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from setpoint import fix
        >>> model = nn.Sequential(UnifiedNorm(8), nn.Linear(8, 2))
        >>> fix(model, UnifiedFolding(), [torch.randn(3, 8)]).model[0]
        Identity()
    """

    id: ClassVar[str] = "unified-norm-fold"
    stage: ClassVar[Stage] = "transform"
    preserves: ClassVar[Preserves] = "exact"

    def applies(self, anatomy: Anatomy) -> Refusal | None:
        """It needs UnifiedNorms."""
        return needs(anatomy, UnifiedNorm, "UnifiedNorm", "fold")

    def plan(self, ctx: FixContext) -> list[Edit]:
        """Weights and biases that read a norm, and nothing in its place."""
        return folded(ctx, self.id, UnifiedNorm)
