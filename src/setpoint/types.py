"""The dataclasses that rooms exchange.

Everything here is data: frozen, small, and free of torch at import time, so that the catalogue, the shell and a
report read back from disk can use it without loading a tensor library. Tensors appear only as annotations.

Four groups: what was loaded (`Loaded`), what a model is made of (`Tap` to `Unread`, filled by
`setpoint.surgery.Anatomy`), what was measured (`Stat` to `Trace`, filled by `setpoint.probe.Recorder`), and what
follows from it (`Finding`, `Remedy`). `Method` and `Item` describe the catalogue; `Edit`, `FixContext`, `Refusal`,
`Change` and `Claim` are the contracts of fixing and proving.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    FloatArray = np.ndarray[Any, np.dtype[np.floating[Any]]]

# --------------------------------------------------------------------------------------------------------------------
# Loading


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to run, and what is needed to feed it.

    Args:
        model: The network, in eval mode.
        processor: The tokenizer (text) or image transform (a callable from a PIL image to a ``(3, height, width)``
            tensor), or None for a model of the user's own.
        task: What the outputs mean; decides the default data and loss.
        forward: ``forward(model, batch)`` runs one batch and returns the model's output.
        source: What the user asked for, as typed.
        notes: Facts a reader must know to judge the numbers (for example "weights are 4-bit, dequantized to float32").
        batches: Inputs that came with the model (a user's factory may return them beside it), None otherwise.
        loss: ``loss(output, batch)`` that came with the model in the same way, None otherwise.
    """

    model: nn.Module
    processor: Any
    task: Task
    forward: Callable[[nn.Module, Any], Any]
    source: str
    notes: tuple[str, ...] = ()
    batches: Sequence[Any] | None = None
    loss: Callable[[Any, Any], Tensor] | None = None


Task = Literal["language-model", "encoder", "image-features", "image-classification", "other"]

# --------------------------------------------------------------------------------------------------------------------
# Anatomy

SiteRole = Literal["embedding", "residual", "branch", "norm", "hidden", "attention", "convolution", "logits"]
"""What a place in a network carries.

``embedding``: the residual stream before the first block. ``residual``: the stream after a block. ``branch``: what a
sub-layer adds to the stream. ``norm``: a norm's output. ``hidden``: a feed-forward's activations as its down
projection reads them. ``attention``: queries and keys as they enter the attention core. ``convolution``: the output
of a conv -> norm -> activation chain. ``logits``: the head's output.
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
        input_axis: The parameter's axis that meets the norm's channels (1 for `nn.Linear`, 0 for GPT-2's Conv1D).
        slice: ``(start, stop)`` of the norm's channels that are read, None for all.
        call_index: Which of the reader's calls.
        via: Names of the ops between norm and reader, in order (reshape, slice, dropout, cast). Element-wise
            activations appear here too and forbid a fold.
        op: Name of the reading op when it carries no weight.
    """

    module: str
    parameter: str = ""
    input_axis: int | None = None
    slice: tuple[int, int] | None = None
    call_index: int = 0
    via: tuple[str, ...] = ()
    op: str = ""

    @property
    def is_weight(self) -> bool:
        """Whether the reader is a weight, so that a scale or shift could be folded into it."""
        return bool(self.parameter)


@dataclass(frozen=True, slots=True, eq=False)
class NormSite:
    """A normalization layer as the trace saw it.

    Args:
        name: Qualified name of its module, or of the module in whose forward it is computed plus ``"#n"``.
        kind: The family it behaves as.
        axes: Axes normalized over, negative, counted on the input.
        eps: The epsilon it adds, None when it could not be read.
        centred: Whether the mean is removed.
        gain: Effective multiplier as seen by the input (Gemma stores gain - 1; this is the gain), or None.
        shift: Effective addend, or None.
        gain_parameter: Qualified name of the parameter behind the gain, "" if none.
        shift_parameter: Qualified name of the parameter behind the shift, "" if none.
        uses: Every reader of every call, in order.
        calls: How often it ran in the pass.
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

    @property
    def feeds(self) -> frozenset[str]:
        """Qualified names of the weight-carrying modules that read this norm."""
        return frozenset(use.module for use in self.uses if use.is_weight)

    @property
    def foldable(self) -> bool:
        """Whether a per-channel scale may be folded: every use is a weight use with no activation between."""
        return bool(self.uses) and all(use.is_weight and PASS_THROUGH.issuperset(use.via) for use in self.uses)


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
        activation: Name of the element-wise function ("silu", "gelu", "relu", ...).
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
        writer: Last weight of the branch, None if unread.
        attention, feed_forward: The recognised sub-layer.
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
        """Where the norms stand: ``pre``, ``post``, ``peri`` (both sides), ``output``, ``none`` or ``mixed``."""
        kinds = {
            "post"
            if b.after_norms and not b.input_norms
            else "peri"
            if b.input_norms and b.output_norms
            else "pre"
            if b.input_norms
            else "output"
            if b.output_norms
            else "none"
            for b in self.branches
        }
        return kinds.pop() if len(kinds) == 1 else "mixed" if kinds else "none"


@dataclass(frozen=True, slots=True)
class Chain:
    """A convolution with the norm and activation that follow it.

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
    """A weight whose output is added to the residual stream (embeddings included).

    Args:
        projection: The weight.
        block: Index of the block, None for embeddings.
        role: The branch's role, or ``"embedding"``.
    """

    projection: Projection
    block: int | None
    role: BranchRole | Literal["embedding"]


@dataclass(frozen=True, slots=True)
class Unread:
    """A part of the model that the trace could not read, and why.

    Args:
        name: Qualified name of the module, or of the op in it.
        reason: In plain words ("never called in this pass", "one fused op", ...).
    """

    name: str
    reason: str


# --------------------------------------------------------------------------------------------------------------------
# Recording


class Stat(StrEnum):
    """A statistic that the recorder can take at a site; probes name the ones they need."""

    MOMENTS = "moments"
    """mean, variance, rms, min, max, non-finite share; over all values of the site."""
    TAILS = "tails"
    """the fourth central moment, and with it the kurtosis; costs as much again as MOMENTS."""
    MEDIAN = "median"
    """median of the magnitudes, from a histogram of floating-point exponents unless the recorder is exact."""
    PEAKS = "peaks"
    """the largest magnitudes with their batch, token and channel."""
    CHANNELS = "channels"
    """per channel: mean, rms, largest magnitude."""
    ZEROS = "zeros"
    """share of exact zeros, and per channel the share of tokens on which the channel is not zero."""
    COSINE = "cosine"
    """mean cosine similarity between the token vectors of one sequence."""
    STEP = "step"
    """how far a block turns the stream: needs the block's input beside its output."""
    ATTENTION = "attention"
    """per head: entropy, mass on the first token, largest weight, largest logit."""
    GRADIENT = "gradient"
    """rms of the gradient at the site, and norms per parameter; needs a loss."""


@dataclass(frozen=True, slots=True)
class Peak:
    """One large entry: ``value`` (signed) at ``(batch, token, channel)``; ``sequence`` counts over all batches."""

    value: float
    sequence: int
    token: int
    channel: int


@dataclass(frozen=True, slots=True)
class GroupRecord:
    """Statistics of one named group of tokens at one site.

    Args:
        norm: Mean L2 norm of its token vectors.
        angle: Mean angle in degrees between block input and output, None where there is no block input.
        tokens: How many token vectors.
    """

    norm: float
    angle: float | None
    tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """What was measured at one site. Fields are None when the statistic was not asked for.

    Values are pooled over all batches, tokens and channels unless the name says otherwise. A site that carried
    non-finite values has its statistics over the finite ones.

    Args:
        site: Where.
        count: Values seen.
        tokens: Token vectors (or positions of a feature map) seen.
        mean, variance, rms, fourth_moment, minimum, maximum: Of the values; the variance is the biased one and the
            fourth moment is central, so that excess kurtosis is ``fourth_moment / variance**2 - 3``.
        non_finite: How many values were inf or nan.
        median: Median magnitude.
        median_error: Largest relative error of ``median`` (0 when exact).
        peaks: The largest magnitudes, largest first.
        channel_mean, channel_rms, channel_max: Shape ``(channels,)``; ``channel_max`` is of magnitudes.
        zeros: Share of exact zeros.
        channel_active: Shape ``(channels,)``: share of tokens on which the channel is above 0 in magnitude.
        cosine: Mean pairwise cosine between token vectors of a sequence.
        angle: Mean angle in degrees between a token's vector before and after the block.
        step_ratio: rms of (output - input) over rms of input.
        gradient_rms: rms of the loss gradient at the site.
        groups: Token groups that the user named.
        dtype: The dtype the values had in the model, e.g. ``"bfloat16"``.
    """

    site: Site
    count: int = 0
    tokens: int = 0
    mean: float | None = None
    variance: float | None = None
    rms: float | None = None
    fourth_moment: float | None = None
    minimum: float | None = None
    maximum: float | None = None
    non_finite: int = 0
    median: float | None = None
    median_error: float = 0.0
    peaks: tuple[Peak, ...] = ()
    channel_mean: FloatArray | None = None
    channel_rms: FloatArray | None = None
    channel_max: FloatArray | None = None
    zeros: float | None = None
    channel_active: FloatArray | None = None
    cosine: float | None = None
    angle: float | None = None
    step_ratio: float | None = None
    gradient_rms: float | None = None
    groups: Mapping[str, GroupRecord] = field(default_factory=dict)
    dtype: str = ""

    @property
    def kurtosis(self) -> float | None:
        """Excess kurtosis: 0 for a Gaussian, large when a few values are far out."""
        if self.fourth_moment is None or not self.variance:
            return None
        return self.fourth_moment / self.variance**2 - 3.0


@dataclass(frozen=True, slots=True, eq=False)
class AttentionRecord:
    """What was measured at one attention core, per query head.

    Args:
        site: Where; ``site.role`` is ``"attention"``.
        entropy: Shape ``(heads,)``: mean entropy of the rows in nats, divided by the log of the number of visible
            keys (so 1 is uniform, 0 is one-hot). Rows with one visible key are left out.
        sink: Shape ``(heads,)``: mean mass on the first token, rows that see more than one key.
        largest: Shape ``(heads,)``: mean largest weight of a row.
        logit_max: Shape ``(heads,)``: largest logit magnitude (after scaling, before the softmax).
        saturated: Shape ``(heads,)``: share of rows whose largest weight is above 0.999.
        queries: Query rows per head that were used.
        keys: Keys of the longest row.
    """

    site: Site
    entropy: FloatArray
    sink: FloatArray
    largest: FloatArray
    logit_max: FloatArray
    saturated: FloatArray
    queries: int
    keys: int


@dataclass(frozen=True, slots=True)
class ParameterRecord:
    """A parameter's L2 norm and, when a loss was given, the norm and rms of its gradient."""

    name: str
    block: int | None
    size: int
    norm: float
    gradient_norm: float | None = None
    gradient_rms: float | None = None


TABLE_COLUMNS = (
    "mean",
    "variance",
    "rms",
    "kurtosis",
    "minimum",
    "maximum",
    "non_finite",
    "median",
    "zeros",
    "cosine",
    "angle",
    "step_ratio",
    "gradient_rms",
)


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Everything one recording produced; what probes read.

    Args:
        records: Site name -> record, in order of execution.
        attention: Site name -> attention record.
        parameters: Parameter name -> record.
        blocks: Number of blocks.
        task: The model's task.
        tokens: Tokens (or positions) of all batches; ``sequences`` sequences (or images).
        loss: Mean loss per token in nats when one was given.
        facts: Numbers about the model that probes need beside the sites (vocabulary size, parameter count, ...).
        structure: What the model has, for filtering remedies: "attention", "feed_forward", "layer-norm", "rms-norm",
            "batch-norm", "convolution", "head", "pre", "post", "peri", ...
    """

    records: Mapping[str, Record]
    attention: Mapping[str, AttentionRecord]
    parameters: Mapping[str, ParameterRecord]
    blocks: int
    task: Task
    sequences: int
    tokens: int
    loss: float | None = None
    facts: Mapping[str, float] = field(default_factory=dict)
    structure: frozenset[str] = frozenset()

    def by_role(self, role: SiteRole) -> list[Record]:
        """Records of one role, in order of execution."""
        return [r for r in self.records.values() if r.site.role == role]

    def table(self) -> list[dict[str, Any]]:
        """One flat row per site, ready for ``pandas.DataFrame`` or a csv writer."""
        rows: list[dict[str, Any]] = []
        for record in self.records.values():
            site = record.site
            row: dict[str, Any] = {"site": site.name, "role": site.role, "block": site.block}
            row.update({name: getattr(record, name) for name in TABLE_COLUMNS})
            rows.append(row)
        return rows


# --------------------------------------------------------------------------------------------------------------------
# Findings

Severity = Literal["info", "warning", "error"]
SEVERITIES: tuple[Severity, ...] = ("info", "warning", "error")


@dataclass(frozen=True, slots=True)
class Remedy:
    """A method that treats a finding.

    Args:
        key: The method's key, as in ``setpoint show KEY``.
        title: What doing it means, in a few words.
        when: ``"now"`` on the model as it is, ``"training"`` when it is (re)trained.
        reference: Authors, year and arXiv number.
        available: Whether this version of setpoint carries the method; if not, only the paper is named.
    """

    key: str
    title: str
    when: Literal["now", "training"]
    reference: str
    available: bool = False


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart: ``y`` against ``x``, None where there is no value."""

    name: str
    x: tuple[float, ...]
    y: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Chart:
    """A picture as data; the report draws it.

    Args:
        kind: ``"profile"`` lines over depth, ``"heatmap"`` channels x blocks (one series per block, x channels).
        title: What it shows, with the unit.
        x, y: Axis titles.
        series: The data.
        log: Whether the value axis (colour for a heat map) is logarithmic.
        threshold: A horizontal rule at the threshold, None for none.
    """

    kind: Literal["profile", "heatmap"]
    title: str
    x: str
    y: str
    series: tuple[Series, ...]
    log: bool = False
    threshold: float | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong, or worth knowing, with the evidence.

    Args:
        code: What kind ("massive-activation"); remedies are looked up by it.
        id: Stable over runs on the same model, ``code@place``; what ``--ignore`` takes.
        severity: ``info < warning < error``.
        value: The measured number that crossed the threshold.
        unit: Its unit in words ("x median", "nats").
        threshold: The number it was held against.
        source: Where the threshold comes from.
        sites: Names of the sites concerned, worst first.
        evidence: One line of plain words with the numbers.
        explanation: A paragraph: what it is, why it matters, when it is harmless.
        remedies: Methods that treat it and accept this model.
        numbers: The finding's figures by name.
        chart: What to draw.
    """

    code: str
    id: str
    severity: Severity
    value: float
    unit: str
    threshold: float
    source: str
    sites: tuple[str, ...]
    evidence: str
    explanation: str = ""
    remedies: tuple[Remedy, ...] = ()
    numbers: Mapping[str, float | int | str] = field(default_factory=dict)
    chart: Chart | None = None


# --------------------------------------------------------------------------------------------------------------------
# Catalogue

Kind = Literal["check", "fix", "callback", "part"]
Preserves = Literal["exact", "approximate", "retrain"]


@dataclass(frozen=True, slots=True)
class Item:
    """One thing that a method brings.

    Args:
        id: What ``--with`` and ``--probe`` take; unique over the catalogue.
        kind: ``check`` measures, ``fix`` changes a model, ``callback`` acts during training, ``part`` is built with.
        path: ``module:attribute`` of the code.
        does: One sentence in plain words.
        treats: Finding codes it treats (a check: the codes it raises).
        preserves: For a fix: what stays the same.
    """

    id: str
    kind: Kind
    path: str
    does: str
    treats: tuple[str, ...] = ()
    preserves: Preserves | None = None


@dataclass(frozen=True, slots=True)
class Method:
    """A published method and the items that setpoint has of it.

    Args:
        key: Short name, unique.
        room: Folder below ``setpoint`` where its code lives.
        title, authors, year, arxiv: The paper.
        summary: What it does, in own words.
        items: What it brings.
        proof: Name of its study, or ``"none"`` for a companion.
        result: Its proof's last stored result, None if never run.
    """

    key: str
    room: str
    title: str
    authors: str
    year: int
    arxiv: str
    summary: str
    items: tuple[Item, ...]
    proof: str = "none"
    result: Mapping[str, Any] | None = None

    @property
    def reference(self) -> str:
        """Authors, year and arXiv number in one line."""
        return f"{self.authors}, {self.year}" + (f" · arXiv {self.arxiv}" if self.arxiv else "")

    @property
    def kinds(self) -> frozenset[Kind]:
        """Kinds of its items."""
        return frozenset(item.kind for item in self.items)

    @property
    def treats(self) -> frozenset[str]:
        """Finding codes that its items treat or raise."""
        return frozenset(code for item in self.items for code in item.treats)


# --------------------------------------------------------------------------------------------------------------------
# Fixing and proving


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a fix does not accept a model: the place in the model and the reason."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Edit:
    """One change to a model: put ``value`` (a module, parameter or buffer) at the qualified name ``path``."""

    path: str
    value: nn.Module | Tensor
    why: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class FixContext:
    """What a fix may use while it plans.

    Args:
        anatomy: Fresh, of the model as it stands at this stage.
        reference: The model as it was before any fix.
        batches: Real inputs.
        forward: ``forward(model, batch)``.
        generator: The only source of randomness.
        progress: ``progress(done, total, text)``.
        resume: A folder for partial results, None to keep none.
    """

    anatomy: Any
    reference: nn.Module
    batches: Sequence[Any]
    forward: Callable[[nn.Module, Any], Any]
    generator: torch.Generator
    progress: Callable[[int, int, str], None]
    resume: Path | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """What a fix did, measured.

    Args:
        parameters, bytes: ``(before, after)``.
        difference: Largest absolute output difference on real inputs; ``relative`` divides by the largest output.
        divergence: Mean KL of the logits in nats, None without a head.
        perplexity: ``(before, after)``, None without a head.
        time: Forward time after over before.
    """

    parameters: tuple[int, int]
    bytes: tuple[int, int]
    difference: float
    relative: float
    divergence: float | None = None
    perplexity: tuple[float, float] | None = None
    time: float | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """What a proof claims about the difference method minus baseline (positive is better).

    Args:
        kind: ``better``: at least ``bound``; ``not_worse``: no more than ``bound`` below; ``equal``: within
            ``bound``; ``shape``: a fitted form.
        bound: delta, margin or tolerance, in the metric's unit.
    """

    kind: Literal["better", "not_worse", "equal", "shape"]
    bound: float


Batches = Iterable[Any]
