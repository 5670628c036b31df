"""A proof as JSON, in a terminal and as a page."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from setpoint.errors import InputError
from setpoint.report.proof import Proof
from setpoint.report.proof_page import render
from setpoint.report.proof_words import criterion_of, zone_of
from setpoint.types import (
    ArmResult,
    Band,
    Better,
    Claim,
    Equal,
    Interval,
    Judgement,
    NotWorse,
    Pair,
    Shape,
    StudyResult,
    Trial,
)

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
RATIO = Claim("Fewer steps <b>are</b> needed.", Better(0.5), "steps_to_95", "ours", "theirs", scale="ratio")
PARITY = Claim("The loss stays.", NotWorse(0.01), "loss", "ours", "theirs", unit="nats", control="nothing")
SAME = Claim("Nothing changes.", Equal(1e-5), "difference", "ours")
GROWS = Claim("It grows linearly.", Shape("linear", 0.9, 1.1), "variance over depth", "ours")


def interval(estimate: float, half: float) -> Interval:
    low, high = estimate - half, estimate + half
    return Interval(estimate, low, high, low + half / 4, high - half / 4, 3)


def make_proof(**changes: object) -> Proof:
    pairs = tuple(Pair(seed, 100.0 + seed, 800.0 + 10 * seed) for seed in range(3))
    steps = tuple(map(float, range(0, 300, 10)))
    mean = tuple(3.0 / (1 + s / 50) for s in steps)
    curve = Band("loss over step", steps, mean, tuple(m - 0.1 for m in mean), tuple(m + 0.1 for m in mean))
    trials = (Trial({"lr": 0.1}, 1.5), Trial({"lr": 1.0}, 0.5), Trial({"lr": 10.0}, None))
    arms = tuple(
        ArmResult(
            name, f"the arm {name}", {"lr": 1.0}, 3, int(name == "theirs"), 0,
            {"seconds": 4.2, "memory": 4.1e8, "parameters": 27_710.0}, trials, (curve,),
        )
        for name in ("theirs", "ours")
    )  # fmt: skip
    judgements = (
        Judgement(RATIO, "holds", "the interval says so", interval(7.0, 1.0), pairs),
        Judgement(PARITY, "no effect", "the control passes too", interval(0.0, 0.005), (), interval(0.001, 0.004)),
        Judgement(SAME, "reversed", "it changed", interval(0.1, 0.01), (Pair(0, 0.1, None), Pair(1, 0.11, None))),
        Judgement(GROWS, "undecided", "1 of 3 runs of ours is missing", None, (Pair(0, None, None),)),
    )
    study = StudyResult(
        "walk", "Is ours better?", judgements, arms, "seed", (0, 1, 2), {"steps": 300, "rates": [0.1, 1.0]},
        "6 tuning runs per arm", "loss", ("ours is best at the edge of its grid: lr 1.0",),
    )  # fmt: skip
    values: dict[str, object] = {
        "method": "ours",
        "budget": "laptop",
        "studies": (study,),
        "source": "ours",
        "date": "2026-01-02T03:04:05+00:00",
        "seconds": 90.0,
        "machine": {"processor": "A processor", "cores": "2"},
        "versions": {"torch": "2.13.0", "scikit-learn": ""},
        "fingerprint": "abc",
        "command": "setpoint prove ours --budget laptop",
    }
    return Proof(**{**values, **changes})  # type: ignore[arg-type]


def printed(proof: Proof, width: int = 140) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(proof)
    return out.getvalue()


def test_json_brings_a_proof_back_as_it_was() -> None:
    proof = make_proof()
    again = Proof.from_json(proof.to_json())
    assert again.studies == proof.studies
    assert again.to_json() == proof.to_json()


def test_json_can_leave_the_curves_out() -> None:
    again = Proof.from_json(make_proof().to_json(curves=False))
    assert all(arm.curves == () for study in again.studies for arm in study.arms)
    assert again.judgements == make_proof().judgements


def test_numbers_that_are_not_finite_survive_json() -> None:
    proof = make_proof()
    lost = replace(proof.judgements[0], pairs=(Pair(0, math.inf, math.nan),))
    study = replace(proof.studies[0], judgements=(lost,))
    (pair,) = Proof.from_json(replace(proof, studies=(study,)).to_json()).judgements[0].pairs
    assert pair.method == math.inf
    assert math.isnan(pair.baseline or 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema_version": 99}', "schema version 99, this setpoint reads 1"),
        ('{"verdict": "holds"}', "schema version None"),
        ('{"schema_version": 1', "not valid JSON"),
        ('{"schema_version": 1, "method": "a"}', "has no 'budget'"),
    ],
)
def test_what_is_no_proof_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Proof.from_json(text)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.json"):
        Proof.from_json(tmp_path / "absent.json")


def test_the_headline_is_the_first_claim_and_a_smoke_run_has_none() -> None:
    assert make_proof().verdict == "holds"
    assert make_proof(budget="smoke").verdict == "undecided"


def test_terminal_has_every_claim_with_effect_interval_cost_and_command() -> None:
    text = " ".join(printed(make_proof()).split())
    for part in ("8 ×", "[7 to 9 ×]", "no effect", "reversed", "undecided", "4.2 s", "410 MB", "27.7k", "1 diverged"):
        assert part in text
    assert "Fewer steps <b>are</b> needed." in text
    assert "setpoint prove ours --budget laptop" in text
    assert "A smoke run" in printed(make_proof(budget="smoke"))


def test_a_narrow_terminal_keeps_every_verdict() -> None:
    text = printed(make_proof(), width=60)
    assert all(word in text for word in ("holds", "no effect", "reversed", "undecided"))


def test_criteria_are_put_into_words() -> None:
    assert criterion_of(RATIO) == "ours better than theirs in steps to 95 by 50 % or more"
    assert criterion_of(PARITY) == "ours at most 0.01 nats worse than theirs in loss"
    assert criterion_of(SAME) == "ours equal in difference within 1.000e-05"
    assert criterion_of(GROWS) == "variance over depth of ours is linear, parameter 0.9 to 1.1"
    assert zone_of(RATIO, 0.01) == "±1 %"


def test_the_page_needs_nothing_else_and_escapes_what_a_study_says() -> None:
    page = render(make_proof())
    assert "default-src 'none'" in page
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', page)
    assert "Fewer steps &lt;b&gt;are&lt;/b&gt; needed." in page
    assert "<b>are" not in page


def test_the_page_shows_effects_costs_tuning_and_how_to_run_again() -> None:
    page = render(make_proof())
    body = re.sub(r"(?s)<(script|style).*?</\1>", "", page)
    for part in ("8 ×", "410 MB", "4.2 s", "27.7k", "tuned to", "lr 1.0", "Every setting that was tried", "diverged"):
        assert part in body
    assert "setpoint prove ours --budget laptop" in body
    specs = json.loads(re.search(r'(?s)id="figures">(.*?)</script>', page).group(1))  # type: ignore[union-attr]
    assert set(specs) == {"effect-0-0", "effect-0-1", "effect-0-2", "curve-0-0", "trials-0"}
    band = specs["curve-0-0"]["datasets"]["curve-0-0"]
    assert {row["s"] for row in band} == {"ours", "theirs"}
    assert {"low", "high", "y"} <= set(band[0])
    ticks = [row["v"] for row in specs["effect-0-0"]["datasets"]["effect-0-0"] if "v" in row]
    assert ticks == pytest.approx([8.0, 810 / 101, 820 / 102])


def figures(proof: Proof) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(re.search(r'(?s)id="figures">(.*?)</script>', render(proof)).group(1))  # type: ignore[union-attr]
    return found


def axis(figure: Any, layer: int = 0) -> Any:
    return figure["layer"][layer]["encoding"]["x"]


def test_a_ratio_near_one_is_drawn_in_per_cent_as_the_text_has_it() -> None:
    claim = replace(RATIO, criterion=NotWorse(0.01))
    pairs = (Pair(0, 1.0, 0.99), Pair(1, 1.0, 1.0))
    near = Judgement(claim, "undecided", "", interval(-0.00319, 0.004), pairs)
    drawn = figures(make_proof(studies=(replace(make_proof().studies[0], judgements=(near,)),)))["effect-0-0"]
    assert axis(drawn, 2)["title"] == "effect, %"
    rows = drawn["datasets"]["effect-0-0"]
    assert rows[0]["mid"] == pytest.approx(-0.319)
    assert [row["v"] for row in rows if "v" in row] == pytest.approx([-1.0, 0.0])
    assert axis(figures(make_proof())["effect-0-0"], 2)["title"] == "effect, times as good"


def test_a_smoke_run_draws_no_effect_and_prints_none_large() -> None:
    smoke = make_proof(budget="smoke")
    assert set(figures(smoke)) == {"curve-0-0", "trials-0"}
    assert 'class="estimate"' not in render(smoke)
    assert 'class="estimate"' in render(make_proof())


def test_names_of_the_code_become_words() -> None:
    study = make_proof().studies[0]
    arms = tuple(replace(arm, cost={"seconds_per_step": 0.1}, setting={"embedding_std": 0.2}) for arm in study.arms)
    named = make_proof(studies=(replace(study, arms=arms, options={"held_out": 8}),))
    body = re.sub(r"(?s)<(script|style).*?</\1>", "", render(named))
    for text in (body, printed(named)):
        assert "seconds per step" in text
        assert "embedding std 0.2" in text
        assert "_" not in text
    assert "held out 8" in body


@pytest.mark.parametrize(
    ("tried", "log"),
    [((0.05, 0.1, 0.2), True), ((1e-3, 3e-3, 1e-2), True), ((1.0, 2.0, 3.0), False), ((0.1, 0.2), False)],
)
def test_a_grid_that_multiplies_is_drawn_on_a_logarithmic_axis(tried: tuple[float, ...], log: bool) -> None:
    study = make_proof().studies[0]
    trials = tuple(Trial({"lr": rate}, 1.0) for rate in tried)
    arms = tuple(replace(arm, trials=trials) for arm in study.arms)
    drawn = figures(make_proof(studies=(replace(study, arms=arms),)))["trials-0"]
    assert (axis(drawn)["scale"].get("type") == "log") is log


def test_of_many_arms_only_those_of_the_first_claim_have_bands() -> None:
    study = make_proof().studies[0]
    arms = (*study.arms, replace(study.arms[0], name="third"), replace(study.arms[0], name="fourth"))
    drawn = figures(make_proof(studies=(replace(study, arms=arms),)))["curve-0-0"]
    assert drawn["layer"][0]["transform"][0]["filter"]["oneOf"] == ["theirs", "ours"]
    assert {row["s"] for row in drawn["datasets"]["curve-0-0"]} == {"theirs", "ours", "third", "fourth"}


def test_a_few_blocks_have_a_tick_each_and_many_steps_have_not() -> None:
    study = make_proof().studies[0]
    blocks = Band("variance over block", (0.0, 1.0, 2.0), (1.0, 2.0, 3.0), (1.0, 2.0, 3.0), (1.0, 2.0, 3.0))
    arms = tuple(replace(arm, curves=(*arm.curves, blocks)) for arm in study.arms)
    drawn = figures(make_proof(studies=(replace(study, arms=arms),)))
    assert axis(drawn["curve-0-1"])["axis"]["values"] == [0.0, 1.0, 2.0]
    assert "values" not in axis(drawn["curve-0-0"])["axis"]


def test_a_page_of_a_study_without_results_is_still_a_page() -> None:
    study = replace(make_proof().studies[0], judgements=(make_proof().judgements[3],), arms=())
    assert "1 of 3 runs of ours is missing" in render(make_proof(studies=(study,)))
    assert "Proof of ours" in render(make_proof(studies=()))


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")
def test_a_browser_draws_every_chart_without_a_word_of_complaint(tmp_path: Path) -> None:
    page = make_proof().to_html(tmp_path / "proof.html")
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=60000",
        "--window-size=1280,900", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert 'data-charts="5/5"' in done.stdout
    assert "CONSOLE" not in done.stderr
