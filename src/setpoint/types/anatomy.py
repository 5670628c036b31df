"""What a model is made of, as `setpoint.surgery.Anatomy` reads it from one traced pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor


SiteRole = Literal["embedding", "residual", "branch", "norm", "hidden", "attention", "convolution", "logits"]
"""What a place in a network carries.

``embedding``: the residual stream before the first block. ``residual``: the stream after a block. ``branch``: what a
sub-layer adds to the stream. ``norm``: a norm's output. ``hidden``: a feed-forward's activations as its down
projection reads them, or those behind a linear outside blocks. ``attention``: queries and keys as they enter the
attention core. ``convolution``: the output of a conv -> norm -> activation chain. ``logits``: the head's output.
"""

BranchRole = Literal["attention", "cross_attention", "feed_forward", "convolution", "parallel", "other"]
NormKind = Literal["layer", "rms", "batch", "group", "instance", "other"]


@dataclass(frozen=True, slots=True)
class Tap:
    """Where a tensor can be caught during a forward pass with an ordinary module hook.

    Args:
        module: Qualified name of the module ("" is the root).
        side: Catch the module's input or its output.
        index: Position among the tensors of that input or output, flattened in order (keyword arguments after
            positional ones).
        call: Which of the module's calls in one forward pass, from 0 (shared modules run several times).
    """

    module: str
    side: Literal["input", "output"]
    index: int = 0
    call: int = 0


@dataclass(frozen=True, slots=True)
class Site:
    """A place that the recorder measures.

    Args:
        name: Unique and readable, e.g. ``"model.layers.11 residual"``.
        role: What the tensor is.
        tap: Where it is caught.
        block: Index of the block it belongs to (0-based), None outside blocks.
        channel_axis: Axis of channels, -1 for token models and 1 for convolutional feature maps.
        module: Qualified name of the module that a person would look at (the block, the norm, the writer).
    """

    name: str
    role: SiteRole
    tap: Tap
    block: int | None = None
    channel_axis: int = -1
    module: str = ""


PASS_THROUGH = frozenset({"view", "transpose", "slice", "concat", "expand", "dropout", "cast", "clone", "to"})
"""Names in ``Use.via`` that move values without changing them; anything else on the way to a weight forbids a fold."""


@dataclass(frozen=True, slots=True)
class Use:
    """One reader of a norm's output.

    A weight use names the calling module and its parameter; any other reader (a residual addition, a rotary rotation,
    a pooling) has ``op`` set and no parameter.

    Args:
        module: Qualified name of the module that reads.
        parameter: Qualified name of the weight, "" for an op.
        input_axis: The parameter's axis that meets the norm's channels (1 for `nn.Linear`, 0 for GPT-2's Conv1D and for
            a depthwise convolution); None where no single axis does (a grouped convolution, heads split before a
            batched product), so that nothing can be folded.
        slice: The norm's channels that are read, in the order in which the parameter's input axis meets them: entry i
            meets index i, -1 where something else is read there. A range when contiguous, None for all as they are.
        call_index: Which of the reader's calls.
        via: Names of the ops between norm and reader, in order (reshape, slice, dropout, cast). Element-wise
            activations appear here too and forbid a fold, as does ``"merge"``: channels are flattened together with
            tokens or joined with other channels, so that ``slice`` repeats or skips.
        op: Name of the reading op when it carries no weight.
        output_axis: The parameter's axis that indexes outputs.
        bias: Qualified name of the bias that goes with the weight, "" if none.
        rows: Output indices of the parameter that take part, where it is cut before the product (the packed
            in-projection of a cross-attention); None for all.
    """

    module: str
    parameter: str = ""
    input_axis: int | None = None
    slice: range | tuple[int, ...] | None = None
    call_index: int = 0
    via: tuple[str, ...] = ()
    op: str = ""
    output_axis: int = 0
    bias: str = ""
    rows: range | tuple[int, ...] | None = None

    @property
    def is_weight(self) -> bool:
        """Whether the reader is a weight, so that a scale or shift could be folded into it."""
        return bool(self.parameter)

    @property
    def foldable(self) -> bool:
        """Whether a per-channel scale may be folded into the reader: a weight, one axis, nothing but moves between."""
        return self.is_weight and self.input_axis is not None and PASS_THROUGH.issuperset(self.via)


@dataclass(frozen=True, slots=True, eq=False)
class NormSite:
    """A normalization layer as the trace saw it.

    Args:
        name: Qualified name of its module, or of the module in whose forward it is computed plus ``"#n"``.
        kind: The family it behaves as.
        axes: Axes normalized over, negative, counted on the input (the channel axis of a group norm among them).
        eps: The epsilon it adds under the root, None when it could not be read.
        centred: Whether the mean is removed.
        gain: Effective multiplier as seen by the input (Gemma stores gain - 1; this is the gain), or None.
        shift: Effective addend, or None.
        gain_parameter: Qualified name of the parameter behind the gain, "" if none.
        shift_parameter: Qualified name of the parameter behind the shift, "" if none.
        uses: Every reader of every call, in order.
        calls: How often it ran in the pass.
        groups: How many groups of channels are normalized apart from each other (group norm), 1 otherwise.
        as_given: Whether what it normalizes is its module's input with the axes where they were; False where the module
            moves axes or computes something first.
    """

    name: str
    kind: NormKind
    axes: tuple[int, ...]
    eps: float | None
    centred: bool
    gain: Tensor | None
    shift: Tensor | None
    gain_parameter: str = ""
    shift_parameter: str = ""
    uses: tuple[Use, ...] = ()
    calls: int = 1
    groups: int = 1
    as_given: bool = True

    @property
    def feeds(self) -> frozenset[str]:
        """Qualified names of the weight-carrying modules that read this norm."""
        return frozenset(use.module for use in self.uses if use.is_weight)

    @property
    def foldable(self) -> bool:
        """Whether a per-channel scale may be folded: every use is a weight use with no activation between."""
        return bool(self.uses) and all(use.foldable for use in self.uses)


@dataclass(frozen=True, slots=True)
class Projection:
    """A weight in a role: q, k, v, out, gate, up or down.

    Args:
        module: Qualified name of the module that multiplies by it.
        parameter: Qualified name of the weight.
        bias: Qualified name of the bias, "" if none.
        output_axis: The parameter's axis that indexes outputs (0 for `nn.Linear`, 1 for GPT-2's Conv1D).
        rows: Output indices that play this role in a fused weight (a range when contiguous); None for all.
    """

    module: str
    parameter: str
    bias: str = ""
    output_axis: int = 0
    rows: range | tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class AttentionSite:
    """One attention: its projections, its heads and where its core runs.

    Args:
        name: Qualified name of the module that owns it.
        q, k, v, out: The projections; None where the trace could not follow (listed in `Anatomy.unread`).
        num_heads: Query heads.
        num_kv_heads: Key/value heads; smaller than ``num_heads`` for grouped queries.
        head_dim: Width of one query/key head.
        causal: Whether later tokens are masked.
        op: Name of the core op, ``"scaled_dot_product_attention"`` or ``"softmax"``.
        call_index: Ordinal of that core among all attention cores of one forward pass, from 0.
        query_norm, key_norm: Names of the norms on queries and keys, "" if none.
    """

    name: str
    q: Projection | None
    k: Projection | None
    v: Projection | None
    out: Projection | None
    num_heads: int
    num_kv_heads: int
    head_dim: int
    causal: bool
    op: str
    call_index: int
    query_norm: str = ""
    key_norm: str = ""


@dataclass(frozen=True, slots=True)
class FeedForwardSite:
    """One feed-forward (MLP), gated or not, with experts or not.

    Args:
        name: Qualified name of the module that owns it.
        up: First projection (the ungated half of a gated one).
        gate: The half that goes through the activation, None when ungated.
        down: Last projection.
        activation: Name of the element-wise function ("silu", "gelu", "gelu_tanh", "relu", ...).
        hidden: Where the activations that the down projection reads can be caught, None inside fused expert code.
        experts: Number of experts; 1 for a dense feed-forward.
    """

    name: str
    up: Projection | None
    gate: Projection | None
    down: Projection | None
    activation: str
    hidden: Tap | None
    experts: int = 1


@dataclass(frozen=True, slots=True)
class Branch:
    """What runs beside the residual stream and is added to it.

    Args:
        role: What it computes.
        reads: Where the stream is read (before any norm of the branch).
        writes: Where the tensor that is added to the stream can be caught.
        input_norms: Norms between the stream and the branch's first weight.
        output_norms: Norms between the branch's last weight and the addition.
        after_norms: Norms applied to the stream right after the addition (post-norm).
        writer: Last weight of the branch, None if unread; of a weight and its low-rank adapter, the weight.
        attention, feed_forward: The recognised sub-layer.
        inner_norms: Norms between the branch's first and last weight (ConvNeXt's; those on queries and keys).
    """

    role: BranchRole
    reads: Tap | None
    writes: Tap | None
    input_norms: tuple[str, ...] = ()
    output_norms: tuple[str, ...] = ()
    after_norms: tuple[str, ...] = ()
    writer: Projection | None = None
    attention: AttentionSite | None = None
    feed_forward: FeedForwardSite | None = None
    inner_norms: tuple[str, ...] = ()

    @property
    def placement(self) -> str:
        """Where its norms stand, one of the words of `Block.placement`."""
        if self.input_norms:
            return "peri" if self.output_norms else "pre"
        if self.after_norms:
            return "post"
        if self.output_norms:
            return "output"
        return "inner" if self.inner_norms else "none"


@dataclass(frozen=True, slots=True)
class Block:
    """A unit of depth: one transformer layer, one residual unit of a convolutional network.

    Args:
        index: 0-based, in order of execution.
        name: Qualified name of its module; with shared modules (ALBERT) the name repeats and ``call`` counts.
        branches: Its branches in order of their additions.
        input: The stream before the block.
        output: The stream after the block.
        call: Which of the module's calls.
    """

    index: int
    name: str
    branches: tuple[Branch, ...]
    input: Tap | None
    output: Tap | None
    call: int = 0

    @property
    def placement(self) -> str:
        """Where norms stand: ``pre``, ``post``, ``peri`` (both sides), ``output``, ``inner``, ``none``, ``mixed``."""
        kinds = {branch.placement for branch in self.branches}
        return kinds.pop() if len(kinds) == 1 else "mixed" if kinds else "none"


@dataclass(frozen=True, slots=True)
class Chain:
    """A convolution, or a linear outside blocks, with the norm and activation that follow it.

    Args:
        convolution: The weight; its module is the chain's name.
        norm: Name of the norm behind it, "" if none.
        activation: Name of the element-wise function behind that, "" if none.
        output: Where the chain's result can be caught.
        next: Names of the chains' convolutions (or linears) that read the result.
    """

    convolution: Projection
    norm: str
    activation: str
    output: Tap | None
    next: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Writer:
    """A weight, or a bare parameter, that is added to the residual stream.

    Args:
        projection: The weight. Of a parameter added as it is (a class token, learned positions, a bias on its own) the
            module is the one in whose forward it is added, and ``output_axis`` its channel axis.
        block: Index of the block, None for what a stream starts from.
        role: The branch's role; ``"embedding"`` for what a stream starts from (tables, a patch convolution, learned
            positions, the projection between two stages).
        via: Names of the ops between the weight and the sum, in order: those of `PASS_THROUGH`, ``"scale"`` for a
            factor that is a number or a parameter, ``"resample"`` for averages over positions, and other ops and norms
            by their own name.
        scale: Qualified name of a parameter that multiplies in between (LayerScale's gamma), "" if none.
        norms: Names of the norms in between.
    """

    projection: Projection
    block: int | None
    role: BranchRole | Literal["embedding"]
    via: tuple[str, ...] = ()
    scale: str = ""
    norms: tuple[str, ...] = ()

    @property
    def linear(self) -> bool:
        """Whether the stream gets the output times fixed factors, so that centring it centres what is added."""
        return all(name in PASS_THROUGH or name in ("scale", "resample") for name in self.via)


@dataclass(frozen=True, slots=True)
class Unread:
    """A part of the model that the trace could not read, and why.

    Args:
        name: Qualified name of the module, or of the op in it.
        reason: In plain words ("never called in this pass", "one fused op", ...).
    """

    name: str
    reason: str
