"""The places of a model that are worth measuring, as hooks can reach them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from setpoint.types import Site, SiteRole, Tap

if TYPE_CHECKING:
    from setpoint.surgery.anatomy import Anatomy


def sites_of(anatomy: Anatomy) -> tuple[Site, ...]:
    """Embedding, residual, branch, hidden, attention, convolution, norm and logits sites of a model."""
    found: list[Site] = []
    names: set[str] = set()

    def add(place: str, role: SiteRole, tap: Tap | None, block: int | None, module: str) -> None:
        if tap is None:
            return
        name, count = f"{place} {role}".strip(), 2
        while name in names:
            name = f"{place}@{count} {role}".strip()
            count += 1
        names.add(name)
        found.append(Site(name, role, tap, block, anatomy.channel_axes.get(tap, -1), module))

    images = {chain.convolution.module for chain in anatomy.chains}
    add("", "embedding", anatomy.taps.get("stream"), None, "")
    cores = iter(anatomy.attention)
    for block in anatomy.blocks:
        place = block.name or f"block {block.index}"
        for branch in block.branches:
            writer = branch.writer.module if branch.writer is not None else block.name
            if branch.attention is not None:
                core = next(cores)
                inside = Tap(core.name, "input", 0, block.call)
                add(core.name or place, "attention", inside, block.index, core.name)
            ff = branch.feed_forward
            if (
                ff is not None
                and ff.down is not None
                and (branch.role == "feed_forward" or ff.down.module not in images)
            ):
                add(ff.name or place, "hidden", ff.hidden, block.index, ff.name)
            add(writer or place, "branch", branch.writes, block.index, writer)
        add(place, "residual", block.output, block.index, block.name)
    for chain in anatomy.chains:
        module = chain.convolution.module
        owner = next((b.index for b in anatomy.blocks if b.name and module.startswith(f"{b.name}.")), None)
        add(module, "convolution", chain.output, owner, module)
    for layer in anatomy.layers:
        add(layer.convolution.module, "hidden", layer.output, None, layer.convolution.module)
    for norm in anatomy.norms.values():
        if "#" not in norm.name:
            owner = next((b.index for b in anatomy.blocks if b.name and norm.name.startswith(f"{b.name}.")), None)
            add(norm.name, "norm", Tap(norm.name, "output"), owner, norm.name)
    if anatomy.head is not None:
        add(anatomy.head.module, "logits", anatomy.taps.get("logits"), None, anatomy.head.module)
    return tuple(found)
