"""Parts of a backbone as plain data, and back: how a saved model says what it is built of, without code.

A class or a `functools.partial` of one becomes ``{"name": "RMSNorm", "eps": 1e-05}``, a placement or position object
the same. Names are looked up in the rooms below and nowhere else, so that a file can name nothing but a part of
setpoint or of `torch.nn`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from importlib import import_module
from typing import Any, TypeVar

from torch import nn

from setpoint.errors import InputError

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)

_ROOMS = (
    "setpoint.nn",
    "setpoint.nn.block",
    "setpoint.models.stack",
    "setpoint.models.vision",
    "setpoint.models.resnet",
    "setpoint.models.position",
    "setpoint.models.initialize",
)


def to_plain(part: Any) -> Any:
    """A part of a backbone as data that JSON can hold.

    Args:
        part: A module class, a partial of one, a frozen object (placement, position, initializer), or a plain value.

    Raises:
        InputError: A class that is neither of setpoint nor of `torch.nn`.

    Example:
        >>> to_plain(partial(nn.LayerNorm, eps=1e-6))
        {'name': 'torch.nn.LayerNorm', 'eps': 1e-06}
    """
    if part is None or isinstance(part, bool | int | float | str):
        return part
    if isinstance(part, tuple | list):
        return [to_plain(item) for item in part]
    if isinstance(part, partial):
        positional = {"args": to_plain(part.args)} if part.args else {}
        named = {key: to_plain(value) for key, value in part.keywords.items()}
        return {"name": _name_of(part.func), **positional, **named}
    if is_dataclass(part) and not isinstance(part, type):
        own = {field.name: to_plain(getattr(part, field.name)) for field in fields(part)}
        return {"name": _name_of(type(part)), **own}
    return {"name": _name_of(part)}


def from_plain(data: Any) -> Any:
    """The part that `to_plain` wrote down.

    Args:
        data: What `to_plain` returned, perhaps by way of JSON.

    Raises:
        InputError: A name that is no part, or options that it does not take.

    Example:
        >>> from_plain({"name": "torch.nn.LayerNorm", "eps": 1e-6})(8).eps
        1e-06
    """
    if isinstance(data, list):
        return tuple(from_plain(item) for item in data)
    if not isinstance(data, Mapping):
        return data
    args = from_plain(data.get("args", []))
    options = {key: from_plain(value) for key, value in data.items() if key not in ("name", "args")}
    name = data.get("name")
    kind = _find(name) if isinstance(name, str) else None
    if kind is None:
        raise InputError(f"expected the name of a part of setpoint.nn, setpoint.models or torch.nn, got {name!r}")
    if issubclass(kind, nn.Module):
        return partial(kind, *args, **options) if args or options else kind
    return build(kind, options)


def rebuild(model: Callable[..., M], config: type[Any], data: Mapping[str, Any], parts: Collection[str]) -> M:
    """A model from its sizes and parts as data.

    Args:
        model: Its class, called with the configuration and the parts by name.
        config: Class of its sizes.
        data: ``{"config": sizes, part: data of the part, ...}``.
        parts: Names of its parts.

    Raises:
        InputError: Sizes are missing, or a name is no part or no field.
    """
    if not isinstance(data.get("config"), Mapping) or set(data) - {"config", *parts}:
        raise InputError(f"expected a model as data with config and any of {', '.join(parts)}, got {', '.join(data)}")
    sizes = {name: from_plain(value) for name, value in data["config"].items()}
    return model(build(config, sizes), **{name: from_plain(data[name]) for name in parts if name in data})


def build(kind: type[T], options: Mapping[str, Any]) -> T:
    """An object from named fields.

    Raises:
        InputError: It has no such field, or lacks one; the message lists what it takes.
    """
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    wrong = sorted(set(options) - set(known))
    if wrong:
        raise InputError(f"{kind.__name__} takes {', '.join(known) or 'nothing'}; got {', '.join(wrong)}")
    return kind(**options)


def _name_of(kind: Any) -> str:
    name = getattr(kind, "__name__", "")
    for candidate in (name, f"torch.nn.{name}"):
        if isinstance(kind, type) and _find(candidate) is kind:
            return candidate
    raise InputError(
        f"expected a class of setpoint.nn, setpoint.models or torch.nn, or a functools.partial of one, got "
        f"{kind!r}; a model that is to be rebuilt from its file can be made of those alone"
    )


def _find(name: str) -> type[Any] | None:
    rooms = ("torch.nn",) if name.startswith("torch.nn.") else _ROOMS
    for room in rooms:
        found = getattr(import_module(room), name.rpartition(".")[2], None)
        if isinstance(found, type) and (issubclass(found, nn.Module) or is_dataclass(found)):
            return found
    return None
