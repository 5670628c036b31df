"""Token groups whose vectors differ in length, such as image and text tokens in one sequence.

In a pre-norm network each block adds an update whose size doesn't depend on the length of the token's vector. With h
the vector and D the update, C = |D| and phi the angle between them, the block turns the vector by theta with

    tan(theta) = C sin(phi) / (|h| + C cos(phi)),

so the longer group turns less in every layer and hardly takes up anything from the shorter one (Li et al., 2025,
arXiv 2512.08374).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import atan2, cos, degrees, radians, sin
from typing import ClassVar

from setpoint.probe.base import Needs, Probe, known, profile, stream
from setpoint.types import Finding, GroupRecord, Record, Stat, Trace
from setpoint.words import rounded


def effective_rotation(norm: float, update: float, angle: float) -> float:
    """Degrees by which adding an update turns a vector.

    Args:
        norm: Length of the vector before.
        update: Length of the update.
        angle: Degrees between them.

    Returns:
        The rotation in degrees.

    Reference:
        Li et al., 2025, arXiv 2512.08374.

    Example:
        >>> round(effective_rotation(30, 1, 90), 4), round(effective_rotation(1, 1, 90), 4)
        (1.9092, 45.0)
    """
    phi = radians(angle)
    return degrees(atan2(update * sin(phi), norm + update * cos(phi)))


@dataclass(frozen=True)
class NormMismatch(Probe):
    """Named token groups enter the blocks with vectors of very different length. Silent unless groups are named.

    ``warning`` beyond ``limit`` at the first measured place, ``info`` between ``notable`` and ``limit``.

    Args:
        limit: Ratio of mean lengths (Li et al., 2025: tens of times in multimodal models; at 29 the longer group
            turned 13 times less in the first layer).
        notable: Ratio that is worth a note (setpoint: groups of one vocabulary were measured below 2).
    """

    limit: float = 10.0
    notable: float = 3.0

    code: ClassVar[str] = "norm-mismatch"
    title: ClassVar[str] = "Token groups enter with different lengths"
    needs: ClassVar[Needs] = {
        "embedding": frozenset({Stat.MOMENTS, Stat.STEP}),
        "residual": frozenset({Stat.MOMENTS, Stat.STEP}),
    }
    explanation: ClassVar[str] = (
        "One group of tokens has far longer vectors than another. A block of a pre-norm network adds an update of "
        "about the same size to every token, so the long vectors hardly turn and the two groups are fused late or "
        "not at all. It arises where outputs of another network (an image encoder, a projector) meet text embeddings. "
        "A norm behind the projector, with a gain set to the mean length of the text embeddings, removes it."
    )

    def lacks(self, trace: Trace) -> str:
        """A stream, or groups in it."""
        named = any(r.groups for r in stream(trace, embedding=True))
        return super().lacks(trace) or ("" if named else "needs named groups of tokens")

    def __call__(self, trace: Trace) -> list[Finding]:
        """At most one finding, judged where the groups first stand side by side."""
        records = [r for r in stream(trace, embedding=True) if len(_lengths(r)) > 1]
        if not records:
            return []
        first = records[0]
        lengths = _lengths(first)
        longest, shortest = max(lengths, key=lengths.__getitem__), min(lengths, key=lengths.__getitem__)
        ratio = lengths[longest] / lengths[shortest]
        if ratio <= self.notable:
            return []
        turns = [
            (r, r.groups[shortest].angle, r.groups[longest].angle)
            for r in records
            if longest in r.groups and shortest in r.groups
        ]
        slow = [(r, a / b) for r, a, b in turns if a is not None and b is not None and known(a) and known(b) and b > 0]
        turn = ""
        if slow:
            turn = f"; in block {slow[0][0].site.block} they turn {rounded(slow[0][1])} times less"
        severe = ratio > self.limit
        return [
            self.finding(
                f"{longest}/{shortest}",
                "warning" if severe else "info",
                value=ratio,
                unit="x length",
                threshold=self.limit if severe else self.notable,
                source="Li et al., 2025 · arXiv 2512.08374: tens of times in multimodal models"
                if severe
                else "setpoint: groups of one vocabulary were measured below 2",
                sites=[r.site.name for r in records],
                evidence=f"Vectors of the group {longest!r} are {rounded(ratio)} times as long as those of "
                f"{shortest!r} at {first.site.name} ({rounded(lengths[longest])} against "
                f"{rounded(lengths[shortest])}){turn}.",
                numbers={
                    "ratio": ratio,
                    "longest": longest,
                    "shortest": shortest,
                    "rotation_ratio": slow[0][1] if slow else "unknown",
                },
                chart=profile(
                    "Mean length of the token vectors",
                    "length",
                    {name: [_point(r, r.groups.get(name)) for r in records] for name in sorted(lengths)},
                    log=True,
                ),
            )
        ]


def _lengths(record: Record) -> dict[str, float]:
    return {name: g.norm for name, g in record.groups.items() if known(g.norm) and g.norm > 0 and g.tokens}


def _point(record: Record, group: GroupRecord | None) -> tuple[int, float | None]:
    return (-1 if record.site.block is None else record.site.block, group.norm if group else None)
