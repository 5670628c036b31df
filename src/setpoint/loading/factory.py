"""A user's own model: ``module:factory`` names a function that builds it.

The convention, in full: the factory takes no argument and returns

- a model, or
- ``(model, batches)``, where ``batches`` is a list of inputs, or
- ``(model, batches, loss)``, where ``loss(output, batch)`` gives a scalar tensor.

A tensor is passed to the model as it is, a tuple or list as positional arguments, a dict as keyword arguments.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from setpoint.errors import InputError, nearest


def from_factory(source: str) -> tuple[nn.Module, tuple[Any, ...], Callable[[Any, Any], Tensor] | None]:
    """Build the model that ``module:factory`` names.

    Args:
        source: Import path of a module (the current directory counts), a colon, and the name of a function in it
            (or of a model that is already built).

    Returns:
        Model, its batches (empty if none came), and its loss or None.

    Raises:
        InputError: The module or the function is not there, needs arguments, fails, or returns something else.
    """
    module_name, _, attribute = source.partition(":")
    module = _import(module_name, source)
    found: Any = module
    for part in attribute.split("."):
        names = [name for name, value in vars(found).items() if callable(value) and not name.startswith("_")]
        if not hasattr(found, part):
            hint = f"; nearest: {', '.join(nearest(part, names))}" if names else ""
            raise InputError(f"{module_name} has no {part!r}{hint}")
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        return found, (), None
    if not callable(found):
        raise InputError(f"{source} is a {type(found).__name__}; expected a function that returns a torch.nn.Module")
    _require_no_arguments(found, source)
    try:
        built = found()
    except Exception as error:
        raise InputError(f"{source} failed while building the model: {_where(error)}") from error
    return _unpack(built, source)


def _import(name: str, source: str) -> Any:
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        importlib.invalidate_caches()
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise InputError(
                f"no module {error.name!r} for {source}; it is looked for in {here} and among the installed packages"
            ) from error
        raise InputError(f"{name} could not be imported: {_where(error)}") from error
    except Exception as error:
        raise InputError(f"{name} could not be imported: {_where(error)}") from error
    finally:
        if added and here in sys.path:
            sys.path.remove(here)


def _require_no_arguments(factory: Callable[..., Any], source: str) -> None:
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature; calling tells
        return
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in optional]
    if needed:
        raise InputError(
            f"{source} needs arguments ({', '.join(needed)}); name a function that takes none and calls it with yours"
        )


def _unpack(built: Any, source: str) -> tuple[nn.Module, tuple[Any, ...], Callable[[Any, Any], Tensor] | None]:
    if isinstance(built, nn.Module):
        return built, (), None
    if not isinstance(built, tuple) or len(built) not in (2, 3) or not isinstance(built[0], nn.Module):
        kind = f"a tuple of {len(built)}" if isinstance(built, tuple) else f"a {type(built).__name__}"
        raise InputError(
            f"{source} returned {kind}; expected a torch.nn.Module, (model, batches) or (model, batches, loss)"
        )
    model, given, *rest = built
    batches = (given,) if isinstance(given, Tensor | Mapping) else tuple(given)
    if not batches:
        raise InputError(f"{source} returned no batches; give at least one, or return the model alone")
    loss = rest[0] if rest else None
    if loss is not None and not callable(loss):
        raise InputError(f"{source} returned a {type(loss).__name__} as loss; expected loss(output, batch)")
    return model, batches, loss


def _where(error: BaseException) -> str:
    """The error in one line, with the line of code that raised it."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if isinstance(error, SyntaxError) or trace is None:
        return text
    return f"{text} ({Path(trace.tb_frame.f_code.co_filename).name}, line {trace.tb_lineno})"
