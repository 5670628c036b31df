"""A user's own model: ``module:factory`` names a function that builds it.

The convention, in full: the factory takes no argument and returns

- a model, or
- ``(model, batches)``, where ``batches`` is a list of inputs, or
- ``(model, batches, loss)``, where ``loss(output, batch)`` gives a scalar tensor, or
- ``(model, batches, loss, forward)``, where ``forward(model, batch)`` runs a batch; ``loss`` may be None.

Without a ``forward`` a tensor is passed to the model as it is, a tuple or list as positional arguments, a dict as
keyword arguments. Batches of inputs and labels need one: ``lambda model, batch: model(batch[0])``.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from setpoint.errors import InputError, nearest
from setpoint.placing import as_batches


class Built(NamedTuple):
    """What a factory returned; batches are empty and functions None where it gave none."""

    model: nn.Module
    batches: tuple[Any, ...] = ()
    loss: Callable[[Any, Any], Tensor] | None = None
    forward: Callable[[nn.Module, Any], Any] | None = None


def from_factory(source: str) -> Built:
    """Build the model that ``module:factory`` names.

    Args:
        source: Import path of a module (the current directory counts), a colon, and the name of a function in it
            (or of a model that is already built).

    Returns:
        The model and what came with it.

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
        return Built(found)
    if not callable(found):
        raise InputError(f"{source} is a {type(found).__name__}; expected a function that returns a torch.nn.Module")
    _require_no_arguments(found, source)
    try:
        built = found()
    except (Exception, SystemExit) as error:
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
    except (Exception, SystemExit) as error:
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


def _unpack(built: Any, source: str) -> Built:
    if isinstance(built, nn.Module):
        return Built(built)
    if not isinstance(built, tuple) or len(built) not in (2, 3, 4) or not isinstance(built[0], nn.Module):
        kind = f"a tuple of {len(built)}" if isinstance(built, tuple) else f"a {type(built).__name__}"
        raise InputError(
            f"{source} returned {kind}; expected a torch.nn.Module, (model, batches), (model, batches, loss) or "
            "(model, batches, loss, forward)"
        )
    result = Built(built[0], tuple(_batches(built[1], source)), *built[2:])
    for name, call, form in (("loss", result.loss, "output, batch"), ("forward", result.forward, "model, batch")):
        if call is not None and not callable(call):
            raise InputError(f"{source} returned a {type(call).__name__} as {name}; expected {name}({form})")
    return result


def _batches(given: Any, source: str) -> list[Any]:
    try:
        return as_batches(given)
    except InputError as error:
        raise InputError(f"{source} returned no batches to run: {error}") from None


def _where(error: BaseException) -> str:
    """The error in one line, with the line of code that raised it."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if isinstance(error, SyntaxError) or trace is None:
        return text
    return f"{text} ({Path(trace.tb_frame.f_code.co_filename).name}, line {trace.tb_lineno})"
