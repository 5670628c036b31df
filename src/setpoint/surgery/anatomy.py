"""What a model is made of, read from one forward pass instead of a table of class names.

`Anatomy.trace` runs one batch, writes down every operation with the module that made it (`setpoint.surgery.tape`), and
reads roles from the result: what writes to the residual stream, which norm feeds which weights, what is attention and
what is feed-forward. What it can't read it lists in ``unread``, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from setpoint.errors import InputError
from setpoint.running import Forward, untouched, unwrap
from setpoint.surgery.behaviour import NormRead
from setpoint.surgery.branches import Addition, find_additions, read_branches
from setpoint.surgery.chains import find_chains, find_layers
from setpoint.surgery.channels import find_channel_axes
from setpoint.surgery.graph import Graph, bit
from setpoint.surgery.norms import Product, find_norms, norm_sites, reaches
from setpoint.surgery.ops import is_known
from setpoint.surgery.tape import Call, Value, record
from setpoint.surgery.writers import find_writers
from setpoint.types import AttentionSite, Block, Branch, Chain, NormSite, Projection, Site, Tap, Unread, Writer

if TYPE_CHECKING:
    from rich.tree import Tree


@dataclass(frozen=True, slots=True, eq=False)
class Anatomy:
    """The parts of a model, by role.

    Args:
        blocks: Units of depth in order of execution.
        norms: Name -> norm with everything that reads it.
        chains: Convolution -> norm -> activation.
        attention: Attention cores in order of execution; `AttentionSite.call_index` counts them: every
            ``scaled_dot_product_attention``, and every softmax whose result weighs values.
        writers: Weights and bare parameters that are added to the residual stream, what it starts from included.
        embeddings: Tables that are looked up.
        head: The last weight after the last block, None if there is none.
        tied: Groups of parameter names that share one tensor.
        unread: What could not be read, and why.
        taps: Where the stream enters the first block and where the logits leave.
        unwritten: What enters the residual stream without coming from a parameter (the model's own input, positions
            computed in the forward), by the module that adds it.
        layers: Linear -> norm -> activation outside blocks.
        channel_axes: Where a tensor can be caught -> the axis that holds its channels: -1 for the last, others counted
            from the front.
        products: Name of a weight -> every product with it, to see who reads it.
        classes: Of all its modules; what an earlier fix put in is known by them, see `has`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        >>> model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        >>> anatomy = Anatomy.trace(model, torch.randn(1, 5, 8))
        >>> anatomy.blocks[0].placement, sorted(anatomy.feeds["layers.0.norm2"])
        ('pre', ['layers.0.linear1'])
    """

    blocks: tuple[Block, ...]
    norms: Mapping[str, NormSite]
    chains: tuple[Chain, ...]
    attention: tuple[AttentionSite, ...]
    writers: tuple[Writer, ...]
    embeddings: tuple[Projection, ...]
    head: Projection | None
    tied: tuple[tuple[str, ...], ...]
    unread: tuple[Unread, ...]
    taps: Mapping[str, Tap | None] = field(default_factory=dict)
    unwritten: tuple[Unread, ...] = ()
    layers: tuple[Chain, ...] = ()
    channel_axes: Mapping[Tap, int] = field(default_factory=dict)
    products: Mapping[str, tuple[Product, ...]] = field(default_factory=dict)
    classes: frozenset[type[nn.Module]] = frozenset()

    @property
    def feeds(self) -> Mapping[str, frozenset[str]]:
        """Norm name -> names of the weight-carrying modules that read it."""
        return {name: norm.feeds for name, norm in self.norms.items()}

    def has(self, *kinds: type[nn.Module]) -> bool:
        """Whether the model holds a module of one of these classes."""
        return any(issubclass(each, kinds) for each in self.classes)

    @property
    def structure(self) -> frozenset[str]:
        """Words for what the model has, as listed at `setpoint.types.Trace`."""
        words = {f"{norm.kind}-norm" for norm in self.norms.values()}
        words |= {branch.role for block in self.blocks for branch in block.branches}
        words |= {block.placement for block in self.blocks if block.placement in ("pre", "post", "peri", "output")}
        if self.attention:
            words.add("attention")
        if any(site.causal for site in self.attention):
            words.add("causal")
        if any(branch.feed_forward is not None for block in self.blocks for branch in block.branches):
            words.add("feed_forward")
        if self.blocks:
            words.add("residual")
        if self.chains:
            words.add("convolution")
        if self.head is not None:
            words.add("head")
        if self.embeddings:
            words.add("embedding")
        return frozenset(words)

    @classmethod
    def trace(cls, model: nn.Module, batch: Any, *, forward: Forward | None = None) -> Anatomy:
        """Run one batch and read the model from what happened; the model is as before afterwards.

        Args:
            model: Any module; compiled and data-parallel wrappers are looked through.
            batch: A tensor (the only argument), a tuple or list (positional) or a mapping (keywords).
            forward: ``forward(model, batch)``, if calling takes more than the batch.

        Raises:
            setpoint.errors.InputError: A fully sharded or a scripted model.
        """
        model = unwrap(model)
        if "FullyShardedDataParallel" in type(model).__name__:
            raise InputError(
                "expected a plain module, got one wrapped in FullyShardedDataParallel, whose weights are flattened; "
                "trace the model before it is sharded"
            )
        if isinstance(model, torch.jit.ScriptModule):
            raise InputError(
                f"expected a module that runs in Python, got a {type(model).__name__}, whose operations can't be seen; "
                "trace the model before it is scripted"
            )
        with untouched(model):
            tape = record(model, batch, forward)
            return _read(model, Graph(tape))

    def sites(self) -> tuple[Site, ...]:
        """The places worth measuring, in order of execution within each role."""
        from setpoint.surgery.sites import sites_of

        return sites_of(self)

    def tree(self) -> Tree:
        """The model as a tree of roles; equal neighbours are folded into one entry."""
        from setpoint.surgery.tree import tree_of

        return tree_of(self)


def _read(model: nn.Module, graph: Graph) -> Anatomy:
    reads = find_norms(graph)
    additions = find_additions(graph)
    final = next((v for v in graph.tape.outputs if v.floating), None)
    for addition, following in zip_longest(additions, additions[1:]):
        ends = following is None or not graph.descends(following.source, addition.output)
        addition.branches = read_branches(graph, addition, None if ends else following.stream, reads)
        if ends:  # of the model, or of an encoder before its decoder
            addition.branches = _without_final_norm(addition.branches, additions[: additions.index(addition)])
    blocks = _blocks(graph, additions)
    embeddings = _embeddings(graph)
    head, logits = _head(graph, additions, final)
    attention = tuple(b.attention for block in blocks for b in block.branches if b.attention is not None)
    writers, unwritten = find_writers(graph, additions, reads)
    if not additions:
        writers = tuple(Writer(table, None, "embedding") for table in embeddings)
    taps = {
        "stream": blocks[0].input if blocks else None,
        "logits": graph.tap(logits) if logits is not None else None,
    }
    chains, layers = find_chains(graph, reads), find_layers(graph, reads, additions)
    norms, products = norm_sites(graph, reads)
    return Anatomy(
        blocks,
        norms,
        chains,
        attention,
        writers,
        embeddings,
        head,
        _tied(model),
        (*_unread(model, graph, reads), *_uncaught(blocks)),
        taps,
        unwritten,
        layers,
        find_channel_axes(graph, reads, additions, blocks, chains + layers, (head, taps["logits"])),
        products,
        frozenset(map(type, model.modules())),
    )


def _tied(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return tuple(tuple(group) for group in names.values() if len(group) > 1)


def _without_final_norm(branches: list[Branch], earlier: list[Addition]) -> list[Branch]:
    """Behind the last addition a block keeps as many norms as stand behind the others; one more is the model's own."""
    before = [branch for addition in earlier for branch in addition.branches]
    if before:
        usual = max(len(branch.after_norms) for branch in before)
    else:
        usual = 0 if any(branch.input_norms for branch in branches) else 1
    return [replace(branch, after_norms=branch.after_norms[:usual]) for branch in branches]


# blocks --------------------------------------------------------------------------------------------------------------


def _blocks(graph: Graph, additions: list[Addition]) -> tuple[Block, ...]:
    groups: list[list[Addition]] = []
    loose = {"convolution", "other"}
    for addition in additions:
        roles = {branch.role for branch in addition.branches}
        seen = {branch.role for one in groups[-1] for branch in one.branches} if groups else set()
        if not groups or roles & seen or not _belongs(groups[-1], addition, bool(roles & loose or seen & loose)):
            groups.append([])
        groups[-1].append(addition)
    blocks = []
    for index, group in enumerate(groups):
        owner = _shared(group)
        name = owner.name if owner is not None else group[0].node.call.name
        last = group[-1]
        for addition in group:
            addition.block = index
        branches = tuple(branch for addition in group for branch in addition.branches)
        following = groups[index + 1][0] if index + 1 < len(groups) else None
        result = _result(graph, owner, last, following)
        # an addition inside a branch (the skip of a state space) runs before the one that the branch ends in
        start = graph.tap(min((addition.source for addition in group), key=lambda value: value.index))
        blocks.append(Block(index, name, branches, start, graph.tap(result), owner.ordinal if owner is not None else 0))
    return tuple(blocks)


def _belongs(group: list[Addition], addition: Addition, loose: bool) -> bool:
    """Whether an addition is of the same block as those before it.

    Attention and feed-forward make a block wherever they stand. What is neither joins only its own kin: additions made
    in the same call, or in parts of one module that are no entries of a list.
    """
    shared = _shared([*group, addition])
    if shared is None or not loose:
        return shared is not None
    depth = len(shared.name.split(".")) if shared.name else 0
    paths = [one.node.call.name.split(".")[depth:] for one in (group[-1], addition) if one.node.call is not shared]
    return not any(part.isdigit() for path in paths for part in path)


def _shared(group: list[Addition]) -> Call | None:
    """The innermost module call that holds all additions of a group; None if that is the whole model and more."""
    chains = [list(addition.node.call.ancestors()) for addition in group]
    return next((call for call in chains[0] if all(call in chain for chain in chains[1:])), None)


def _result(graph: Graph, owner: Call | None, last: Addition, following: Addition | None) -> Value:
    """The stream after a block: what its module returns if that is the sum or a norm behind it, else the sum."""
    for value in owner.outputs if owner is not None and owner.name else ():
        if following is not None and graph.descends(value, following.output):
            continue  # a module around several blocks
        if value.floating and reaches(graph, last.output, value) and value.tensor.shape == last.output.tensor.shape:
            return value
    return last.output


# the rest ------------------------------------------------------------------------------------------------------------


def _embeddings(graph: Graph) -> tuple[Projection, ...]:
    found: dict[tuple[str, str], Projection] = {}
    for output, place in graph.lookups.items():
        node = graph.tape.values[output].producer
        table = graph.root(node.inputs[place]) if node is not None else None
        if node is not None and table is not None and table.kind == "parameter":
            found.setdefault((node.call.name, table.name), Projection(node.call.name, table.name, "", 1))
    return tuple(found.values())


def _head(graph: Graph, additions: list[Addition], final: Value | None) -> tuple[Projection | None, Value | None]:
    if final is None:
        return None, None
    weight = graph.last_weight(final)
    if weight is None or (additions and not graph.ancestors[weight.node.outputs[0].index] & bit(additions[-1].output)):
        return None, None
    return weight.projection(), weight.node.outputs[0]


def _uncaught(blocks: tuple[Block, ...]) -> tuple[Unread, ...]:
    """Branches that are added in the middle of a forward, between functions, where a hook can't reach."""
    found = []
    for side, verb in (("reads", "read"), ("writes", "add")):
        missed = [(block, [b for b in block.branches if getattr(b, side) is None]) for block in blocks]
        missed = [(block, branches) for block, branches in missed if branches]
        if missed:
            (first, branches), more = missed[0], len(missed) - 1
            names = ", ".join(b.writer.parameter if b.writer is not None else b.role for b in branches)
            behind = f", nor in {more} other block{'s' if more > 1 else ''}" if more else ""
            found.append(Unread(first.name, f"what its branches {verb} ({names}) can't be caught by a hook{behind}"))
    return tuple(found)


def _unread(model: nn.Module, graph: Graph, norms: list[NormRead]) -> tuple[Unread, ...]:
    found = [Unread(name, reason) for name, reason in graph.tape.opaque]
    known = {norm.call.name for norm in norms if norm.name == norm.call.name and norm.kind != "other"}
    found += [Unread(name, reason) for name, reason in graph.tape.followed if name not in known]
    opaque = {name for name, _ in graph.tape.opaque}
    called = {call.name for call in graph.tape.calls}
    used = {value.name for node in graph.tape.nodes for value in map(graph.root, node.inputs) if value.name}
    quiet: list[str] = []
    for name, module in model.named_modules():
        own = [f"{name}.{key}" if name else key for key, _ in module.named_parameters(recurse=False)]
        if name in called or not own or used & set(own) or any(name == q or name.startswith(f"{q}.") for q in quiet):
            continue
        if any(name.startswith(f"{outer}.") for outer in opaque):
            continue
        quiet.append(name)
        found.append(Unread(name, "never called in this pass"))
    for node in graph.computed:
        found.append(
            Unread(node.call.name, "multiplies by a weight that is no parameter but a buffer, or computed in the pass")
        )
    for node in graph.tape.nodes:
        if node.op in ("opaque", "alias_write") or is_known(node.op):
            continue
        if any(graph.root(value).kind == "parameter" for value in node.inputs):
            found.append(
                Unread(node.call.name, f"the op {node.op} takes a parameter and its meaning is not known here")
            )
    names = {name for name, _ in model.named_modules()}
    return tuple(dict.fromkeys(part for part in found if part.name in names))
