"""From catalogue files to `Method`s, strictly.

The files are TOML, written one value a line with the value as JSON writes it::

    summary = "What the method does, in own words."
    proof = "none"

    [paper]
    title = "The title"
    authors = "First et al."
    year = 2025
    arxiv = "2503.22329"

    [[item]]
    id = "massive-activation"
    kind = "check"
    path = "setpoint.probe.massive:MassiveActivation"
    does = "What it does, in a sentence."
    treats = ["massive-activation"]

Key and room are not written down: they are the file's name and folder. Values are read with the C scanner of `json`
and not with `tomllib`, which needs five times as long, and a listing should answer before anyone notices that a
hundred files were read. That the files are TOML all the same is held by a test.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, cast, get_args

from setpoint.errors import InputError, nearest
from setpoint.types import Item, Kind, Method, Preserves

NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
PATH = re.compile(r"setpoint(\.[a-z_][a-z0-9_]*)+:[A-Za-z_]\w*")
ARXIV = re.compile(r"(\d{4}\.\d{4,5})?")
RESULTS = "results"

METHOD_FIELDS = {"summary", "proof", "paper", "item"}
PAPER_FIELDS = {"title", "authors", "year", "arxiv"}
ITEM_FIELDS = {"id", "kind", "path", "does", "treats", "preserves"}


def read_folder(folder: Path) -> dict[str, Method]:
    """Read every ``<room>/<key>.toml`` below a folder and join the results in ``results/<key>.json``.

    Args:
        folder: The catalogue's folder. Files directly in it belong to no room and are no methods.

    Returns:
        The methods by key, sorted by key.

    Raises:
        InputError: A file that is not as the catalogue wants it (the message names the file and the field), a key
            or an item id that two files claim.
    """
    found: dict[str, Method] = {}
    owners: dict[str, str] = {}
    for room, path in _files(str(folder)):
        method = read_file(Path(path), room, folder / RESULTS)
        if method.key in found:
            raise InputError(f"{path}: the key {method.key!r} is taken by {found[method.key].room}/{method.key}.toml")
        found[method.key] = method
        for item in method.items:
            if item.id in owners:
                raise InputError(f"{path}: the item id {item.id!r} is taken by the method {owners[item.id]!r}")
            owners[item.id] = method.key
    return dict(sorted(found.items()))


def read_file(path: Path, room: str, results: Path | None = None) -> Method:
    """Read one catalogue file.

    Args:
        path: The file; its stem is the method's key.
        room: The method's room, e.g. ``"nn/norm"``.
        results: Folder that may hold ``<key>.json`` with the last result of its proof.

    Raises:
        InputError: The file breaks a rule of the catalogue; the message names the file and the field.
    """
    check = _Fields(path)
    key = check.name("the file's name", path.stem)
    document = parse(path.read_text(encoding="utf-8"), str(path))
    check.only("", document, METHOD_FIELDS)
    paper = check.table("[paper]", document.get("paper"))
    check.only("[paper] ", paper, PAPER_FIELDS)
    rows = document.get("item")
    if not isinstance(rows, list):
        check.fail("[[item]]", "at least one", "none")
    return Method(
        key=key,
        room=room,
        title=check.text("[paper] title", paper.get("title")),
        authors=check.text("[paper] authors", paper.get("authors")),
        year=check.year("[paper] year", paper.get("year")),
        arxiv=check.matching("[paper] arxiv", paper.get("arxiv", ""), ARXIV, 'a number like "2503.22329"'),
        summary=check.text("summary", document.get("summary")),
        items=tuple(_item(check, row, number) for number, row in enumerate(rows, start=1)),
        proof=check.name("proof", document.get("proof")),
        result=_result(results / f"{key}.json") if results else None,
    )


def parse(text: str, where: str) -> dict[str, Any]:
    """Read the part of TOML that the catalogue uses: tables, arrays of tables, and one JSON value a line.

    >>> parse('year = 2025\\n[paper]\\ntitle = "T"\\n[[item]]\\nid = "a"', "example")
    {'year': 2025, 'paper': {'title': 'T'}, 'item': [{'id': 'a'}]}
    """
    document: dict[str, Any] = {}
    table = document
    for number, line in enumerate(text.splitlines(), start=1):
        if not line or line[0] == "#":
            continue
        if line.startswith("[["):
            table = {}
            rows = document.setdefault(line[2:-2], [])
            if not isinstance(rows, list):
                raise InputError(f"{where}, line {number}: {line[2:-2]!r} is a value and a table")
            rows.append(table)
        elif line[0] == "[":
            if line[1:-1] in document:
                raise InputError(f"{where}, line {number}: {line} comes twice")
            table = document[line[1:-1]] = {}
        else:
            name, equals, value = line.partition(" = ")
            try:
                if not equals or name in table:
                    raise ValueError
                table[name] = json.loads(value)
            except ValueError:
                raise InputError(
                    f"{where}, line {number}: expected `name = value` with the value on one line as JSON writes it "
                    f"and a name that is new in its table, got {line!r}"
                ) from None
    return document


def _files(folder: str) -> Iterator[tuple[str, str]]:
    """``(room, path)`` of every catalogue file, sorted."""
    rooms = [(entry.name, entry.path) for entry in os.scandir(folder) if entry.is_dir() and entry.name[0].isalpha()]
    for name, path in sorted(rooms):
        if name == RESULTS:
            continue
        for current, below, names in os.walk(path):
            below.sort()
            room = "/".join([name, *os.path.relpath(current, path).split(os.sep)]).removesuffix("/.")
            yield from ((room, os.path.join(current, file)) for file in sorted(names) if file.endswith(".toml"))


def _item(check: _Fields, row: Any, number: int) -> Item:
    where = f"[[item]] {number} "
    check.table(where.rstrip(), row)
    check.only(where, row, ITEM_FIELDS)
    kind = cast(Kind, check.one_of(where + "kind", row.get("kind"), get_args(Kind)))
    preserves = row.get("preserves")
    if (kind == "fix") != (preserves is not None):
        check.fail(where + "preserves", "a value for a fix and none for anything else", preserves)
    if preserves is not None:
        check.one_of(where + "preserves", preserves, get_args(Preserves))
    treats = row.get("treats", [])
    if not isinstance(treats, list) or (kind == "check" and not treats):
        check.fail(where + "treats", "a list of finding codes (for a check, those it raises)", treats)
    return Item(
        id=check.name(where + "id", row.get("id")),
        kind=kind,
        path=check.matching(where + "path", row.get("path"), PATH, '"setpoint.module:attribute"'),
        does=check.text(where + "does", row.get("does")),
        treats=tuple(check.name(where + "treats", code) for code in treats),
        preserves=preserves,
    )


def _result(path: Path) -> Mapping[str, Any] | None:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        result = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); run the proof again to write it anew") from None
    if not isinstance(result, dict):
        raise InputError(f"{path}: expected one JSON object, got a {type(result).__name__}")
    return result


class _Fields:
    """Checks of single values; each failure names the file, the field, what was expected and what came."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fail(self, field: str, expected: str, got: object) -> NoReturn:
        came = "nothing" if got is None else repr(got)
        raise InputError(f"{self.path}: {field}: expected {expected}, got {came}")

    def only(self, where: str, table: Mapping[str, Any], fields: Collection[str]) -> None:
        for name in table:
            if name not in fields:
                raise InputError(
                    f"{self.path}: {where}{name}: no such field; did you mean {nearest(name, sorted(fields), 1)[0]!r}?"
                )

    def table(self, field: str, value: Any) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            self.fail(field, "a table", value)
        return value

    def text(self, field: str, value: Any) -> str:
        if not isinstance(value, str) or not value.strip():
            self.fail(field, "some text", value)
        return value

    def year(self, field: str, value: Any) -> int:
        if not isinstance(value, int) or not 1900 < value < 2100:
            self.fail(field, "a year", value)
        return value

    def name(self, field: str, value: Any) -> str:
        return self.matching(field, value, NAME, "lower-case words joined by hyphens")

    def matching(self, field: str, value: Any, pattern: re.Pattern[str], expected: str) -> str:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            self.fail(field, expected, value)
        return value

    def one_of(self, field: str, value: Any, allowed: Collection[str]) -> str:
        if value not in allowed:
            self.fail(field, " or ".join(map(repr, allowed)), value)
        return cast(str, value)
