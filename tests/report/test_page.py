from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from setpoint.errors import InputError
from setpoint.report import ModelInfo, Report, diff
from setpoint.report.charts import describe, draw, short_names
from setpoint.report.page import render
from setpoint.report.profiles import profiles
from setpoint.types import Chart, Series, Trace

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")

Visit = Callable[..., tuple[str, str]]


@pytest.fixture
def visit(tmp_path: Path) -> Visit:
    """Open a page in a headless browser; gives the document after its scripts ran, and the browser's log."""

    def run(page: Path, *flags: str) -> tuple[str, str]:
        command = [
            str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--disable-dev-shm-usage", f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr",
            "--virtual-time-budget=60000", "--window-size=1280,900", *flags, "--dump-dom", page.as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        return done.stdout, done.stderr

    return run


@pytest.fixture(scope="module")
def page(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report.to_html(tmp_path_factory.mktemp("page") / "report.html")


class Outline(HTMLParser):
    """Collects what a test asks about a page: elements by tag, and text outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag if tag in ("script", "style") else ""

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self.text += data

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.elements if t == tag and all(a.get(k) == v for k, v in attributes.items())]


def with_script(page: Path, script: str) -> Path:
    """Add a script that runs when those of the page have run."""
    before, _, after = page.read_text(encoding="utf-8").rpartition("</body>")
    page.with_name("changed.html").write_text(
        f"{before}<script type='module'>{script}</script></body>{after}", encoding="utf-8"
    )
    return page.with_name("changed.html")


def drawn(document: str) -> tuple[int, int]:
    match = re.search(r'data-charts="(\d+)/(\d+)"', document)
    assert match, "the page never said that its charts are drawn"
    return int(match[1]), int(match[2])


def test_the_page_stays_under_three_megabytes(page: Path) -> None:
    assert page.stat().st_size < 3_000_000


def test_the_page_names_every_finding_with_evidence_and_remedies(page: Path, report: Report) -> None:
    outline = Outline(page.read_text(encoding="utf-8"))
    for finding in report.findings:
        assert finding.evidence in outline.text
        assert finding.id in outline.text
        assert all(remedy.key in outline.text for remedy in finding.remedies)
    assert "setpoint show outliertune" in outline.text
    assert {"https://arxiv.org/abs/2402.17762", "https://arxiv.org/abs/2506.19697"} <= {
        a["href"] for a in outline.all("a")
    }


def test_nothing_is_loaded_from_anywhere(page: Path) -> None:
    outline = Outline(page.read_text(encoding="utf-8"))
    assert not outline.all("img")
    assert not outline.all("iframe")
    assert not any("src" in a for a in outline.all("script"))
    assert [a["href"] for a in outline.all("link")] == ["data:,"]
    policy = outline.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"] or ""
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy
    styles = re.findall(r"<style>(.*?)</style>", page.read_text(encoding="utf-8"), re.DOTALL)
    assert not any("url(" in style or "@import" in style for style in styles)


def test_every_chart_has_words_for_those_who_do_not_see_it(page: Path) -> None:
    charts = [a for a in Outline(page.read_text(encoding="utf-8")).all("div") if a.get("class") == "chart"]
    assert len(charts) >= 12
    assert all(a["role"] == "img" and len(a["aria-label"] or "") > 30 for a in charts)


def test_a_saved_page_is_read_back_and_compared(page: Path, report: Report) -> None:
    back = Report.from_json(page)
    assert back.findings == report.ranked
    assert back.trace.table() == report.trace.table()
    assert diff(report, back).empty


def test_a_strange_page_is_no_report(tmp_path: Path) -> None:
    (tmp_path / "other.html").write_text("<!doctype html><p>hello")
    with pytest.raises(InputError, match=r"other\.html is not a page that setpoint wrote"):
        Report.from_json(tmp_path / "other.html")


HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>\"'&\u2028"


def hostile(report: Report) -> Report:
    finding = report.findings[0]
    assert finding.chart is not None
    chart = replace(finding.chart, title=HOSTILE, x=HOSTILE, series=(Series(HOSTILE, (0.0, 1.0), (1.0, 2.0)),))
    spoilt = replace(finding, id=HOSTILE, evidence=HOSTILE, source=HOSTILE, sites=(HOSTILE,), chart=chart)
    spoilt = replace(spoilt, numbers={HOSTILE: HOSTILE}, explanation=HOSTILE)
    record = next(iter(report.trace.records.values()))
    records = {**report.trace.records, HOSTILE: replace(record, site=replace(record.site, name=HOSTILE))}
    return replace(
        report,
        model=ModelInfo(name=HOSTILE, source=HOSTILE, notes=(HOSTILE,)),
        findings=(spoilt,),
        trace=replace(report.trace, records=records),
        settings={"data": HOSTILE, "command": HOSTILE, "unread": [HOSTILE], HOSTILE: HOSTILE},
    )


def test_names_from_outside_never_become_markup(report: Report) -> None:
    plain, spoilt = (Outline(render(r)) for r in (report, hostile(report)))
    assert len(spoilt.all("script")) == len(plain.all("script"))
    assert not spoilt.all("img")
    assert HOSTILE in spoilt.text
    assert HOSTILE not in hostile(report)._repr_html_()
    assert (
        html.escape(HOSTILE, quote=True).replace("&quot;", "&#34;").replace("&#x27;", "&#39;")
        in hostile(report)._repr_html_()
    )


def test_a_hostile_report_is_read_back_as_it_was(report: Report, tmp_path: Path) -> None:
    path = hostile(report).to_html(tmp_path / "h.html")
    assert Report.from_json(path).model.source == HOSTILE


def test_a_notebook_gets_a_table_without_scripts(report: Report) -> None:
    outline = Outline(report._repr_html_())
    assert len(outline.all("table")) == 1
    assert not outline.all("script")
    for finding in report.findings:
        assert finding.evidence in outline.text


def test_a_report_without_findings_or_sites_has_a_page(report: Report) -> None:
    empty = Report(ModelInfo("tiny"), (), Trace({}, {}, {}, blocks=0, task="other", sequences=0, tokens=0))
    outline = Outline(render(empty))
    assert "Nothing was measured" in outline.text
    assert not outline.all("table")


def test_profiles_cover_every_quantity_of_a_language_model(report: Report) -> None:
    titles = " ".join(p.chart.title.lower() for p in profiles(report.trace))
    for quantity in (
        "magnitude",
        "variance",
        "kurtosis",
        "cosine",
        "angle",
        "entropy",
        "first token",
        "zero",
        "gradient",
    ):
        assert quantity in titles
    heat = [p.chart for p in profiles(report.trace) if p.group == "Channels"]
    assert len(heat) == 1
    assert len(heat[0].series) == 30
    assert 507.0 in heat[0].series[0].x


def test_a_network_without_a_stream_is_drawn_over_its_convolutions(report: Report) -> None:
    records = {
        name: replace(r, site=replace(r.site, role="convolution", block=None), zeros=0.5)
        for name, r in report.trace.records.items()
        if r.site.role == "residual"
    }
    found = profiles(replace(report.trace, records=records, attention={}, parameters={}))
    assert {p.group for p in found} == {"Convolutions"}
    assert found[0].labels[3.0] == "model.layers.3 residual"


def test_what_can_not_be_drawn_leaves_a_gap() -> None:
    chart = Chart("profile", "t", "block", "y", (Series("s", (0, 1, 2, 3), (1.0, None, math.inf, -2.0)),), log=True)
    assert [row["y"] for row in draw(chart, "f").spec["datasets"]["f"]] == [1.0, None, None, None]
    assert json.dumps(draw(chart, "f").spec, allow_nan=False)


def test_rows_of_a_heat_map_are_named_by_what_differs() -> None:
    assert short_names(["a.layers.3 residual", "a.layers.12 residual"]) == ["3", "12"]
    assert short_names(["embed embedding", "layers.0 residual", "layers.1 residual"]) == [
        "embed embedding",
        "layers.0 residual",
        "layers.1 residual",
    ]
    assert short_names(["h.0.ln_1 norm", "h.0.ln_2 norm"]) == ["ln_1", "ln_2"]
    assert short_names(["0", "1"]) == ["0", "1"]
    assert short_names(["only"]) == ["only"]
    assert short_names([]) == []


def test_a_line_without_values_is_not_in_the_legend() -> None:
    chart = Chart("profile", "t", "block", "y", (Series("a", (0, 1), (1.0, 2.0)), Series("b", (0, 1), (None, None))))
    assert {row["s"] for row in draw(chart, "f").spec["datasets"]["f"]} == {"a"}


def test_a_chart_is_described_by_its_numbers() -> None:
    lines = Chart("profile", "t", "block", "rms", (Series("a", (0, 1, 2), (1.0, 9.0, 3.0)),))
    assert describe(lines) == "Line chart, rms over block. a: 1 at 0 to 3 at 2, highest 9 at 1."
    heat = Chart(
        "heatmap", "t", "channel", "block", (Series("0", (5, 7), (1.0, 2.0)), Series("1", (5, 7), (8.0, None)))
    )
    assert describe(heat) == "Heat map, channel across and block down. Highest 8 at channel 5, block 1."


@needs_browser
def test_every_chart_is_drawn_without_an_error_in_the_console(page: Path, visit: Visit) -> None:
    document, log = visit(page)
    done, total = drawn(document)
    assert done == total >= 12
    outline = Outline(document)
    assert len([a for a in outline.all("svg") if "marks" in (a.get("class") or "")]) == total
    assert "CONSOLE" not in log, log
    assert not outline.all("link", rel="stylesheet")


@needs_browser
def test_hostile_and_non_finite_reports_draw_and_run_nothing(report: Report, visit: Visit, tmp_path: Path) -> None:
    spoilt = hostile(report)
    records = {
        n: replace(r, rms=math.nan, maximum=math.inf, fourth_moment=math.inf) for n, r in spoilt.trace.records.items()
    }
    path = replace(spoilt, trace=replace(spoilt.trace, records=records)).to_html(tmp_path / "h.html")
    document, log = visit(with_script(path, "document.documentElement.dataset.hacked = String(window.hacked)"))
    done, total = drawn(document)
    assert done == total > 0
    assert 'data-hacked="undefined"' in document
    assert "CONSOLE" not in log, log


@needs_browser
def test_the_theme_follows_the_system_and_the_button(page: Path, visit: Visit) -> None:
    dark, _ = visit(page, "--blink-settings=preferredColorScheme=0")
    assert 'data-theme="dark"' in dark
    document, log = visit(with_script(page, "document.getElementById('theme').click()"))
    assert 'data-theme="dark"' in document
    done, total = drawn(document)
    assert done == total
    assert "#6fb0f2" in document.split("<script", 1)[0].lower() or "rgb(111, 176, 242)" in document
    assert "CONSOLE" not in log, log


@needs_browser
def test_the_table_of_sites_sorts_and_filters(page: Path, visit: Visit) -> None:
    act = """
      const heads = [...document.querySelectorAll("#site-table thead button")];
      heads.find((head) => head.textContent === "largest |h|").click();
      const role = document.getElementById("role");
      role.value = "residual";
      role.dispatchEvent(new Event("change"));
      const rows = [...document.querySelectorAll("#site-table tbody tr")].filter((row) => !row.hidden);
      document.documentElement.dataset.first = rows[0].cells[0].textContent;
      document.documentElement.dataset.count = rows.length;"""
    document, _ = visit(with_script(page, act))
    assert 'data-first="model.layers.11 residual"' in document
    assert 'data-count="30"' in document
    assert 'aria-sort="descending"' in document


@needs_browser
def test_a_point_under_the_pointer_shows_its_value_and_site(page: Path, visit: Visit) -> None:
    hover = """
      const ready = () => document.documentElement.dataset.charts ? point() : setTimeout(ready, 50);
      function point() {
        const chart = document.querySelector('[data-figure="profile-0"]');
        const points = chart.querySelectorAll(".mark-symbol path[aria-roledescription=point]");
        points[points.length - 1].dispatchEvent(new PointerEvent("pointermove", { bubbles: true }));
      }
      ready();"""
    document, _ = visit(with_script(page, hover))
    tooltip = document.rpartition('id="vg-tooltip-element"')[2]
    for words in ("block", "magnitude", "median", "model.layers.29 residual"):
        assert words in tooltip
    assert "undefined" not in tooltip


def test_a_heat_map_names_every_row_in_full_and_writes_numbers_out() -> None:
    names = [f"model.layers.{i}.input_layernorm norm" for i in range(3)] + ["model.layers.9 residual"]
    chart = Chart("heatmap", "t", "channel", "site", tuple(Series(n, (1.0, 2.0), (0.1, 20.0)) for n in names), log=True)
    encoding = draw(chart, "f").spec["encoding"]
    assert encoding["y"]["axis"]["labelOverlap"] is False
    assert encoding["y"]["axis"]["labelLimit"] >= 250
    assert "format" not in encoding["color"]["legend"], "SI letters: 100m would stand for 0.1"
    assert encoding["color"]["legend"]["values"] == [0.1, 1.0, 10.0]


def test_what_several_findings_share_is_told_once(report: Report) -> None:
    twice = replace(report, findings=(report.findings[0], replace(report.findings[0], id="massive-activation@other")))
    body = re.sub(r"(?s)<(script|style).*?</\1>", "", render(twice))
    assert body.count("A handful of entries in the residual stream") == 1
    assert body.count("scale per channel, folded") == 1
    assert 'Explained <a href="#finding-0">above</a>' in body
    assert 'The same methods as <a href="#finding-0">above</a>' in body
    assert "Measured 41,873 x median, threshold 1,000 x median." in body
