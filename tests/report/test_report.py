from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from setpoint.errors import InputError
from setpoint.report import SCHEMA_VERSION, ModelInfo, Report
from setpoint.report.files import write_text
from setpoint.types import Trace

FINDING_KEYS = {
    "code", "id", "severity", "value", "unit", "threshold", "source",
    "sites", "evidence", "explanation", "remedies", "numbers", "chart",
}  # fmt: skip


def test_findings_are_ranked_by_severity(report: Report) -> None:
    assert [f.severity for f in report.ranked] == ["error", "warning", "info"]
    assert report.worst == "error"


def test_exceeds_compares_with_the_worst_finding(report: Report) -> None:
    mild = replace(report, findings=tuple(f for f in report.findings if f.severity == "warning"))
    assert mild.exceeds("info")
    assert mild.exceeds("warning")
    assert not mild.exceeds("error")


def test_no_findings_exceed_nothing(report: Report) -> None:
    clean = replace(report, findings=())
    assert clean.worst is None
    assert not clean.exceeds("info")


def test_exceeds_refuses_an_unknown_severity(report: Report) -> None:
    with pytest.raises(InputError, match="info, warning, error"):
        report.exceeds("fatal")  # type: ignore[arg-type]


def test_json_has_every_part_and_every_finding_field(report: Report) -> None:
    data = json.loads(report.to_json())
    assert data["schema_version"] == SCHEMA_VERSION
    assert data["model"]["source"] == "smollm2"
    assert {"findings", "trace", "settings"} <= data.keys()
    assert all(set(finding) == FINDING_KEYS for finding in data["findings"])
    assert len(data["trace"]["records"]) == len(report.trace.records)


def test_json_comes_back_equal(report: Report) -> None:
    back = Report.from_json(report.to_json())
    assert back.model == report.model
    assert back.findings == report.ranked
    assert back.settings == report.settings
    assert back.trace.table() == report.trace.table()
    assert back.trace.structure == report.trace.structure
    assert back.trace.parameters == report.trace.parameters
    for name, record in report.trace.records.items():
        assert back.trace.records[name].site == record.site
        assert back.trace.records[name].peaks == record.peaks
        np.testing.assert_allclose(back.trace.records[name].channel_max, record.channel_max, rtol=1e-5)
    for name, attention in report.trace.attention.items():
        np.testing.assert_allclose(back.trace.attention[name].sink, attention.sink, rtol=1e-5)
    assert back.to_json() == report.to_json()


def test_json_without_channels_keeps_every_number_per_site(report: Report) -> None:
    small = report.to_json(channels=False)
    assert len(small) < len(report.to_json()) / 5
    back = Report.from_json(small)
    assert back.trace.table() == report.trace.table()
    assert all(record.channel_max is None for record in back.trace.records.values())


def test_numbers_that_are_not_finite_survive_strict_json(report: Report) -> None:
    finding = replace(report.findings[0], value=math.inf, threshold=-math.inf, numbers={"worst": math.nan, "blocks": 3})
    name, record = next(iter(report.trace.records.items()))
    spoilt = replace(record, rms=math.inf, mean=math.nan, channel_max=np.array([1.0, math.inf, math.nan]))
    trace = replace(report.trace, records={name: spoilt})
    text = replace(report, findings=(finding,), trace=trace).to_json()
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    back = Report.from_json(text)
    assert (back.findings[0].value, back.findings[0].threshold) == (math.inf, -math.inf)
    assert math.isnan(back.findings[0].numbers["worst"])
    assert back.findings[0].numbers["blocks"] == 3
    assert back.trace.records[name].rms == math.inf
    np.testing.assert_array_equal(back.trace.records[name].channel_max, [1.0, math.inf, math.nan])


def test_a_note_that_says_nan_stays_a_string(report: Report) -> None:
    named = replace(report, model=replace(report.model, notes=("nan", "inf")), settings={"data": "nan"})
    back = Report.from_json(named.to_json())
    assert back.model.notes == ("nan", "inf")
    assert back.settings["data"] == "nan"


def test_a_saved_json_file_is_read(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(report.to_json(), encoding="utf-8")
    assert Report.from_json(path).findings == Report.from_json(str(path)).findings == report.ranked


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "not valid JSON"),
        (lambda text: "[1, 2]", "no schema_version"),
        (lambda text: '{"a": 1}', "no schema_version"),
        (lambda text: text.replace('"schema_version": 1', '"schema_version": 99', 1), "99"),
        (lambda text: text.replace('"severity": "warning"', '"severity": "fatal"', 1), r"severity.*fatal"),
        (lambda text: text.replace('"parameters": 134515008', '"parameters": "many"', 1), "a whole number"),
        (lambda text: '{"schema_version": 1, "model": {"name": "m"}, "findings": []}', "no 'trace'"),
        (lambda text: '{"schema_version": 1, "model": {}, "findings": [], "trace": {}}', "no 'name'"),
    ],
)
def test_a_damaged_report_gives_one_line(report: Report, tmp_path: Path, damage, message: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(damage(report.to_json(channels=False)), encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        Report.from_json(path)
    assert "broken.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_report_and_a_binary_one_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.json"):
        Report.from_json(tmp_path / "nowhere.json")
    (tmp_path / "b.json").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(InputError, match="not text"):
        Report.from_json(tmp_path / "b.json")


def test_reading_reports_needs_no_torch() -> None:
    heavy = "{'torch', 'altair', 'jinja2'}"
    code = f"import sys; from setpoint.report import Report, diff; sys.exit(len({heavy} & set(sys.modules)))"
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code]) == 0


def test_writing_replaces_a_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    path.write_text("old")
    path.chmod(0o640)
    assert write_text(path, "new") == path
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.txt"
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_symbolic_link_keeps_pointing(tmp_path: Path) -> None:
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to(tmp_path / "real.txt")
    write_text(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"


def test_a_folder_and_a_missing_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        write_text(tmp_path, "x")
    with pytest.raises(InputError, match="does not exist"):
        write_text(tmp_path / "none" / "r.html", "x")


def test_an_empty_trace_makes_a_report() -> None:
    trace = Trace({}, {}, {}, blocks=0, task="other", sequences=0, tokens=0)
    empty = Report(ModelInfo(""), (), trace)
    assert Report.from_json(empty.to_json()).trace.blocks == 0
