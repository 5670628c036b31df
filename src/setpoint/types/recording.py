"""What was measured in a model, as `setpoint.probe.Recorder` fills it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from setpoint.types.anatomy import Site, SiteRole
from setpoint.types.loading import Task

if TYPE_CHECKING:
    import numpy as np

    FloatArray = np.ndarray[Any, np.dtype[np.floating[Any]]]


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
        count: Values seen, the non-finite ones among them.
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
