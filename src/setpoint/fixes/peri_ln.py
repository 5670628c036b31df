"""Peri-LN: a norm on the output of every branch too, so that the residual stream grows by a bounded amount per layer.

    y = x + N_out(F(N_in(x)))        and a norm on the embeddings

The output norms are new, of the kind and epsilon of the branch's input norm, with a learnable gain. The model computes
something else from then on: for training, from scratch or on.

Reference: Kim et al., 2025, "Peri-LN: Revisiting Normalization Layer in the Transformer Architecture",
arXiv 2502.02732.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from setpoint.fixes.fields import expect_positive
from setpoint.surgery.editing import parameter
from setpoint.surgery.stream import stream_norms, stream_width
from setpoint.types import Branch, Build, Edit, FixContext, NormSite, Preserves, Ref, Refusal, Stage

if TYPE_CHECKING:
    from setpoint.surgery import Anatomy


@dataclass(frozen=True)
class OutputNorms:
    """Turn a Pre-LN model into a Peri-LN one; train afterwards.

    Args:
        embed_norm: Also normalize the stream where it enters the first block.
        out_gain: Where the gains of the output norms start.

    Reference:
        Kim et al., 2025, arXiv 2502.02732.

    Example:
        >>> from setpoint import fix
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        >>> stack = nn.TransformerEncoder(layer, 1, norm=nn.LayerNorm(8), enable_nested_tensor=False)
        >>> fixed = fix(stack, OutputNorms(embed_norm=False), [torch.randn(1, 4, 8)])
        >>> type(fixed.model.layers[0].linear2.norm).__name__
        'LayerNorm'
    """

    embed_norm: bool = True
    out_gain: float = 1.0

    id: ClassVar[str] = "peri-ln"
    stage: ClassVar[Stage] = "transform"
    preserves: ClassVar[Preserves] = "retrain"

    def __post_init__(self) -> None:
        expect_positive(out_gain=self.out_gain)  # a branch that starts at 0 is another method

    def applies(self, anatomy: Anatomy) -> Refusal | None:
        """It must be Pre-LN, and every branch's output must be what some module returns."""
        if not anatomy.blocks:
            return Refusal("", "no residual blocks were found in it")
        placements = {block.placement for block in anatomy.blocks}
        if placements == {"peri"}:
            return Refusal("", "it has norms on both sides of every branch; there is nothing to add", done=True)
        for block in anatomy.blocks:
            for branch in block.branches:
                place = branch.writer.module if branch.writer is not None else block.name
                if branch.placement != "pre":
                    return Refusal(
                        place, f"its branch is {branch.placement}-norm; expected a norm in front of it and no other"
                    )
                if branch.writer is None or branch.writes is None or branch.writes.side != "output":
                    return Refusal(
                        place, "what it adds to the stream is not what a module returns, so no norm fits there"
                    )
        if self.embed_norm and not anatomy.blocks[0].name:
            return Refusal("", "its blocks are no modules; without a norm on the embeddings it fits: embed_norm=false")
        return None

    def plan(self, ctx: FixContext) -> list[Edit]:
        """An output norm on each branch, and a norm where the stream enters."""
        anatomy: Anatomy = ctx.anatomy
        width = stream_width(ctx.model, anatomy)
        edits: list[Edit] = []
        done: set[str] = set()
        for block in anatomy.blocks:
            for branch in block.branches:
                assert branch.writes is not None
                if branch.writes.module not in done:  # shared blocks share their norms
                    done.add(branch.writes.module)
                    edits += self._around(ctx.model, anatomy, branch, width)
        if self.embed_norm and not stream_norms(anatomy).embedding:
            first = anatomy.blocks[0]
            like = anatomy.norms[first.branches[0].input_norms[0]]
            edits += _wrap(
                first.name, "NormedInput", {}, like, width, "the first branches must not drown the embeddings"
            )
        return edits

    def _around(self, model: nn.Module, anatomy: Anatomy, branch: Branch, width: int) -> list[Edit]:
        assert branch.writes is not None
        assert branch.writer is not None
        like = anatomy.norms[branch.input_norms[0]]
        path = branch.writes.module
        edits = _wrap(path, "NormedOutput", {"index": branch.writes.index}, like, width, "bounds what the branch adds")
        if self.out_gain != 1.0:
            gain = torch.full((width,), self.out_gain).to(parameter(model, branch.writer.parameter))
            edits.append(Edit(f"{path}.norm.weight", gain, "where the gain starts"))
        return edits


def _wrap(path: str, around: str, more: dict[str, Any], like: NormSite, width: int, why: str) -> list[Edit]:
    """A module with a new norm beside it, of the kind of a norm that the branch has."""
    kind = "torch.nn:LayerNorm" if like.kind == "layer" else "setpoint.nn:RMSNorm"
    norm = Build(kind, {"normalized_shape": width, "eps": like.eps or 1e-5})
    arguments = {"inner": Ref(path), "norm": norm, **more}
    return [Edit(path, Build(f"setpoint.surgery.inserts:{around}", arguments), why)]
