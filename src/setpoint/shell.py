"""What the commands share: options that mean the same everywhere, the console, and a line that says what goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from setpoint.progress import Progress, unseen

if TYPE_CHECKING:
    from rich.console import Console

Model = Annotated[
    str,
    typer.Argument(help="A name (smollm2, minilm, vit-s, mobilenetv2), a folder, a .gguf file or module:factory."),
]
Hub = Annotated[bool, typer.Option("--hub", help="MODEL is a Hugging Face id; fetch it.")]
Trust = Annotated[bool, typer.Option("--trust-code", help="Run code that comes with the model's folder.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps.", show_default=False)]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, float16.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def console(*, stderr: bool = False) -> Console:
    """A console that leaves numbers and paths as they are."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


@contextmanager
def shown(*, quiet: bool) -> Iterator[Progress]:
    """A line on standard error that says what is being done; nothing when it is not a terminal."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    errors = console(stderr=True)
    if quiet or not errors.is_terminal:
        yield unseen
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True) as bars:
        task = bars.add_task("starting", total=None)

        def show(done: int, total: int, text: str) -> None:
            bars.update(task, description=text, total=total or None, completed=done)

        yield show
