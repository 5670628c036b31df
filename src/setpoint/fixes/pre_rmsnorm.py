"""Pre-RMSNorm: a trained Pre-LN model with RMSNorm in place of LayerNorm, and the same outputs.

Whoever reads the residual stream of a Pre-LN transformer first takes the mean over features away. So the mean may as
well never be written: centre what writes to the stream (embeddings, the last weight of every branch; ``W - mean(W)``
over the outputs), and LayerNorm finds nothing left to remove,

    LayerNorm(x) = (x - mean(x)) / sqrt(mean((x - mean(x))²) + eps) = x / sqrt(mean(x²) + eps) = RMSNorm(x).

That holds for every eps, gain and shift, which are kept. A token table that is also the head can't be centred without
moving the logits: its rows are centred as they are looked up. Where the stream starts from something that no weight
writes, or that can't be centred, it is centred where it enters the first block.

In training the two agree as long as nothing behind the centring writes a mean again; dropout on a branch does.

Reference: Jiang, Gu, Zhu and Pan, 2023, "Pre-RMSNorm and Pre-CRMSNorm Transformers", arXiv 2305.14858.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from setpoint.fixes.norm_sites import cannot_replace, kept_affine
from setpoint.fixing.base import Refused
from setpoint.nn import CRMSNorm
from setpoint.surgery.centre import centre_writers
from setpoint.surgery.copying import in_float64
from setpoint.surgery.editing import commit, table_of
from setpoint.surgery.stream import ZERO, Means, measure_means, not_pre_norm, stream_norms, stream_width
from setpoint.types import Build, Edit, FixContext, NormSite, Preserves, Ref, Refusal, Stage, Writer

if TYPE_CHECKING:
    from setpoint.surgery import Anatomy


@dataclass(frozen=True)
class PreRMSNorm:
    """Turn the LayerNorms that read the residual stream into RMSNorms; exact.

    Reference:
        Jiang, Gu, Zhu and Pan, 2023, arXiv 2305.14858.

    Example:
        >>> from setpoint import fix
        >>> import torch
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        >>> stack = nn.TransformerEncoder(layer, 1, norm=nn.LayerNorm(8), enable_nested_tensor=False)
        >>> fixed = fix(stack, PreRMSNorm(), [torch.randn(1, 4, 8)])
        >>> type(fixed.model.norm).__name__
        'RMSNorm'
    """

    id: ClassVar[str] = "pre-rmsnorm"
    stage: ClassVar[Stage] = "transform"
    preserves: ClassVar[Preserves] = "exact"

    def applies(self, anatomy: Anatomy) -> Refusal | None:
        """Every branch must read the stream through a norm over the features, and a norm must stand behind the last."""
        refusal = nothing_centred(anatomy) or not_pre_norm(anatomy)
        if refusal is not None:
            return refusal
        norms = stream_norms(anatomy)
        return cannot_replace(anatomy, norms.inner)

    def plan(self, ctx: FixContext) -> list[Edit]:
        """Centre the writers, see that the stream is centred, and replace the norms."""
        edits, norms = centred_stream(ctx, self.id)
        wraps = [edit for edit in edits if isinstance(edit.value, Build) and "CentredInput" in edit.value.target]
        edits = [edit for edit in edits if edit not in wraps]
        for name in norms:
            edits += _rms_norm(ctx.model, ctx.anatomy, ctx.anatomy.norms[name])
        return edits + wraps


def nothing_centred(anatomy: Anatomy) -> Refusal | None:
    """A model none of whose norms removes a mean has nothing to convert; done if it is a Llama or was converted."""
    if any(site.kind == "layer" for site in anatomy.norms.values()):
        return None
    done = anatomy.has(CRMSNorm) or any(site.kind == "rms" for site in anatomy.norms.values())
    return Refusal("", "it has no LayerNorm; there is nothing to convert", done=done)


def centred_stream(ctx: FixContext, fix: str, *, drop_last: bool = False) -> tuple[list[Edit], list[str]]:
    """Edits after which the stream has no mean, and the names of the norms that read it then.

    Args:
        ctx: The fix's context.
        fix: Its id, for messages.
        drop_last: Passed on to the module that centres a stream where it enters.

    Returns:
        Edits (modules that centre at an entrance last) and norm names.

    Raises:
        Refused: Something writes a mean that can't be removed; the message names the place.
    """
    anatomy: Anatomy = ctx.anatomy
    candidates = stream_norms(anatomy)
    names = [*candidates.inner, *candidates.outer]
    entrances: list[str] = []
    while True:
        # Judged in float64: in a model's own type, weights that were centred and then rounded have a mean again.
        trial = in_float64(ctx.model)
        commit(trial, [*_centred(trial, anatomy, entrances), *(_entrance(name) for name in entrances)])
        means = measure_means(trial, anatomy, ctx.batches[0], ctx.forward, names)
        _refuse_branches(anatomy, means, fix)
        leak = next((b.name for b in anatomy.blocks if means.blocks.get(b.name, 0.0) > ZERO), None)
        if leak is None:
            break
        if leak in entrances:
            raise Refused(fix, Refusal(leak, "the stream enters it with a mean that nothing readable writes"))
        entrances.append(leak)
    readers = [name for name in names if means.norms.get(name, 1.0) <= ZERO]
    for name in candidates.inner:
        if name not in readers:
            raise Refused(fix, Refusal(name, "what it reads still has a mean after everything readable was centred"))
    outer = [name for name in readers if name in candidates.outer]
    if not outer:
        raise Refused(fix, Refusal(anatomy.blocks[-1].name, "no norm reads the stream behind the last block"))
    refusal = cannot_replace(anatomy, outer)
    if refusal is not None:
        raise Refused(fix, refusal)
    edits = _centred(ctx.model, anatomy, entrances)
    return [*edits, *(_entrance(name, drop_last=drop_last) for name in entrances)], readers


def _centred(model: nn.Module, anatomy: Anatomy, entrances: Sequence[str]) -> list[Edit]:
    """Centre every branch, and the embeddings unless the stream is centred where it enters."""
    edits = centre_writers(model, [writer for writer in anatomy.writers if writer.block is not None])
    return edits if entrances else [*edits, *_centred_embeddings(model, anatomy)]


def _entrance(block: str, *, drop_last: bool = False) -> Edit:
    build = Build("setpoint.surgery.inserts:CentredInput", {"inner": Ref(block), "drop_last": drop_last})
    return Edit(block, build, "the stream enters with no mean")


def _refuse_branches(anatomy: Anatomy, means: Means, fix: str) -> None:
    branches = [branch for block in anatomy.blocks for branch in block.branches]
    for number, branch in enumerate(branches):
        if means.branches.get(number, 0.0) > ZERO and branch.writer is not None:
            raise Refused(fix, Refusal(branch.writer.module, "its branch still writes a mean after it was centred"))


def is_read_elsewhere(anatomy: Anatomy, name: str) -> bool:
    """Whether an embedding's table is also a weight (a tied head)."""
    return (
        any(name in group for group in anatomy.tied)
        or (anatomy.head is not None and anatomy.head.parameter == name)
        or any(use.parameter == name for site in anatomy.norms.values() for use in site.uses)
    )


def _centred_embeddings(model: nn.Module, anatomy: Anatomy) -> list[Edit]:
    edits: list[Edit] = []
    plain: list[Writer] = []
    for writer in anatomy.writers:
        if writer.block is not None or not writer.linear:
            continue
        made = writer.projection
        if not is_read_elsewhere(anatomy, made.parameter):
            plain.append(writer)
            continue
        table = model.get_submodule(made.module)
        if type(table) is nn.Embedding and not writer.scale:
            edits += table_of(
                made.module, table, "setpoint.surgery.inserts:CentredEmbedding", "centred as it is looked up"
            )
    return [*centre_writers(model, plain), *edits]


def _rms_norm(model: nn.Module, anatomy: Anatomy, site: NormSite) -> list[Edit]:
    arguments = {
        "normalized_shape": stream_width(model, anatomy),
        "eps": site.eps,
        "elementwise_affine": site.gain is not None,
        "bias": site.shift is not None,
    }
    norm = Edit(site.name, Build("setpoint.nn:RMSNorm", arguments), "reads a stream without a mean")
    return [norm, *kept_affine(model, site)]
