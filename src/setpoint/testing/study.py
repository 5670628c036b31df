"""The list that every study must pass, setpoint's own and a stranger's.

A proof is believed for what it compares, so a study must be repeatable under a seed, differ from seed to seed, give
each arm the same chances, tune on other data than it judges on, and name its metrics the right way round.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from setpoint.errors import InputError
from setpoint.report.proof import Proof
from setpoint.studies.declare import TUNING_SEED, Arm, Budget, Context, Study
from setpoint.studies.engine.assemble import assemble
from setpoint.studies.engine.execute import Finished, run_once
from setpoint.studies.engine.store import Row, RunKey
from setpoint.studies.engine.tune import Tuned
from setpoint.testing.probe import ConformanceError
from setpoint.types.proving import Outcome, Shape

LOWER = ("loss", "error", "perplexity", "steps_to", "seconds", "nats", "bits", "spikes", "diverged")
HIGHER = ("accuracy", "auc", "r2", "score", "f1")
SMOKE_SECONDS = 60.0
LAPTOP_MINUTES, TUNING_MINUTES = 10.0, 60.0


def check_study(study: Study) -> None:
    """Hold a study to what setpoint asks of every study. It is run at its smoke budget, a few times per arm.

    Args:
        study: What `setpoint.studies.study` made.

    Raises:
        ConformanceError: (an `AssertionError`) at the first rule that is broken, with what to do about it.

    Example:
        >>> from setpoint.studies import find_studies
        >>> check_study(find_studies("batchnorm")[0])
    """
    _declaration(study)
    _directions(study)
    budget = study.budgets["smoke"]
    seeds = range(budget.seeds)
    runs = {arm.name: {seed: _run(study, arm, seed, budget) for seed in seeds} for arm in study.arms}
    for arm in study.arms:
        _gives_what_claims_need(study, arm, runs[arm.name][0])
        _repeatable(study, arm, runs[arm.name][0], budget)
        _other_data_when_tuning(study, arm, runs[arm.name][0], budget)
    _seeds_matter(study, runs)
    _same_conditions(study, runs)
    _shared_knobs(study, budget)
    _round_trip(study, budget, runs)


def _demand(kept: bool, study: Study, advice: str) -> None:
    if not kept:
        raise ConformanceError(f"study {study.name!r} {advice}")


def _declaration(study: Study) -> None:
    """Before anything runs: in words that a reader can judge, and within the house's budgets."""
    _demand(study.question.strip().endswith("?"), study, f"asks {study.question!r}: put its question as a question")
    for claim in study.claims:
        _demand(bool(claim.text.strip()), study, f"has a claim on {claim.metric!r} without a text")
    for arm in study.arms:
        _demand(bool(arm.does.strip()), study, f"does not say what the arm {arm.name!r} is")
    for arm, other in _pairs(study):
        same = dict(arm.options) == dict(other.options) and dict(arm.knobs) == dict(other.knobs)
        told_apart = same and not arm.options and not arm.knobs  # the run may go by the name alone
        _demand(
            not same or told_apart,
            study,
            f"has the arms {arm.name!r} and {other.name!r} with the same options: they differ in nothing",
        )
    laptop = study.budgets["laptop"]
    _demand(laptop.minutes <= LAPTOP_MINUTES, study, f"wants {laptop.minutes:g} minutes at laptop: at most 10")
    _demand(laptop.seeds >= 3, study, f"has {laptop.seeds} replicates at laptop: at least 3 for an interval of use")
    if study.tuning:
        _demand(
            study.tuning.minutes <= TUNING_MINUTES, study, f"tunes for {study.tuning.minutes:g} minutes: at most 60"
        )


def _directions(study: Study) -> None:
    """A metric has one better side, and it is the one that its name says."""
    found = {claim.metric: claim.better for claim in study.claims if not isinstance(claim.criterion, Shape)}
    for claim in study.claims:
        agrees = isinstance(claim.criterion, Shape) or found[claim.metric] == claim.better
        _demand(agrees, study, f"calls {claim.metric!r} better when lower in one claim and when higher in another")
    if study.tuning:
        agrees = found.get(study.tuning.metric, study.tuning.better) == study.tuning.better
        _demand(agrees, study, f"tunes {study.tuning.metric!r} to be {study.tuning.better} and claims the opposite")
        found[study.tuning.metric] = study.tuning.better
    for metric, better in found.items():
        wrong = LOWER if better == "higher" else HIGHER
        hit = next(
            (word for word in wrong if word in metric.lower().split("_") or metric.lower().startswith(word)), None
        )
        _demand(hit is None, study, f"says that {metric!r} is better when {better}: set `better` the other way")


def _run(study: Study, arm: Arm, seed: int, budget: Budget, ctx: Context | None = None) -> Finished:
    """One run at the first setting, with the errors that a study makes turned into advice."""
    import torch

    steps: list[int] = []
    ctx = replace(ctx or Context(), progress=lambda done, *_: steps.append(done))
    before = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads())
    setting = study.settings(arm)[0]
    try:
        finished = run_once(study, arm, setting, seed, budget, ctx)
    except Exception as error:
        raise ConformanceError(
            f"study {study.name!r} breaks on arm {arm.name!r} at {setting} ({type(error).__name__}: {error})"
        ) from error
    after = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads())
    _demand(before == after, study, "leaves torch's default dtype, grad mode or thread count changed: put them back")
    _demand(finished.status == "done", study, f"diverges at smoke ({finished.error}): make the smoke setting tame")
    _demand(bool(steps), study, "never calls ctx.progress: say how far a run is, at least once")
    seconds = _outcome(finished).cost["seconds"]
    _demand(seconds <= SMOKE_SECONDS, study, f"takes {seconds:.0f} s for one smoke run: make it smaller")
    return finished


def _outcome(finished: Finished) -> Outcome:
    assert finished.outcome is not None
    return finished.outcome


def _gives_what_claims_need(study: Study, arm: Arm, finished: Finished) -> None:
    outcome = _outcome(finished)
    curves = {curve.name for curve in outcome.curves}
    for claim in study.claims:
        if arm.name not in (claim.method, claim.baseline, claim.control):
            continue
        have = curves if isinstance(claim.criterion, Shape) else {*outcome.metrics, "diverged"}
        _demand(
            claim.metric in have, study, f"claims about {claim.metric!r}, and arm {arm.name!r} gives {sorted(have)}"
        )
        steady = claim.steady is None or claim.steady in outcome.metrics
        _demand(steady, study, f"wants {claim.steady!r} to be steady, and arm {arm.name!r} does not give it")
    if study.tuning:
        given = study.tuning.metric in outcome.metrics
        _demand(given, study, f"tunes {study.tuning.metric!r}, which arm {arm.name!r} does not give")
    for curve in outcome.curves:
        _demand(len(curve.x) == len(curve.y), study, f"has a curve {curve.name!r} with x and y of different lengths")


def _repeatable(study: Study, arm: Arm, first: Finished, budget: Budget) -> None:
    if study.alone:  # what is timed is never the same twice
        return
    again = _run(study, arm, 0, budget)
    _demand(
        _figures(first) == _figures(again),
        study,
        f"gives other figures on arm {arm.name!r} when seed 0 runs again: draw all randomness from generators that the "
        "seed sets",
    )


def _other_data_when_tuning(study: Study, arm: Arm, first: Finished, budget: Budget) -> None:
    if study.tuning is None:
        return
    tuned = _run(study, arm, 0, budget, Context(split="valid"))
    _demand(
        _figures(first) != _figures(tuned),
        study,
        f"gives the same figures on arm {arm.name!r} when tuning: measure on the part that ctx.split names",
    )
    assert max(b.seeds for b in study.budgets.values()) < TUNING_SEED


def _seeds_matter(study: Study, runs: Mapping[str, Mapping[int, Finished]]) -> None:
    """In every arm: one that stands still makes the interval of a paired difference too narrow."""
    if study.alone:  # what is timed differs anyway, which shows nothing
        return
    for arm, by_seed in runs.items():
        first, *others = (_figures(finished) for finished in by_seed.values())
        _demand(
            all(other != first for other in others),
            study,
            f"gives the same figures for every seed on arm {arm!r}: a replicate must draw something anew",
        )


def _same_conditions(study: Study, runs: Mapping[str, Mapping[int, Finished]]) -> None:
    """Equal but for what the claim is about."""
    conditions = {arm: _outcome(by_seed[0]).conditions for arm, by_seed in runs.items()}
    _demand(all(conditions.values()), study, "gives no conditions: list steps, batch size and data that all arms share")
    for (arm, ours), (other, theirs) in zip(conditions.items(), list(conditions.items())[1:], strict=False):
        _demand(
            dict(ours) == dict(theirs),
            study,
            f"gives {arm!r} {dict(ours)} and {other!r} {dict(theirs)}: make them equal",
        )
    counts = {arm: _outcome(by_seed[0]).cost.get("parameters") for arm, by_seed in runs.items()}
    known = {arm: count for arm, count in counts.items() if count is not None}
    _demand(
        not known or max(known.values()) <= (1 + study.parameter_slack) * min(known.values()),
        study,
        f"has arms of {known} parameters: match them, or say with parameter_slack how far they may differ and why",
    )


@dataclass
class _Watched(Mapping[str, Any]):
    """A setting that notes which of its values were read."""

    values_: Mapping[str, Any]
    read: set[str] = field(default_factory=set)

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return self.values_[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)


def _shared_knobs(study: Study, budget: Budget) -> None:
    """Every arm turns every knob that it is tuned with."""
    for arm in study.arms if study.tuning else ():
        watched = _Watched(study.settings(arm)[0])
        run_once(study, arm, watched, 0, budget, Context())
        unread = sorted(set(watched) - watched.read)
        _demand(
            not unread,
            study,
            f"tunes {', '.join(unread)}, which arm {arm.name!r} never reads: use it, or give it to the arms that do as "
            "Arm.knobs",
        )


def _round_trip(study: Study, budget: Budget, runs: Mapping[str, Mapping[int, Finished]]) -> None:
    rows = {
        arm: {seed: _row(study, arm, seed, done) for seed, done in by_seed.items()} for arm, by_seed in runs.items()
    }
    tuned = Tuned({arm.name: study.settings(arm)[0] for arm in study.arms}, {}, "")
    try:
        result = assemble(study, budget, tuned, rows, range(budget.seeds))
        proof = Proof(study.key, "smoke", (result,))
        text = proof.to_json()
        _demand(
            json.loads(Proof.from_json(text).to_json()) == json.loads(text),
            study,
            "gives a result that JSON does not bring back as it was",
        )
    except (InputError, TypeError, ValueError) as error:
        raise ConformanceError(f"study {study.name!r} gives a result that can't be judged or saved: {error}") from error


def _row(study: Study, arm: str, seed: int, finished: Finished) -> Row:
    key = RunKey(study.key, study.name, "judge", "smoke", arm, study.settings(study.arm(arm))[0], seed, "")
    return Row(key, finished.status, finished.outcome, finished.error, 0.0)


def _figures(finished: Finished) -> tuple[Any, ...]:
    """What a run found, without what it cost."""
    outcome = _outcome(finished)
    return {n: _key(v) for n, v in outcome.metrics.items()}, [(c.name, c.x, c.y) for c in outcome.curves]


def _key(value: float) -> float | str:
    return "nan" if math.isnan(value) else float(value)


def _pairs(study: Study) -> Iterator[tuple[Arm, Arm]]:
    return ((a, b) for i, a in enumerate(study.arms) for b in study.arms[i + 1 :])
