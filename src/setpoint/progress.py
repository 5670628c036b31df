"""How long work tells how far it is: ``progress(done, total, text)``, with a total of 0 where it is not known."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int, str], None]


def unseen(done: int, total: int, text: str) -> None:
    """Progress that nobody watches."""


def unheard(text: str) -> None:
    """A note that nobody reads."""
