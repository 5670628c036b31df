"""What attention looks at, from the queries and keys as they enter its core.

Fused attention never shows its weights, so a light `TorchFunctionMode` watches the calls inside an attention module:
at ``scaled_dot_product_attention`` it takes about 64 query rows per head, spread over the sequence, and recomputes
their masked softmax in float32; at a plain ``softmax`` over the last axis (eager attention) it reads the same rows of
the logits. Cores are matched to sites by the module in whose call they run; if one module holds several, in order.

The mode is active inside the attention modules only, for calls that are recorded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

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


def attention_statistics(
    query: Tensor,
    key: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    rows: int = 64,
    valid: Tensor | None = None,
) -> AttentionStatistics:
    """Statistics of softmax(scale · q kᵀ + mask) over a sample of query rows.

    Args:
        query: Shape ``(batch, heads, queries, head_dim)``.
        key: Shape ``(batch, kv_heads, keys, head_dim)``; ``heads`` is a multiple of ``kv_heads``.
        mask: Broadcastable to ``(batch, heads, queries, keys)``: bool (True = visible) or added to the logits.
        causal: Whether query i sees keys 0 to i only.
        scale: Multiplier of the logits; ``1 / sqrt(head_dim)`` when None.
        rows: Query rows per head and sequence to use.
        valid: Shape ``(batch, queries)``: False leaves a padded query out.

    Returns:
        Sums per query head, over rows that see more than one key.
    """
    batch, heads, length, width = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    chosen = spread_rows(length, rows).to(query.device)
    scale = 1 / math.sqrt(width) if scale is None else scale
    q = query.index_select(2, chosen).float() * scale
    total = None
    step = max(1, _VALUES // max(heads * len(chosen) * keys, 1))
    for start in range(0, batch, step):
        part = slice(start, min(start + step, batch))
        size = part.stop - part.start
        k = key[part].float()
        logits = torch.matmul(q[part].reshape(size, kv_heads, -1, width), k.transpose(2, 3))
        logits = logits.view(size, heads, len(chosen), keys)
        hidden = None
        if causal:
            hidden = torch.arange(keys, device=query.device) > chosen[:, None]
        if mask is not None:
            rows_of_mask = _select(mask, part, chosen)
            if rows_of_mask.dtype is torch.bool:
                out_of_sight = ~rows_of_mask
            else:
                out_of_sight = rows_of_mask < -MASKED
                logits = logits + rows_of_mask.float().masked_fill(out_of_sight, 0.0)
            hidden = out_of_sight if hidden is None else hidden | out_of_sight
        usable = None if valid is None else valid[part].index_select(1, chosen)
        sums = row_statistics(logits, hidden, usable)
        if total is None:
            total = sums
        else:
            total.add(sums)
    assert total is not None
    return total


def _select(mask: Tensor, batch: slice, rows: Tensor) -> Tensor:
    """The part of a broadcastable mask that belongs to some sequences and query rows."""
    while mask.dim() < 4:
        mask = mask.unsqueeze(0)
    if mask.shape[0] > 1:
        mask = mask[batch]
    return mask.index_select(2, rows) if mask.shape[2] > 1 else mask


def row_statistics(logits: Tensor, hidden: Tensor | None, usable: Tensor | None) -> AttentionStatistics:
    """Sums over rows of logits.

    Args:
        logits: Shape ``(batch, heads, rows, keys)``, float32; overwritten.
        hidden: Broadcastable to it, True where a key is masked; None for none.
        usable: Shape ``(batch, rows)``: rows that count; None for all.

    Returns:
        Sums per head.
    """
    batch, heads, rows, keys = logits.shape
    if hidden is None:
        visible = torch.full((1, 1, 1), float(keys), device=logits.device)
        lowest = logits.amin((0, 2, 3))
    else:
        # Adding a huge number where a key is masked is several times quicker than filling by a broadcast mask.
        away = hidden.float().mul_(_FAR)
        visible = keys - hidden.expand(*hidden.shape[:-1], keys).sum(-1, dtype=torch.float32)
        lowest = logits.add_(away).amin((0, 2, 3))
        logits.sub_(away, alpha=2)
    top = logits.amax(-1, keepdim=True)
    highest = top.amax((0, 2, 3))
    # exp is up to 20 times slower than exp2 on a CPU where it underflows, as it does at every masked key.
    weights = torch.exp2(logits.sub_(top).mul_(_LOG2_E))
    total = weights.sum(-1)
    sink = weights[..., 0] / total
    spread = logits.mul_(weights).sum(-1) / _LOG2_E  # a masked key gives -1e30 · 0
    entropy = (total.log() - spread / total) / visible.clamp(min=2).log()
    counted = (visible > 1).expand(batch, heads, rows) & entropy.isfinite()
    if usable is not None:
        counted = counted & usable[:, None, :]
    largest = 1 / total
    columns = (counted, entropy, sink, largest, largest > SATURATED)
    sums = torch.stack([torch.where(counted, c, 0.0).sum((0, 2), dtype=torch.float64) for c in columns])
    count, entropies, sinks, largests, saturated = sums.cpu().numpy()
    logit_max = torch.maximum(highest.clamp(min=0.0), -lowest.clamp(max=0.0))
    return AttentionStatistics(
        rows=count,
        entropy=entropies,
        sink=sinks,
        largest=largests,
        saturated=saturated,
        logit_max=torch.nan_to_num(logit_max.double(), nan=math.inf).cpu().numpy(),
        keys=int(visible.max()),
    )


def logit_statistics(logits: Tensor, heads: int | None, rows: int, valid: Tensor | None) -> AttentionStatistics:
    """`attention_statistics` for eager attention, from the logits as its softmax receives them.

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
    total = None
    step = max(1, _VALUES // max(logits.shape[1] * len(chosen) * logits.shape[3], 1))
    for start in range(0, logits.shape[0], step):
        part = logits[start : start + step].index_select(2, chosen).float().clamp_(min=-_FAR / 10)
        hidden = part < part.amax(-1, keepdim=True) - MASKED
        usable = None if valid is None else valid[start : start + step].index_select(1, chosen)
        sums = row_statistics(part, hidden, usable)
        if total is None:
            total = sums
        else:
            total.add(sums)
    assert total is not None
    return total


def _body(function: FunctionType) -> Callable[..., Any]:
    """A composite of `torch.nn.functional` that runs its own body under a mode, instead of handing itself over."""
    scope = dict(function.__globals__, has_torch_function=lambda _: False)
    body = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    body.__kwdefaults__ = function.__kwdefaults__
    return body


class CoreListener(TorchFunctionMode):
    """Calls ``found`` for each attention core that runs while it is active.

    Args:
        found: Takes a function that computes the statistics of the core when called.
        rows: Query rows per head and sequence to use.
        valid: Returns which queries are no padding, for a batch and a query count; None for all.
    """

    def __init__(
        self,
        found: Callable[[Callable[[], AttentionStatistics]], None],
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

        def compute() -> AttentionStatistics:
            return attention_statistics(
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

        def compute() -> AttentionStatistics:
            return logit_statistics(input.detach(), heads, self.rows, self.valid(batch, input.shape[-2]))

        self.found(compute)


def _four_dimensional(t: Tensor) -> Tensor:
    t = t.detach()
    if t.dim() == 3:  # (batch, tokens, channels): one head
        return t.unsqueeze(1)
    return t.flatten(0, -4) if t.dim() > 4 else t
