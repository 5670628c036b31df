"""What `fix` gives back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.jupyter import JupyterMixin

from setpoint.fixing.base import Fix
from setpoint.fixing.spec import to_text
from setpoint.types import Change, Edit, Loaded

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from torch import nn


@dataclass(frozen=True, slots=True, eq=False)
class Fixed(JupyterMixin):
    """A changed model and a measured statement of what the change did.

    Args:
        model: The model: a copy that shares unchanged tensors with the original, or the original with ``inplace``.
        change: The measurement.
        fixes: What was applied, in the order in which it was.
        edits: Every edit that was made.
        loaded: The same model with its tokenizer, its task and where it came from. Fix it again by this and not by
            ``model`` alone: it knows what was done before.
        notes: What a user must know: nothing left to do, train before use, optimizers are stale.
    """

    model: nn.Module
    change: Change
    fixes: tuple[Fix, ...]
    edits: tuple[Edit, ...]
    loaded: Loaded
    notes: tuple[str, ...] = ()

    @property
    def specs(self) -> tuple[str, ...]:
        """The shell form of each fix."""
        return tuple(to_text(fix) for fix in self.fixes)

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write the model as a folder that `setpoint.load` reads; all of it or nothing.

        Args:
            folder: Must not exist yet.
            force: Replace it if an earlier fix wrote it.

        Returns:
            The folder.

        Raises:
            InputError: It exists, can't be written, or the model holds parts that can't be described as data.
        """
        from setpoint.fixing.saving import save

        return save(self, Path(folder), force=force)

    def to_dict(self) -> dict[str, Any]:
        """The statement as plain data, for a file or a script."""
        from dataclasses import asdict

        return {
            "schema_version": 1,
            "fixes": list(self.specs),
            "edits": len(self.edits),
            "change": asdict(self.change),
            "notes": list(self.notes),
        }

    def lines(self) -> Iterator[tuple[str, str]]:
        """The statement as ``(what, figures)``, in plain words."""
        change = self.change
        yield "fixes", ", ".join(self.specs)
        if change.exact is not None:
            yield (
                "outputs",
                f"the same: off by {change.exact[0]:.1e} in float64, {change.exact[1]:.1e} in the model's type",
            )
        else:
            yield "outputs", f"moved by up to {change.difference:.3g} ({change.relative:.1%} of the largest)"
        if change.divergence is not None and change.exact is None:
            yield "divergence", f"{change.divergence:.4g} nats between the old and the new predictions"
        if change.perplexity is not None:
            yield "perplexity", f"{change.perplexity[0]:.4g} -> {change.perplexity[1]:.4g}"
        yield "parameters", _pair(change.parameters)
        yield "bytes", _pair(change.bytes)
        yield "time", "not measurable here" if change.time is None else f"{change.time:.3f} x"
        for note in self.notes:
            yield "note", note

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2, 0, 0))
        for what, figures in self.lines():
            table.add_row(Text(what, style="dim"), Text(figures))
        yield table


def _pair(values: tuple[int, int]) -> str:
    before, after = values
    return f"{before:,}" if before == after else f"{before:,} -> {after:,} ({after / before - 1:+.1%})"
