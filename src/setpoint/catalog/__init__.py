"""The catalogue: every published method that setpoint carries, as data.

One small TOML file per method lies at ``catalog/<room>/<key>.toml``: the paper, and the items that it brings with
the import path of their code. The last result of its proof lies beside it in ``catalog/results/<key>.json``. Reading
the catalogue imports nothing of what it lists, so that ``setpoint list`` answers at once.

>>> from setpoint.catalog import methods, select
>>> methods["massive-refined"].year
2025
>>> [method.key for method in select(treats="rank-collapse")]
['rank-collapse']
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import get_args

from setpoint.catalog.reader import read_folder
from setpoint.errors import InputError, nearest
from setpoint.types import Item, Kind, Method

__all__ = ["Catalog", "UnknownMethod", "find", "items", "methods", "select"]


class UnknownMethod(InputError, KeyError):
    """No method or item has this name; the message offers the nearest ones."""

    __str__ = Exception.__str__  # KeyError would show the message in quotation marks


class Catalog(Mapping[str, Method]):
    """Methods by key, sorted, read from their files on first use.

    Args:
        folder: Where the room folders with the TOML files lie.

    Raises:
        UnknownMethod: (a `KeyError` and a `ValueError`) from ``catalog[key]`` for a key that is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def _methods(self) -> Mapping[str, Method]:
        return read_folder(self.folder)

    def __getitem__(self, key: str) -> Method:
        try:
            return self._methods[key]
        except KeyError:
            raise UnknownMethod(_unknown("method", key, self._methods)) from None

    def __contains__(self, key: object) -> bool:
        return key in self._methods  # without composing the message of an error that nobody sees

    def __iter__(self) -> Iterator[str]:
        return iter(self._methods)

    def __len__(self) -> int:
        return len(self._methods)

    def __repr__(self) -> str:
        return f"<{len(self)} methods: {', '.join(self)}>"


methods: Mapping[str, Method] = Catalog(Path(__file__).parent)
"""Every method of the catalogue by its key; a read-only mapping."""


def items() -> dict[str, tuple[Method, Item]]:
    """Every item of the catalogue with the method it belongs to.

    Returns:
        Item id (what ``--with`` and ``--probe`` take) to ``(method, item)``.

    >>> method, item = items()["massive-activation"]
    >>> method.key, item.kind
    ('massive-refined', 'check')
    """
    return {item.id: (method, item) for method in methods.values() for item in method.items}


def find(name: str) -> Method:
    """The method with this key, or the method that brings the item with this id.

    Args:
        name: A method's key or an item's id; the key wins where both exist.

    Raises:
        UnknownMethod: Nothing is called so. The message names the paper if a report may have named it as one that
            this version does not carry, and the nearest keys and ids otherwise.

    >>> find("massive-activation").key
    'massive-refined'
    """
    if name in methods:
        return methods[name]
    known = items()
    if name in known:
        return known[name][0]
    raise UnknownMethod(_published(name) or _unknown("method or item", name, [*methods, *known]))


def select(kind: Kind | None = None, room: str | None = None, treats: str | None = None) -> tuple[Method, ...]:
    """The methods that meet every filter given, in the order of their keys.

    Args:
        kind: They bring an item of this kind (``check``, ``fix``, ``callback``, ``part``).
        room: They live in this room or below it (``nn`` takes in ``nn/norm``).
        treats: An item treats, or as a check raises, this finding code.

    Raises:
        InputError: A kind, room or code that the catalogue does not have.

    >>> all("check" in method.kinds for method in select(kind="check", room="probe"))
    True
    """
    rooms = {"/".join(parts[:n]) for parts in _room_parts() for n in range(1, len(parts) + 1)}
    _known("kind", kind, set(get_args(Kind)))
    _known("room", room, rooms)
    _known("finding code", treats, {code for method in methods.values() for code in method.treats})
    return tuple(
        method
        for method in methods.values()
        if (kind is None or kind in method.kinds)
        and (room is None or method.room == room or method.room.startswith(room + "/"))
        and (treats is None or treats in method.treats)
    )


def _published(key: str) -> str:
    """What to say of a method that only the literature has; "" if that has not either."""
    import tomllib  # a report's remedies are looked up one at a time: never on the way to a listing

    text = Path(__file__).with_name("literature.toml").read_text(encoding="utf-8")
    for paper in tomllib.loads(text)["paper"]:
        if paper["key"] == key:
            return (
                f"{key} is published and not carried by this version: {paper['title']} ({paper['authors']}, "
                f"{paper['year']}, https://arxiv.org/abs/{paper['arxiv']}) - {paper['does']}"
            )
    return ""


def _room_parts() -> Iterator[list[str]]:
    return (method.room.split("/") for method in methods.values())


def _known(what: str, name: str | None, known: set[str]) -> None:
    if name is not None and name not in known:
        raise InputError(_unknown(what, name, sorted(known)))


def _unknown(what: str, name: str, known: Mapping[str, object] | list[str]) -> str:
    close = nearest(name, dict.fromkeys(known))
    return f"no {what} is called {name!r}" + (f"; the nearest names are {', '.join(close)}" if close else "")
