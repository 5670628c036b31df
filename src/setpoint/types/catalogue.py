"""A published method and the items that setpoint has of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["check", "fix", "callback", "part"]
Preserves = Literal["exact", "approximate", "retrain"]


@dataclass(frozen=True, slots=True)
class Item:
    """One thing that a method brings.

    Args:
        id: What ``--with`` and ``--probe`` take; unique over the catalogue.
        kind: ``check`` measures, ``fix`` changes a model, ``callback`` acts during training, ``part`` is built with.
        path: ``module:attribute`` of the code.
        does: One sentence in plain words.
        treats: Finding codes it treats (a check: the codes it raises).
        preserves: For a fix: what stays the same.
    """

    id: str
    kind: Kind
    path: str
    does: str
    treats: tuple[str, ...] = ()
    preserves: Preserves | None = None


@dataclass(frozen=True, slots=True)
class Method:
    """A published method and the items that setpoint has of it.

    Args:
        key: Short name, unique.
        room: Folder below ``setpoint`` where its code lives.
        title, authors, year, arxiv: The paper.
        summary: What it does, in own words.
        items: What it brings.
        proof: Name of its study, or ``"none"`` for a companion.
        result: Its proof's last stored result, None if never run.
    """

    key: str
    room: str
    title: str
    authors: str
    year: int
    arxiv: str
    summary: str
    items: tuple[Item, ...]
    proof: str = "none"
    result: Mapping[str, Any] | None = None

    @property
    def reference(self) -> str:
        """Authors, year and arXiv number in one line."""
        return f"{self.authors}, {self.year}" + (f" · arXiv {self.arxiv}" if self.arxiv else "")

    @property
    def kinds(self) -> frozenset[Kind]:
        """Kinds of its items."""
        return frozenset(item.kind for item in self.items)

    @property
    def treats(self) -> frozenset[str]:
        """Finding codes that its items treat or raise."""
        return frozenset(code for item in self.items for code in item.treats)
