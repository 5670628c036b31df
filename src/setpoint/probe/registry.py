"""All probes and interventions, and the verbs that run them.

>>> "massive-activation" in codes()
True
>>> [probe.code for probe in probes_for({"rank-collapse"})]
['rank-collapse']
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from setpoint.errors import InputError, nearest
from setpoint.probe.activity import ActivationSparsity, DeadUnits
from setpoint.probe.attention import AttentionCollapse, AttentionSaturation
from setpoint.probe.base import Intervention, Probe, Subject
from setpoint.probe.channels import OutlierChannels
from setpoint.probe.gradients import GradientImbalance
from setpoint.probe.groups import NormMismatch
from setpoint.probe.idle import IdleLayers
from setpoint.probe.massive import MassiveActivation
from setpoint.probe.nonfinite import NonFinite
from setpoint.probe.precision import PrecisionRisk
from setpoint.probe.rank import RankCollapse
from setpoint.probe.remedies import remedies
from setpoint.probe.variance import VarianceGrowth
from setpoint.types import SEVERITIES, Finding, SiteRole, Stat, Trace

PROBES: tuple[Probe, ...] = (
    NonFinite(),
    MassiveActivation(),
    OutlierChannels(),
    VarianceGrowth(),
    GradientImbalance(),
    DeadUnits(),
    ActivationSparsity(),
    IdleLayers(),
    AttentionCollapse(),
    AttentionSaturation(),
    RankCollapse(),
    NormMismatch(),
    PrecisionRisk(),
)
"""One of each, with its default thresholds."""


def codes() -> tuple[str, ...]:
    """Every finding code, in the order in which findings of one severity are shown."""
    return tuple(probe.code for probe in PROBES)


def probes_for(wanted: Collection[str] | None = None) -> tuple[Probe, ...]:
    """The probes that raise the given codes; all of them for None or none.

    Raises:
        InputError: A code that doesn't exist.
    """
    unknown = sorted(set(wanted or ()) - set(codes()))
    if unknown:
        near = ", ".join(nearest(unknown[0], codes()))
        raise InputError(f"There is no finding called {unknown[0]!r}; the nearest are {near}.")
    return tuple(probe for probe in PROBES if not wanted or probe.code in wanted)


def needs(probes: Iterable[Probe]) -> dict[SiteRole, frozenset[Stat]]:
    """What a recorder must take for these probes: the union, per kind of site.

    >>> sorted(needs(probes_for({"rank-collapse", "idle-layers"}))["residual"])
    [<Stat.COSINE: 'cosine'>, <Stat.STEP: 'step'>]
    """
    union: dict[SiteRole, frozenset[Stat]] = {}
    for probe in probes:
        for role, stats in probe.needs.items():
            union[role] = union.get(role, frozenset()) | stats
    return union


def run(probes: Iterable[Probe], trace: Trace) -> list[Finding]:
    """Every probe over one trace, worst finding first."""
    return by_severity(finding for probe in probes for finding in probe(trace))


def not_measured(probes: Iterable[Probe], trace: Trace) -> dict[str, str]:
    """The codes of probes whose silence means nothing, each with why.

    >>> from setpoint.testing import healthy_trace
    >>> not_measured(probes_for({"norm-mismatch", "rank-collapse"}), healthy_trace())
    {'norm-mismatch': 'needs named groups of tokens'}
    """
    return {probe.code: why for probe in probes if (why := probe.lacks(trace))}


def by_severity(findings: Iterable[Finding]) -> list[Finding]:
    """Findings with the worst severity first, otherwise in the order given."""
    return sorted(findings, key=lambda finding: -SEVERITIES.index(finding.severity))


def interventions_for(wanted: Collection[str] | None = None) -> tuple[Intervention, ...]:
    """The interventions behind the given codes; all for None or none."""
    from setpoint.probe.interventions import INTERVENTIONS

    return tuple(i for i in INTERVENTIONS if not wanted or i.code in wanted)


def deepen(
    subject: Subject, trace: Trace, findings: Sequence[Finding], codes: Collection[str] | None = None
) -> list[Finding]:
    """Run the interventions and let what they found replace or join the findings of the recording.

    A finding of an intervention with the id of an earlier one takes its place and keeps its chart if it has none of
    its own. An intervention that fails on this model costs its own findings and no others: what it was and why is
    warned of and noted in ``subject.failed``.

    Args:
        subject: The model and what runs it. It is untouched afterwards.
        trace: The recording.
        findings: What the probes found in it.
        codes: Codes to stay with; None or empty for all.

    Returns:
        Findings, worst first.
    """
    merged = {finding.id: finding for finding in findings}
    for intervention in interventions_for(codes):
        for finding in _attempted(intervention, subject, trace):
            earlier = merged.get(finding.id)
            if earlier is not None:
                finding = replace(
                    finding,
                    chart=finding.chart or earlier.chart,
                    numbers={**earlier.numbers, **finding.numbers},
                )
            merged[finding.id] = finding
    return by_severity(merged.values())


def _attempted(intervention: Intervention, subject: Subject, trace: Trace) -> list[Finding]:
    try:
        return intervention(subject, trace)
    except Exception as error:  # whatever a model does when its inside is changed: the recording stands
        reason = " ".join(str(error).split()) or type(error).__name__
        subject.failed[f"{intervention.code} --deep"] = reason
        warnings.warn(f"{intervention.code}: not measured with --deep: {reason}", stacklevel=3)
        return []


def with_remedies(finding: Finding, structure: Collection[str]) -> Finding:
    """The finding with the methods that treat it and accept a model of this structure."""
    from setpoint.catalog import methods

    return replace(finding, remedies=remedies(finding.id, structure, methods))
