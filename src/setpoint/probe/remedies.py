"""Which methods treat a finding, for the model at hand.

The catalogue comes first: what this version carries. Behind it stands a data file of published methods that are not
carried yet (``catalog/literature.toml``), so that a finding names the paper all the same. Both are filtered by what the
model is made of: a convolutional network is not told about attention.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Literal

from setpoint.catalog.listing import python_form, shell_form
from setpoint.types import Item, Method, Remedy

if TYPE_CHECKING:
    from setpoint.surgery import Anatomy

When = Literal["now", "training"]


@dataclass(frozen=True, slots=True)
class Paper:
    """A method known from the literature, one entry of ``literature.toml``.

    Args:
        key: The method's key.
        title, authors, year, arxiv: The paper.
        treats: Finding codes, or whole ids where it treats one kind of a code's findings only.
        when: ``"now"`` on the model as it is, ``"training"`` when it is trained.
        does: What doing it means, in a few words.
        requires: Words of ``Trace.structure`` that a model must have; ``"a|b"`` means one of them.
        excludes: Words that it must not have.
    """

    key: str
    title: str
    authors: str
    year: int
    arxiv: str
    treats: tuple[str, ...]
    when: When
    does: str
    requires: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()

    def accepts(self, structure: Collection[str]) -> bool:
        """Whether a model with this structure can take the method."""
        return all(any(word in structure for word in need.split("|")) for need in self.requires) and not any(
            word in structure for word in self.excludes
        )

    @property
    def codes(self) -> frozenset[str]:
        """The codes of the findings it treats."""
        return frozenset(treated.partition("@")[0] for treated in self.treats)

    @property
    def reference(self) -> str:
        """Authors, year and arXiv number in one line."""
        return f"{self.authors}, {self.year} · arXiv {self.arxiv}"


@cache
def literature() -> Mapping[str, Paper]:
    """The methods known from the literature, key -> paper, in the file's order."""
    text = (files("setpoint.catalog") / "literature.toml").read_text(encoding="utf-8")
    papers = {}
    for entry in tomllib.loads(text)["paper"]:
        lists = {name: tuple(entry.get(name, ())) for name in ("treats", "requires", "excludes")}
        papers[entry["key"]] = Paper(**{**entry, **lists})
    return papers


def remedies(
    finding: str, structure: Collection[str], methods: Mapping[str, Method] | None = None
) -> tuple[Remedy, ...]:
    """Methods that treat a finding and accept the model: what can be applied now first, carried methods first.

    Args:
        finding: The finding's id, or its code for everything that treats any finding of the code.
        structure: What the model is made of (``Trace.structure``).
        methods: The catalogue; None for none.

    Returns:
        The remedies.

    Example:
        >>> [r.key for r in remedies("norm-mismatch", {"attention", "pre"})]
        ['norm-align']
        >>> remedies("norm-mismatch", {"convolution", "batch-norm"})
        ()
    """
    papers = literature()
    code, _, place = finding.partition("@")

    def treated(by: Collection[str]) -> bool:
        if place:
            return bool({code, finding} & set(by))
        return any(t.partition("@")[0] == code for t in by)

    found: list[Remedy] = []
    carried: set[str] = set()
    for method in (methods or {}).values():
        items = [item for item in method.items if item.kind != "check" and treated(item.treats)]
        if not items:
            continue
        carried.add(method.key)
        if method.key not in papers or papers[method.key].accepts(structure):
            found += [_carried(method, item) for item in items]
    found += [
        Remedy(paper.key, paper.does, paper.when, paper.reference)
        for paper in papers.values()
        if treated(paper.treats) and paper.key not in carried and paper.accepts(structure)
    ]
    return tuple(sorted(found, key=lambda r: (r.when == "training", not r.available)))


def fitting(found: Iterable[Remedy], anatomy: Anatomy) -> tuple[Remedy, ...]:
    """The remedies that a model can take, by the word of each fix itself.

    Args:
        found: From `remedies`, which has looked at what kind of model it is.
        anatomy: Of the model.

    Returns:
        Those that are no fix of setpoint's, and the fixes whose ``applies`` accepts the model.
    """
    return tuple(remedy for remedy in found if not remedy.available or _accepts(remedy.key, anatomy))


def _accepts(key: str, anatomy: Anatomy) -> bool:
    from setpoint.catalog import items

    known = items()
    if key not in known or known[key][1].kind != "fix":
        return True
    module, _, name = known[key][1].path.partition(":")
    fix: Any = getattr(import_module(module), name)()
    return fix.applies(anatomy) is None


def _carried(method: Method, item: Item) -> Remedy:
    return Remedy(
        item.id,
        item.does,
        _when(item),
        method.reference,
        available=True,
        shell=shell_form(item),
        python=python_form(item),
        proof="" if method.proof == "none" else method.key,
    )


def _when(item: Item) -> When:
    return "now" if item.preserves in ("exact", "approximate") else "training"
