"""A proof from end to end, on a study in a file of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

import setpoint
from setpoint.cli import main
from setpoint.errors import InputError
from setpoint.proving import prove, results
from setpoint.report.proof import Proof
from setpoint.studies.engine import shipped as shipped_module
from setpoint.studies.engine.fingerprint import sources
from setpoint.studies.engine.schedule import Event
from setpoint.studies.engine.shipped import store_result
from setpoint.studies.engine.store import Store
from setpoint.studies.registry import find_studies, source_file
from setpoint.types import ArmResult, StudyResult

Logged = Callable[[Path], list[list[str]]]


@pytest.fixture
def db(tmp_path: Path) -> Path:
    return tmp_path / "proofs.db"


def test_a_real_effect_holds_and_settings_are_each_arms_best(own_study: Path, db: Path) -> None:
    proof = prove(str(own_study), jobs=1, store=db)
    assert proof.verdict == "holds"
    assert [judgement.verdict for judgement in proof.judgements] == ["holds", "holds"]
    (study,) = proof.studies
    assert {arm.name: arm.setting for arm in study.arms} == {"plain": {"lr": 0.1}, "method": {"lr": 0.4}}
    assert [{trial.setting["lr"] for trial in arm.trials} for arm in study.arms] == [{0.05, 0.1, 0.2, 0.4, 0.8}] * 2
    assert study.notes == ()
    assert "beyond the declared grid every arm tried lr 0.05 and 0.8" in study.tuning
    assert study.arms[0].cost["parameters"] == 10
    assert study.arms[0].cost["memory"] > 0
    assert study.arms[0].curves[0].x == (0.0, 1.0, 2.0)


@pytest.mark.parametrize(("effect", "verdicts"), [("0.0", ("no effect", "holds")), ("-1.0", ("reversed", "reversed"))])
def test_a_null_is_a_null_and_a_harm_is_reversed(
    make_study: Callable[..., Path], db: Path, effect: str, verdicts: tuple[str, str]
) -> None:
    proof = prove(str(make_study(effect=effect)), jobs=1, store=db)
    assert tuple(judgement.verdict for judgement in proof.judgements) == verdicts


def test_tuning_has_its_own_split_seeds_and_sizes(own_study: Path, db: Path, logged: Logged) -> None:
    prove(str(own_study), jobs=1, store=db)
    tuning = [line for line in logged(own_study) if line[0] == "valid"]
    judged = [line for line in logged(own_study) if line[0] == "test"]
    assert {line[3] for line in tuning} == {"1000"}
    assert {line[3] for line in judged} == {"0", "1", "2", "3"}
    assert {line[4] for line in tuning} == {"3"}
    assert {line[4] for line in judged} == {"10"}


def test_a_second_call_runs_nothing(own_study: Path, db: Path, logged: Logged) -> None:
    first = prove(str(own_study), jobs=1, store=db)
    count = len(logged(own_study))
    second = prove(str(own_study), jobs=1, store=db)
    assert len(logged(own_study)) == count == 18
    assert second.studies == first.studies


def test_more_seeds_run_only_what_is_new(own_study: Path, db: Path, logged: Logged) -> None:
    prove(str(own_study), seeds=2, jobs=1, store=db)
    prove(str(own_study), seeds=3, jobs=1, store=db)
    assert len([line for line in logged(own_study) if line[0] == "test"]) == 2 * 3


def test_workers_give_the_same_numbers_as_this_process(
    own_study: Path, db: Path, tmp_path: Path, logged: Logged
) -> None:
    alone = prove(str(own_study), jobs=1, store=db)
    shared = prove(str(own_study), jobs=2, store=tmp_path / "other.db")
    assert [j.pairs for j in shared.judgements] == [j.pairs for j in alone.judgements]
    assert len({line[5] for line in logged(own_study)}) == 3


def test_changed_code_makes_results_stale_and_deletes_nothing(
    make_study: Callable[..., Path], db: Path, logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study()
    prove(str(study), jobs=1, store=db)
    assert [entry.stale for entry in results(store=db)] == [False]
    rows = len(Store(db).rows())
    make_study(source=study.read_text().replace("3.0 + 0.1", "3.5 + 0.1"))
    forget(monkeypatch)
    assert [entry.stale for entry in results(store=db)] == [True]
    prove(str(study), jobs=1, store=db)
    assert len(Store(db).rows()) == 2 * rows
    assert [entry.stale for entry in results(store=db)] == [False, True]


def test_a_comment_makes_nothing_stale(
    make_study: Callable[..., Path], db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study()
    prove(str(study), jobs=1, store=db)
    study.write_text("# a remark\n" + study.read_text())
    forget(monkeypatch)
    assert [entry.stale for entry in results(store=db)] == [False]


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a new process would: no study file is loaded."""
    import sys

    for name in [name for name in sys.modules if name.startswith("setpoint_study_")]:
        monkeypatch.delitem(sys.modules, name)


def test_a_run_that_breaks_is_told_and_tried_again(own_study: Path, db: Path, logged: Logged) -> None:
    (own_study.parent / "break").touch()
    proof = prove(str(own_study), jobs=1, store=db)
    assert proof.verdict == "undecided"
    assert "1 of 4 runs of method broke" in proof.judgements[0].reason
    assert any("something broke" in note for note in proof.studies[0].notes)
    (own_study.parent / "break").unlink()
    count = len(logged(own_study))
    assert prove(str(own_study), jobs=1, store=db).verdict == "holds"
    assert len(logged(own_study)) == count + 2


def test_a_worker_that_dies_fails_its_run_and_no_other(own_study: Path, db: Path) -> None:
    (own_study.parent / "die").touch()
    proof = prove(str(own_study), jobs=2, store=db)
    assert proof.verdict == "undecided"
    assert any("exit code 9" in note for note in proof.studies[0].notes)
    assert [arm.failed for arm in proof.studies[0].arms] == [0, 1]
    assert prove(str(own_study), jobs=1, store=db).verdict == "holds"


def test_smoke_runs_untuned_and_asserts_nothing(own_study: Path, db: Path, logged: Logged) -> None:
    proof = prove(str(own_study), budget="smoke", jobs=1, store=db)
    assert {judgement.verdict for judgement in proof.judgements} == {"undecided"}
    assert {line[0] for line in logged(own_study)} == {"test"}


def test_ones_own_corpus_reaches_every_run_and_is_part_of_the_key(
    own_study: Path, db: Path, tmp_path: Path, logged: Logged
) -> None:
    corpus = tmp_path / "my.txt"
    corpus.write_text("one")
    assert prove(str(own_study), budget="smoke", data=corpus, jobs=1, store=db).data == "my.txt"
    assert {line[6] for line in logged(own_study)} == {str(corpus)}
    prove(str(own_study), budget="smoke", data=corpus, jobs=1, store=db)
    assert len(logged(own_study)) == 8
    corpus.write_text("two")
    prove(str(own_study), budget="smoke", data=corpus, jobs=1, store=db)
    assert len(logged(own_study)) == 16


def test_a_tuning_stage_without_time_says_so(make_study: Callable[..., Path], db: Path) -> None:
    study = make_study()
    study.write_text(study.read_text().replace('metric="loss", options', 'metric="loss", minutes=1e-9, options'))
    with pytest.raises(InputError, match="ended before every arm had tried one setting"):
        prove(str(study), jobs=1, store=db)


def test_arms_under_unequal_conditions_are_refused(make_study: Callable[..., Path], db: Path) -> None:
    study = make_study()
    study.write_text(study.read_text().replace('{"steps": budget["steps"]}', '{"steps": len(arm.name)}'))
    with pytest.raises(InputError, match="plain has 5, method has 6"):
        prove(str(study), budget="smoke", jobs=1, store=db)


def test_runs_leave_the_generators_and_threads_of_the_caller_alone(own_study: Path, db: Path) -> None:
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    prove(str(own_study), budget="smoke", jobs=1, threads=2, store=db)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_num_threads() == threads


def test_progress_goes_over_runs_and_within_them(own_study: Path, db: Path) -> None:
    events: list[Event] = []
    prove(str(own_study), jobs=1, store=db, progress=events.append)
    assert {event.stage for event in events} == {"tuning shifted", "running shifted"}
    assert any(event.run and event.done == 1 and event.total == 1 for event in events)
    ended = [event.finished for event in events if event.stage == "running shifted" and event.status]
    assert ended == list(range(1, 9))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"budget": "huge"}, "budget should be one of smoke, laptop, full"),
        ({"seeds": 1}, "at least 2 seeds"),
        ({"seeds": 1001}, "at most 1000 seeds"),
        ({"jobs": 0}, "at least one job"),
        ({"threads": 0}, "at least one thread"),
        ({"executor": "slurm"}, "no executor is called 'slurm'"),
        ({"data": "absent.txt"}, "absent.txt does not exist"),
    ],
)
def test_what_can_not_be_used_is_named(own_study: Path, db: Path, given: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        prove(str(own_study), store=db, **given)  # type: ignore[arg-type]


def test_a_study_on_its_own_data_only_refuses_a_corpus(db: Path, own_study: Path) -> None:
    with pytest.raises(InputError, match="takes no other"):
        prove("batchnorm", data=own_study, store=db)


@pytest.mark.parametrize(("content", "words"), [(b"", "is empty"), (b"\xff\xfe\x00\x81", "is not UTF-8")])
def test_a_corpus_that_can_not_be_read_starts_no_run(
    own_study: Path, db: Path, tmp_path: Path, logged: Logged, content: bytes, words: str
) -> None:
    corpus = tmp_path / "mine.txt"
    corpus.write_bytes(content)
    with pytest.raises(InputError, match=words):
        prove(str(own_study), budget="smoke", data=corpus, store=db)
    assert logged(own_study) == []


def test_the_shell_fails_when_every_run_of_an_arm_broke(
    make_study: Callable[..., Path], db: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_study().read_text().replace('if (HERE / "break").exists() and seed == 1:', 'if arm.name == "method":')
    study = make_study(source=source)
    assert run("prove", str(study), "--budget", "smoke", "--jobs", "1", "--store", str(db)) == 2
    shown = capsys.readouterr()
    assert "4 broke" in shown.out
    assert "every run of method broke: RuntimeError: something broke" in shown.err


def test_one_error_of_several_arms_is_told_once_with_all_of_them(make_study: Callable[..., Path], db: Path) -> None:
    source = make_study().read_text().replace('if (HERE / "break").exists() and seed == 1:', "if True:")
    study = make_study(source=source)
    (result,) = prove(str(study), budget="smoke", jobs=1, store=db).studies
    assert "plain, method: RuntimeError: something broke" in result.notes


def test_methods_without_a_study_say_why(db: Path) -> None:
    with pytest.raises(InputError, match="has no proof of its own"):
        prove("rank-collapse", store=db)
    with pytest.raises(InputError, match="the nearest names"):
        prove("bachnorm", store=db)


def test_ray_that_is_not_there_names_its_extra(own_study: Path, db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"setpoint\[scale\]"):
        prove(str(own_study), executor="ray", store=db)


@pytest.mark.slow
def test_ray_gives_the_same_numbers(own_study: Path, db: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    here = prove(str(own_study), jobs=1, store=db)
    there = prove(str(own_study), jobs=2, executor="ray", store=tmp_path / "ray.db")
    assert [j.pairs for j in there.judgements] == [j.pairs for j in here.judgements]


def test_the_catalogue_keeps_figures_and_settings_and_no_curves(own_study: Path, db: Path, tmp_path: Path) -> None:
    proof = prove(str(own_study), jobs=1, store=db)
    path = store_result(proof, tmp_path)
    kept = Proof.from_json(path)
    assert path.name == "own-study.json"
    assert [j.effect for j in kept.judgements] == [j.effect for j in proof.judgements]
    assert kept.studies[0].arms[0].curves == ()
    assert {"processor", "cores"} <= set(kept.machine)
    assert kept.versions["torch"] == version("torch")
    assert kept.date


def test_smoke_and_foreign_data_are_no_results(own_study: Path, db: Path, tmp_path: Path) -> None:
    smoke = prove(str(own_study), budget="smoke", jobs=1, store=db)
    with pytest.raises(InputError, match="smoke run says nothing"):
        store_result(smoke, tmp_path)
    foreign = prove(str(own_study), data=own_study, jobs=1, store=db)
    with pytest.raises(InputError, match="corpus of yours"):
        store_result(foreign, tmp_path)


@pytest.fixture
def stored_batchnorm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put a result of the first study of batchnorm, at a learning rate, where the package has its own."""

    def put(rate: float, sources: dict[str, str] | None = None) -> None:
        (study, *_) = find_studies("batchnorm")
        arms = tuple(ArmResult(arm.name, arm.does, {"lr": rate}) for arm in study.arms)
        result = StudyResult(study.name, study.question, (), arms, "seed", (0, 1), {})
        text = Proof("batchnorm", "laptop", (result,), sources=sources or {}).to_json()
        (tmp_path / "batchnorm.json").write_text(text)
        monkeypatch.setattr(shipped_module.shipped, "__defaults__", (tmp_path,))

    return put


def first_rate(study: int) -> float:
    """The first learning rate that a study of batchnorm declares."""
    tuning = find_studies("batchnorm")[study].tuning
    assert tuning is not None
    return float(tuning.grid["lr"][0])


@pytest.mark.parametrize("rate", [8.0, 32.0])  # of the grid, and within reach of it
def test_the_package_gives_the_settings_of_its_own_result(
    db: Path, stored_batchnorm: Callable[..., None], rate: float
) -> None:
    """A smoke run of a shipped method takes its settings from the stored result, not the first of the grid."""
    stored_batchnorm(rate, sources(source_file("batchnorm")))
    first, second, _ = prove("batchnorm", budget="smoke", jobs=1, store=db).studies
    assert {arm.setting["lr"] for arm in first.arms} == {rate}
    assert "stored result" in first.tuning
    assert not any("code has changed" in note for note in first.notes)
    assert {arm.setting["lr"] for arm in second.arms} == {first_rate(1)}  # the stored result does not know it


def test_settings_that_other_code_was_tuned_with_are_said_to_be(
    db: Path, stored_batchnorm: Callable[..., None]
) -> None:
    stored_batchnorm(8.0, {"execution": "0"})
    (first, *_) = prove("batchnorm", budget="smoke", jobs=1, store=db).studies
    assert any("code has changed since the settings were tuned" in note for note in first.notes)


def test_settings_that_the_grid_could_not_give_are_not_taken(db: Path, stored_batchnorm: Callable[..., None]) -> None:
    stored_batchnorm(7.0, sources(source_file("batchnorm")))
    (first, *_) = prove("batchnorm", budget="smoke", jobs=1, store=db).studies
    assert {arm.setting["lr"] for arm in first.arms} == {first_rate(0)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, s: replace(p, studies=()), "lacks the study shifted"),
        (lambda p, s: replace(p, studies=(replace(s, replicates=(0, 1)),)), "has 4 replicates, this one 2"),
        (lambda p, s: with_arms(p, s, failed=1), "1 of 4 runs of plain in shifted broke"),
        (lambda p, s: with_arms(p, s, runs=3), "1 runs of plain in shifted are missing"),
        (lambda p, s: with_arms(p, s, trials=()), "plain in shifted was not tuned"),
    ],
)
def test_less_than_the_study_declares_is_no_result(
    own_study: Path, db: Path, tmp_path: Path, change: Callable[[Proof, StudyResult], Proof], message: str
) -> None:
    proof = prove(str(own_study), jobs=1, store=db)
    with pytest.raises(InputError, match=message):
        store_result(change(proof, proof.studies[0]), tmp_path)
    assert not list(tmp_path.glob("*.json"))


def with_arms(proof: Proof, study: StudyResult, **changes: Any) -> Proof:
    arms = tuple(replace(arm, **changes) for arm in study.arms)
    return replace(proof, studies=(replace(study, arms=arms),))


def test_the_shell_proves_lists_and_writes_pages(
    own_study: Path, db: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "proof.html"
    args = [str(own_study), "--jobs", "1", "--store", str(db)]
    assert run("prove", *args, "--html", str(page)) == 0
    assert "holds" in capsys.readouterr().out
    assert page.read_text().startswith("<!doctype html>")
    assert run("prove", *args, "--json") == 0
    assert json.loads(capsys.readouterr().out)["method"] == "own-study"
    assert run("results", "--store", str(db)) == 0
    assert "own-study" in capsys.readouterr().out
    assert run("results", "own-study", "--store", str(db)) == 0
    assert "Is the better arm better?" in capsys.readouterr().out
    assert run("results", "dyt", "--store", str(db)) == 2
    assert "setpoint prove dyt" in capsys.readouterr().err
    assert run("prove") == 2
    assert "--all" in capsys.readouterr().err


def test_looking_into_a_store_that_is_not_there_makes_none(db: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("results", "--store", str(db)) == 2
    assert f"there is no store {db}" in capsys.readouterr().err
    assert not db.exists()


def test_the_call_that_a_proof_ends_with_finds_its_store(
    own_study: Path, db: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"--budget smoke --store {db}"
    assert run("prove", str(own_study), "--budget", "smoke", "--jobs", "1", "--store", str(db)) == 0
    assert words in "".join(capsys.readouterr().out.split("\n"))
    assert run("results", "own-study", "--store", str(db)) == 0
    assert words in "".join(capsys.readouterr().out.split("\n"))


def test_results_stand_below_their_questions_within_80_columns(
    own_study: Path, db: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prove(str(own_study), budget="smoke", jobs=1, store=db)
    monkeypatch.setenv("COLUMNS", "80")
    assert run("results", "--store", str(db)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.strip() for line in lines[1:3]] == ["Is the better arm better?", "Its loss is lower."]
    assert lines[3].strip().startswith("undecided  +")


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(args))
    return int(stop.value.code or 0)


def test_the_front_door_has_the_verb() -> None:
    assert setpoint.prove is prove
    assert setpoint.Proof is Proof


def test_all_goes_on_after_one_that_can_not_be_run(
    own_study: Path, db: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = own_study.with_name("empty.py")
    empty.touch()
    monkeypatch.setattr("setpoint.studies.registry.study_keys", lambda: (str(empty), str(own_study)))
    assert run("prove", "--all", "--budget", "smoke", "--jobs", "1", "--store", str(db)) == 2
    shown = capsys.readouterr()
    assert "Is the better arm better?" in shown.out
    assert "not all of the proofs could be run" in shown.err
    assert "empty.py declares no study" in shown.err


DIVERGING = """
from setpoint.studies import *
from setpoint.train import History, NonFiniteLoss

SIZE = Budget(2, 1)

@study(
    "What counts as diverged?",
    arms=(Arm("own", "says so"), Arm("loop", "as the training loop says it"), Arm("metric", "gives what is no number")),
    claims=(Claim("it does", Better(0.5), "diverged", "own"),),
    budgets={"smoke": SIZE, "laptop": SIZE, "full": SIZE},
)
def diverging(arm, setting, seed, budget, ctx):
    if arm.name == "own":
        raise Diverged("loss 9e99 at step 3")
    if arm.name == "loop":
        raise NonFiniteLoss("nan", step=3, history=None, report=None, batches=())
    return Outcome({"loss": float("nan")})
"""


def test_a_run_diverges_by_its_own_word_that_of_the_loop_or_its_metrics(
    make_study: Callable[..., Path], db: Path
) -> None:
    proof = prove(str(make_study("diverging", source=DIVERGING)), jobs=1, store=db)
    assert [(arm.runs, arm.diverged, arm.failed) for arm in proof.studies[0].arms] == [(2, 2, 0)] * 3
    assert any("loss 9e99 at step 3" in note for note in proof.studies[0].notes)
    assert proof.judgements[0].pairs[0].method == 1.0
