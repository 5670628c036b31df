"""``setpoint prove`` and ``setpoint results``. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from setpoint.errors import InputError
from setpoint.shell import AsJson, console

if TYPE_CHECKING:
    from rich.progress import TaskID
    from rich.text import Text

    from setpoint.proving import StoredProof
    from setpoint.report.proof import Proof
    from setpoint.studies.engine.schedule import Event, Progress
    from setpoint.types import Judgement


class BudgetName(StrEnum):
    """Budgets as the shell takes them."""

    smoke = "smoke"
    laptop = "laptop"
    full = "full"


class ExecutorName(StrEnum):
    """Executors as the shell takes them."""

    local = "local"
    ray = "ray"


Store = Annotated[Path | None, typer.Option(help="File that holds the runs.", show_default=False)]
Html = Annotated[Path | None, typer.Option(help="Write the page to this file.", show_default=False)]


def add_to(app: typer.Typer) -> None:
    """Add the commands to the shell."""
    app.command()(prove)
    app.command()(results)


def prove(
    key: Annotated[
        str | None, typer.Argument(help="A method's key, or a Python file that declares studies.", show_default=False)
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every method that has studies, one after the other.")] = False,
    budget: Annotated[
        BudgetName, typer.Option(help="smoke: seconds; laptop: minutes on two cores; full: a GPU.")
    ] = BudgetName.laptop,
    seeds: Annotated[int | None, typer.Option(help="Replicates of each arm.", show_default="as the study says")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Run the same comparison on this corpus.", show_default=False)
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="Runs at a time.", show_default="one per core")] = None,
    executor: Annotated[ExecutorName, typer.Option(help="Where runs are done.")] = ExecutorName.local,
    tune: Annotated[bool, typer.Option("--tune", help="Tune here, even if the package has settings.")] = False,
    threads: Annotated[int, typer.Option(help="Threads of each run.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps.")] = "cpu",
    html: Html = None,
    json: AsJson = False,
    store: Store = None,
    store_result: Annotated[bool, typer.Option("--store-result", hidden=True)] = False,
) -> None:
    """Run KEY's proof, baseline against method, and say whether its claims hold."""
    if (key is None) != all_:
        raise InputError("give a method's key, or --all (and not both); `setpoint list` shows the keys")
    if html is not None and (all_ or not html.absolute().parent.is_dir()):
        raise InputError("a page is written for one method, into a folder that exists; give KEY and --html FILE")
    from setpoint.proving import prove as run
    from setpoint.studies.engine.shipped import store_result as keep
    from setpoint.studies.registry import study_keys

    failed = []
    for name in study_keys() if all_ else (str(key),):
        try:
            with _progress() as show:
                proof = run(
                    name,
                    budget=budget.value,
                    seeds=seeds,
                    data=data,
                    jobs=jobs,
                    executor=executor.value,
                    tune=tune,
                    threads=threads,
                    device=device,
                    store=store,
                    progress=show,
                )
        except InputError as error:
            if not all_:
                raise
            failed.append(f"{name}: {error}")
            continue
        if store_result:
            keep(proof)
        _show(proof, json=json, html=html, store=store)
        failed += [f"{name}: {words}" for words in _broken(proof)]
    if failed and all_:
        raise InputError(f"not all of the proofs could be run: {'; '.join(failed)}")
    if failed:
        raise InputError("; ".join(failed))


def _broken(proof: Proof) -> list[str]:
    """Arms of which every run broke, by what broke them."""
    arms: dict[str, dict[str, None]] = {}
    for arm in (arm for study in proof.studies for arm in study.arms if arm.broke):
        arms.setdefault(arm.error, {})[arm.name] = None
    return [f"every run of {', '.join(names)} broke: {error}" for error, names in arms.items()]


def results(
    key: Annotated[
        str | None, typer.Argument(help="Show this method's newest proof in full.", show_default=False)
    ] = None,
    html: Html = None,
    json: AsJson = False,
    store: Store = None,
) -> None:
    """List what was proved on this machine; nothing is run."""
    from setpoint.proving import results as find

    if key is None and html is not None:
        raise InputError("a page is written for one method; give KEY")
    found = find(key, store=store)
    if key is not None:
        if not found:
            raise InputError(f"nothing is stored for {key!r}; run `setpoint prove {key}`")
        if found[0].stale:
            print("setpoint: stale: code or versions have changed since; prove it again", file=sys.stderr)
        _show(found[0].proof, json=json, html=html, store=store)
    elif json:
        sys.stdout.write("[" + ", ".join(entry.proof.to_json(curves=False) for entry in found) + "]\n")
    elif not found:
        console().print("Nothing was proved here yet; run `setpoint prove KEY`.")
    else:
        _list(found)


def _show(proof: Proof, *, json: bool, html: Path | None, store: Path | None) -> None:
    if store is not None:  # where a proof lies is no part of it, but of the call that finds it again
        proof = replace(proof, command=f"{proof.command} --store {shlex.quote(str(store))}")
    if html is not None:
        proof.to_html(html)
    if json:
        sys.stdout.write(proof.to_json() + "\n")
        return
    console().print(proof)
    if html is not None:
        console().print(f"page: {html}", soft_wrap=True)


def _list(found: list[StoredProof]) -> None:
    """Each proof by its studies: every claim on lines of its own, below it the verdict and the effect."""
    from rich.padding import Padding
    from rich.text import Text

    screen = console()
    for entry in found:
        proof = entry.proof
        own = f"on {Path(proof.data).name}" if proof.data else ""  # its verdict is then about those data
        facts = "  ".join(filter(None, [proof.budget, own, proof.date[:10]]))
        stale = ("  stale" if entry.stale else "", "yellow")
        screen.print(Text.assemble((proof.method, "bold"), (f"  {facts}", "dim"), stale))
        for study in proof.studies:
            screen.print(Padding(Text(study.question, style="italic"), (0, 0, 0, 2)))
            for judgement in study.judgements:
                screen.print(Padding(_verdict(judgement), (0, 0, 0, 4)))


def _verdict(judgement: Judgement) -> Text:
    from rich.text import Text

    from setpoint.report.proof_terminal import STYLES
    from setpoint.report.proof_words import estimate_of, span_of

    claim, effect = judgement.claim, judgement.effect
    figure = "" if effect is None else f"  {estimate_of(claim, effect)} [{span_of(claim, effect)}]"
    return Text.assemble(claim.text, "\n  ", (judgement.verdict, STYLES[judgement.verdict]), figure)


@contextmanager
def _progress() -> Iterator[Progress]:
    """One bar over all runs and one for each run that is going on; a line per ended run where there is no terminal."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    errors = console(stderr=True)
    if not errors.is_terminal:
        yield _line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors, transient=True) as bars:
        overall = bars.add_task("starting", total=None, text="")
        going: dict[str, TaskID] = {}

        def show(event: Event) -> None:
            bars.update(overall, description=event.stage, completed=event.finished, total=event.runs, text="")
            if not event.run:
                bars.update(overall, text=event.text)
            elif event.status:
                if event.run in going:
                    bars.remove_task(going.pop(event.run))
            else:
                if event.run not in going:
                    going[event.run] = bars.add_task(f"  {event.run}", total=None, text="")
                bars.update(going[event.run], completed=event.done, total=event.total or None, text=event.text)

        yield show


def _line(event: Event) -> None:
    if event.status and event.text != "stored":
        print(f"{event.stage}: {event.finished} of {event.runs}, {event.run}: {event.status}", file=sys.stderr)
