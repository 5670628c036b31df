"""Dataclasses to JSON and back, without a hand-written pair of functions per class.

`encode` turns frozen dataclasses into plain objects; `decode` reads them back by their annotations and checks every
value on the way, so that a damaged file gives one line that names the place. JSON has no infinities, so numbers that
are not finite are written as the strings ``"nan"``, ``"inf"`` and ``"-inf"`` and come back as numbers. Arrays are
written with six significant digits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import PurePath
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from setpoint.errors import InputError
from setpoint.types import Record

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class _Array:
    """Stands for numpy's arrays in annotations."""


_SPARSE = (Record,)  # mostly unset statistics: a field that holds None is left out


def _is_array(value: Any) -> bool:
    """Whether it is an array or a scalar of numpy, told without importing numpy."""
    return hasattr(value, "dtype") and hasattr(value, "ndim")


def encode(value: Any, *, arrays: bool = True) -> Any:
    """Plain JSON data for ``value``.

    Args:
        value: A dataclass, mapping, sequence, set, array, number, string or None, nested as deep as it likes.
        arrays: Whether to write the per-channel arrays of records, by far the largest part of a trace.

    Returns:
        Dictionaries, lists, strings, numbers, booleans and None, ready for ``json.dumps(..., allow_nan=False)``.

    >>> from setpoint.types import Peak
    >>> encode(Peak(value=float("inf"), sequence=0, token=3, channel=5))
    {'value': 'inf', 'sequence': 0, 'token': 3, 'channel': 5}
    """
    if value is None or isinstance(value, bool | str | int):
        return str(value) if isinstance(value, str) else value
    if isinstance(value, float):
        number = float(value)
        return number if math.isfinite(number) else str(number)
    if _is_array(value):
        if value.ndim == 0:
            return encode(value.item())
        return [encode(float(f"{x:.6g}")) for x in value.tolist()] if value.ndim == 1 else encode(list(value))
    if is_dataclass(value):
        items = {f.name: getattr(value, f.name) for f in fields(value)}
        if isinstance(value, _SPARSE):
            items = {k: v for k, v in items.items() if v is not None and (arrays or not _is_array(v))}
        return {name: encode(item, arrays=arrays) for name, item in items.items()}
    if isinstance(value, Mapping):
        return {str(key): encode(item, arrays=arrays) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item, arrays=arrays) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(encode(item, arrays=arrays) for item in value)
    if isinstance(value, PurePath):
        return str(value)
    raise TypeError(f"a report can't hold a {type(value).__name__}; use numbers, strings, lists and mappings")


def decode(kind: Any, value: Any, where: str = "report") -> Any:
    """Read ``value``, which came from JSON, as the type ``kind``.

    Args:
        kind: A dataclass, or any annotation made of dataclasses, tuples, mappings, sets, literals, unions and numbers.
        value: Plain JSON data.
        where: Name of the place, for the error.

    Returns:
        An instance of ``kind``.

    Raises:
        InputError: A value is missing or has the wrong type.

    >>> decode(tuple[float, ...], [1, "nan"])
    (1.0, nan)
    """
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, UnionType):
        return _decode_union(args, value, where)
    if origin is Literal:
        if value not in args:
            raise _wrong(where, "one of " + ", ".join(map(str, args)), value)
        return value
    if is_dataclass(kind):
        return _decode_dataclass(kind, value, where)
    if kind is _Array:
        import numpy as np

        return np.array(decode(tuple[float, ...], value, where), dtype=np.float32)
    if origin is tuple:
        _expect(list, value, where)
        if args[-1] is not Ellipsis and len(args) != len(value):
            raise _wrong(where, f"{len(args)} values", value)
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return tuple(decode(kinds[i], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is frozenset:
        return frozenset(decode(tuple[str, ...], value, where))
    if origin is not None and issubclass(origin, Mapping):
        _expect(dict, value, where)
        return {key: decode(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is float:
        if isinstance(value, str) and value in _NON_FINITE:
            return _NON_FINITE[value]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _wrong(where, "a number", value)
        return float(value)
    if kind is int and isinstance(value, bool):
        raise _wrong(where, "a whole number", value)
    _expect(kind, value, where)
    return value


def _decode_union(args: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and NoneType in args:
        return None
    kinds = [arg for arg in args if arg is not NoneType]
    if int in kinds and type(value) is int:  # a union of int and float keeps whole numbers whole
        return value
    if float in kinds and isinstance(value, str) and value in _NON_FINITE:
        return _NON_FINITE[value]
    error: InputError | None = None
    for kind in kinds:
        try:
            return decode(kind, value, where)
        except InputError as exc:
            error = exc
    raise error or _wrong(where, "a value", value)


def _decode_dataclass(kind: Any, value: Any, where: str) -> Any:
    _expect(dict, value, where)
    hints = _hints(kind)
    arguments = {}
    for f in fields(kind):
        if f.name in value:
            arguments[f.name] = decode(hints[f.name], value[f.name], f"{where}.{f.name}")
        elif f.default is MISSING and f.default_factory is MISSING:
            raise InputError(f"{where} has no {f.name!r}; the report is damaged or was not written by setpoint")
    return kind(**arguments)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    # `FloatArray` is known to type checkers only, so that neither `setpoint.types` nor a stored proof needs numpy.
    return get_type_hints(kind, localns={"FloatArray": _Array})


def _expect(kind: type, value: Any, where: str) -> None:
    if not isinstance(value, kind):
        raise _wrong(where, {dict: "an object", list: "a list", str: "a string", int: "a whole number"}[kind], value)


def _wrong(where: str, expected: str, value: Any) -> InputError:
    shown = repr(value)
    return InputError(f"{where} should be {expected}, not {shown if len(shown) < 60 else shown[:57] + '...'}")
