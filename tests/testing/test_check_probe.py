"""`check_probe` catches each way in which a probe can be wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf, nan
from typing import Any, ClassVar

import pytest

from setpoint.probe.base import Needs, Probe
from setpoint.testing import (
    ConformanceError,
    ailing_traces,
    check_probe,
    convolutional_trace,
    empty_trace,
    healthy_trace,
    restrict,
)
from setpoint.types import Chart, Finding, Series, Stat, Trace


@dataclass(frozen=True)
class LargeVariance(Probe):
    """Finds a residual stream of large variance.

    Args:
        limit: Largest variance (made up for this test).
    """

    limit: float = 100.0

    code: ClassVar[str] = "large-variance"
    title: ClassVar[str] = "Large variance"
    explanation: ClassVar[str] = "The stream is large."
    needs: ClassVar[Needs] = {"residual": frozenset({Stat.MOMENTS})}

    def __call__(self, trace: Trace) -> list[Finding]:
        return [self.one(r.site.name, r.variance) for r in trace.by_role("residual") if (r.variance or 0) > self.limit]

    def one(self, name: str, variance: float | None, **changes: Any) -> Finding:
        assert variance is not None
        if not variance < inf:
            variance = self.limit
        given: dict[str, Any] = {
            "severity": "warning",
            "value": variance,
            "unit": "variance",
            "threshold": self.limit,
            "source": "made up",
            "sites": [name],
            "evidence": f"variance {variance}",
            "numbers": {"variance": variance},
        }
        given |= changes
        return self.finding(given.pop("place", name), given.pop("severity"), **given)


def test_good_probe_passes_as_class_and_as_instance() -> None:
    check_probe(LargeVariance)
    check_probe(LargeVariance(limit=50.0))


def test_probe_may_bring_its_own_trace() -> None:
    with pytest.raises(ConformanceError, match="finds nothing in any trace"):
        check_probe(LargeVariance(limit=1e30))
    with pytest.raises(ConformanceError, match="finds nothing"):
        check_probe(LargeVariance, trace=ailing_traces()["rank-collapse"])
    check_probe(LargeVariance, trace=ailing_traces()["variance-growth"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sites": ["nowhere"]}, "names sites that are not in the trace"),
        ({"sites": []}, "names sites that are not in the trace"),
        ({"evidence": "it is large"}, "evidence must be one line with figures"),
        ({"evidence": "1\n2"}, "evidence must be one line with figures"),
        ({"source": ""}, "has no source"),
        ({"unit": ""}, "has no unit"),
        ({"place": "stream"}, "gave one id twice"),
        ({"severity": "fatal"}, "gave a severity"),
        ({"value": nan}, "answered .* differently the second time|value is nan"),
        ({"threshold": inf}, "threshold is inf"),
        ({"numbers": {"x": [1]}}, "must be Python numbers or text"),
        ({"chart": Chart("profile", "t", "x", "y", (Series("s", (1.0, 2.0), (1.0,)),))}, "chart can't be drawn"),
        ({"chart": Chart("profile", "t", "x", "y", (Series("s", (1.0,), (nan,)),))}, "chart can't be drawn"),
    ],
)
def test_malformed_finding_is_named(changes: dict[str, Any], message: str) -> None:
    class Malformed(LargeVariance):
        __doc__ = LargeVariance.__doc__

        def one(self, name: str, variance: float | None, **_: Any) -> Finding:
            return super().one(name, variance, **changes)

    with pytest.raises(ConformanceError, match=message):
        check_probe(Malformed())


def test_id_without_a_place_is_named() -> None:
    class Nowhere(LargeVariance):
        __doc__ = LargeVariance.__doc__

        def one(self, name: str, variance: float | None, **_: Any) -> Finding:
            return super().one(name, variance, place="")

    with pytest.raises(ConformanceError, match="the id must read code@place"):
        check_probe(Nowhere(limit=1e13), trace=ailing_traces()["variance-growth"])


def writes(self: LargeVariance, trace: Trace) -> list[Finding]:
    for record in trace.records.values():
        assert record.channel_rms is not None
        record.channel_rms[0] += 1.0
    return []


def remembers(self: LargeVariance, trace: Trace, calls: list[int] = []) -> list[Finding]:  # noqa: B006
    calls.append(1)
    return [self.one("blocks.3 residual", float(len(calls)))] if trace.tokens else []


def always_speaks(self: LargeVariance, trace: Trace) -> list[Finding]:
    return [self.one("blocks.0 residual", 1e9)]


def alarms_on_health(self: LargeVariance, trace: Trace) -> list[Finding]:
    return [self.one(r.site.name, 1e9) for r in trace.by_role("residual")]


def reads_undeclared(self: LargeVariance, trace: Trace) -> list[Finding]:
    return [self.one(r.site.name, 1e9) for r in trace.by_role("residual") if (r.cosine or 0.0) > 0.9]


def falls_on_missing(self: LargeVariance, trace: Trace) -> list[Finding]:
    return [self.one(r.site.name, r.variance) for r in trace.by_role("residual") if r.variance > 100]  # type: ignore[operator]


def number_in_id(self: LargeVariance, trace: Trace) -> list[Finding]:
    large = [r for r in trace.by_role("residual") if (r.variance or 0) > 100]
    return [self.one(r.site.name, r.variance, place=f"{r.variance}") for r in large]


def gives_a_tuple(self: LargeVariance, trace: Trace) -> Any:
    return ()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (writes, "changed the healthy trace: copy an array"),
        (remembers, "differently the second time"),
        (always_speaks, "raises an alarm on the empty trace"),
        (alarms_on_health, "raises an alarm on the healthy trace"),
        (reads_undeclared, "declare all that it reads"),
        (falls_on_missing, r"fails on .* that are missing \(TypeError"),
        (number_in_id, "keep measured numbers out of ids"),
        (gives_a_tuple, "returned tuple on the empty trace: return a list"),
    ],
)
def test_misbehaving_probe_is_named(call: Callable[[LargeVariance, Trace], Any], message: str) -> None:
    wrong = dataclass(frozen=True)(
        type("Wrong", (LargeVariance,), {"__call__": call, "__doc__": LargeVariance.__doc__})
    )
    with pytest.raises(ConformanceError, match=f"^Wrong .*{message}"):
        check_probe(wrong)


def test_mutable_probe_is_refused() -> None:
    thawed = type("Thawed", (), dict(vars(LargeVariance)))
    assert check_fails(dataclass(thawed)()) == "can be changed after it was made"


def check_fails(probe: Any) -> str:
    with pytest.raises(ConformanceError) as caught:
        check_probe(probe)
    message = str(caught.value)
    return message.partition(" ")[2].partition(":")[0]


def test_threshold_without_a_word_is_refused() -> None:
    @dataclass(frozen=True)
    class Silent(LargeVariance):
        """Says nothing of the other one.

        Args:
            limit: Largest variance.
        """

        other: float = 1.0

    assert check_fails(Silent) == "has the threshold 'other' that its docstring does not explain"


def test_threshold_without_a_default_is_refused() -> None:
    @dataclass(frozen=True)
    class Bare(LargeVariance):
        __doc__ = LargeVariance.__doc__

        other: float = field(kw_only=True)

    assert check_fails(Bare).startswith("can't be made without arguments")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("code", "Large Variance", "has the code 'Large Variance'"),
        ("title", " ", "has no title"),
        ("explanation", "", "has no explanation"),
        ("needs", {}, "has no needs"),
        (
            "needs",
            {"stream": frozenset({Stat.MOMENTS})},
            "needs the unknown site role 'stream'",
        ),
        ("needs", {"residual": {"moments"}}, "needs {'moments'} at residual"),
    ],
)
def test_incomplete_declaration_is_refused(name: str, value: object, message: str) -> None:
    wrong = dataclass(frozen=True)(type("Wrong", (LargeVariance,), {name: value, "__doc__": LargeVariance.__doc__}))
    assert check_fails(wrong).startswith(message)


def test_restrict_keeps_what_was_asked_and_nothing_else() -> None:
    small = restrict(healthy_trace(), {"residual": frozenset({Stat.MOMENTS}), "hidden": frozenset({Stat.ZEROS})})
    residual, hidden = small.by_role("residual")[0], small.by_role("hidden")[0]
    assert residual.variance is not None
    assert residual.median is None
    assert residual.channel_max is None
    assert hidden.zeros == 0.4
    assert hidden.channel_active is not None
    assert hidden.variance is None
    assert {r.site.role for r in small.records.values()} == {"residual", "hidden"}
    assert not small.attention
    assert all(p.gradient_norm is None and p.norm for p in small.parameters.values())


def test_restrict_keeps_attention_and_gradients_when_asked() -> None:
    full = healthy_trace()
    small = restrict(full, {"attention": frozenset({Stat.ATTENTION}), "residual": frozenset({Stat.GRADIENT})})
    assert small.attention == full.attention
    assert small.parameters == full.parameters
    assert small.by_role("residual")[0].gradient_rms == full.by_role("residual")[0].gradient_rms


def test_ailing_traces_are_the_healthy_one_in_shape() -> None:
    names = set(healthy_trace().records)
    for code, trace in ailing_traces().items():
        assert set(trace.records) == names, code


def test_moments_of_a_planted_entry_are_those_of_the_values() -> None:
    """The massive trace must be a signal that can exist: a thirty-second of the tokens carry the entry."""
    record = ailing_traces()["massive-activation"].by_role("residual")[2]
    assert record.kurtosis == pytest.approx(32 * 256 - 3, rel=1e-2)
    assert record.variance == pytest.approx(2.5 + (2e4**2) / (32 * 256), rel=1e-3)
    assert record.peaks[0].value == record.maximum == max(record.channel_max)  # type: ignore[arg-type]


def test_empty_and_convolutional_traces_have_no_stream() -> None:
    assert not empty_trace().records
    assert not convolutional_trace().by_role("residual")
