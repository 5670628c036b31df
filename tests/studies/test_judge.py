"""From runs to the four words, edge cases included."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import pytest

from setpoint.errors import InputError
from setpoint.studies.engine.judge import judge
from setpoint.studies.engine.store import Row, RunKey, Status
from setpoint.types import Better, Claim, Equal, Interval, NotWorse, Outcome, Series, Shape

CLAIM = Claim("lower loss", Better(0.5), "loss", "ours", "theirs", unit="nats")


def row(arm: str, seed: int, status: Status = "done", **metrics: float) -> Row:
    key = RunKey("m", "s", "judge", "laptop", arm, {}, seed, "f")
    return Row(key, status, Outcome(metrics) if status != "failed" else None, "boom" if status == "failed" else "", 1.0)


def runs(ours: list[float], theirs: list[float], **more: list[float]) -> dict[str, dict[int, Row]]:
    arms = {"ours": ours, "theirs": theirs, **more}
    return {
        arm: {seed: row(arm, seed, loss=value) for seed, value in enumerate(values)} for arm, values in arms.items()
    }


def between(low: float, high: float) -> Interval:
    return Interval((low + high) / 2, low, high, low, high, 5)


@pytest.mark.parametrize(
    ("criterion", "low", "high", "verdict"),
    [
        (Better(0.1), 0.05, 0.3, "holds"),
        (Better(0.1), 0.01, 0.05, "no effect"),  # there is one, too small to matter
        (Better(0.1), -0.05, 0.05, "no effect"),
        (Better(0.1), -0.05, 0.3, "undecided"),
        (Better(0.1), 0.01, 0.15, "undecided"),  # better for sure, and not for sure by enough
        (Better(0.1), -0.3, -0.01, "reversed"),
        (Better(0.1), -0.05, -0.01, "reversed"),
        (NotWorse(0.1), -0.09, 0.3, "holds"),
        (NotWorse(0.1), -0.2, 0.3, "undecided"),
        (NotWorse(0.1), -0.3, -0.15, "reversed"),
        (Equal(0.1), -0.09, 0.09, "holds"),
        (Equal(0.1), -0.2, 0.05, "undecided"),
        (Equal(0.1), 0.15, 0.3, "reversed"),
        (Equal(0.1), -0.3, -0.15, "reversed"),
    ],
)
def test_a_criterion_gives_the_word_that_its_interval_allows(
    criterion: Better | NotWorse | Equal, low: float, high: float, verdict: str
) -> None:
    assert criterion.judge(between(low, high), 0.1) == verdict


@pytest.mark.parametrize("criterion", [NotWorse(0.1), Equal(0.1)])
def test_what_a_control_passes_too_shows_nothing(criterion: NotWorse | Equal) -> None:
    assert criterion.judge(between(-0.05, 0.05), 0.1, between(-0.05, 0.05)) == "no effect"
    assert criterion.judge(between(-0.05, 0.05), 0.1, between(-0.5, -0.3)) == "holds"
    assert criterion.judge(between(-0.5, -0.3), 0.1, between(-0.05, 0.05)) == "undecided"
    assert criterion.judge(between(-0.5, -0.3), 0.1, between(-0.6, -0.5)) == "reversed"


@pytest.mark.parametrize(
    ("low", "high", "fit", "verdict"),
    [
        (0.4, 0.6, 0.99, "holds"),
        (0.7, 0.8, 0.99, "reversed"),
        (0.4, 0.8, 0.99, "undecided"),
        (0.4, 0.6, 0.5, "no effect"),
    ],
)
def test_a_shape_wants_form_and_parameter(low: float, high: float, fit: float, verdict: str) -> None:
    assert Shape("power", 0.3, 0.65).judge(between(low, high), fit) == verdict


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan, math.inf])
def test_a_smallest_effect_that_is_none_is_refused(bound: float) -> None:
    with pytest.raises(InputError, match="smallest effect that matters"):
        Better(bound)


def test_differences_are_paired_by_replicate() -> None:
    """Seeds differ by far more than the arms do; only pairing sees the effect."""
    theirs = [1.0, 5.0, 9.0, 13.0]
    found = judge(CLAIM, runs([v - 0.6 - 0.01 * i for i, v in enumerate(theirs)], theirs), range(4))
    assert found.verdict == "holds"
    assert found.effect is not None
    assert found.effect.estimate == pytest.approx(0.615)
    assert [pair.replicate for pair in found.pairs] == [0, 1, 2, 3]


def test_better_when_higher_turns_the_sign() -> None:
    data = runs([1.0, 1.1, 1.2], [2.0, 2.2, 2.1])
    assert judge(CLAIM, data, range(3)).verdict == "holds"
    assert judge(replace(CLAIM, better="higher"), data, range(3)).verdict == "reversed"


def test_a_ratio_is_judged_on_logarithms_and_shown_as_a_fraction() -> None:
    claim = replace(CLAIM, scale="ratio", criterion=Better(0.5))
    found = judge(claim, runs([100.0, 110.0, 120.0], [800.0, 880.0, 960.0]), range(3))
    assert found.verdict == "holds"
    assert found.effect is not None
    assert found.effect.estimate == pytest.approx(7.0)
    # 1 / 1.5 is as far from 1 as 1.5: a loss of a third lies at the edge of no effect, not a half
    nearly = judge(claim, runs([139.0, 140.0, 141.0], [100.0, 101.0, 100.0]), range(3))
    assert nearly.verdict == "reversed"


def test_a_ratio_of_what_is_not_positive_is_the_studys_fault() -> None:
    with pytest.raises(InputError, match="needs positive values"):
        judge(replace(CLAIM, scale="ratio"), runs([1.0, 0.0], [1.0, 1.0]), range(2))


def test_a_metric_that_compares_in_itself_is_held_against_none() -> None:
    claim = Claim("equal", Equal(1e-5), "loss", "ours")
    assert judge(claim, runs([1e-7, 3e-7, 2e-7], []), range(3)).verdict == "holds"
    assert judge(claim, runs([1e-2, 1.1e-2, 1e-2], []), range(3)).verdict == "reversed"


def test_identical_replicates_are_said_to_be() -> None:
    found = judge(CLAIM, runs([1.0, 1.0], [2.0, 2.0]), range(2))
    assert found.verdict == "holds"
    assert "no width" in found.reason


def test_one_replicate_is_undecided() -> None:
    found = judge(CLAIM, runs([1.0], [2.0]), range(1))
    assert (found.verdict, found.effect) == ("undecided", None)


def test_a_run_that_diverged_counts_as_the_claim_says() -> None:
    data = runs([1.0, 1.1, 1.0], [2.0, 2.1, 2.0])
    data["theirs"][1] = row("theirs", 1, "diverged")
    silent = judge(CLAIM, data, range(3))
    assert silent.verdict == "undecided"
    assert "1 of 3 runs of theirs diverged" in silent.reason
    counted = judge(replace(CLAIM, diverged=2.2), data, range(3))
    assert counted.verdict == "holds"
    assert "count as 2.2" in counted.reason
    assert counted.pairs[1].baseline == 2.2


@pytest.mark.parametrize(("better", "worst"), [("lower", 7.0), ("higher", 1.0)])
def test_a_run_that_diverged_is_never_ahead_of_one_that_ended_badly(
    better: Literal["lower", "higher"], worst: float
) -> None:
    """The claim counts a divergence as 2.2; another run, finite, ended at 7 (or at 1 where higher is better)."""
    data = runs([1.0, 1.1, 7.0], [2.0, 2.1, 2.0])
    data["theirs"][1] = row("theirs", 1, "diverged")
    found = judge(replace(CLAIM, diverged=2.2, better=better), data, range(3))
    assert found.pairs[1].baseline == worst
    assert f"count as {worst:g}, the worst value of a run that did not" in found.reason


def test_a_control_that_ended_badly_bounds_what_diverged_from_below() -> None:
    claim = replace(CLAIM, criterion=NotWorse(0.1), control="nothing", diverged=2.2)
    data = runs([2.0, 2.0, 2.0], [2.0, 2.1, 2.0], nothing=[9.0, 9.0, 9.0])
    data["ours"][1] = row("ours", 1, "diverged")
    assert judge(claim, data, range(3)).pairs[1].method == 9.0


def test_runs_that_all_diverged_count_as_the_claim_says() -> None:
    data = {arm: {seed: row(arm, seed, "diverged") for seed in range(3)} for arm in ("ours", "theirs")}
    found = judge(replace(CLAIM, diverged=2.2), data, range(3))
    assert [(pair.method, pair.baseline) for pair in found.pairs] == [(2.2, 2.2)] * 3


def test_divergence_itself_is_a_metric() -> None:
    data = runs([1.0] * 4, [1.0] * 4)
    for seed in range(3):
        data["theirs"][seed] = row("theirs", seed, "diverged")
    found = judge(replace(CLAIM, metric="diverged", criterion=Better(0.25)), data, range(4))
    assert found.effect is not None
    assert found.effect.estimate == pytest.approx(0.75)


@pytest.mark.parametrize("kind", ["failed", "missing"])
def test_a_run_that_broke_or_is_missing_leaves_it_undecided(kind: str) -> None:
    data = runs([1.0, 1.1, 1.0], [2.0, 2.1, 2.0])
    if kind == "failed":
        data["ours"][2] = row("ours", 2, "failed")
    else:
        del data["ours"][2]
    found = judge(replace(CLAIM, diverged=9.0), data, range(3))
    assert found.verdict == "undecided"
    assert "1 of 3 runs of ours" in found.reason


def test_a_restless_machine_decides_nothing() -> None:
    claim = replace(CLAIM, steady="plain_again")
    data = runs([1.0, 1.1, 1.0], [2.0, 2.1, 2.0])
    data["ours"] = {s: row("ours", s, loss=1.0 + s / 10, plain_again=0.01 if s else 0.03) for s in range(3)}
    found = judge(claim, data, range(3))
    assert found.verdict == "undecided"
    assert "not measurable here" in found.reason
    data["ours"][0] = row("ours", 0, loss=1.0, plain_again=-0.019)
    assert judge(claim, data, range(3)).verdict == "holds"


def test_a_control_that_passes_too_is_named() -> None:
    claim = replace(CLAIM, criterion=NotWorse(0.1), control="nothing")
    same = [2.0, 2.01, 1.99]
    assert judge(claim, runs(same, same, nothing=[3.0, 3.1, 2.9]), range(3)).verdict == "holds"
    found = judge(claim, runs(same, same, nothing=same), range(3))
    assert found.verdict == "no effect"
    assert "control arm nothing passes too" in found.reason
    assert found.control is not None
    worse = judge(claim, runs([3.0, 3.1, 2.9], same, nothing=same), range(3))
    assert worse.verdict == "undecided"
    assert "control arm nothing passes" in worse.reason


def test_a_shape_is_fitted_to_the_curve_of_every_replicate() -> None:
    claim = Claim("grows linearly", Shape("linear", 0.9, 1.1), "variance over depth", "ours")
    data: dict[str, dict[int, Row]] = {"ours": {}}
    for seed in range(3):
        y = tuple((1 + 0.01 * seed) * x for x in range(8))
        curve = Series("variance over depth", tuple(map(float, range(8))), y)
        data["ours"][seed] = replace(row("ours", seed), outcome=Outcome({}, curves=(curve,)))
    found = judge(claim, data, range(3))
    assert found.verdict == "holds"
    assert [pair.method for pair in found.pairs] == pytest.approx([1.0, 1.01, 1.02])
    assert judge(replace(claim, criterion=Shape("linear", 2.0, 3.0)), data, range(3)).verdict == "reversed"


def test_a_metric_that_no_run_gives_is_named_with_those_there_are() -> None:
    with pytest.raises(InputError, match=r"no run has the metric 'lost'; there are loss, diverged"):
        judge(replace(CLAIM, metric="lost"), runs([1.0, 1.0], [1.0, 1.0]), range(2))
