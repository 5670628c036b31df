"""Which parameters weight decay shrinks: one mark, one rule, read by every builder of optimizers.

Decay belongs on matrices that multiply activations. Gains of norms, biases and other vectors or scalars only shift or
rescale, so they are left alone without being asked. A parameter with two axes or more that must not shrink (a relative
position table, an embedding whose scale matters) is marked by the module that owns it. The mark is kept on the module
and not on the parameter, since a copied or pickled parameter loses its attributes.
"""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from setpoint.errors import InputError, nearest

_MARK = "no_weight_decay_names"
_NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,  # batch and instance norms
)
_SLOTS = ("bias_k", "bias_v")
"""Biases of torch's attention that have three axes: a key and a value behind the others."""

Module = TypeVar("Module", bound=nn.Module)


def no_weight_decay(module: Module, *names: str) -> Module:
    """Mark parameters of a module as not to be decayed.

    Args:
        module: The module that owns them.
        names: Names of its own parameters, such as ``"weight"``; none for all of them.

    Returns:
        The module, marked. The mark stays through copies, pickles and moves between devices.

    Raises:
        InputError: The module has no parameter of that name.

    >>> table = no_weight_decay(nn.Embedding(10, 4))
    >>> [group["names"] for group in decay_groups(nn.Sequential(table, nn.Linear(4, 2)), 0.1)]
    [['1.weight'], ['0.weight', '1.bias']]
    """
    own = dict(module.named_parameters(recurse=False))
    for name in names:
        if name not in own:
            known = ", ".join(nearest(name, own)) or "none"
            raise InputError(f"{type(module).__name__} has no parameter {name!r} of its own; it has {known}")
    marked = getattr(module, _MARK, frozenset()) | frozenset(names or own)
    setattr(module, _MARK, marked)
    return module


def is_decayed(module: nn.Module, name: str) -> bool:
    """Whether weight decay applies to a module's own parameter.

    Args:
        module: The module that owns it.
        name: Its name there.

    Returns:
        False for marked parameters, for those of norms, for biases, and for those with fewer than two axes.
    """
    if name in getattr(module, _MARK, ()) or isinstance(module, _NORMS):
        return False
    if isinstance(module, nn.MultiheadAttention) and name in _SLOTS:
        return False
    return bool(getattr(module, name).dim() >= 2)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: what is decayed, and what is not.

    A parameter that several modules share is decayed only if all of them agree. Parameters that don't require a
    gradient are left out. Models of timm say by a method ``no_weight_decay()`` what they want to keep; it is heard.

    Args:
        model: The network.
        weight_decay: For the first group; the second has 0.

    Returns:
        Up to two groups with ``params``, ``weight_decay`` and, for a report, ``names``.

    Raises:
        InputError: No parameter requires a gradient.

    >>> groups = decay_groups(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), 0.1)
    >>> [(group["weight_decay"], group["names"]) for group in groups]
    [(0.1, ['0.weight']), (0.0, ['0.bias', '1.weight', '1.bias'])]
    """
    asked = getattr(model, "no_weight_decay", None)
    kept = set(asked()) if callable(asked) else set()
    names: dict[int, str] = {}
    decayed: dict[int, bool] = {}
    parameters: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            key, name = id(parameter), f"{path}.{own}" if path else own
            parameters[key] = parameter
            names.setdefault(key, name)
            decayed[key] = decayed.get(key, True) and name not in kept and is_decayed(module, own)
    if not parameters:
        raise InputError("The model has no parameter that requires a gradient, so there is nothing to train.")
    groups = []
    for wanted, decay in ((True, weight_decay), (False, 0.0)):
        keys = [key for key in parameters if decayed[key] is wanted]
        if keys:
            groups.append(
                {
                    "params": [parameters[key] for key in keys],
                    "weight_decay": decay,
                    "names": [names[key] for key in keys],
                }
            )
    return groups
