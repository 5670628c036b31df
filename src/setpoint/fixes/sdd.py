"""Scale-distribution decoupling: linear layers whose outputs are normalized, to be trained from there.

Every linear layer of attention and feed-forward becomes a `setpoint.nn.SDDLinear` with the weight that it had: the
matrix sets the direction of what comes out, and a learned vector alpha its size. Alpha starts at 1, and where a layer
writes to the residual stream at ``1 / sqrt(2 L)`` in a stack of L blocks with two branches each. Head and embeddings
stay as they are, since normalized logits would be bounded.

Queries or keys that have a norm of their own already keep it and their plain layer. A feed-forward whose gate and up
projection are one matrix is normalized over both together, as the authors do; queries, keys and values in one matrix
can't be told apart by one norm, and are refused.

Reference: Wang et al., 2025, "Scale-Distribution Decoupling", arXiv 2502.15499.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from setpoint.fixes.fields import expect_positive
from setpoint.fixes.norm_sites import stack_of
from setpoint.fixing.base import Refused
from setpoint.nn import SDDLinear
from setpoint.types import Branch, Build, Edit, FixContext, Preserves, Projection, Refusal, Stage

if TYPE_CHECKING:
    from setpoint.surgery import Anatomy


@dataclass(frozen=True)
class Decoupling:
    """Replace the linear layers of attention and feed-forward by SDDLinear; the model must be trained afterwards.

    Args:
        residual_alpha: Where alpha starts in layers that write to the residual stream; None for ``1 / sqrt(number of
            branches in the stack)``, which is ``1 / sqrt(2 L)``. The paper's text has ``1 / sqrt(L)``.
        eps: Added to the mean square of the outputs.

    Reference:
        Wang et al., 2025, arXiv 2502.15499.

    Example:
        >>> from setpoint import fix
        >>> from setpoint.testing.tiny import tiny
        >>> model, batch = tiny("decoder")
        >>> fix(model, Decoupling(), [batch]).model.stack.blocks[0].attention.sublayer.o_proj
        SDDLinear(in_features=16, out_features=16, bias=False, eps=1e-06, alpha_init=0.5)
    """

    residual_alpha: float | None = None
    eps: float = 1e-6

    id: ClassVar[str] = "sdd"
    stage: ClassVar[Stage] = "transform"
    preserves: ClassVar[Preserves] = "retrain"

    def __post_init__(self) -> None:
        expect_positive(residual_alpha=self.residual_alpha, eps=self.eps)

    def applies(self, anatomy: Anatomy) -> Refusal | None:
        """It needs blocks with attention or feed-forward, and no queries, keys and values in one matrix."""
        found = [entry for block in anatomy.blocks for branch in block.branches for entry in _projections(branch)]
        if not found:
            return Refusal("", "no attention and no feed-forward was found in it")
        for projection, role in found:
            if role in ("query", "key", "value") and projection.rows is not None:
                return Refusal(
                    projection.module,
                    "holds queries, keys and values in one matrix, and one norm over all three would mix their sizes",
                )
        return None

    def plan(self, ctx: FixContext) -> list[Edit]:
        """A decoupled layer with the old weight for every linear layer."""
        anatomy: Anatomy = ctx.anatomy
        branches: Counter[str] = Counter()
        for block in anatomy.blocks:
            branches[stack_of(block)] += len(block.branches)
        edits: list[Edit] = []
        seen: set[str] = set()
        for block in anatomy.blocks:
            for projection, role in (entry for branch in block.branches for entry in _projections(branch)):
                path = projection.module
                if path in seen or isinstance(ctx.model.get_submodule(path), SDDLinear):
                    continue
                seen.add(path)
                alpha = self.residual_alpha or 1 / sqrt(branches[stack_of(block)])
                edits += self._replaced(ctx.model, path, alpha if role == "writer" else 1.0)
        if not edits:
            raise Refused(self.id, Refusal("", "its linear layers are decoupled already", done=True))
        return edits

    def _replaced(self, model: nn.Module, path: str, alpha: float) -> list[Edit]:
        layer = model.get_submodule(path)
        if type(layer) is not nn.Linear:
            raise Refused(self.id, Refusal(path, f"is a {type(layer).__name__}, and only nn.Linear can be decoupled"))
        arguments = {
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "bias": layer.bias is not None,
            "eps": self.eps,
            "alpha_init": alpha,
        }
        edits = [Edit(path, Build("setpoint.nn:SDDLinear", arguments), "its outputs are normalized")]
        return edits + [Edit(f"{path}.{name}", p, "kept") for name, p in layer.named_parameters(recurse=False)]


def _projections(branch: Branch) -> Iterator[tuple[Projection, str]]:
    """The weights of a branch that are to be decoupled, with what each is for."""
    attention, feed_forward = branch.attention, branch.feed_forward
    if attention is not None:
        found = [
            (attention.q if not attention.query_norm else None, "query"),
            (attention.k if not attention.key_norm else None, "key"),
            (attention.v, "value"),
            (attention.out, "writer"),
        ]
        yield from ((projection, role) for projection, role in found if projection is not None)
    if feed_forward is not None:
        found = [(feed_forward.gate, "gate"), (feed_forward.up, "up"), (feed_forward.down, "writer")]
        yield from ((projection, role) for projection, role in found if projection is not None)
