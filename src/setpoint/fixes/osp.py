"""Outlier-safe pre-training, its layers: one gain per norm, projections at the token table and the head; and the fold.

`OutlierSafe` changes a transformer for training: a `setpoint.nn.SSNorm` for every LayerNorm and RMSNorm, a projection
behind the token table and one in front of the head. `ProjectionFolding` is for inference with a model that was trained
so: both projections go into the tables, outputs stay. The recipe's third part is the optimizer, Muon for all matrices
but the two tables; each part alone leaves outliers, as its authors report.

Reference: Park, Lee, Kim and Kang, 2025, "Outlier-Safe Pre-Training for Robust 4-Bit Quantization of Large Language
Models", arXiv 2506.19697.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from setpoint.errors import InputError
from setpoint.fixes.fields import expect_positive
from setpoint.fixes.norm_sites import needs, needs_norms, replaceable, sizes_of
from setpoint.fixing.base import Refused
from setpoint.nn import ProjectedEmbedding, ProjectedHead, SSNorm
from setpoint.types import Build, Edit, FixContext, Preserves, Refusal, Stage

if TYPE_CHECKING:
    from setpoint.surgery import Anatomy


@dataclass(frozen=True)
class OutlierSafe:
    """Give every norm a single gain, and token table and head a projection; train afterwards.

    Args:
        eps: Of the norms.
        norms: Replace the norms.
        projections: Add the projections. A head that was the token table becomes a matrix of its own.

    Reference:
        Park, Lee, Kim and Kang, 2025, arXiv 2506.19697.

    Example:
        >>> import torch
        >>> from setpoint import fix
        >>> from setpoint.models import Transformer, TransformerConfig
        >>> model = Transformer(TransformerConfig(vocab_size=11, dim=8, depth=1, num_heads=2))
        >>> fixed = fix(model, OutlierSafe(), [torch.tensor([[1, 2, 3]])]).model
        >>> fixed.stack.final_norm, type(fixed.head).__name__
        (SSNorm((8,), eps=1e-06), 'ProjectedHead')
    """

    eps: float = 1e-6
    norms: bool = True
    projections: bool = True

    id: ClassVar[str] = "osp"
    stage: ClassVar[Stage] = "transform"
    preserves: ClassVar[Preserves] = "retrain"

    def __post_init__(self) -> None:
        expect_positive(eps=self.eps)
        if not (self.norms or self.projections):
            raise InputError("expected norms or projections to be true, got neither; there is nothing to do")

    def applies(self, anatomy: Anatomy) -> Refusal | None:
        """It needs norms over features that are modules of their own, a token table and a head."""
        if self.norms and (refusal := needs_norms(anatomy, SSNorm)) is not None:
            return refusal
        if self.projections and not (anatomy.embeddings and anatomy.head is not None):
            reason = "it has no token table and head for projections; add projections=false for the norms alone"
            return Refusal("", reason)
        return None

    def plan(self, ctx: FixContext) -> list[Edit]:
        """The norms that are no SSNorm yet, and the two projections where there are none."""
        edits = self._norms(ctx) if self.norms else []
        if self.projections:
            edits += self._projections(ctx)
        if not edits:
            raise Refused(self.id, Refusal("", "it has these layers already; there is nothing to do", done=True))
        return edits

    def _norms(self, ctx: FixContext) -> list[Edit]:
        return [
            Edit(
                site.name,
                Build("setpoint.nn:SSNorm", {"normalized_shape": sizes_of(ctx.model, site, self.id), "eps": self.eps}),
                "one gain for all channels",
            )
            for site in ctx.anatomy.norms.values()
            if replaceable(site) and not isinstance(ctx.model.get_submodule(site.name), SSNorm)
        ]

    def _projections(self, ctx: FixContext) -> list[Edit]:
        anatomy: Anatomy = ctx.anatomy
        assert anatomy.head is not None
        path = anatomy.head.module
        head = ctx.model.get_submodule(path)
        if not isinstance(head, nn.Linear):
            raise Refused(self.id, Refusal(path, f"is a {type(head).__name__}, no plain nn.Linear"))
        edits = self._behind_table(ctx, anatomy, head.out_features)
        if type(head) is nn.Linear:
            build = Build("setpoint.nn:ProjectedHead", _sizes_of_linear(head))
            own = nn.Parameter(head.weight.detach().clone(), head.weight.requires_grad)  # it may have been the table
            edits += [
                Edit(path, build, "a projection in front of the head"),
                Edit(f"{path}.weight", own, "the same head"),
                *_bias(path, head),
            ]
        elif not isinstance(head, ProjectedHead):
            raise Refused(self.id, Refusal(path, f"is a {type(head).__name__}, no plain nn.Linear"))
        return edits

    def _behind_table(self, ctx: FixContext, anatomy: Anatomy, vocabulary: int) -> list[Edit]:
        tables = {table.module: ctx.model.get_submodule(table.module) for table in anatomy.embeddings}
        rows = {path: getattr(table, "num_embeddings", 0) for path, table in tables.items()}
        path = next((path for path, count in rows.items() if count == vocabulary), next(iter(tables)))
        table = tables[path]
        if isinstance(table, ProjectedEmbedding):
            return []
        if type(table) is not nn.Embedding:
            raise Refused(self.id, Refusal(path, f"is a {type(table).__name__}, no plain nn.Embedding"))
        return [
            Edit(
                path, Build("setpoint.nn:ProjectedEmbedding", _sizes_of_table(table)), "a projection behind the table"
            ),
            Edit(f"{path}.weight", table.weight, "the same table"),
        ]


@dataclass(frozen=True)
class ProjectionFolding:
    """Fold the projections into the token table and the head; exact.

    Reference:
        Park, Lee, Kim and Kang, 2025, arXiv 2506.19697.

    Example:
        >>> import torch
        >>> from setpoint import fix
        >>> model = nn.Sequential(ProjectedEmbedding(11, 8), ProjectedHead(8, 11, bias=False))
        >>> fix(model, ProjectionFolding(), [torch.tensor([[1, 2, 3]])]).model
        Sequential(
          (0): Embedding(11, 8)
          (1): Linear(in_features=8, out_features=11, bias=False)
        )
    """

    id: ClassVar[str] = "osp-fold"
    stage: ClassVar[Stage] = "transform"
    preserves: ClassVar[Preserves] = "exact"

    def applies(self, anatomy: Anatomy) -> Refusal | None:
        """It needs projections."""
        return needs(anatomy, (ProjectedEmbedding, ProjectedHead), "embedding projections", "fold")

    def plan(self, ctx: FixContext) -> list[Edit]:
        """A plain table and a plain head, each with the product of its two weights."""
        edits: list[Edit] = []
        for path, module in ctx.model.named_modules():
            if isinstance(module, ProjectedEmbedding):
                plain, bias = Build("torch.nn:Embedding", _sizes_of_table(module)), []
            elif isinstance(module, ProjectedHead):
                plain, bias = Build("torch.nn:Linear", _sizes_of_linear(module)), _bias(path, module)
            else:
                continue
            why = "its projection is in its weight"
            edits += [Edit(path, plain, why), Edit(f"{path}.weight", module.folded_weight(), why), *bias]
        return edits


def _sizes_of_table(table: nn.Embedding) -> dict[str, Any]:
    return {name: getattr(table, name) for name in ("num_embeddings", "embedding_dim", "padding_idx")}


def _sizes_of_linear(linear: nn.Linear) -> dict[str, Any]:
    return {
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "bias": linear.bias is not None,
    }


def _bias(path: str, linear: nn.Linear) -> list[Edit]:
    return [] if linear.bias is None else [Edit(f"{path}.bias", linear.bias, "kept")]
