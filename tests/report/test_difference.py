from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from setpoint.report import Report, diff

SITE = "model.layers.17 residual"


def with_record(report: Report, site: str, **changes: Any) -> Report:
    records = {**report.trace.records, site: replace(report.trace.records[site], **changes)}
    return replace(report, trace=replace(report.trace, records=records))


def printed(what: object, width: int = 100) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(what)
    return file.getvalue()


def test_a_report_does_not_differ_from_itself(report: Report) -> None:
    change = diff(report, report)
    assert change.empty
    assert "Nothing changed" in printed(change)


def test_a_notebook_shows_the_tables(report: Report) -> None:
    bundle = diff(report, replace(report, findings=()))._repr_mimebundle_([], [])
    assert "gone" in bundle["text/html"]
    assert "massive-activation" in bundle["text/html"]


def test_saving_and_reading_changes_nothing(report: Report) -> None:
    assert diff(report, Report.from_json(report.to_json(channels=False))).empty


def test_findings_are_new_gone_or_changed(report: Report) -> None:
    massive, sink, growth = report.findings
    other = replace(report, findings=(replace(massive, severity="info", value=12.0), growth, replace(sink, id="x@y")))
    change = diff(report, other)
    assert [f.id for f in change.new] == ["x@y"]
    assert [f.id for f in change.gone] == [sink.id]
    assert [(c.before.value, c.after.value) for c in change.changed] == [(41873.0, 12.0)]
    text = printed(change)
    for word in ("new", "gone", "changed", "41,873 → 12"):
        assert word in text


def test_a_small_move_of_a_value_is_no_change(report: Report) -> None:
    massive = report.findings[0]
    close = replace(report, findings=(replace(massive, value=massive.value * 1.2), *report.findings[1:]))
    far = replace(report, findings=(replace(massive, value=massive.value * 1.3), *report.findings[1:]))
    assert not diff(report, close).changed
    assert len(diff(report, far).changed) == 1


def test_statistics_beyond_a_quarter_are_listed_worst_first(report: Report) -> None:
    record = report.trace.records[SITE]
    other = with_record(report, SITE, rms=record.rms * 1.24, median=record.median / 3, angle=record.angle * 2)
    found = diff(report, other).statistics
    assert [(c.site, c.statistic) for c in found] == [(SITE, "median"), (SITE, "angle")]
    assert found[0].ratio == pytest.approx(1 / 3)
    assert found[1].ratio == pytest.approx(2.0)


def test_noise_near_zero_stays_out(report: Report) -> None:
    one, two = (with_record(report, SITE, zeros=z, cosine=c) for z, c in ((0.0001, -0.002), (0.004, 0.009)))
    assert not diff(one, two).statistics


def test_a_value_that_turns_infinite_comes_first(report: Report) -> None:
    other = with_record(report, SITE, rms=math.inf, non_finite=7, median=report.trace.records[SITE].median * 9)
    found = diff(report, other).statistics
    assert {c.statistic for c in found[:2]} == {"rms", "non_finite"}
    assert all(c.ratio == math.inf for c in found[:2])
    assert json.loads(diff(report, other).to_json())["statistics"][0]["ratio"] == "inf"
    assert diff(other, report).statistics[0].ratio == 0.0


def test_attention_is_compared_by_its_mean_over_heads(report: Report) -> None:
    name, record = next(iter(report.trace.attention.items()))
    attention = {**report.trace.attention, name: replace(record, sink=record.sink * 2)}
    found = diff(report, replace(report, trace=replace(report.trace, attention=attention))).statistics
    assert [(c.site, c.statistic) for c in found] == [(name, "attention sink")]


def test_sites_of_one_model_only_are_counted(report: Report) -> None:
    records = {name: record for name, record in report.trace.records.items() if not name.startswith("model.layers.29")}
    shorter = replace(report, trace=replace(report.trace, records=records))
    change = diff(report, shorter)
    assert len(change.only_a) == 4
    assert not change.only_b
    assert not change.empty
    assert "4 sites only in smollm2" in printed(change)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_tables_stay_within_the_width(report: Report, width: int) -> None:
    other = with_record(replace(report, findings=report.findings[:1]), SITE, rms=9.0)
    assert max(map(len, printed(diff(report, other), width).splitlines())) <= width
