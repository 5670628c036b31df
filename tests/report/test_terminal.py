from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from setpoint.report import Report
from setpoint.report.wording import facts
from setpoint.types import Task


def printed(what: object, width: int, *, colour: bool = False) -> str:
    file = io.StringIO()
    Console(file=file, width=width, force_terminal=colour, color_system="truecolor" if colour else None).print(what)
    return file.getvalue()


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_every_finding_and_remedy_is_printed_within_the_width(report: Report, width: int) -> None:
    text = printed(report, width)
    assert max(map(len, text.splitlines())) <= width
    joined = "".join(text.split())
    for finding in report.findings:
        assert finding.code in joined or width == 40
        assert all(remedy.key in joined or width == 40 for remedy in finding.remedies)
    assert "1 error, 1 warning, 1 info" in text


def test_the_worst_finding_comes_first(report: Report) -> None:
    text = printed(report, 100)
    assert text.index("variance-growth") < text.index("massive-activation") < text.index("attention-saturation")


def test_a_pipe_gets_no_colour_codes_and_a_terminal_does(report: Report) -> None:
    assert "\x1b" not in printed(report, 80)
    assert "\x1b[" in printed(report, 80, colour=True)


def test_the_heading_names_model_size_and_data(report: Report) -> None:
    heading = printed(report, 200).splitlines()[0]
    for fact in (
        "smollm2",
        "LlamaForCausalLM",
        "135M parameters in float32",
        "2,048 tokens in 4 sequences",
        "data: default",
    ):
        assert fact in heading


def test_many_sites_are_named_by_their_blocks(report: Report) -> None:
    assert "residual of blocks 11-27" in printed(report, 200)


def test_a_healthy_model_gets_a_friendly_line(report: Report) -> None:
    text = printed(replace(report, findings=()), 100)
    assert "Nothing found: 151 sites measured, every signal within its threshold." in text


def test_silence_about_what_was_not_measured_is_not_called_health(report: Report) -> None:
    lacking = {"rank-collapse": "no residual stream", "gradient-imbalance": "needs a loss"}
    lacking["idle-layers"] = lacking["rank-collapse"]
    text = printed(replace(report, findings=(), settings={"not_measured": lacking}), 200)
    assert "Not measured: rank-collapse and idle-layers (no residual stream); gradient-imbalance (needs a" in text
    nothing = replace(report.trace, records={}, attention={})
    text = printed(replace(report, findings=(), trace=nothing, settings={"not_measured": lacking}), 200)
    assert "every signal" not in text
    assert "Nothing was measured." in text


def test_methods_known_from_papers_only_stand_apart(report: Report) -> None:
    text = printed(report, 200)
    assert "apply now: outliertune" in text
    assert "known from papers: massive-refined, osp" in text
    assert "Known from papers: this version does not carry the method" in text
    carried = tuple(replace(f, remedies=tuple(replace(r, available=True) for r in f.remedies)) for f in report.findings)
    assert "nown from papers" not in printed(replace(report, findings=carried), 200)


def test_the_report_ends_with_what_to_type(report: Report) -> None:
    text = printed(report, 80)
    use, proof = "setpoint fix smollm2 --with outliertune -o OUT", "setpoint prove outliertune"
    assert f"  for variance-growth and massive-activation\n    {use}\n    {proof}\n" in text
    assert "OUT is the folder to write" in text
    assert "with osp" not in text


def test_a_step_is_told_once_with_all_findings_that_it_treats(report: Report) -> None:
    twice = (report.findings[0], replace(report.findings[0], code="outlier-channels"))
    text = printed(replace(report, findings=twice), 80)
    assert text.count("--with outliertune") == 1
    assert "for massive-activation and outlier-channels" in text


def test_a_model_given_as_a_module_gets_lines_of_python(report: Report) -> None:
    own = replace(report, model=replace(report.model, source="LlamaForCausalLM"))
    text = printed(own, 80)
    assert 'setpoint.fix(model, "outliertune", batches)' in text
    assert "setpoint fix" not in text


@pytest.mark.parametrize(("task", "unit"), [("language-model", "loss 2.5 nats"), ("other", "loss 2.5")])
def test_only_a_language_models_loss_is_called_nats(report: Report, task: Task, unit: str) -> None:
    trace = replace(report.trace, loss=2.5, task=task)
    assert facts(replace(report, trace=trace))[-1] == unit


@pytest.mark.parametrize(
    ("task", "structure", "tokens", "words"),
    [
        ("language-model", {"attention"}, 2048, "2,048 tokens in 4 sequences"),
        ("image-classification", {"convolution"}, 50176, "4 images"),
        ("other", {"convolution"}, 50176, "4 examples"),
        ("other", set(), 4, "4 examples"),
    ],
)
def test_what_was_run_is_counted_in_words_that_fit(
    report: Report, task: Task, structure: set[str], tokens: int, words: str
) -> None:
    trace = replace(report.trace, task=task, structure=frozenset(structure), tokens=tokens, sequences=4)
    assert words in facts(replace(report, trace=trace))


def test_names_that_look_like_markup_are_printed_as_they_are(report: Report) -> None:
    finding = replace(report.findings[0], sites=("[red]layers.0[/red]",), evidence="[bold]value[/bold] [/nope]")
    text = printed(replace(report, model=replace(report.model, source="[link=x]m[/]"), findings=(finding,)), 200)
    for literal in ("[red]layers.0[/red]", "[bold]value[/bold] [/nope]", "[link=x]m[/]"):
        assert literal in text
