"""What the recorder knows of the running batch: its padding, its token groups, its shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from setpoint.errors import InputError
from setpoint.probe.stat_observe import Selection


class Inputs:
    """The batch that is running.

    Args:
        groups: Name -> bool mask of shape ``(batch, tokens)`` or ``(tokens,)``, or a callable from batch to mask.
    """

    def __init__(self, groups: Mapping[str, Tensor | Callable[[Any], Tensor]]) -> None:
        self._groups = groups
        self._announced = False
        self._padding: Tensor | None = None
        self._masks: dict[str, Tensor] = {}
        self._keep: Tensor | None = None
        self.shape: tuple[int, int] | None = None
        self.followed: set[str] = set()

    def announce(self, batch: Any) -> None:
        """A batch as the user has it; the model's own inputs are then not looked at for group masks."""
        self._announced = True
        self._read(batch)

    def arrive(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The inputs with which the model is called."""
        self.followed.clear()
        if not self._announced:
            self._read(kwargs if kwargs and not args else args[0] if len(args) == 1 and not kwargs else (*args, kwargs))
        if self._padding is None:
            self._set_padding(kwargs)

    def _read(self, batch: Any) -> None:
        self.followed.clear()
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

    def select(self, values: Tensor, groups: bool) -> Selection:
        """Which positions of ``values``, shape ``(sequences, positions, channels)``, count and how they are grouped."""
        shape = values.shape[:2]
        keep = self._keep if self._padding is not None and self._padding.shape == shape else None
        if keep is not None:
            keep = keep.to(values.device)
        if not groups or not self._masks:
            return Selection(keep)
        flat = {}
        for name, mask in self._masks.items():
            if mask.shape == shape or (mask.dim() == 1 and mask.shape[0] == shape[1]):
                flat[name] = mask.to(values.device).expand(shape).reshape(-1)
        return Selection(keep, flat)
