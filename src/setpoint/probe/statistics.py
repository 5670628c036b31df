"""Statistics that merge: what the recorder keeps of a site between batches, and across processes.

Each class here holds a fixed number of float64 values however many tokens went by, and ``add`` joins two of them as if
their data had been seen at once. Central moments are joined by the pairwise rule

    δ = mean_b - mean_a,   M2 = M2_a + M2_b + δ² n_a n_b / n,   and its like for the third and fourth,

so a stream with a mean far from zero, or with one entry of 20 000 among values of 1, loses no digits. Nothing here
needs torch: `setpoint.probe.stat_kernels` reduces tensors to these.

References:
    Chan, Golub and LeVeque, 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
    Pébay, 2008, "Formulas for robust, one-pass parallel computation of covariances and arbitrary-order statistical
    moments" (SAND2008-6212).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from setpoint.types import AttentionRecord, GroupRecord, Peak, Record, Site, Stat

Array = np.ndarray[Any, np.dtype[np.float64]]
Counts = np.ndarray[Any, np.dtype[np.int64]]

MANTISSA_BITS = 5
"""Bits of the mantissa that a magnitude bin keeps beside the exponent; 2**5 bins for each doubling of the square."""

BINS = 1 << (8 + MANTISSA_BITS)

_LOG_2_P = math.log(2 / 1e-9)


@dataclass(slots=True)
class Moments:
    """Count, mean and central power sums up to the fourth, with extremes.

    >>> a, b = Moments.of(np.array([1.0, 2.0])), Moments.of(np.array([6.0, 9.0, 1e4]))
    >>> a.add(b)
    >>> whole = np.array([1.0, 2.0, 6.0, 9.0, 1e4])
    >>> bool(np.isclose(a.variance, whole.var())), a.maximum
    (True, 10000.0)
    """

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0
    m3: float = 0.0
    m4: float = 0.0
    minimum: float = math.inf
    maximum: float = -math.inf
    non_finite: int = 0

    @classmethod
    def from_sums(
        cls,
        count: int,
        sums: tuple[float, float, float, float],
        minimum: float,
        maximum: float,
        shift: float = 0.0,
        non_finite: int = 0,
    ) -> Moments:
        """Moments of ``count`` finite values x from the sums of (x - shift) to the powers 1 to 4."""
        if count == 0:
            return cls(non_finite=non_finite)
        if minimum == maximum:  # a constant: rounding must not leave a variance to divide by
            return cls(count, minimum, minimum=minimum, maximum=maximum, non_finite=non_finite)
        s1, s2, s3, s4 = sums
        d = s1 / count
        return cls(
            count=count,
            mean=shift + d,
            m2=max(0.0, s2 - d * s1),
            m3=s3 - 3 * d * s2 + 2 * d * d * s1,
            m4=max(0.0, s4 - 4 * d * s3 + 6 * d * d * s2 - 3 * d**3 * s1),
            minimum=minimum,
            maximum=maximum,
            non_finite=non_finite,
        )

    @classmethod
    def of(cls, values: Array) -> Moments:
        """Moments of an array, non-finite values counted and left out."""
        finite = values[np.isfinite(values)].astype(np.float64)
        lost = int(values.size - finite.size)
        if finite.size == 0:
            return cls(non_finite=lost)
        mean = float(finite.mean())
        d = finite - mean
        sums = (float(d.sum()), float((d**2).sum()), float((d**3).sum()), float((d**4).sum()))
        return cls.from_sums(finite.size, sums, float(finite.min()), float(finite.max()), mean, lost)

    @property
    def variance(self) -> float:
        """Biased variance."""
        return self.m2 / self.count if self.count else 0.0

    @property
    def fourth(self) -> float:
        """Fourth central moment."""
        return self.m4 / self.count if self.count else 0.0

    @property
    def rms(self) -> float:
        """Root of the mean square."""
        return math.sqrt(self.variance + self.mean**2)

    def add(self, other: Moments) -> None:
        """Join ``other`` to this, as if its values had been seen here too."""
        self.non_finite += other.non_finite
        if other.count == 0:
            return
        na, nb = float(self.count), float(other.count)
        n = na + nb
        d = other.mean - self.mean
        self.m4 += (
            other.m4
            + d**4 * na * nb * (na * na - na * nb + nb * nb) / n**3
            + 6 * d * d * (na * na * other.m2 + nb * nb * self.m2) / n**2
            + 4 * d * (na * other.m3 - nb * self.m3) / n
        )
        self.m3 += other.m3 + d**3 * na * nb * (na - nb) / n**2 + 3 * d * (na * other.m2 - nb * self.m2) / n
        self.m2 += other.m2 + d * d * na * nb / n
        self.mean += d * nb / n
        self.count += other.count
        self.minimum = min(self.minimum, other.minimum)
        self.maximum = max(self.maximum, other.maximum)


@dataclass(slots=True)
class Channels:
    """Per channel: finite values seen, their sum, sum of squares and largest magnitude. Arrays of shape (channels,)."""

    count: Array
    total: Array
    squares: Array
    largest: Array

    def add(self, other: Channels) -> None:
        """Join ``other`` to this; both have the same number of channels."""
        self.count = self.count + other.count
        self.total = self.total + other.total
        self.squares = self.squares + other.squares
        self.largest = np.maximum(self.largest, other.largest)

    @property
    def mean(self) -> Array:
        """Mean per channel (0 where nothing finite was seen)."""
        return self.total / np.maximum(self.count, 1)

    @property
    def rms(self) -> Array:
        """Root mean square per channel."""
        return np.sqrt(self.squares / np.maximum(self.count, 1))


@dataclass(slots=True)
class Magnitudes:
    """A histogram of magnitudes on the float32 grid: bin = exponent and leading mantissa bits of the square.

    The bins are the same for every model and batch, so histograms add. A bin is at most 1.6 % wide; the median is
    interpolated inside its bin, so its real error is usually far below that bound.

    Of a large chunk only every k-th value is counted, k times. How far such a distribution can be off is bounded
    whatever the true one is: by more than sqrt(ln(2/p) Σ n k² / 2) / Σ n k nowhere, but with probability p, for n
    values counted k times each, drawn at random (Massart). The stated error is that of p = 1e-9, read off the
    histogram itself.

    Args:
        counts: Values by bin, those of a sample multiplied.
        values: Every magnitude, if the median is to be exact.
        sampled: Σ n k² over what was sampled; 0 where everything was counted.

    References:
        Massart, 1990, "The tight constant in the Dvoretzky-Kiefer-Wolfowitz inequality".
    """

    counts: Counts = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))
    values: list[Array] | None = None
    sampled: float = 0.0

    def add(self, other: Magnitudes) -> None:
        """Join ``other`` to this."""
        self.counts += other.counts
        self.sampled += other.sampled
        if self.values is not None and other.values is not None:
            self.values.extend(other.values)

    def median(self) -> tuple[float, float]:
        """The median magnitude and the largest relative error it can have (0 when all values were kept)."""
        if self.values is not None:
            everything = np.concatenate(self.values) if self.values else np.zeros(1)
            return float(np.median(everything)), 0.0
        total = int(self.counts.sum())
        if total == 0:
            return 0.0, 0.0
        below = np.cumsum(self.counts)
        middle, slack = total / 2, math.sqrt(_LOG_2_P * self.sampled / 2)
        index = int(np.searchsorted(below, middle))
        if index == 0:
            return 0.0, 0.0
        lower, upper = bin_edge(index), bin_edge(index + 1)
        inside = (middle - (below[index] - self.counts[index])) / self.counts[index]
        median = lower + (upper - lower) * float(inside)
        least = bin_edge(int(np.searchsorted(below, max(middle - slack, 1.0))))
        most = bin_edge(int(np.searchsorted(below, min(middle + slack, float(total)))) + 1)
        return median, max(most - median, median - least) / median


def bin_edge(index: int) -> float:
    """Lower edge, as a magnitude, of a bin of `Magnitudes`.

    >>> round(bin_edge(127 << MANTISSA_BITS), 6)
    1.0
    """
    bits = np.array([index << (23 - MANTISSA_BITS)], dtype=np.int64).astype(np.uint32)
    return math.sqrt(float(bits.view(np.float32)[0]))


@dataclass(slots=True)
class Peaks:
    """The ``size`` entries of largest magnitude, largest first: rows of (value, sequence, token, channel)."""

    size: int
    rows: Array = field(default_factory=lambda: np.zeros((0, 4)))

    @property
    def floor(self) -> float:
        """The magnitude that a new entry must exceed to get in."""
        return float(abs(self.rows[-1, 0])) if len(self.rows) >= self.size else -1.0

    def add(self, rows: Array, first_sequence: int = 0) -> None:
        """Offer rows of (value, sequence, token, channel); ``first_sequence`` is added to their sequence."""
        if first_sequence:
            rows = rows + np.array([0.0, float(first_sequence), 0.0, 0.0])
        both = np.concatenate([self.rows, rows])
        self.rows = both[np.argsort(-np.abs(both[:, 0]), kind="stable")[: self.size]]


@dataclass(slots=True)
class Group:
    """A token group's running sums."""

    norm: float = 0.0
    angle: float = 0.0
    tokens: int = 0
    turned: int = 0

    def add(self, other: Group) -> None:
        """Join ``other`` to this."""
        self.norm += other.norm
        self.angle += other.angle
        self.tokens += other.tokens
        self.turned += other.turned

    def record(self) -> GroupRecord:
        """As the trace shows it."""
        angle = self.angle / self.turned if self.turned else None
        return GroupRecord(norm=self.norm / max(self.tokens, 1), angle=angle, tokens=self.tokens)


@dataclass(slots=True)
class SiteStatistics:
    """All that is kept of one site. ``wanted`` are the statistics asked for there."""

    wanted: frozenset[Stat]
    peaks: Peaks
    tokens: int = 0
    dtype: str = ""
    moments: Moments = field(default_factory=Moments)
    channels: Channels | None = None
    active: Array | None = None
    zeros: float = 0.0
    seen: int = 0
    magnitudes: Magnitudes | None = None
    cosine: float = 0.0
    pairs: float = 0.0
    angle: float = 0.0
    turned: int = 0
    step_squares: float = 0.0
    input_squares: float = 0.0
    gradient_squares: float = 0.0
    gradient_count: int = 0
    groups: dict[str, Group] = field(default_factory=dict)

    def add_channels(self, other: Channels) -> None:
        """Join per-channel sums."""
        if self.channels is None:
            self.channels = other
        else:
            self.channels.add(other)

    def add_active(self, other: Array, values: int) -> None:
        """Join per-channel counts of values that are not zero, out of so many values."""
        self.active = other if self.active is None else self.active + other
        self.seen += values
        self.zeros += values - float(other.sum())

    def add_magnitudes(self, other: Magnitudes) -> None:
        """Join a histogram."""
        if self.magnitudes is None:
            self.magnitudes = other
        else:
            self.magnitudes.add(other)

    def add_cosine(self, square: float, tokens: int) -> None:
        """Join a sequence: the squared norm of its unit vectors' sum holds all pairwise cosines."""
        if tokens > 1:
            self.cosine += square - tokens
            self.pairs += tokens * (tokens - 1)

    def add(self, other: SiteStatistics, first_sequence: int = 0) -> None:
        """Join the statistics that another process took of the same site; its sequences count from there on."""
        self.tokens += other.tokens
        self.dtype = self.dtype or other.dtype
        self.moments.add(other.moments)
        if other.channels is not None:
            self.add_channels(other.channels)
        if other.active is not None:
            self.active = other.active if self.active is None else self.active + other.active
        if other.magnitudes is not None:
            self.add_magnitudes(other.magnitudes)
        self.peaks.add(other.peaks.rows, first_sequence)
        for name, group in other.groups.items():
            self.groups.setdefault(name, Group()).add(group)
        for name in _ADDITIVE:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def record(self, site: Site) -> Record:
        """The record of the site, with every statistic that was not asked for left None."""
        wanted, moments = self.wanted, self.moments
        values: dict[str, Any] = {}
        if Stat.MOMENTS in wanted and moments.count:
            values.update(
                mean=moments.mean,
                variance=moments.variance,
                rms=moments.rms,
                minimum=moments.minimum,
                maximum=moments.maximum,
            )
        if Stat.TAILS in wanted and moments.count:
            values["fourth_moment"] = moments.fourth
        if Stat.MEDIAN in wanted and self.magnitudes is not None:
            values["median"], values["median_error"] = self.magnitudes.median()
        if Stat.PEAKS in wanted:
            values["peaks"] = tuple(Peak(float(v), int(s), int(t), int(c)) for v, s, t, c in self.peaks.rows)
        if Stat.CHANNELS in wanted and self.channels is not None:
            values.update(
                channel_mean=self.channels.mean, channel_rms=self.channels.rms, channel_max=self.channels.largest
            )
        if Stat.ZEROS in wanted and self.active is not None:
            values["zeros"] = self.zeros / max(self.seen, 1)
            values["channel_active"] = self.active / max(self.tokens, 1)
        if Stat.COSINE in wanted and self.pairs:
            values["cosine"] = self.cosine / self.pairs
        if Stat.STEP in wanted and self.turned:
            values["angle"] = self.angle / self.turned
            values["step_ratio"] = math.sqrt(self.step_squares / self.input_squares) if self.input_squares else None
        if self.gradient_count:
            values["gradient_rms"] = math.sqrt(self.gradient_squares / self.gradient_count)
        return Record(
            site=site,
            count=moments.count + moments.non_finite,
            tokens=self.tokens,
            non_finite=moments.non_finite,
            groups={name: group.record() for name, group in self.groups.items()},
            dtype=self.dtype,
            **values,
        )


_ADDITIVE = (
    "zeros",
    "seen",
    "cosine",
    "pairs",
    "angle",
    "turned",
    "step_squares",
    "input_squares",
    "gradient_squares",
    "gradient_count",
)


_PER_HEAD = ("rows", "entropy", "sink", "largest", "saturated", "logit_max")


@dataclass(slots=True)
class AttentionStatistics:
    """Sums over the query rows of one attention, per head; ``rows`` counts them. Arrays of shape (heads,)."""

    rows: Array
    entropy: Array
    sink: Array
    largest: Array
    saturated: Array
    logit_max: Array
    keys: int

    def add(self, other: AttentionStatistics) -> None:
        """Join ``other`` to this."""
        for name in _PER_HEAD[:-1]:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.logit_max = np.maximum(self.logit_max, other.logit_max)
        self.keys = max(self.keys, other.keys)

    def split(self, parts: int) -> list[AttentionStatistics]:
        """The heads in so many equal runs."""
        runs = {name: np.split(getattr(self, name), parts) for name in _PER_HEAD}
        return [AttentionStatistics(**{name: runs[name][i] for name in runs}, keys=self.keys) for i in range(parts)]

    def record(self, site: Site) -> AttentionRecord:
        """As the trace shows it."""
        rows = np.maximum(self.rows, 1)
        return AttentionRecord(
            site=site,
            entropy=self.entropy / rows,
            sink=self.sink / rows,
            largest=self.largest / rows,
            logit_max=self.logit_max,
            saturated=self.saturated / rows,
            queries=int(self.rows.max(initial=0)),
            keys=self.keys,
        )


def merge_sites(mine: Mapping[str, SiteStatistics], other: Mapping[str, SiteStatistics], first_sequence: int) -> None:
    """Join the sites that another process recorded to ``mine``, in place."""
    for name, statistics in mine.items():
        if name in other:
            statistics.add(other[name], first_sequence)
