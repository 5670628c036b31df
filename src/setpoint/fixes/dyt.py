"""Dynamic Tanh: every norm of a transformer becomes ``weight * tanh(alpha x) + bias``, to be trained from there.

Where a LayerNorm or RMSNorm stands, a `setpoint.nn.DyT` of the same width takes its place: norms in front of branches,
the final one, those on queries and keys; batch norms stay. What the old norms had learned is not kept, since their gain
belongs to a normalized input. Two things come with a language model:

* The token embeddings are multiplied by one learnable number that starts at sqrt(width). Without it, embeddings drawn
  at 0.02 leave tanh in its linear part, where it does nothing.
* ``alpha`` starts higher in front of attention than elsewhere, and lower for wider models. The published pairs
  (attention, elsewhere) are 1.0/1.0 at width 1024, 1.0/0.5 at 2048, 0.8/0.2 at 4096, 0.6/0.15 at 5120 and 0.2/0.05 at
  8192; the nearest width on a logarithmic scale is taken. All other models start at 0.5.

Reference: Zhu, Chen, He, LeCun and Liu, 2025, "Transformers without Normalization", arXiv 2503.10622.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log2, sqrt
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from setpoint.fixes.fields import expect_positive
from setpoint.fixes.norm_sites import channels_last, needs_norms, replaceable, sizes_of
from setpoint.fixing.base import Refused
from setpoint.nn import DyT
from setpoint.surgery.editing import table_of
from setpoint.types import Build, Edit, FixContext, Preserves, Refusal, Stage, Writer

if TYPE_CHECKING:
    from setpoint.surgery import Anatomy

ALPHAS = {1024: (1.0, 1.0), 2048: (1.0, 0.5), 4096: (0.8, 0.2), 5120: (0.6, 0.15), 8192: (0.2, 0.05)}
"""Width -> where alpha starts in a language model, in front of attention and elsewhere."""
ELSEWHERE = 0.5
"""Where alpha starts in any other model."""


@dataclass(frozen=True)
class DynamicTanh:
    """Replace every LayerNorm and RMSNorm by DyT; the model must be trained afterwards.

    Args:
        alpha: Where alpha starts in every layer; None for the published values by width and place.
        attention_alpha, other_alpha: The same for norms in front of attention (and on queries and keys), and for all
            other norms; they overrule ``alpha``.
        embedding_scale: In a language model, multiply the token embeddings by a learnable number, first sqrt(width).

    Reference:
        Zhu, Chen, He, LeCun and Liu, 2025, arXiv 2503.10622.

    Example:
        >>> import torch
        >>> from setpoint import fix
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        >>> stack = nn.TransformerEncoder(layer, 1, norm=nn.LayerNorm(8), enable_nested_tensor=False)
        >>> fix(stack, DynamicTanh(alpha=0.8), [torch.randn(1, 4, 8)]).model.norm.alpha.item()
        0.800000011920929
    """

    alpha: float | None = None
    attention_alpha: float | None = None
    other_alpha: float | None = None
    embedding_scale: bool = True

    id: ClassVar[str] = "dyt"
    stage: ClassVar[Stage] = "transform"
    preserves: ClassVar[Preserves] = "retrain"

    def __post_init__(self) -> None:
        expect_positive(alpha=self.alpha, attention_alpha=self.attention_alpha, other_alpha=self.other_alpha)

    def applies(self, anatomy: Anatomy) -> Refusal | None:
        """It needs attention, and a norm over the features that is a module of its own."""
        refusal = needs_norms(anatomy, DyT)
        if refusal is None and not anatomy.attention:
            return Refusal("", "it has no attention, and DyT was made for transformers")
        return refusal

    def plan(self, ctx: FixContext) -> list[Edit]:
        """A DyT for every norm, and the scale on the embeddings."""
        anatomy: Anatomy = ctx.anatomy
        language = "causal" in anatomy.structure and bool(anatomy.embeddings) and anatomy.head is not None
        near_attention = _near_attention(anatomy)
        width = max(sizes_of(ctx.model, site, self.id)[-1] for site in anatomy.norms.values() if replaceable(site))
        edits = []
        for site in anatomy.norms.values():
            if not replaceable(site):
                continue
            arguments = {
                "normalized_shape": sizes_of(ctx.model, site, self.id),
                "alpha_init_value": self._start(site.name in near_attention, width, language=language),
                "channels_last": channels_last(site),
                "bias": site.shift is not None,
            }
            edits.append(Edit(site.name, Build("setpoint.nn:DyT", arguments), "tanh in place of the norm"))
        if language and self.embedding_scale:
            edits += _scaled_embedding(ctx.model, anatomy)
        return edits

    def _start(self, attention: bool, width: int, *, language: bool) -> float:
        published = starts(width)[0 if attention else 1] if language else ELSEWHERE
        own = self.attention_alpha if attention else self.other_alpha
        return next(value for value in (own, self.alpha, published) if value is not None)


def starts(width: int) -> tuple[float, float]:
    """Where alpha starts in a language model of a width: in front of attention, and elsewhere.

    >>> starts(768), starts(4096), starts(6000)
    ((1.0, 1.0), (0.8, 0.2), (0.6, 0.15))
    """
    return ALPHAS[min(ALPHAS, key=lambda known: abs(log2(known / width)))]


def _near_attention(anatomy: Anatomy) -> set[str]:
    names = {name for site in anatomy.attention for name in (site.query_norm, site.key_norm) if name}
    for block in anatomy.blocks:
        for branch in block.branches:
            if branch.role in ("attention", "cross_attention"):
                names |= set(branch.input_norms)
    return names


def _scaled_embedding(model: nn.Module, anatomy: Anatomy) -> list[Edit]:
    """The token table (the largest one that writes to the stream), unless something scales it already."""
    tables = [table.parameter for table in anatomy.embeddings]
    writers = [w for w in anatomy.writers if w.block is None and w.projection.parameter in tables]
    if not writers:
        return []

    def rows(writer: Writer) -> int:
        return getattr(model.get_submodule(writer.projection.module), "num_embeddings", 0)

    writer = max(writers, key=rows)
    if writer.scale or "scale" in writer.via:
        return []
    place = writer.projection.module
    table = model.get_submodule(place)
    if type(table) is not nn.Embedding:
        kind = type(table).__name__
        reason = f"is a {kind}, no plain nn.Embedding; scale it in your code and add embedding_scale=false"
        raise Refused("dyt", Refusal(place, reason))
    target = "setpoint.surgery.inserts:ScaledEmbedding"
    return table_of(place, table, target, "tanh needs a stream of about unit size", scale=sqrt(table.embedding_dim))
