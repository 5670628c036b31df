"""What the recorder knows of the running batch: its padding, its token groups, its shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from setpoint.errors import InputError
from setpoint.probe.stat_observe import Selection
from setpoint.running import tensors_of


class Inputs:
    """The batch that is running.

    Args:
        groups: Name -> bool mask of shape ``(batch, tokens)`` or ``(tokens,)``, or a callable from batch to mask.

    Raises:
        InputError: A group that is neither a tensor nor can be called.
    """

    def __init__(self, groups: Mapping[str, Tensor | Callable[[Any], Tensor]]) -> None:
        for name, group in groups.items():
            if not isinstance(group, Tensor) and not callable(group):
                raise InputError(
                    f"Group {name!r} needs a bool tensor of shape (batch, tokens) or (tokens,), or a callable from a "
                    f"batch to one, got {type(group).__name__}."
                )
        self._groups = groups
        self._announced = False
        self._padding: Tensor | None = None
        self._masks: dict[str, Tensor] = {}
        self._keep: Tensor | None = None
        self._met: set[str] = set()
        self._unmet: dict[str, tuple[int, ...]] = {}
        self._misfits: dict[str, str] = {}
        self.non_finite = 0
        self.shape: tuple[int, int] | None = None
        self.given = (0, 0)
        self.followed: set[str] = set()

    def announce(self, batch: Any) -> None:
        """A batch as the user has it; the model's own inputs are then not looked at for group masks."""
        self._announced = True
        self._read(batch)

    def arrive(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The inputs with which the model is called."""
        self.followed.clear()
        tensors = tensors_of((args, kwargs))
        self.non_finite += sum(_non_finite(tensor) for tensor in tensors)
        self.given = _outline(tensors[0]) if tensors else (0, 0)
        if not self._announced:
            self._read(kwargs if kwargs and not args else args[0] if len(args) == 1 and not kwargs else (*args, kwargs))
        if self._padding is None:
            self._set_padding(kwargs)

    def _read(self, batch: Any) -> None:
        self.followed.clear()
        self._close()
        self._padding = self._keep = None
        if isinstance(batch, Mapping):
            self._set_padding(batch)
        self._masks = {}
        for name, group in self._groups.items():
            mask = group if isinstance(group, Tensor) else group(batch)
            if not isinstance(mask, Tensor) or mask.dim() not in (1, 2):
                found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
                raise InputError(
                    f"Group {name!r} needs a bool mask of shape (batch, tokens) or (tokens,), got {found}."
                )
            self._masks[name] = mask.bool()

    def demand_groups(self) -> None:
        """Make sure that every group's mask had the shape of the token vectors at some place in each batch.

        Raises:
            InputError: One had not, so that it would have been dropped without a word.
        """
        self._close()
        for misfit in self._misfits.values():
            raise InputError(misfit)

    def _close(self) -> None:
        """Note which masks of the batch that ended fitted nowhere."""
        for name, shape in self._unmet.items():
            self._misfits.setdefault(
                name,
                f"The mask of group {name!r} has shape {tuple(self._masks[name].shape)}, but the token vectors are "
                f"{shape} (batch, tokens). Give one entry per token.",
            )
        self._unmet = {}
        self._met.clear()

    def _set_padding(self, batch: Mapping[str, Any]) -> None:
        mask = batch.get("attention_mask")
        # In an encoder-decoder the mask is the encoder's, and a decoder's tensor may happen to have its shape.
        if isinstance(mask, Tensor) and mask.dim() == 2 and not any(str(k).startswith("decoder") for k in batch):
            mask = mask.bool()
            if not bool(mask.all()):
                self._padding = mask
                self._keep = mask.reshape(-1).nonzero().squeeze(1)

    def tokens(self, sequences: int, length: int) -> int:
        """Tokens of the batch that are not padding."""
        padding = self._padding
        if padding is not None and padding.shape == (sequences, length):
            return int(padding.sum())
        return sequences * length

    def valid_queries(self, batch: int, queries: int) -> Tensor | None:
        """Which query rows are not padding; None for all."""
        padding = self._padding
        return padding if padding is not None and padding.shape == (batch, queries) else None

    def select(self, values: Tensor, groups: bool, of: slice = slice(None)) -> Selection:
        """Which positions count and how they are grouped.

        Args:
            values: Shape ``(sequences, positions, channels)``.
            groups: Whether token groups are looked at.
            of: Which sequences of the batch the values are.
        """
        shape = values.shape[:2]
        padding = self._padding[of] if self._padding is not None else None
        keep = None
        if padding is not None and padding.shape == shape:
            keep = self._keep if of == slice(None) else padding.reshape(-1).nonzero().squeeze(1)
        if keep is not None:
            keep = keep.to(values.device)
        if not groups or not self._masks:
            return Selection(keep)
        flat = {}
        for name, whole in self._masks.items():
            mask = whole if whole.dim() == 1 else whole[of]
            if mask.shape == shape or (mask.dim() == 1 and mask.shape[0] == shape[1]):
                flat[name] = mask.to(values.device).expand(shape).reshape(-1)
                self._met.add(name)
                self._unmet.pop(name, None)
            elif name not in self._met:
                self._unmet.setdefault(name, tuple(shape))
        return Selection(keep, flat)


def _non_finite(tensor: Tensor) -> int:
    """How many values are nan or inf; minus infinity is what masks are made of and doesn't count."""
    if not tensor.is_floating_point() or bool(tensor.sum().isfinite()):
        return 0
    return int((tensor.isnan() | (tensor == torch.inf)).sum())


def _outline(tensor: Tensor) -> tuple[int, int]:
    """Sequences and tokens in each, as far as an input tells: ids and vectors have tokens, anything else is one."""
    if tensor.dim() == 0:
        return 0, 0
    has_tokens = tensor.dim() == 3 or (tensor.dim() == 2 and not tensor.is_floating_point())
    return len(tensor), tensor.shape[1] if has_tokens else 1
