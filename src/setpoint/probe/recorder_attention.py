"""What attention looks at, from the queries and keys as they enter its core.

Fused attention never shows its weights, so a light `TorchFunctionMode` watches the calls inside an attention module:
at ``scaled_dot_product_attention`` it takes about 32 query rows per head, spread over the sequence, and recomputes
their masked softmax in float32; at a plain ``softmax`` over the last axis (eager attention) it reads the same rows of
the logits. Cores are matched to sites by the module in whose call they run; if one module holds several, in order.

The mode is active inside the attention modules only, for calls that are recorded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from setpoint.probe.stat_scratch import to_numpy
from setpoint.probe.statistics import AttentionStatistics

SATURATED = 0.999
"""A row whose largest weight is above this looks at one key only."""

MASKED = 9_000.0
"""In eager attention, a key whose logit lies this far below the row's largest was masked, not chosen against."""

_FAR = 1e30
_LOG2_E = math.log2(math.e)
_VALUES = 1 << 21
_SOFTMAX = frozenset({functional.softmax, torch.softmax, Tensor.softmax})


def spread_rows(length: int, count: int) -> Tensor:
    """Positions of at most ``count`` of ``length`` rows, evenly spread.

    >>> spread_rows(8, 4).tolist(), spread_rows(3, 64).tolist()
    ([1, 3, 5, 7], [0, 1, 2])
    """
    if length <= count:
        return torch.arange(length)
    return ((torch.arange(count) + 0.5) * (length / count)).long()


@dataclass(slots=True)
class RowSums:
    """What rows of attention weights were reduced to; `settle` turns it into statistics.

    Args:
        lowest: Shape ``(heads,)``: smallest visible logit.
        top: Shape ``(batch, heads, rows)``: largest logit of a row.
        total: The same shape: Σ exp(logit - top).
        first: The same shape: the first key's share of that sum.
        spread: The same shape: Σ (logit - top) exp(logit - top), in units of log 2.
        visible: Broadcastable to the same shape: keys that a row sees.
        usable: Shape ``(batch, rows)``: rows that count; None for all.
    """

    lowest: Tensor
    top: Tensor
    total: Tensor
    first: Tensor
    spread: Tensor
    visible: Tensor
    usable: Tensor | None

    @property
    def kind(self) -> tuple[object, ...]:
        """What must be equal, or the same tensor, for rows of different cores to be settled together."""
        return (self.top.shape, self.top.device, id(self.visible), id(self.usable))

    def settle(self) -> AttentionStatistics:
        """Sums per head, over rows that see more than one key."""
        top, total, first, spread = to_numpy(torch.stack((self.top, self.total, self.first, self.spread)))
        seen = to_numpy(self.visible)
        with np.errstate(divide="ignore", invalid="ignore"):
            entropy = (np.log(total) - spread / _LOG2_E / total) / np.log(np.maximum(seen, 2))
            largest = 1 / total
            sink = first / total
        counted = np.broadcast_to(seen > 1, total.shape) & np.isfinite(entropy)
        if self.usable is not None:
            counted = counted & self.usable.cpu().numpy()[:, None, :]
        columns = (entropy, sink, largest, largest > SATURATED)
        sums = [np.where(counted, column, 0.0).sum((0, 2)) for column in columns]
        magnitude = np.maximum(np.maximum(top, 0.0).max((0, 2)), -np.minimum(to_numpy(self.lowest), 0.0))
        return AttentionStatistics(
            rows=counted.sum((0, 2)).astype(np.float64),
            entropy=sums[0],
            sink=sums[1],
            largest=sums[2],
            saturated=sums[3],
            logit_max=np.nan_to_num(magnitude, nan=math.inf, posinf=math.inf),
            keys=int(seen.max()),
        )


@dataclass(frozen=True, slots=True)
class Hidden:
    """Which keys are out of sight: ``away`` is 1e30 there and 0 elsewhere, ``visible`` counts the others by row."""

    away: Tensor
    visible: Tensor

    @classmethod
    def by(cls, mask: Tensor, keys: int) -> Hidden:
        """From a bool mask, True where hidden, broadcastable to ``(batch, heads, rows, keys)``."""
        hidden = mask.expand(*mask.shape[:-1], keys).sum(-1, dtype=torch.float32)
        return cls(mask.float().mul_(_FAR), keys - hidden)


@lru_cache(maxsize=16)
def _causal(length: int, count: int, keys: int, device: torch.device) -> tuple[Tensor, Hidden]:
    """The sampled rows and what is hidden from them when query i sees keys 0 to i; the same for every layer."""
    with torch.inference_mode(False):
        chosen = spread_rows(length, count).to(device)
        return chosen, Hidden.by(torch.arange(keys, device=device) > chosen[:, None], keys)


def attention_rows(
    query: Tensor,
    key: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    rows: int = 64,
    valid: Tensor | None = None,
) -> list[RowSums]:
    """Reduce softmax(scale · q kᵀ + mask) over a sample of query rows.

    Args:
        query: Shape ``(batch, heads, queries, head_dim)``.
        key: Shape ``(batch, kv_heads, keys, head_dim)``; ``heads`` is a multiple of ``kv_heads``.
        mask: Broadcastable to ``(batch, heads, queries, keys)``: bool (True = visible) or added to the logits.
        causal: Whether query i sees keys 0 to i only.
        scale: Multiplier of the logits; ``1 / sqrt(head_dim)`` when None.
        rows: Query rows per head and sequence to use.
        valid: Shape ``(batch, queries)``: False leaves a padded query out.

    Returns:
        One part for as many sequences as fit into a bounded buffer.
    """
    batch, heads, length, width = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    chosen, triangle = _causal(length, rows, keys, query.device)
    q = query.index_select(2, chosen).float().mul_(1 / math.sqrt(width) if scale is None else scale)
    parts = []
    step = max(1, _VALUES // max(heads * len(chosen) * keys, 1))
    for start in range(0, batch, step):
        part = slice(start, min(start + step, batch))
        size = part.stop - part.start
        logits = torch.matmul(q[part].reshape(size, kv_heads, -1, width), key[part].float().transpose(2, 3))
        logits = logits.view(size, heads, len(chosen), keys)
        hidden = triangle if causal else None
        if mask is not None:
            shown = _select(mask, part, chosen)
            if shown.dtype is torch.bool:
                out_of_sight = ~shown
            else:
                out_of_sight = shown < -MASKED
                logits = logits + shown.float().masked_fill(out_of_sight, 0.0)
            if hidden is not None:
                out_of_sight = out_of_sight | (hidden.away > 0)
            hidden = Hidden.by(out_of_sight, keys)
        parts.append(reduce_rows(logits, hidden, None if valid is None else valid[part].index_select(1, chosen)))
    return parts


def _select(mask: Tensor, batch: slice, rows: Tensor) -> Tensor:
    """The part of a broadcastable mask that belongs to some sequences and query rows."""
    while mask.dim() < 4:
        mask = mask.unsqueeze(0)
    if mask.shape[0] > 1:
        mask = mask[batch]
    return mask.index_select(2, rows) if mask.shape[2] > 1 else mask


def reduce_rows(logits: Tensor, hidden: Hidden | None, usable: Tensor | None) -> RowSums:
    """Reduce rows of logits.

    Args:
        logits: Shape ``(batch, heads, rows, keys)``, float32; overwritten.
        hidden: Keys that are out of sight; None for none.
        usable: Shape ``(batch, rows)``: rows that count; None for all.
    """
    if hidden is None:
        visible = torch.full((1, 1, 1), float(logits.shape[-1]), device=logits.device)
        lowest = logits.amin((0, 2, 3))
    else:
        # Adding a huge number where a key is hidden is several times quicker than filling by a broadcast mask.
        visible = hidden.visible
        lowest = logits.add_(hidden.away).amin((0, 2, 3))
        logits.sub_(hidden.away, alpha=2)
    top = logits.amax(-1, keepdim=True)
    # exp is up to 20 times slower than exp2 on a CPU where it underflows, as it does at every hidden key.
    weights = torch.exp2(logits.sub_(top).mul_(_LOG2_E))
    total, first = weights.sum(-1), weights[..., 0].clone()
    spread = logits.mul_(weights).sum(-1)  # a hidden key gives -1e30 · 0
    return RowSums(lowest, top.squeeze(-1), total, first, spread, visible, usable)


def logit_rows(logits: Tensor, heads: int | None, rows: int, valid: Tensor | None) -> list[RowSums]:
    """`attention_rows` for eager attention, from the logits as its softmax receives them.

    Args:
        logits: Shape ``(batch, heads, queries, keys)``, or ``(batch * heads, queries, keys)``.
        heads: Number of heads where the shape does not show it; None for one.
        rows: Query rows per head and sequence to use.
        valid: Shape ``(batch, queries)``: False leaves a padded query out.
    """
    if logits.dim() == 3:
        logits = logits.reshape(-1, heads or 1, *logits.shape[1:])
    elif logits.dim() > 4:
        logits = logits.flatten(0, -4)
    chosen = spread_rows(logits.shape[2], rows).to(logits.device)
    parts = []
    step = max(1, _VALUES // max(logits.shape[1] * len(chosen) * logits.shape[3], 1))
    for start in range(0, logits.shape[0], step):
        part = logits[start : start + step].index_select(2, chosen).float().clamp_(min=-_FAR / 10)
        hidden = Hidden.by(part < part.amax(-1, keepdim=True) - MASKED, part.shape[-1])
        parts.append(reduce_rows(part, hidden, None if valid is None else valid[start : start + step][:, chosen]))
    return parts


def settle_cores(cores: Sequence[Sequence[RowSums]]) -> list[AttentionStatistics]:
    """The statistics of each core, from its parts; parts of one kind together, as heads of one large core."""
    alike: dict[tuple[object, ...], list[tuple[int, RowSums]]] = {}
    for number, parts in enumerate(cores):
        for part in parts:
            alike.setdefault(part.kind, []).append((number, part))
    found: list[AttentionStatistics | None] = [None] * len(cores)
    for several in alike.values():
        first = several[0][1]
        joined = RowSums(
            lowest=torch.cat([part.lowest for _, part in several]),
            top=torch.cat([part.top for _, part in several], 1),
            total=torch.cat([part.total for _, part in several], 1),
            first=torch.cat([part.first for _, part in several], 1),
            spread=torch.cat([part.spread for _, part in several], 1),
            visible=first.visible,
            usable=first.usable,
        ).settle()
        for (number, _), statistics in zip(several, joined.split(len(several)), strict=True):
            earlier = found[number]
            if earlier is None:
                found[number] = statistics
            else:
                earlier.add(statistics)
    return [statistics for statistics in found if statistics is not None]


def _body(function: FunctionType) -> Callable[..., Any]:
    """A composite of `torch.nn.functional` that runs its own body under a mode, instead of handing itself over."""
    scope = dict(function.__globals__, has_torch_function=lambda _: False)
    body = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    body.__kwdefaults__ = function.__kwdefaults__
    return body


class CoreListener(TorchFunctionMode):
    """Calls ``found`` for each attention core that runs while it is active.

    Args:
        found: Takes a function that reduces the core's rows when called.
        rows: Query rows per head and sequence to use.
        valid: Returns which queries are no padding, for a batch and a query count; None for all.
    """

    def __init__(
        self,
        found: Callable[[Callable[[], list[RowSums]]], None],
        rows: int,
        valid: Callable[[int, int], Tensor | None],
    ) -> None:
        super().__init__()
        self.found, self.rows, self.valid = found, rows, valid
        self._multi_head = _body(functional.multi_head_attention_forward)  # type: ignore[arg-type]
        self._heads: int | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Look at attention cores, pass everything on."""
        kwargs = kwargs or {}
        if func is functional.multi_head_attention_forward:
            self._heads = kwargs.get("num_heads", args[4] if len(args) > 4 else None)
            with self:
                return self._multi_head(*args, **kwargs)
        if func is functional.scaled_dot_product_attention:
            self._fused(*args, **kwargs)
        elif func in _SOFTMAX:
            self._eager(*args, **kwargs)
        return func(*args, **kwargs)

    def _fused(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,  # noqa: ARG002
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,  # noqa: ARG002
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,  # noqa: ARG002
    ) -> None:
        query, key = (_four_dimensional(t) for t in (query, key))

        def compute() -> list[RowSums]:
            return attention_rows(
                query,
                key,
                mask=attn_mask,
                causal=is_causal,
                scale=scale,
                rows=self.rows,
                valid=self.valid(query.shape[0], query.shape[2]),
            )

        self.found(compute)

    def _eager(self, input: Tensor, dim: int | None = None, *_: Any, **__: Any) -> None:
        if dim not in (-1, input.dim() - 1) or input.dim() < 3:
            return
        heads = self._heads if input.dim() == 3 else None
        batch = input.shape[0] // (heads or 1) if input.dim() == 3 else input.shape[0]

        def compute() -> list[RowSums]:
            return logit_rows(input.detach(), heads, self.rows, self.valid(batch, input.shape[-2]))

        self.found(compute)


def _four_dimensional(t: Tensor) -> Tensor:
    t = t.detach()
    if t.dim() == 3:  # (batch, tokens, channels): one head
        return t.unsqueeze(1)
    return t.flatten(0, -4) if t.dim() > 4 else t
