"""The verbs at a shell. Nothing heavy is imported before a command needs it, so that help answers at once."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from setpoint import __version__, cli_fix, cli_proofs
from setpoint.cli_data import app as data_app
from setpoint.errors import InputError
from setpoint.shell import AsJson, Device, Dtype, Hub, Model, Trust, console, shown

if TYPE_CHECKING:
    from setpoint.progress import Progress
    from setpoint.report import Report

app = typer.Typer(
    name="setpoint",
    help="Find what is wrong with the signals inside a deep network.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
models_app = typer.Typer(no_args_is_help=True, help="Models that packages ship: list them, get one.")
app.add_typer(models_app, name="models")
app.add_typer(data_app, name="data")
cli_fix.add_to(app)
cli_proofs.add_to(app)


class SeverityName(StrEnum):
    """Severities as the shell takes them."""

    info = "info"
    warning = "warning"
    error = "error"


class KindName(StrEnum):
    """Kinds of catalogue items as the shell takes them."""

    check = "check"
    fix = "fix"
    callback = "callback"
    part = "part"


Data = Annotated[
    Path | None,
    typer.Option(help="A text file, token ids (.npy, .safetensors) or a folder of images.", show_default=False),
]


@app.command()
def check(
    model: Model,
    data: Data = None,
    loss: Annotated[bool, typer.Option("--loss", help="Also measure gradients of the task's loss.")] = False,
    deep: Annotated[bool, typer.Option("--deep", help="Also intervene: remove what was found and see.")] = False,
    probe: Annotated[
        list[str] | None, typer.Option(metavar="CODE", help="Look for this finding only; repeatable.")
    ] = None,
    ignore: Annotated[list[str] | None, typer.Option(metavar="ID", help="Leave this finding out; repeatable.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    html: Annotated[Path | None, typer.Option(help="Write the page to this file.", show_default=False)] = None,
    json: AsJson = False,
    fail_on: Annotated[
        SeverityName | None, typer.Option(help="Exit with 1 if a finding is this bad.", show_default=False)
    ] = None,
    hub: Hub = False,
    trust_code: Trust = False,
) -> None:
    """Measure the signals inside MODEL on real inputs and say what is wrong with them."""
    with shown(quiet=json) as show:
        show(0, 0, f"loading {model}")
        from setpoint.checkup import check as run
        from setpoint.loading import load

        if html is not None:
            _writable(html)
        report = run(
            load(model, hub=hub, trust_code=trust_code),
            data=data,
            loss=loss,
            deep=deep,
            probes=probe or (),
            ignore=ignore or (),
            device=device,
            dtype=dtype,
            progress=show,
        )
        if html is not None:
            show(0, 0, "drawing the page")
            report.to_html(html)
    if json:
        sys.stdout.write(report.to_json() + "\n")
    else:
        screen = console()
        screen.print(report)
        if html is not None:
            screen.print(f"report: {html}", soft_wrap=True)
    if fail_on is not None and report.exceeds(fail_on.value):
        raise typer.Exit(1)


def _writable(path: Path) -> None:
    """Say before minutes of work that the page can't be written."""
    if path.is_dir():
        raise InputError(f"{path} is a folder. Give the name of a file to write, e.g. {path / 'report.html'}.")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path} can't be written: the folder {path.absolute().parent} does not exist.")


@app.command()
def anatomy(model: Model, data: Data = None, hub: Hub = False, trust_code: Trust = False) -> None:
    """Print what MODEL is made of, as one traced pass shows it."""
    with shown(quiet=False) as show:
        show(0, 0, f"loading {model}")
        from setpoint.loading import batches_for, load
        from setpoint.surgery import Anatomy
        from setpoint.surgery.tree import LEGEND

        loaded = load(model, hub=hub, trust_code=trust_code)
        batches = batches_for(loaded, data, tokens=64, count=1)
        show(0, 0, "reading the structure")
        tree = Anatomy.trace(loaded.model, batches[0], forward=loaded.forward).tree()
    screen = console()
    screen.print(tree)
    screen.print(f"\n{LEGEND}", style="dim", markup=False, highlight=False)


@app.command()
def diff(
    a: Annotated[str, typer.Argument(help="A model, or a report saved with --json or --html.")],
    b: Annotated[str, typer.Argument(help="Another.")],
    data: Data = None,
    json: AsJson = False,
    hub: Hub = False,
    trust_code: Trust = False,
) -> None:
    """Say what changed between two models, or between two saved reports."""
    with shown(quiet=json) as show:
        from setpoint.report import diff as compare

        reports = [_report(source, data, hub, trust_code, show) for source in (a, b)]
    change = compare(*reports)
    if json:
        sys.stdout.write(change.to_json() + "\n")
    else:
        console().print(change)


def _report(source: str, data: Path | None, hub: bool, trust_code: bool, show: Progress) -> Report:
    from setpoint.report import Report

    path = Path(source)
    if path.is_file() and path.suffix in {".json", ".html"}:
        return Report.from_json(path)
    from setpoint.checkup import check as run
    from setpoint.loading import load

    show(0, 0, f"loading {source}")
    return run(load(source, hub=hub, trust_code=trust_code), data=data, progress=show)


@app.command(name="list")
def list_(
    kind: Annotated[KindName | None, typer.Option(help="Only methods with items of this kind.")] = None,
    room: Annotated[str | None, typer.Option(help="Only this room, e.g. probe or nn/norm.")] = None,
    treats: Annotated[str | None, typer.Option(metavar="CODE", help="Only what treats this finding.")] = None,
    json: AsJson = False,
) -> None:
    """List the methods that setpoint has."""
    from setpoint.catalog import select
    from setpoint.catalog.listing import as_json, render_list

    chosen = select(kind=kind.value if kind else None, room=room, treats=treats)
    if json:
        sys.stdout.write(as_json(chosen) + "\n")
    else:
        console().print(render_list(chosen))


@app.command()
def show(
    key: Annotated[str, typer.Argument(help="A method's key, as in `setpoint list`.")], json: AsJson = False
) -> None:
    """Show one method: its paper, what it does, how to call it, what its proof gave."""
    from setpoint.catalog import find
    from setpoint.catalog.listing import as_json, render_method

    method = find(key)
    if json:
        sys.stdout.write(as_json([method]) + "\n")
    else:
        console().print(render_method(method))


@models_app.command("list")
def models_list(json: AsJson = False) -> None:
    """List the models that packages ship, and where each was found."""
    from setpoint.loading import packaged

    known = packaged()
    if json:
        import json as encoder
        from dataclasses import asdict

        sys.stdout.write(encoder.dumps([asdict(model) for model in known.values()]) + "\n")
        return
    from rich.table import Table

    table = Table("name", "what", "task", "licence", "here", box=None, padding=(0, 2, 0, 0))
    for model in known.values():
        here = "yes" if model.available else f"setpoint models get {model.name}"
        table.add_row(model.name, model.what, model.task, model.license, here)
    console().print(table)


@models_app.command("get")
def models_get(name: Annotated[str, typer.Argument(help="A name from `setpoint models list`.")]) -> None:
    """Download the package that ships NAME and keep its weights in the cache."""
    with shown(quiet=False) as show:
        from setpoint.loading import get

        path = get(name, progress=show)
    console().print(f"{name}: {path}", soft_wrap=True)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"setpoint {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Find what is wrong with the signals inside a deep network."""


BROKEN = 70
"""Exit code for a fault of setpoint's own (EX_SOFTWARE), so that a pipeline doesn't take it for findings."""


def main(args: list[str] | None = None) -> Any:
    """Run the command line; a user's error is one line on standard error and exit code 2."""
    try:
        return app(args)
    except InputError as error:
        print(f"setpoint: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == 130:  # Typer's answer to Ctrl-C says nothing
            print("setpoint: stopped", file=sys.stderr)
        raise
    except Exception:
        import traceback

        traceback.print_exc()
        print("setpoint: this is a fault of setpoint, not of the model; please report it", file=sys.stderr)
        sys.exit(BROKEN)


if __name__ == "__main__":
    main()
