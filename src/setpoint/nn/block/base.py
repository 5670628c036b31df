"""Placements: where a block's norms stand relative to its sub-layers and to the residual stream.

A placement is a small frozen object that is passed to a backbone. It wraps each sub-layer in a residual unit and says
whether the stack also needs a norm on the embedding and one after the last block. Adding a placement is adding a
subclass: nothing else has to know of it, and `placement` finds it by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from typing import Any, ClassVar

from torch import Tensor, nn

from setpoint.errors import InputError

NormFactory = Callable[..., nn.Module]
"""``norm(dim) -> module``: a class such as `torch.nn.RMSNorm`, or a `functools.partial` of one."""


@dataclass(frozen=True)
class Placement(ABC):
    """Base of all placements.

    Args:
        embed_norm: Whether the stack normalizes the embedding before the first block.
    """

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    final_norm: ClassVar[bool] = True
    """Whether the stream has to be normalized after the last block."""

    embed_norm: bool = False

    @abstractmethod
    def residual(
        self, sublayer: nn.Module, dim: int, *, norm: NormFactory, layer: int, depth: int, dropout: float = 0.0
    ) -> nn.Module:
        """Wrap a sub-layer in its norms and its residual addition.

        Args:
            sublayer: Maps ``(..., dim)`` to ``(..., dim)``; may take further arguments and return a tuple.
            dim: Width of the residual stream.
            norm: Makes each norm.
            layer: Number of the block, counted from 1; both sub-layers of a block have the same.
            depth: How many blocks there are.
            dropout: Probability on what the branch adds.

        Returns:
            A module that maps the stream to the stream.
        """


@dataclass(frozen=True)
class UniformPlacement(Placement):
    """A placement whose residual units are alike in every block: `unit`, with the options that `unit_options` gives."""

    unit: ClassVar[type[nn.Module]]

    def residual(
        self,
        sublayer: nn.Module,
        dim: int,
        *,
        norm: NormFactory,
        layer: int,  # noqa: ARG002
        depth: int,  # noqa: ARG002
        dropout: float = 0.0,
    ) -> nn.Module:
        """The sub-layer in the placement's unit; arguments as for `Placement.residual`."""
        return self.unit(sublayer, dim, norm_layer=norm, dropout=dropout, **self.unit_options())

    def unit_options(self) -> dict[str, Any]:
        """Further arguments of the unit."""
        return {}


def placement(name: str, **fields: Any) -> Placement:
    """A placement by its name.

    Args:
        name: ``"pre"``, ``"post"``, ``"peri"`` (or ``"sandwich"``), ``"output"``, ``"lns"``, or the name of any other
            subclass of `Placement` that has been imported.
        fields: Fields of that placement.

    Raises:
        InputError: No placement has that name (the message lists them), or it has no such field.

    Example:
        >>> placement("peri", out_gain_init=0.5)
        PeriNorm(embed_norm=True, out_gain_init=0.5)
        >>> placement("middle")
        Traceback (most recent call last):
        setpoint.errors.InputError: no placement is called 'middle'; there are lns, output, peri (sandwich), post, pre
    """
    kinds = _below(Placement)  # type: ignore[type-abstract]
    for kind in reversed(kinds):  # the latest, where a notebook cell that defines one was run twice
        if name in (kind.name, *kind.aliases):
            try:
                return kind(**fields)
            except TypeError:
                known = ", ".join(field.name for field in dataclass_fields(kind))
                raise InputError(f"the placement {name!r} takes {known}, got {', '.join(fields)}") from None
    listed = sorted(kind.name + (f" ({', '.join(kind.aliases)})" if kind.aliases else "") for kind in kinds)
    raise InputError(f"no placement is called {name!r}; there are {', '.join(listed)}")


def _below(kind: type[Placement]) -> list[type[Placement]]:
    below = [found for child in kind.__subclasses__() for found in (child, *_below(child))]
    return [found for found in below if vars(found).get("name")]


def run_branch(
    sublayer: nn.Module, x: Tensor, stream: Tensor, args: Any, kwargs: Any
) -> tuple[Tensor, tuple[Any, ...]]:
    """Call a sub-layer and part what it adds to the stream from the rest of what it returns.

    Args:
        sublayer: The sub-layer.
        x: Its input, ``(..., dim)``.
        stream: What its output will be added to, ``(..., dim)``.
        args, kwargs: Further arguments.

    Returns:
        The branch, shaped as the stream, and the tail of a tuple that was returned.

    Raises:
        InputError: The output's shape is not the stream's.
    """
    result = sublayer(x, *args, **kwargs)
    branch, rest = (result[0], tuple(result[1:])) if isinstance(result, tuple) else (result, ())
    if branch.shape != stream.shape:
        raise InputError(
            f"expected {type(sublayer).__name__} to return the stream's shape {tuple(stream.shape)}, "
            f"got {tuple(branch.shape)}; end the sub-layer with a projection to {stream.shape[-1]} channels"
        )
    return branch, rest
