"""Putting a reparametrization on weights, and folding it away again.

torch keeps one in ``module.parametrizations.weight`` and computes ``module.weight`` from it at every use
(`torch.nn.utils.parametrize`). Two things are added here. A weight that several modules share stays shared: they get
one parametrization together, where torch would give the first a weight of its own. And what is folded in a copy leaves
the original as it is, where torch takes the property from the class that both have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from setpoint.errors import InputError
from setpoint.nn.weight.units import units_of
from setpoint.running import kept_modes

Module = TypeVar("Module", bound=nn.Module)


def put(module: Module, name: str, parametrization: nn.Module) -> Module:
    """Register a parametrization on a weight, in place.

    Raises:
        InputError: The weight has one of the same kind already.
    """
    _refuse_twice(module, name, parametrization)
    parametrize.register_parametrization(module, name, parametrization)
    return module


def kinds_on(module: nn.Module, name: str) -> list[type[nn.Module]]:
    """The classes of the parametrizations on a weight, in the order in which they act."""
    if not parametrize.is_parametrized(module, name):
        return []
    found: Any = module.parametrizations
    return [type(each) for each in found[name]]


def put_everywhere(
    model: Module,
    wanted: Callable[[str, nn.Module], bool],
    make: Callable[[nn.Module], nn.Module],
    register: Callable[[nn.Module, str, nn.Module], nn.Module] = put,
) -> Module:
    """Put a parametrization on the ``weight`` of every chosen module; a weight that several modules share stays shared.

    Args:
        model: Changed in place.
        wanted: ``wanted(name, module)`` says whether a module is chosen.
        make: The parametrization for a module; raises what is wrong with it.
        register: Puts one on.

    Returns:
        The model.

    Raises:
        InputError: Nothing is chosen, a chosen weight has such a parametrization already, or it stands under another
            name or in another layout elsewhere. The model is then as it was.
    """
    made = {module: make(module) for name, module in model.named_modules() if wanted(name, module)}
    if not made:
        raise InputError("expected a model with layers to reparametrize, found none that was chosen; see `types`")
    for module, parametrization in made.items():
        _refuse_twice(module, "weight", parametrization)
    owners = _owners(model)
    sharing = {module: _sharing(module, owners) for module in made}
    for module, others in sharing.items():
        if type(made[module]) in kinds_on(module, "weight"):
            continue  # done together with one that shares its weight
        register(module, "weight", made[module])
        for other in others:
            register(other, "weight", made[module])
            _lists(other)["weight"] = _lists(module)["weight"]
    return model


def fold_weights(model: Module) -> Module:
    """Replace every parametrized weight by the plain tensor that it computes, in place; outputs stay the same.

    Takes any parametrization of `torch.nn.utils.parametrize`, torch's own too: weight normalization, weight
    conditioning, weight standardization, spectral norm. Do it before export, quantization or pickling. Optimizers that
    were built before hold parameters which are no longer there.

    Args:
        model: A module; one whose weights are shared keeps them shared.

    Returns:
        The model.

    Raises:
        InputError: Nothing in it is parametrized.

    Example:
        >>> from setpoint.nn import weight_norm
        >>> layer = fold_weights(weight_norm(nn.Linear(3, 2)))
        >>> type(layer).__name__, [name for name, _ in layer.named_parameters()]
        ('Linear', ['bias', 'weight'])
    """
    found = list(parametrized(model))
    if not found:
        raise InputError("expected a model with parametrized weights, found none; there is nothing to fold")
    folded: dict[Any, Tensor] = {}
    for module, name in found:
        original = _lists(module)[name]
        folded.setdefault(original, plain(module, name))
        fold(module, name, folded[original])
    return model


def fold(module: Module, name: str, value: Tensor | None = None) -> Module:
    """Replace one parametrized weight by a plain tensor, in place.

    Args:
        module: Whose weight it is.
        name: The weight.
        value: What to put there; left out, what the parametrization computes.

    Returns:
        The module.
    """
    value = plain(module, name) if value is None else value
    _own_class(module)
    delattr(type(module), name)
    del _lists(module)[name]
    if not _lists(module):
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]
    if isinstance(value, nn.Parameter):
        module.register_parameter(name, value)
    else:
        module.register_buffer(name, value)
    return module


def parametrized(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Every module with a parametrized tensor, and the tensor's name."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            for name in list(_lists(module)):
                yield module, name


@torch.no_grad()
def plain(module: nn.Module, name: str) -> Tensor:
    """What a parametrized name stands for in evaluation: a parameter if what it is made of are parameters."""
    parametrizations = _lists(module)[name]
    originals = list(parametrizations.parameters())
    with kept_modes(parametrizations):
        for part in parametrizations.modules():
            part.training = False  # spectral norm would move its estimate on
        value: Tensor = getattr(module, name).detach().clone()
    if not originals:
        return value
    return nn.Parameter(value, requires_grad=any(p.requires_grad for p in originals))


def _lists(module: nn.Module) -> Any:
    """Name -> `ParametrizationList`."""
    return module.parametrizations


def _refuse_twice(module: nn.Module, name: str, parametrization: nn.Module) -> None:
    if type(parametrization) in kinds_on(module, name):
        raise InputError(
            f"{type(module).__name__}.{name} has a {type(parametrization).__name__} already; fold_weights(model) takes "
            "it away"
        )


def _owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((module, name))
    return owners


def _sharing(module: nn.Module, owners: dict[int, list[tuple[nn.Module, str]]]) -> list[nn.Module]:
    """The other modules that use a module's weight."""
    found = [place for place in owners.get(id(module._parameters.get("weight")), []) if place[0] is not module]
    for other, name in found:
        if name != "weight" or units_of(other) != units_of(module):
            raise InputError(
                f"the weight of a {type(module).__name__} is also {type(other).__name__}.{name}, which keeps it in "
                "another form; untie them, or leave this layer out"
            )
    return [other for other, _ in found]


def _own_class(module: nn.Module) -> None:
    """Give a module a class that no copy of it has: a property is about to be taken from it."""
    shared = type(module)
    inside = {key: value for key, value in vars(shared).items() if key not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, inside)
