"""A proof in a terminal: per study its claims with verdict, effect and interval, then what the arms were and cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from rich import box
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from setpoint.errors import InputError
from setpoint.report.proof_words import cost_of, criterion_of, estimate_of, plain, setting_of, span_of
from setpoint.report.wording import plural
from setpoint.types.proving import Judgement, StudyResult, Verdict

if TYPE_CHECKING:
    from rich.console import RenderableType

    from setpoint.report.proof import Proof

STYLES: Mapping[Verdict, str] = {
    "holds": "bold green",
    "reversed": "bold red",
    "no effect": "cyan",
    "undecided": "yellow",
}


def proof_lines(proof: Proof) -> Iterator[RenderableType]:
    """The parts of a proof, top to bottom."""
    own = f"on {proof.data}" if proof.data else ""
    where = ", ".join(filter(None, [own, proof.machine.get("processor", ""), proof.date[:10]]))
    yield Text.assemble((proof.method, "bold"), (f"  {proof.budget} budget · {where}", "dim"))
    if proof.budget == "smoke":
        yield Text("A smoke run shows that the study runs from end to end; its figures say nothing.", style="yellow")
    for study in proof.studies:
        yield Text()
        yield Text.assemble((study.question, "bold"), ("  " + _replicates(study), "dim"))
        yield _claims(study, strong=proof.budget != "smoke")
        yield _arms(study)
        yield Padding(Text(f"settings: {study.tuning or 'nothing to tune'}", style="dim"), (0, 0, 0, 2))
        for note in study.notes:
            yield Padding(Text(note, style="dim"), (0, 0, 0, 2))
    yield Text()
    yield Text.assemble(("again: ", "dim"), proof.command)


def summary(proof: Proof) -> Text:
    """A proof in a few lines: what each study asks, its claims with verdict, effect and interval, and where it ran."""
    lines = []
    for study in proof.studies:
        lines.append(Text(study.question, style="italic"))
        lines += [_claim_line(judgement) for judgement in study.judgements]
    where = [f"{proof.budget} budget", proof.date[:10], proof.machine.get("processor", "")]
    where += [f"torch {version}" if (version := proof.versions.get("torch")) else "", f"`{proof.command}`"]
    lines.append(Text(" · ".join(filter(None, where)), style="dim"))
    if _code_has_changed(proof):
        lines.append(Text("measured with another version of the code", style="dim"))
    return Text("\n").join(lines)


def _code_has_changed(proof: Proof) -> bool:
    from setpoint.studies.engine.fingerprint import has_changed
    from setpoint.studies.registry import source_file

    try:
        return has_changed(proof.sources, source_file(proof.source or proof.method))
    except InputError:  # the study is gone, or a file of another machine
        return True


def _claim_line(judgement: Judgement) -> Text:
    claim, effect = judgement.claim, judgement.effect
    word = (f"  {judgement.verdict:<9}", STYLES[judgement.verdict])
    if effect is None:
        return Text.assemble(word, "  ", claim.text)
    figure = f"  {estimate_of(claim, effect)}"
    return Text.assemble(word, "  ", claim.text, figure, (f" [{span_of(claim, effect)}]", "dim"))


def _replicates(study: StudyResult) -> str:
    return plural(len(study.replicates), study.replicate)


def _claims(study: StudyResult, *, strong: bool) -> Table:
    table = Table(box=box.HORIZONTALS, pad_edge=False, expand=True, header_style="dim", border_style="dim")
    table.add_column("verdict", no_wrap=True)
    table.add_column("claim", ratio=5, overflow="fold")
    table.add_column("effect and 95 % interval", ratio=4, overflow="fold")
    for judgement in study.judgements:
        claim = Text.assemble(judgement.claim.text, "\n", (criterion_of(judgement.claim), "dim"))
        table.add_row(
            Text(judgement.verdict, style=STYLES[judgement.verdict]), claim, _effect_text(judgement, strong=strong)
        )
    return table


def _effect_text(judgement: Judgement, *, strong: bool) -> Text:
    """The effect, its two intervals and why the verdict is what it is; an effect that says nothing is not strong."""
    claim, effect = judgement.claim, judgement.effect
    if effect is None:
        return Text(judgement.reason)
    return Text.assemble(
        (estimate_of(claim, effect), "bold" if strong else "dim"),
        (f"  [{span_of(claim, effect)}]\n", "" if strong else "dim"),
        (f"bootstrap [{span_of(claim, effect, bootstrap=True)}]; {judgement.reason}", "dim"),
    )


def _arms(study: StudyResult) -> Table:
    names = list(dict.fromkeys(name for arm in study.arms for name in arm.cost))
    table = Table(
        "arm", "setting", *map(plain, names), box=None, pad_edge=False, padding=(0, 2, 0, 2), header_style="dim"
    )
    for arm in study.arms:
        ends = [f"{count} {word}" for count, word in ((arm.diverged, "diverged"), (arm.failed, "broke")) if count]
        label = Text.assemble((arm.name, "bold"), (" " + ", ".join(ends), "yellow") if ends else "")
        costs = [cost_of(name, arm.cost[name]) if name in arm.cost else "–" for name in names]
        table.add_row(label, setting_of(arm.setting), *costs)
    return table
