"""An anatomy as a tree to read in a terminal."""

from __future__ import annotations

import re
from itertools import groupby
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.tree import Tree

from setpoint.types import Block, Branch, Projection

if TYPE_CHECKING:
    from setpoint.surgery.anatomy import Anatomy

LEGEND = (
    "·              what the branch computes, between the norms before and behind it\n"
    "→              goes into\n"
    "a … b  × N     blocks of one shape, drawn once\n"
    "[i:j]          rows of a fused weight\n"
    "?              no weight was found"
)
"""What the marks in the tree mean."""


def tree_of(anatomy: Anatomy) -> Tree:
    """Embeddings, blocks with their branches, convolution chains outside blocks, the head, and what is unread."""
    tree = Tree("[bold]model[/]")
    for table in anatomy.embeddings:
        tree.add(f"embedding  {escape(table.module)}")
    for _, run in groupby(anatomy.blocks, key=_shape):
        blocks = list(run)
        first = blocks[0]
        names = escape(first.name or "(in the model's own forward)")
        if len(blocks) > 1:
            names += f" … {escape(blocks[-1].name)}  × {len(blocks)}"
        node = tree.add(
            f"[bold]{names}[/]  {first.placement}-norm" if first.placement != "none" else f"[bold]{names}[/]"
        )
        for branch in first.branches:
            _add_branch(node, branch, first)
    loose = [
        c for c in anatomy.chains if not any(c.convolution.module.startswith(f"{b.name}.") for b in anatomy.blocks)
    ]
    for chain in loose:
        parts = [chain.convolution.module, chain.norm, chain.activation]
        tree.add("convolution  " + escape(" → ".join(part for part in parts if part)))
    for layer in anatomy.layers:
        parts = [layer.convolution.module, layer.norm, layer.activation]
        tree.add("linear  " + escape(" → ".join(part for part in parts if part)))
    if anatomy.head is not None:
        tree.add(f"head  {escape(anatomy.head.module)}")
    for group in anatomy.tied:
        tree.add("tied  " + escape(" = ".join(group)))
    if anatomy.unread:
        unread = tree.add("[yellow]unread[/]")
        for part in anatomy.unread:
            unread.add(f"{escape(part.name)}: {escape(part.reason)}")
    return tree


def _shape(block: Block) -> str:
    """A block without its own numbers, to fold equal neighbours."""
    return re.sub(r"\d+", "#", repr([(b.role, b.input_norms, b.output_norms, b.after_norms) for b in block.branches]))


def _short(name: str, block: Block) -> str:
    return escape(name.removeprefix(f"{block.name}.") if block.name else name)


def _weight(projection: Projection | None, block: Block) -> str:
    if projection is None:
        return "?"
    rows = projection.rows
    part = "" if rows is None else f"[{rows.start}:{rows.stop}]" if isinstance(rows, range) else f"[{len(rows)} rows]"
    return _short(projection.module, block) + escape(part)


def _add_branch(tree: Tree, branch: Branch, block: Block) -> None:
    before = "".join(f"{_short(name, block)} → " for name in branch.input_norms)
    if branch.placement == "inner":
        before = "· → " + "".join(f"{_short(name, block)} → " for name in branch.inner_norms)
    behind = "".join(f" → {_short(name, block)}" for name in (*branch.output_norms, *branch.after_norms))
    node = tree.add(f"{branch.role.replace('_', '-')}  {before}·{behind}" if before or behind else branch.role)
    if branch.attention is not None:
        site = branch.attention
        heads = f"{site.num_heads} heads" + (
            f", {site.num_kv_heads} key/value heads" if site.num_kv_heads != site.num_heads else ""
        )
        weights = ", ".join(f"{n} {_weight(getattr(site, n), block)}" for n in ("q", "k", "v", "out"))
        node.add(f"{heads} of {site.head_dim}{', causal' if site.causal else ''}: {weights}")
    if branch.feed_forward is not None:
        ff = branch.feed_forward
        names = ("up", "down") if ff.gate is None else ("gate", "up", "down")
        weights = ", ".join(f"{n} {_weight(getattr(ff, n), block)}" for n in names)
        node.add(f"{ff.activation}: {weights}" + (f", {ff.experts} experts" if ff.experts > 1 else ""))
    elif branch.attention is None and branch.writer is not None:
        node.add(f"written by {_weight(branch.writer, block)}")
