"""Fixes as text: ``pre-rmsnorm,dyt:alpha=0.8:embedding_scale=false``.

One grammar for every fix: an item id of the catalogue, then ``:field=value`` for the fields of its dataclass; items are
separated by commas, the values of a list by ``+``.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from importlib import import_module
from typing import Any, cast, get_origin

from setpoint.catalog import items
from setpoint.errors import InputError, nearest
from setpoint.fixing.base import Fix

_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def fix_class(id: str) -> type[Fix]:
    """The class behind an item id.

    Args:
        id: Of a catalogue item of kind fix.

    Raises:
        InputError: There is none of this name; the message offers the nearest, or says what the item is instead.
    """
    known = items()
    fixes = {name: item for name, (_, item) in known.items() if item.kind == "fix"}
    if id in fixes:
        module, _, name = fixes[id].path.partition(":")
        return cast(type[Fix], getattr(import_module(module), name))
    if id in known:
        method, item = known[id]
        others = [other.id for other in method.items if other.kind == "fix"]
        hint = f"; {method.key} brings the fix {', '.join(others)}" if others else ""
        raise InputError(f"{id!r} is a {item.kind}, not a fix{hint}. See: setpoint show {method.key}")
    alike = ", ".join(nearest(id, fixes, likeness=0.6))
    hint = f"; the nearest: {alike}" if alike else ""
    raise InputError(f"no fix is called {id!r}{hint}. See: setpoint list --kind fix")


def parse(text: str) -> list[Fix]:
    """Read the shell form of one or several fixes.

    Args:
        text: Such as ``"pre-rmsnorm"`` or ``"dyt:alpha=0.5"``, several separated by commas.

    Returns:
        The fixes in the order named.

    Raises:
        InputError: An unknown fix or field (the message lists the fields with their types), or a value that does not
            fit its field.

    >>> parse("pre-rmsnorm")
    [PreRMSNorm()]
    """
    found = []
    for part in text.split(","):
        id, *pairs = (piece.strip() for piece in part.strip().split(":"))
        if not id:
            raise InputError(f"expected key[:field=value]… separated by commas, got {text!r}")
        found.append(_make(fix_class(id), id, pairs))
    return found


def to_text(fix: Fix) -> str:
    """The shell form of a fix: its id and the fields that are not at their defaults.

    >>> to_text(parse("pre-rmsnorm")[0])
    'pre-rmsnorm'
    """
    parts = [fix.id]
    for field in dataclasses.fields(cast(Any, fix)):
        value = getattr(fix, field.name)
        if value != field.default:
            parts.append(f"{field.name}={_written(value)}")
    return ":".join(parts)


def chosen(fixes: str | Fix | Sequence[str | Fix]) -> list[Fix]:
    """Fixes out of what a caller may give: text, a fix, or several of either.

    Raises:
        InputError: As `parse`, or nothing was given.
        TypeError: Something that is no fix.
    """
    if isinstance(fixes, str):
        return parse(fixes)
    if isinstance(fixes, type):
        raise TypeError(f"expected a fix, got the class {fixes.__name__}; make one: {fixes.__name__}()")
    if isinstance(fixes, Sequence):
        found = [fix for each in fixes for fix in chosen(each)]
        if not found:
            raise InputError("expected at least one fix, got none. See: setpoint list --kind fix")
        return found
    if not isinstance(fixes, Fix):
        raise TypeError(f"expected a fix, or its text such as 'pre-rmsnorm', got a {type(fixes).__name__}")
    return [fixes]


def _make(kind: type[Fix], id: str, pairs: Sequence[str]) -> Fix:
    fields = {field.name: field for field in dataclasses.fields(cast(Any, kind)) if field.init}
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or name not in fields:
            raise InputError(f"{id}: expected field=value, got {pair!r}; {_fields(id, fields, hints)}")
        if name in values:
            raise InputError(f"{id}: {name} is given twice")
        values[name] = _read(text.strip(), hints[name], f"{id}:{name}")
    try:
        return kind(**values)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"{id}: {error}; {_fields(id, fields, hints)}") from error


def _fields(id: str, fields: dict[str, Any], hints: dict[str, Any]) -> str:
    if not fields:
        return f"{id} has no fields"
    return f"fields of {id}: " + ", ".join(
        f"{name} ({_named(hints[name])}" + (")" if f.default is dataclasses.MISSING else f", {_written(f.default)})")
        for name, f in fields.items()
    )


def _options(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if isinstance(kind, types.UnionType) or get_origin(kind) is typing.Union else (kind,)


def _named(kind: Any) -> str:
    names = []
    for option in _options(kind):
        if option is type(None):
            names.append("none")
        elif get_origin(option) is typing.Literal:
            names += [str(value) for value in typing.get_args(option)]
        elif get_origin(option) in (tuple, list):
            names.append(f"{_named(typing.get_args(option)[0])}+…")
        else:
            names.append(option.__name__)
    return " or ".join(names)


def _read(text: str, kind: Any, where: str) -> Any:
    for option in _options(kind):
        try:
            return _as(text, option)
        except ValueError:
            continue
    raise InputError(f"{where}: expected {_named(kind)}, got {text!r}")


def _as(text: str, kind: Any) -> Any:
    if kind is type(None):
        if text.lower() == "none":
            return None
        raise ValueError
    if kind is bool:
        if text.lower() not in _WORDS:
            raise ValueError
        return _WORDS[text.lower()]
    if get_origin(kind) is typing.Literal:
        for value in typing.get_args(kind):
            if str(value) == text:
                return value
        raise ValueError
    if get_origin(kind) in (tuple, list):
        inner = typing.get_args(kind)[0]
        return get_origin(kind)(_as(part, inner) for part in text.split("+"))
    return kind(text)


def _written(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, tuple | list):
        return "+".join(map(_written, value))
    return str(value)
