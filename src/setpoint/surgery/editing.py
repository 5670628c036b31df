"""Making edits: all of them or none, ties kept, and nothing ever written into a tensor.

An `Edit` puts a module or a tensor at a qualified name. If what stood there stands at other places too (a tied head, a
shared block), they all get the new one. `commit` returns a list of undo steps; a failure half way undoes itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.types import Build, Edit, Ref

Undo = list[Callable[[], None]]
_SOURCES = ("setpoint.", "torch.nn:")


def commit(model: nn.Module, edits: Iterable[Edit]) -> Undo:
    """Make all edits in order, or none.

    Args:
        model: Changed in place.
        edits: What to put where; later ones see the earlier.

    Returns:
        Steps for `rollback`.

    Raises:
        InputError: A path that doesn't exist, or a value that doesn't fit there; the model is as it was.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> undo = commit(model, [Edit("1", Build("torch.nn:GELU")), Edit("0.weight", torch.eye(2))])
        >>> model[1], model[0].weight.tolist()
        (GELU(approximate='none'), [[1.0, 0.0], [0.0, 1.0]])
        >>> rollback(undo); model[1]
        ReLU()
    """
    undo: Undo = []
    try:
        for edit in edits:
            _make(model, edit, undo)
    except BaseException:
        rollback(undo)
        raise
    return undo


def rollback(undo: Undo) -> None:
    """Undo the steps of one or more commits, last first."""
    while undo:
        undo.pop()()


def construct(model: nn.Module, build: Build, like: nn.Module | None = None) -> nn.Module:
    """The module that a `Build` describes.

    Args:
        model: Where a `Ref` among the arguments is looked up.
        build: Class and arguments.
        like: New parameters get its device and dtype, the module its mode.

    Raises:
        InputError: The class is not setpoint's or torch.nn's, or does not take the arguments.
    """
    module_name, _, attribute = build.target.partition(":")
    if not build.target.startswith(_SOURCES):
        raise InputError(f"a model is rebuilt from classes of setpoint and torch.nn only, got {build.target!r}")
    try:
        kind = getattr(import_module(module_name), attribute)
        takes = inspect.signature(kind).parameters
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"this version of setpoint has no {build.target!r}: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise InputError(f"{build.target!r} is no module class")
    arguments = {name: _argument(model, value, like) for name, value in build.arguments.items()}
    sample = _sample(like) if like is not None else _sample(model)
    if sample is not None:
        arguments |= {name: getattr(sample, name) for name in ("device", "dtype") if name in takes}
    try:
        with torch.random.fork_rng(
            devices=[]
        ):  # its first values are the same at every call, and nobody's draws change
            torch.manual_seed(0)
            made: nn.Module = kind(**arguments)
    except TypeError as error:
        raise InputError(f"{build.target} can't be built: {error}") from error
    made.training = like.training if like is not None else model.training
    return made


def _argument(model: nn.Module, value: Any, like: nn.Module | None) -> Any:
    if isinstance(value, Ref):
        return model.get_submodule(value.path)
    return construct(model, value, like) if isinstance(value, Build) else value


def _sample(module: nn.Module) -> Tensor | None:
    return next((p for p in module.parameters() if p.is_floating_point()), None)


# one edit ------------------------------------------------------------------------------------------------------------


def _make(model: nn.Module, edit: Edit, undo: Undo) -> None:
    parent_path, _, name = edit.path.rpartition(".")
    if not name:
        raise InputError("an edit needs the name of a part; the model as a whole can't be replaced")
    try:
        parent = model.get_submodule(parent_path)
    except AttributeError:
        raise InputError(f"the model has no {parent_path!r} (for the edit of {edit.path!r})") from None
    if isinstance(edit.value, Tensor):
        _put_tensor(model, parent, name, edit, undo)
    else:
        _put_module(model, parent, name, edit, undo)


def _put_module(model: nn.Module, parent: nn.Module, name: str, edit: Edit, undo: Undo) -> None:
    old = parent._modules.get(name)
    if isinstance(edit.value, Build):
        new = construct(model, edit.value, old)
    elif isinstance(edit.value, Ref):
        new = model.get_submodule(edit.value.path)
        if old is not None:  # what was hidden inside its wrapper has not seen changes of mode
            _attribute(new, "training", old.training, undo)
    else:
        assert isinstance(edit.value, nn.Module)
        new = edit.value
    inside = {id(module) for module in new.modules()}  # a wrapper keeps what it wraps
    places = [(parent, name)]
    if old is not None:
        places += [
            (module, key)
            for module in model.modules()
            for key, child in module._modules.items()
            if child is old and id(module) not in inside
        ]
    for module, key in dict.fromkeys(places):
        _set(module._modules, key, new, undo)
    _slow_path(model, edit.path, undo)


def _put_tensor(model: nn.Module, parent: nn.Module, name: str, edit: Edit, undo: Undo) -> None:
    assert isinstance(edit.value, Tensor)
    table = _table_of(parent, name, edit.path, undo)
    old: Tensor | None = getattr(parent, table).get(name)
    new = edit.value
    if table == "_parameters" and not isinstance(new, nn.Parameter):
        new = nn.Parameter(new.detach(), requires_grad=old.requires_grad if old is not None else True)
    places = [(parent, name)]
    if old is not None:
        places += [(module, key) for module in model.modules() for key, t in getattr(module, table).items() if t is old]
    for module, key in dict.fromkeys(places):
        _set(getattr(module, table), key, new, undo)
        _fit_sizes(module, undo)
    if old is None or old.shape != new.shape:
        _slow_path(model, edit.path, undo)


def _table_of(module: nn.Module, name: str, path: str, undo: Undo) -> str:
    """Whether a name is, or would be, a parameter or a buffer of a module."""
    if name in module._buffers:
        return "_buffers"
    if name not in module._parameters and hasattr(module, name):
        if getattr(module, name) is not None or name not in module.__dict__:
            raise InputError(f"{path!r} is a {type(getattr(module, name)).__name__}, not a tensor of the model")
        del module.__dict__[name]  # a parameter that was left out, written `self.bias = None`
        undo.append(lambda: module.__dict__.__setitem__(name, None))
    return "_parameters"


_MISSING = object()


def _set(table: dict[str, Any], key: str, value: Any, undo: Undo) -> None:
    before = table.get(key, _MISSING)

    def restore() -> None:
        if before is _MISSING:
            del table[key]
        else:
            table[key] = before

    table[key] = value
    undo.append(restore)


def _attribute(module: nn.Module, name: str, value: Any, undo: Undo) -> None:
    before = getattr(module, name)
    if before != value:
        setattr(module, name, value)
        undo.append(lambda: setattr(module, name, before))


def _fit_sizes(module: nn.Module, undo: Undo) -> None:
    """Let a module's own record of its size follow its weight; some are read in forward (GPT-2's Conv1D)."""
    for name, size in sizes_of(module).items():
        _attribute(module, name, size, undo)


def sizes_of(module: nn.Module) -> Mapping[str, int]:
    """What the size attributes of a module must be for the weight it has.

    >>> dict(sizes_of(nn.Linear(3, 2)))
    {'out_features': 2, 'in_features': 3}
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() < 2:
        return {}
    first, second = weight.shape[:2]
    if isinstance(module, nn.Linear):
        return {"out_features": first, "in_features": second}
    if isinstance(module, nn.Embedding):
        return {"num_embeddings": first, "embedding_dim": second}
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups == 1:
        return {"out_channels": first, "in_channels": second}
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return {"nf": second, "nx": first}
    return {}


def _slow_path(model: nn.Module, path: str, undo: Undo) -> None:
    """Keep fused code from reading the parameters of parts that are no longer there.

    In eval mode without gradients `nn.TransformerEncoderLayer` runs as one op on the weights of the modules it was
    made with, and never calls those modules. It asks this attribute first.
    """
    module = model
    for part in ["", *path.split(".")[:-1]]:
        module = module.get_submodule(part) if part else module
        if isinstance(module, nn.TransformerEncoderLayer):
            _attribute(module, "activation_relu_or_gelu", 0, undo)


def settle(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor at one place, as when a saved model is rebuilt; other places of the old tensor keep it.

    Args:
        model: Changed in place.
        name: Qualified name of a parameter or buffer that the model has, if only as None.
        tensor: A parameter for a parameter.

    Raises:
        AttributeError: There is no such place.
    """
    parent_path, _, last = name.rpartition(".")
    parent = model.get_submodule(parent_path)
    if not hasattr(parent, last):
        raise AttributeError(name)
    table = getattr(parent, _table_of(parent, last, name, []))
    old = table.get(last)
    table[last] = tensor
    _fit_sizes(parent, [])
    if old is None or old.shape != tensor.shape:
        _slow_path(model, name, [])


def ties(model: nn.Module) -> dict[str, str]:
    """Parameter and buffer names that stand for a tensor with an earlier name: later name -> first name."""
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for named in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in named:
            if id(tensor) in first:
                found[name] = first[id(tensor)]
            else:
                first[id(tensor)] = name
    return found


def parameter(model: nn.Module, name: str) -> torch.Tensor:
    """The parameter or buffer of a qualified name."""
    parent, _, last = name.rpartition(".")
    found = getattr(model.get_submodule(parent), last)
    assert isinstance(found, Tensor)
    return found


def table_of(path: str, table: nn.Embedding, target: str, why: str, **more: float) -> list[Edit]:
    """Edits that make a table one of another class with the same weight, ties included."""
    sizes = {"num_embeddings": table.num_embeddings, "embedding_dim": table.embedding_dim}
    arguments = {**sizes, "padding_idx": table.padding_idx, **more}
    return [Edit(path, Build(target, arguments), why), Edit(f"{path}.weight", table.weight, "the same table")]
