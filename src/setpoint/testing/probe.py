"""The list that every probe must pass, setpoint's own and a stranger's.

A probe is trusted with a recording and answers with findings that go to a person, into a report and into scripts. So
it must be a pure function, say all that it reads, keep its ids steady, and give figures that a file can hold.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import fields, is_dataclass, replace
from math import inf, isfinite, nan
from typing import Any, get_args

import numpy as np

from setpoint.probe.base import Needs, Probe
from setpoint.testing.traces import ailing_traces, convolutional_trace, empty_trace, healthy_trace
from setpoint.types import SEVERITIES, AttentionRecord, Chart, Finding, Record, SiteRole, Stat, Trace

FIELDS_OF: Mapping[Stat, tuple[str, ...]] = {
    Stat.MOMENTS: ("mean", "variance", "rms", "minimum", "maximum", "non_finite"),
    Stat.TAILS: ("fourth_moment",),
    Stat.MEDIAN: ("median", "median_error"),
    Stat.PEAKS: ("peaks",),
    Stat.CHANNELS: ("channel_mean", "channel_rms", "channel_max"),
    Stat.ZEROS: ("zeros", "channel_active"),
    Stat.COSINE: ("cosine",),
    Stat.STEP: ("angle", "step_ratio"),
    Stat.GRADIENT: ("gradient_rms",),
}
"""Which fields of a `Record` each statistic fills (attention has a record of its own)."""

ALWAYS = frozenset({"site", "count", "tokens", "groups", "dtype"})


class ConformanceError(AssertionError):
    """A probe breaks a rule that all probes keep; the message says what its author should do."""


def check_probe(probe: Probe | type[Probe], trace: Trace | None = None) -> None:
    """Hold a probe to what setpoint asks of every probe.

    Args:
        probe: The probe, or its class if it can be made without arguments.
        trace: A recording on which it must find something. Left out, it must find something in one of
            `setpoint.testing.ailing_traces`.

    Raises:
        ConformanceError: (an `AssertionError`) at the first rule that is broken, with what to do about it.

    Example:
        >>> from setpoint.probe.nonfinite import NonFinite
        >>> check_probe(NonFinite)
    """
    made = _made(probe)
    _declarations(made)
    ill = {"the given trace": trace} if trace is not None else ailing_traces()
    for name, recording in (("the empty trace", empty_trace()), ("the healthy trace", healthy_trace())):
        _silent(made, name, recording)
    found = {name: _pure(made, name, recording) for name, recording in ill.items()}
    _demand(
        any(found.values()),
        made,
        "finds nothing in any trace it was tried on: pass `trace=` one that it must speak about",
    )
    for name, findings in found.items():
        _well_formed(made, name, ill[name], findings)
        _steady_ids(made, name, ill[name], findings)
        _needs_suffice(made, name, ill[name], findings)
        _survives_damage(made, name, ill[name])
    _pure(made, "the convolutional trace", convolutional_trace())


def restrict(trace: Trace, needs: Needs) -> Trace:
    """The trace that a recorder makes when only ``needs`` is asked of it.

    Args:
        trace: A recording with more in it.
        needs: Statistics by site role.

    Returns:
        A trace without the sites of other roles and with None for every other statistic.

    >>> small = restrict(healthy_trace(), {"residual": frozenset({Stat.MEDIAN})})
    >>> {record.site.role for record in small.records.values()}, small.records["blocks.0 residual"].mean
    ({'residual'}, None)
    """
    blank = Record(site=next(iter(healthy_trace().records.values())).site)
    records = {}
    for name, record in trace.records.items():
        if record.site.role in needs:
            keep = ALWAYS.union(*(FIELDS_OF.get(stat, ()) for stat in needs[record.site.role]))
            gone = {f.name: getattr(blank, f.name) for f in fields(Record) if f.name not in keep}
            records[name] = replace(record, **gone)
    asked = frozenset[Stat]().union(*needs.values())
    parameters = trace.parameters
    if Stat.GRADIENT not in asked:
        parameters = {n: replace(p, gradient_norm=None, gradient_rms=None) for n, p in parameters.items()}
    attention = trace.attention if Stat.ATTENTION in needs.get("attention", ()) else {}
    return replace(trace, records=records, parameters=parameters, attention=attention)


def _demand(kept: bool, probe: Probe, advice: str) -> None:
    if not kept:
        raise ConformanceError(f"{type(probe).__name__} {advice}")


def _made(probe: Probe | type[Probe]) -> Probe:
    if not isinstance(probe, type):
        return probe
    try:
        return probe()
    except TypeError as error:
        raise ConformanceError(
            f"{probe.__name__} can't be made without arguments ({error}): give every threshold a default and say in "
            "the docstring where it comes from"
        ) from None


def _declarations(probe: Probe) -> None:
    """Before anything runs: frozen, named, explained, and clear about what it reads."""
    _demand(is_dataclass(probe), probe, "is no dataclass: decorate it with @dataclass(frozen=True)")
    frozen = type(probe).__dataclass_params__.frozen  # type: ignore[attr-defined]
    _demand(frozen, probe, "can be changed after it was made: decorate it with @dataclass(frozen=True)")
    _demand(hash(probe) == hash(deepcopy(probe)), probe, "has fields that can't be hashed: use numbers and tuples")
    for name in ("code", "title", "explanation"):
        text = getattr(probe, name, "")
        _demand(isinstance(text, str) and bool(text.strip()), probe, f"has no {name}: set the ClassVar to some text")
    _demand(
        probe.code == probe.code.lower() and not set(probe.code) & set(" _@"),
        probe,
        f"has the code {probe.code!r}: use lower-case words joined by hyphens, it is typed at a shell",
    )
    doc = type(probe).__doc__ or ""
    for field in fields(probe):  # type: ignore[arg-type]
        explained = re.search(rf"^\s*(\w+, )*{field.name}(, \w+)*:", doc, re.MULTILINE)
        _demand(bool(explained), probe, f"has the threshold {field.name!r} that its docstring does not explain")
    needs = getattr(probe, "needs", None)
    _demand(isinstance(needs, Mapping) and bool(needs), probe, "has no needs: map site roles to sets of Stat")
    for role, stats in probe.needs.items():
        _demand(role in get_args(SiteRole), probe, f"needs the unknown site role {role!r}; see setpoint.types.SiteRole")
        _demand(
            isinstance(stats, frozenset) and all(isinstance(stat, Stat) for stat in stats),
            probe,
            f"needs {stats!r} at {role}: use a frozenset of setpoint.types.Stat",
        )


def _pure(probe: Probe, name: str, trace: Trace) -> list[Finding]:
    """The same trace gives the same findings, and is as it was."""
    before = deepcopy(trace)
    first, second = probe(trace), probe(trace)
    _demand(
        isinstance(first, list) and all(isinstance(f, Finding) for f in first),
        probe,
        f"returned {type(first).__name__} on {name}: return a list of Finding",
    )
    _demand(_same(before, trace), probe, f"changed {name}: copy an array before writing into it")
    _demand(first == second, probe, f"answered {name} differently the second time: use no state and no randomness")
    return first


def _silent(probe: Probe, name: str, trace: Trace) -> None:
    loud = [f for f in _pure(probe, name, trace) if f.severity != "info" or trace.tokens == 0]
    _demand(
        not loud,
        probe,
        f"raises an alarm on {name} ({loud[0].evidence if loud else ''}): return [] where the statistics it needs are "
        "missing, and keep warnings for what is wrong",
    )


def _well_formed(probe: Probe, name: str, trace: Trace, findings: Sequence[Finding]) -> None:
    """Each finding can be shown, saved, ignored by id and traced to a threshold with a source."""
    ids = [f.id for f in findings]
    _demand(len(set(ids)) == len(ids), probe, f"gave one id twice on {name} ({ids}): put the place into it")
    places = {*trace.records, *trace.attention, *trace.parameters, *(f"block {n}" for n in range(trace.blocks))}
    ranks = [SEVERITIES.index(f.severity) for f in findings if f.severity in SEVERITIES]
    _demand(len(ranks) == len(ids), probe, f"gave a severity on {name} that is none of {', '.join(SEVERITIES)}")
    for finding in findings:
        where = f"on {name}, finding {finding.id!r}:"
        _demand(finding.code == probe.code, probe, f"{where} has the code {finding.code!r}, not its own {probe.code!r}")
        _demand(
            finding.id.startswith(f"{probe.code}@") and finding.id != f"{probe.code}@",
            probe,
            f"{where} the id must read code@place",
        )
        _demand(bool(finding.source.strip()), probe, f"{where} has no source: say where the threshold comes from")
        _demand(bool(finding.unit.strip()), probe, f"{where} has no unit: say what its value counts")
        _demand(
            any(c.isdigit() for c in finding.evidence) and "\n" not in finding.evidence.strip(),
            probe,
            f"{where} evidence must be one line with figures in it, got {finding.evidence!r}",
        )
        _demand(bool(finding.explanation.strip()), probe, f"{where} has no explanation")
        _demand(
            bool(finding.sites) and places.issuperset(finding.sites),
            probe,
            f"{where} names sites that are not in the trace ({finding.sites}): use the names of its records or "
            "parameters, or `block N`",
        )
        for figure in ("value", "threshold"):
            value = getattr(finding, figure)
            _demand(
                type(value) in (float, int) and isfinite(value),
                probe,
                f"{where} {figure} is {value!r}: give a finite Python number",
            )
        _demand(_plain(finding.numbers), probe, f"{where} numbers {finding.numbers!r} must be Python numbers or text")
        _demand(
            _drawable(finding.chart),
            probe,
            f"{where} chart can't be drawn: give x and y of one length, None for what is not finite",
        )


def _steady_ids(probe: Probe, name: str, trace: Trace, findings: Sequence[Finding]) -> None:
    """Rounding noise must not rename a finding: people put ids into scripts."""
    again = probe(_times(trace, 1 + 1e-6))
    _demand(
        {f.id for f in again} == {f.id for f in findings},
        probe,
        f"renamed its findings on {name} when every statistic moved by a millionth: keep measured numbers out of ids",
    )


def _needs_suffice(probe: Probe, name: str, trace: Trace, findings: Sequence[Finding]) -> None:
    asked = probe(restrict(trace, probe.needs))
    _demand(
        [_gist(f) for f in asked] == [_gist(f) for f in findings],
        probe,
        f"answers {name} differently when only the statistics in its `needs` are recorded: declare all that it reads",
    )


def _survives_damage(probe: Probe, name: str, trace: Trace) -> None:
    """Statistics that are missing, infinite or undefined are no reason to fall over."""
    with np.errstate(all="ignore"):
        damaged = {
            "nan": _times(trace, nan),
            "infinite": replace(_times(trace, inf), attention=_overflown(trace.attention)),
            "zero": _times(trace, 0.0),
            "missing": restrict(trace, {role: frozenset() for role in probe.needs}),
        }
    for kind, broken in damaged.items():
        try:
            with np.errstate(all="ignore"):
                findings = probe(broken)
        except Exception as error:
            raise ConformanceError(
                f"{type(probe).__name__} fails on {name} with statistics that are {kind} "
                f"({type(error).__name__}: {error}): leave out what is not a finite number"
            ) from error
        for finding in findings:
            _demand(
                isfinite(finding.value),
                probe,
                f"reports the value {finding.value} on {name} with statistics that are {kind}: leave it out",
            )


def _gist(finding: Finding) -> tuple[Any, ...]:
    return finding.id, finding.severity, finding.value, finding.threshold, finding.sites


def _plain(numbers: Mapping[str, Any]) -> bool:
    if not all(type(value) in (int, float, str) for value in numbers.values()):
        return False
    return all(isinstance(json.dumps({name: value}), str) for name, value in numbers.items())


def _drawable(chart: Chart | None) -> bool:
    return chart is None or all(
        len(series.x) == len(series.y)
        and all(isfinite(x) for x in series.x)
        and all(y is None or isfinite(y) for y in series.y)
        for series in chart.series
    )


def _times(trace: Trace, factor: float) -> Trace:
    """The trace with every floating-point statistic multiplied; counts and positions stay."""

    def changed(value: Any) -> Any:
        if isinstance(value, float | np.ndarray):
            return value * factor
        if isinstance(value, tuple):
            return tuple(changed(v) for v in value)
        if isinstance(value, Mapping):
            return {name: changed(v) for name, v in value.items()}
        if is_dataclass(value) and not isinstance(value, type):
            return replace(value, **{f.name: changed(getattr(value, f.name)) for f in fields(value)})
        return value

    return replace(
        trace,
        records=changed(trace.records),
        attention=changed(trace.attention),
        parameters=changed(trace.parameters),
    )


def _overflown(attention: Mapping[str, AttentionRecord]) -> dict[str, AttentionRecord]:
    """What attention records hold when a logit was infinite: the weights are then undefined, not infinite."""
    undefined = {"entropy", "sink", "largest", "saturated"}
    return {
        name: replace(record, logit_max=record.logit_max * inf, **{f: getattr(record, f) * nan for f in undefined})
        for name, record in attention.items()
    }


def _same(a: Any, b: Any) -> bool:
    """Equality that looks into arrays and into dataclasses without one of their own."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b, equal_nan=True)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    if is_dataclass(a) and not isinstance(a, type):
        return all(_same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b or (a != a and b != b))
