"""Pre-CRMSNorm: a trained Pre-LN model whose residual stream is one feature narrower, and the same outputs.

A vector without a mean is known from all its entries but one: the last is minus the sum of the others. So once the
stream of a Pre-LN model is centred (see `setpoint.fixes.pre_rmsnorm`), its last feature can be left out:

* writers lose the last row of their outputs, ``W[:-1]``, ``b[:-1]``;
* readers, after the norm's gain and shift are folded into them, become ``W[:, :-1] - W[:, -1:]``;
* LayerNorm becomes CRMSNorm, which puts the missing entry back into the mean square.

A head tied to the token table reads what the table writes, and the two now differ: untie them on purpose or not at all.
A width of d - 1 is rarely a good one for the matrix products of real hardware; measure before you keep it.

Reference: Jiang, Gu, Zhu and Pan, 2023, "Pre-RMSNorm and Pre-CRMSNorm Transformers", arXiv 2305.14858.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from setpoint.errors import InputError
from setpoint.fixes.norm_sites import cannot_replace
from setpoint.fixes.pre_rmsnorm import centred_stream, is_read_elsewhere, nothing_centred
from setpoint.fixing.base import Refused
from setpoint.nn import PreLN
from setpoint.surgery.anatomy import Anatomy
from setpoint.surgery.centre import drop_last
from setpoint.surgery.copying import share
from setpoint.surgery.editing import commit, parameter
from setpoint.surgery.fold import cannot_fold, fold_norm
from setpoint.surgery.stream import not_pre_norm, stream_norms, stream_width
from setpoint.types import Build, Edit, FixContext, NormSite, Preserves, Ref, Refusal, Stage

if TYPE_CHECKING:
    from setpoint.types import Projection


@dataclass(frozen=True)
class PreCRMSNorm:
    """Leave one feature of the residual stream out; exact.

    Args:
        untie: Give a head that shares the token table a weight of its own first; that many parameters more.

    Reference:
        Jiang, Gu, Zhu and Pan, 2023, arXiv 2305.14858.

    Example:
        >>> import torch
        >>> from setpoint import fix
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        ...     def forward(self, x):
        ...         return x + self.down(self.up(self.norm(x)).relu())
        >>> model = nn.Sequential(nn.Linear(4, 8), Block(), nn.LayerNorm(8), nn.Linear(8, 3))
        >>> fixed = fix(model, PreCRMSNorm(), [torch.randn(2, 5, 4)])
        >>> fixed.model[0]
        Linear(in_features=4, out_features=7, bias=True)
    """

    untie: bool = False

    id: ClassVar[str] = "pre-crmsnorm"
    stage: ClassVar[Stage] = "transform"
    preserves: ClassVar[Preserves] = "exact"

    def applies(self, anatomy: Anatomy) -> Refusal | None:
        """As for pre-rmsnorm; besides, every reader of a norm must be a weight of its own."""
        refusal = nothing_centred(anatomy) or not_pre_norm(anatomy)
        if refusal is not None:
            return refusal
        norms = stream_norms(anatomy)
        tied = _tied_tables(anatomy)
        if tied and not self.untie:
            return Refusal(
                tied[0].module,
                "its table is the head as well, and in the narrower model the two differ; pre-rmsnorm keeps it, or add "
                "untie=true for a head with a weight of its own",
            )
        readable = [anatomy.norms[name] for name in norms.inner]
        return cannot_replace(anatomy, norms.inner) or next(filter(None, map(_reads_by_head, readable)), None)

    def plan(self, ctx: FixContext) -> list[Edit]:
        """Untie, fold the norms, centre the writers, then narrow whatever touches the stream."""
        trial = share(ctx.model)
        anatomy: Anatomy = ctx.anatomy
        edits: list[Edit] = []

        def do(more: Iterable[Edit]) -> None:
            more = list(more)
            commit(trial, more)
            edits.extend(more)

        if _tied_tables(anatomy):
            do(_own_head(trial, anatomy))
            anatomy = Anatomy.trace(trial, ctx.batches[0], forward=ctx.forward)
        centring, readers = centred_stream(replace(ctx, model=trial, anatomy=anatomy), self.id, drop_last=True)
        entrances = [edit for edit in centring if isinstance(edit.value, Build)]
        for name in readers:
            site = anatomy.norms[name]
            refusal = cannot_fold(anatomy, site) or _reads_by_head(site)
            if refusal is not None:
                raise Refused(self.id, refusal)
            try:
                do(fold_norm(trial, site))
            except InputError as error:  # a reader that has no place for the shift
                raise Refused(self.id, Refusal(name, f"can't be folded into what reads it: {error}")) from error
        width = stream_width(trial, anatomy)
        do(drop_last([edit for edit in centring if edit not in entrances], _output_axes(anatomy)))
        for name in readers:
            do(_narrow_readers(trial, anatomy.norms[name]))
            do(_own_unit(trial, name, width))
            do([_compressed(anatomy.norms[name], width)])
        return edits + entrances


def _tied_tables(anatomy: Anatomy) -> list[Projection]:
    writers = [w.projection for w in anatomy.writers if w.block is None]
    return [table for table in anatomy.embeddings if table in writers and is_read_elsewhere(anatomy, table.parameter)]


def _own_head(model: nn.Module, anatomy: Anatomy) -> list[Edit]:
    """The head as a linear of its own, with a copy of the table."""
    head = anatomy.head
    module = model.get_submodule(head.module) if head is not None else None
    if head is None or not isinstance(module, nn.Linear):
        place = head.module if head is not None else ""
        raise Refused("pre-crmsnorm", Refusal(place, "the head is no linear of its own, so it can't be untied"))
    sizes = {"in_features": module.in_features, "out_features": module.out_features, "bias": module.bias is not None}
    edits = [
        Edit(head.module, Build("torch.nn:Linear", sizes), "a head of its own"),
        Edit(f"{head.module}.weight", module.weight.detach().clone(), "a copy of the table"),
    ]
    return edits if module.bias is None else [*edits, Edit(f"{head.module}.bias", module.bias, "kept")]


def _output_axes(anatomy: Anatomy) -> dict[str, int]:
    axes: dict[str, int] = {}
    for writer in anatomy.writers:
        made = writer.projection
        axes[made.parameter] = made.output_axis
        axes |= {name: -1 for name in (made.bias, writer.scale) if name}
    return axes


def _reads_by_head(site: NormSite) -> Refusal | None:
    """Readers that need the full width: a part of the features, or torch's attention, which counts them."""
    for use in site.uses:
        if use.slice is not None:
            return Refusal(use.module, f"reads a part of what {site.name} gives, and no entry of that can be left out")
        if use.parameter.endswith("in_proj_weight"):
            return Refusal(
                use.module, "is torch's MultiheadAttention, which refuses inputs of another width than its own"
            )
    return None


def _narrow_readers(model: nn.Module, site: NormSite) -> list[Edit]:
    edits = []
    axes = {use.parameter: use.input_axis for use in site.uses}
    for name, axis in axes.items():
        assert axis is not None
        wide = parameter(model, name).detach().double()
        kept = wide.narrow(axis, 0, wide.shape[axis] - 1) - wide.narrow(axis, wide.shape[axis] - 1, 1)
        edits.append(Edit(name, kept.to(parameter(model, name)), "the last feature is minus the sum of the others"))
    return edits


def _own_unit(model: nn.Module, norm: str, width: int) -> list[Edit]:
    """setpoint's residual unit around a norm, for the narrower stream; other models' blocks don't ask for a width."""
    path = norm.rpartition(".")[0]
    unit = model.get_submodule(path)
    if not isinstance(unit, PreLN):
        return []
    arguments = {"sublayer": Ref(f"{path}.sublayer"), "normalized_shape": width - 1, "dropout": unit.dropout.p}
    return [Edit(path, Build("setpoint.nn:PreLN", arguments), "the stream is narrower")]


def _compressed(site: NormSite, width: int) -> Edit:
    build = Build("setpoint.nn:CRMSNorm", {"dim": width - 1, "eps": site.eps})
    return Edit(site.name, build, "reads a stream with one feature left out")
