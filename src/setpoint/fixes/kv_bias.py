"""KV bias: a slot for attention that has nowhere to go, put into a model's attentions.

`KeyValueBias` is the method: in each attention a learnable key and value stand in front of the others, drawn from
N(0, 0.02²), and the model is trained with them. `KeyValueSlot` puts the same slot in at a logit of minus infinity,
where it gets no weight: outputs stay exactly, and whoever trains later can open it (``kv_bias.slot_logit = 0``).

torch's own `nn.MultiheadAttention` has the method built in (``bias_k``, ``bias_v``, behind the other keys instead of in
front, which is the same to a softmax).

Reference: Owen et al., 2025, "A Refined Analysis of Massive Activations in LLMs", arXiv 2503.22329.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.fixing.base import Refused
from setpoint.nn.attention.kv_bias import STD, KVBias
from setpoint.types import AttentionSite, Build, Edit, FixContext, Preserves, Ref, Refusal, Stage

if TYPE_CHECKING:
    from setpoint.surgery import Anatomy

CLOSED = float("-inf")
"""No finite number would do: float16 ends at -65,504, and to a row whose keys are all masked by the smallest number of
its type, any larger one is an open door."""


@dataclass(frozen=True)
class KeyValueBias:
    """A learnable key and value in front of the others, in every self-attention; train afterwards.

    Args:
        std: Spread from which they are drawn.

    Reference:
        Owen et al., 2025, arXiv 2503.22329.

    Example:
        >>> from setpoint import fix
        >>> from setpoint.models import Transformer, TransformerConfig
        >>> model = Transformer(TransformerConfig(vocab_size=32, dim=16, depth=1, num_heads=2))
        >>> fixed = fix(model, KeyValueBias(), [torch.randint(0, 32, (1, 8))])
        >>> fixed.model.stack.blocks[0].attention.sublayer.kv_bias
        KVBias(num_kv_heads=2, head_dim=8, slot_logit=0.0)
    """

    std: float = STD

    id: ClassVar[str] = "kv-bias"
    stage: ClassVar[Stage] = "transform"
    preserves: ClassVar[Preserves] = "retrain"

    def __post_init__(self) -> None:
        if not 0 <= self.std < inf:
            raise InputError(f"expected std from 0 on and finite, got {self.std}")

    def applies(self, anatomy: Anatomy) -> Refusal | None:
        """Every self-attention must run torch's ``scaled_dot_product_attention``."""
        return _cannot_extend(anatomy)

    def plan(self, ctx: FixContext) -> list[Edit]:
        """A slot for each attention module that has none, with its own draw."""
        edits: list[Edit] = []
        for site in _without_slot(ctx, self.id):
            if isinstance(ctx.model.get_submodule(site.name), nn.MultiheadAttention):
                key, value = (_draw(ctx, site, self.std).reshape(1, 1, -1) for _ in range(2))
                edits += [Edit(f"{site.name}.bias_k", key), Edit(f"{site.name}.bias_v", value)]
            else:
                edits += _slot(ctx, site, self.std, 0.0)
        return edits


@dataclass(frozen=True)
class KeyValueSlot:
    """The slot of `KeyValueBias` where it gets no weight; exact.

    Reference:
        Owen et al., 2025, arXiv 2503.22329.

    Example:
        >>> from setpoint import fix
        >>> from setpoint.models import Transformer, TransformerConfig
        >>> model = Transformer(TransformerConfig(vocab_size=32, dim=16, depth=1, num_heads=2))
        >>> fix(model, KeyValueSlot(), [torch.randint(0, 32, (1, 8))]).change.exact[0] < 1e-9
        True
    """

    id: ClassVar[str] = "kv-bias-slot"
    stage: ClassVar[Stage] = "transform"
    preserves: ClassVar[Preserves] = "exact"

    def applies(self, anatomy: Anatomy) -> Refusal | None:
        """As for `KeyValueBias`."""
        return _cannot_extend(anatomy)

    def plan(self, ctx: FixContext) -> list[Edit]:
        """A closed slot for each attention module that has none."""
        edits: list[Edit] = []
        for site in _without_slot(ctx, self.id):
            if isinstance(ctx.model.get_submodule(site.name), nn.MultiheadAttention):
                reason = "is torch's MultiheadAttention, whose slot can't be closed; kv-bias opens it"
                raise Refused(self.id, Refusal(site.name, reason))
            edits += _slot(ctx, site, STD, CLOSED)
        return edits


def _sites(anatomy: Anatomy) -> list[AttentionSite]:
    """One self-attention for each module."""
    found = {
        branch.attention.name: branch.attention
        for block in anatomy.blocks
        for branch in block.branches
        if branch.attention is not None and branch.role != "cross_attention"
    }
    return list(found.values())


def _without_slot(ctx: FixContext, fix: str) -> list[AttentionSite]:
    """The self-attentions that have no slot.

    Raises:
        Refused: All have one; that is done unless slots are closed and open ones were asked for.
    """
    slots: dict[str, list[nn.Module]] = {}
    sites = _sites(ctx.anatomy)
    for site in sites:
        attention, around = (ctx.model.get_submodule(path) for path in (site.name, site.name.rpartition(".")[0]))
        slots[site.name] = [m for m in (*attention.children(), *around.children()) if isinstance(m, KVBias)]
        if getattr(attention, "bias_k", None) is not None:
            slots[site.name].append(attention)
    left = [site for site in sites if not slots[site.name]]
    if left:
        return left
    closed = next((path for path, own in slots.items() if getattr(own[0], "slot_logit", 0.0) == CLOSED), None)
    if closed is not None and fix == KeyValueBias.id:
        raise Refused(fix, Refusal(closed, "has a closed slot already; open it by kv_bias.slot_logit = 0"))
    raise Refused(fix, Refusal("", "its attentions have such a slot already; there is nothing to add", done=True))


def _draw(ctx: FixContext, site: AttentionSite, std: float) -> Tensor:
    like = next(p for p in ctx.model.get_submodule(site.name).parameters() if p.is_floating_point())
    return (torch.randn(site.num_kv_heads, 1, site.head_dim, generator=ctx.generator) * std).to(like)


def _slot(ctx: FixContext, site: AttentionSite, std: float, logit: float) -> list[Edit]:
    sizes = {"num_kv_heads": site.num_kv_heads, "head_dim": site.head_dim}
    build = Build("setpoint.surgery.inserts:WithKVBias", {"inner": Ref(site.name), **sizes, "slot_logit": logit})
    return [
        Edit(site.name, build, "a slot that belongs to no token"),
        *(Edit(f"{site.name}.kv_bias.{name}", _draw(ctx, site, std), "drawn") for name in ("key", "value")),
    ]


def _cannot_extend(anatomy: Anatomy) -> Refusal | None:
    sites = _sites(anatomy)
    if not sites:
        return Refusal("", "it has no self-attention that could be read")
    for site in sites:
        if site.op != "scaled_dot_product_attention":
            return Refusal(
                site.name,
                f"computes its attention by a {site.op} of its own, where no slot can be put; load the model with "
                "attn_implementation='sdpa'",
            )
        if not site.name:
            return Refusal(site.name, "its attention runs in the model's own forward, where no slot can be put")
    return None
