"""The residual stream of a pre-norm model: which norms read it, what writes to it, and whether its mean is gone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from setpoint.running import tensors_of
from setpoint.surgery.comparing import double, lifted, outputs
from setpoint.surgery.editing import parameter
from setpoint.surgery.inserts import CentredInput
from setpoint.types import Refusal, Tap

if TYPE_CHECKING:
    from setpoint.surgery.anatomy import Anatomy

ZERO = 1e-6
"""Mean over features, relative to their root mean square, below which a vector counts as centred (in float64)."""


@dataclass(frozen=True, slots=True)
class StreamNorms:
    """Norms that read the stream.

    Args:
        inner: Those in front of branches.
        outer: Those outside blocks: the final one, and others that may stand elsewhere (in a head, in an embedding).
        embedding: Those through which the embeddings reach the stream.
    """

    inner: tuple[str, ...]
    outer: tuple[str, ...]
    embedding: tuple[str, ...]


def stream_norms(anatomy: Anatomy) -> StreamNorms:
    """Sort the norms of a model by where they stand.

    Args:
        anatomy: Of the model.
    """
    branches = [branch for block in anatomy.blocks for branch in block.branches]
    inner = {name for branch in branches for name in branch.input_norms}
    others = {name for b in branches for name in (*b.output_norms, *b.after_norms, *b.inner_norms)}
    others |= {name for site in anatomy.attention for name in (site.query_norm, site.key_norm) if name}
    embedding = {name for writer in anatomy.writers if writer.block is None for name in writer.norms}
    outer = [name for name in anatomy.norms if name not in inner | others | embedding]
    keep = anatomy.norms  # in the order of execution
    return StreamNorms(
        tuple(name for name in keep if name in inner), tuple(outer), tuple(n for n in keep if n in embedding)
    )


def not_pre_norm(anatomy: Anatomy) -> Refusal | None:
    """Why the stream of a model is not one that only centring norms read, None if nothing speaks against it.

    Args:
        anatomy: Of the model.
    """
    if not anatomy.blocks:
        return Refusal("", "no residual blocks were found in it")
    for block in anatomy.blocks:
        for branch in block.branches:
            place = branch.writer.module if branch.writer is not None else block.name
            if branch.after_norms:
                return Refusal(
                    branch.after_norms[0], "a norm behind the addition (post-norm) writes a mean to the stream"
                )
            if branch.output_norms:
                return Refusal(branch.output_norms[0], "a norm on a branch's output writes a mean to the stream")
            if not branch.input_norms:
                return Refusal(place, "its branch reads the stream with no norm in front")
            if branch.writer is None:
                return Refusal(place, "what it writes to the stream could not be followed to a weight")
    for writer in anatomy.writers:
        if writer.block is not None and not writer.linear:
            via = ", ".join(writer.via)
            return Refusal(writer.projection.module, f"what lies between it and the stream ({via}) is not linear")
    norms = stream_norms(anatomy)
    for name in norms.inner:
        site = anatomy.norms[name]
        if site.kind not in ("layer", "rms") or site.axes != (-1,):
            return Refusal(name, f"a {site.kind} norm over axes {site.axes}; expected one over the features alone")
    kinds = {anatomy.norms[name].kind for name in norms.inner}
    if len(kinds) > 1:
        name = next(n for n in norms.inner if anatomy.norms[n].kind == "rms")
        return Refusal(name, "keeps the mean of the stream, while other norms of the model remove it")
    if not norms.outer:
        return Refusal(
            anatomy.blocks[-1].name, "no norm stands behind the last block, so the model's output has the mean"
        )
    return None


@dataclass(frozen=True, slots=True)
class Means:
    """Largest |mean over features| / rms seen, by place; nothing for places that were not reached.

    Args:
        blocks: Of what enters a block, by name.
        norms: Of what enters a norm, by name.
        branches: Of what a branch adds, in the order of the anatomy's branches, by number.
    """

    blocks: dict[str, float]
    norms: dict[str, float]
    branches: dict[int, float]


def stream_width(model: nn.Module, anatomy: Anatomy) -> int:
    """How many features the residual stream has, from the first weight that writes to it.

    Args:
        model: The model.
        anatomy: Of the model; a branch must have a writer.
    """
    made = next(writer.projection for writer in anatomy.writers if writer.block is not None)
    return int(parameter(model, made.parameter).shape[made.output_axis])


def measure_means(
    model: nn.Module, anatomy: Anatomy, batch: Any, forward: Callable[[nn.Module, Any], Any], norms: Sequence[str]
) -> Means:
    """Run one batch and see where the stream has a mean.

    Args:
        model: In float64; hooks are left on it.
        anatomy: Of the model as it was before it was centred.
        batch: The batch.
        forward: How to run it.
        norms: Names of norms whose inputs are of interest.

    Returns:
        The means.
    """
    found = Means({}, {}, {})
    width = stream_width(model, anatomy)
    for name in dict.fromkeys(block.name for block in anatomy.blocks if block.name):
        _watch(model, Tap(name, "input"), width, found.blocks, name)
    for name in norms:
        if "#" not in name:
            _watch(model, Tap(name, "input"), None, found.norms, name)
    branches = [branch for block in anatomy.blocks for branch in block.branches]
    for number, branch in enumerate(branches):
        if branch.writes is not None:
            _watch(model, branch.writes, width, found.branches, number)
    with lifted():
        outputs(model, double(batch), forward)
    return found


def _watch(model: nn.Module, tap: Tap, width: int | None, into: dict[Any, float], key: Any) -> None:
    def see(tensors: list[Tensor]) -> None:
        floats = [t for t in tensors if t.is_floating_point() and t.dim() >= 2]
        floats = [t for t in floats if width is None or t.shape[-1] == width]
        if tap.side == "output" and tap.index < len(tensors) and tensors[tap.index].is_floating_point():
            floats = [tensors[tap.index]]
        if floats:
            x = floats[0].double()
            rms = x.square().mean(-1).sqrt()
            ratio = (x.mean(-1).abs() / rms.clamp(min=torch.finfo(torch.float64).tiny)).max()
            into[key] = max(into.get(key, 0.0), float(ratio))

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        see(tensors_of(args, kwargs))

    def behind(_: nn.Module, __: Any, output: Any) -> None:
        see(tensors_of(output))

    module = model.get_submodule(tap.module)
    if isinstance(module, CentredInput) and tap.side == "input":
        module = module.inner
    if tap.side == "input":
        module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        module.register_forward_hook(behind)
