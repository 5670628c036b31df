"""A line on the terminal that says how far a run is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from setpoint.progress import Progress
from setpoint.train.history import Run, holds_tokens


@contextmanager
def shown(progress: Progress | bool, *, main: bool) -> Iterator[Callable[[Run], None]]:
    """What to call after each step.

    Args:
        progress: False for nothing, True for a bar if standard error is a terminal, or a callable that is given
            steps done, steps in all, and a text.
        main: Only the main process shows anything.
    """
    if progress is False or not main:
        yield _nothing
    elif callable(progress):
        report = progress

        def call(run: Run) -> None:
            report(run.step, run.steps, _text(run))

        yield call
    else:
        with _bar() as update:
            yield update


@contextmanager
def _bar() -> Iterator[Callable[[Run], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _nothing
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, refresh_per_second=4) as bars:
        task = bars.add_task("starting", total=None)

        def update(run: Run) -> None:
            bars.update(task, total=run.steps, completed=run.step, description=_text(run))

        yield update


def _nothing(_: Run) -> None:
    """Show nothing."""


def _text(run: Run) -> str:
    unit = "tokens" if run.batches and holds_tokens(run.batches[0]) else "samples"
    parts = [f"loss {run.loss:.4f}", f"{run.history.items_per_second:,.0f} {unit}/s"]
    for name, value in run.history.final.items():
        if name != "step":
            parts.append(f"held-out {name} {value:.4f}")
    return "  ".join(parts)
