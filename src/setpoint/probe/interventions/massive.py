"""Massive activations by hand, and what depends on them.

The measuring protocol of Owen et al. (2025, arXiv 2503.22329): where a block's output holds entries with |h| > 100 and
|h| > 1000 times the median magnitude (`massive_activations`); what happens when they are set to zero or to their mean
(`intervene`); how much attention their token draws (`attention_sink_mass`). `setpoint.probe.interventions.dependence`
runs the protocol on what a recording found.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.probe.interventions.hooks import caught, exchange, module_at
from setpoint.running import run_batch
from setpoint.types import Tap


@dataclass(frozen=True, slots=True)
class Entry:
    """A massive entry: where it stands and its signed value."""

    sequence: int
    token: int
    channel: int
    value: float

    @property
    def starting(self) -> bool:
        """Whether it stands at the first token; starting and other tokens are kept apart."""
        return self.token == 0


@dataclass(frozen=True, slots=True)
class LayerReport:
    """Largest and median magnitude of one block's output, and its massive entries.

    Args:
        name: Qualified name of the block.
        largest, median: Magnitudes, over all entries of all sequences.
        entries: Massive entries, largest first.
    """

    name: str
    largest: float
    median: float
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class MassiveReport:
    """What `massive_activations` found, one `LayerReport` per block in order of depth."""

    layers: tuple[LayerReport, ...]

    @property
    def first_layer(self) -> int | None:
        """Index of the first block whose output holds a massive entry, None if none does."""
        return next((i for i, layer in enumerate(self.layers) if layer.entries), None)

    @property
    def last_layer(self) -> int | None:
        """Index of the last such block."""
        return next((i for i in reversed(range(len(self.layers))) if self.layers[i].entries), None)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of massive entries, most frequent first."""
        return self._most_common("channel")

    @property
    def tokens(self) -> tuple[int, ...]:
        """Token positions of massive entries, most frequent first."""
        return self._most_common("token")

    def _most_common(self, field: str) -> tuple[int, ...]:
        seen = Counter(getattr(e, field) for layer in self.layers for e in layer.entries)
        return tuple(value for value, _ in sorted(seen.items(), key=lambda pair: (-pair[1], pair[0])))


def massive_entries(
    hidden: Tensor, abs_threshold: float = 100.0, rel_threshold: float = 1000.0
) -> tuple[tuple[Entry, ...], float, float]:
    """Massive entries of one block output, with its largest and its median magnitude.

    Args:
        hidden: Shape ``(batch, tokens, channels)`` or ``(tokens, channels)``.
        abs_threshold: Magnitude that a massive entry exceeds.
        rel_threshold: Multiple of the median magnitude that it exceeds. The median is over all entries of its own
            sequence; for an even count it is the lower middle one (`torch.median`).

    Returns:
        ``(entries, largest, median)``; entries largest first, ``largest`` and ``median`` over everything.

    Example:
        >>> hidden = torch.ones(4, 8)
        >>> hidden[0, 3] = 2000.0
        >>> massive_entries(hidden)
        ((Entry(sequence=0, token=0, channel=3, value=2000.0),), 2000.0, 1.0)
    """
    if hidden.ndim == 2:
        hidden = hidden[None]
    if hidden.ndim != 3:
        raise InputError(f"Expected hidden states of shape (batch, tokens, channels), got {tuple(hidden.shape)}.")
    sizes = hidden.detach().float().abs()
    medians = sizes.flatten(1).median(dim=1).values
    entries = entries_where(hidden, (sizes > abs_threshold) & (sizes > rel_threshold * medians[:, None, None]))
    return entries, float(sizes.max()), float(sizes.median())


def entries_where(hidden: Tensor, chosen: Tensor) -> tuple[Entry, ...]:
    """The entries of ``hidden``, shape ``(batch, tokens, channels)``, that a mask of its shape names, largest first."""
    entries = [Entry(s, t, c, float(hidden[s, t, c])) for s, t, c in chosen.nonzero().tolist()]
    return tuple(sorted(entries, key=lambda e: -abs(e.value)))


def massive_activations(
    model: nn.Module,
    input_ids: Any,
    blocks: Sequence[str] | None = None,
    abs_threshold: float = 100.0,
    rel_threshold: float = 1000.0,
) -> MassiveReport:
    """Find the massive activations of a model's blocks in one forward pass.

    Args:
        model: A network whose blocks return hidden states of shape ``(batch, tokens, channels)``, alone or as the
            first tensor of a tuple.
        input_ids: The batch: a tensor (the only argument), a tuple (positional) or a dict (keyword arguments).
        blocks: Qualified names of the blocks; found by tracing the model when left out.
        abs_threshold: Magnitude that a massive entry exceeds.
        rel_threshold: Multiple of the median magnitude that it exceeds.

    Returns:
        The report: per block largest, median and entries; ``.first_layer``, ``.channels``, ``.tokens``.

    Raises:
        InputError: A threshold that is not positive, an unknown block, or no blocks found.

    Reference:
        Owen et al., 2025, arXiv 2503.22329.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        >>> massive_activations(model, torch.ones(1, 4, 8), blocks=["0", "1"]).first_layer is None
        True
    """
    for name, threshold in (("abs_threshold", abs_threshold), ("rel_threshold", rel_threshold)):
        if not threshold > 0:
            raise InputError(f"{name} must be positive, got {threshold}.")
    taps = _block_taps(model, input_ids, blocks)
    with torch.no_grad(), caught(model, list(taps.values())) as tensors:
        run_batch(model, input_ids)
    layers = []
    for name, tap in taps.items():
        if tap not in tensors:
            raise InputError(f"The block {name!r} did not run in this pass.")
        entries, largest, median = massive_entries(tensors[tap], abs_threshold, rel_threshold)
        layers.append(LayerReport(name, largest, median, entries))
    return MassiveReport(tuple(layers))


def _block_taps(model: nn.Module, batch: Any, blocks: Sequence[str] | None) -> dict[str, Tap]:
    if blocks is not None:
        for name in blocks:
            module_at(model, name)
        taps = {name: Tap(name, "output") for name in blocks}
    else:
        from setpoint.surgery import Anatomy

        anatomy = Anatomy.trace(model, batch)
        taps = {b.name or f"block {b.index}": b.output for b in anatomy.blocks if b.output is not None}
    if not taps:
        raise InputError(f"No blocks were found in {type(model).__name__}. Name them: blocks=['layers.0', ...].")
    return taps


@contextmanager
def intervene(
    model: nn.Module,
    layer: str | nn.Module,
    entries: Iterable[Entry],
    value: float | Literal["mean"] | Tensor = 0.0,
) -> Iterator[None]:
    """Set entries of a block's output while the context is open; later blocks run on what was set.

    Args:
        model: The network.
        layer: The block, by qualified name or as the module itself. Its output is a tensor of shape ``(batch, tokens,
            channels)`` or a structure whose first tensor is.
        entries: Which entries. Entries of a token and channel that occur in several sequences act on each.
        value: The number to set; ``"mean"`` for the mean value of the given entries, taken apart for starting and
            other tokens and for each channel; or one number per entry.

    Raises:
        InputError: No entries, or a tensor of another length than the entries.

    Reference:
        Owen et al., 2025, arXiv 2503.22329, the intervention at the first massive layer.

    Example:
        >>> model = nn.Sequential(nn.Identity())
        >>> with intervene(model, "0", [Entry(0, 1, 2, 5.0)], 0.0):
        ...     model(torch.ones(1, 2, 3))
        tensor([[[1., 1., 1.],
                 [1., 1., 0.]]])
    """
    chosen = tuple(entries)
    if not chosen:
        raise InputError("There are no entries to set.")
    module = module_at(model, layer) if isinstance(layer, str) else layer
    values = _values(chosen, value)

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        return exchange(output, 0, lambda hidden: set_entries(hidden, chosen, values))

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _values(entries: Sequence[Entry], value: float | str | Tensor) -> list[float]:
    if isinstance(value, Tensor):
        if value.numel() not in (1, len(entries)):
            raise InputError(f"value must hold one number or one per entry ({len(entries)}), got {value.numel()}.")
        return [float(v) for v in value.flatten().expand(len(entries))]
    if isinstance(value, str):
        if value != "mean":
            raise InputError(f"value must be a number, a tensor or 'mean', got {value!r}.")
        means = group_means(entries)
        return [means[e.starting, e.channel] for e in entries]
    return [float(value)] * len(entries)


def group_means(entries: Iterable[Entry]) -> dict[tuple[bool, int], float]:
    """Mean value of the entries at starting and at other tokens, per channel.

    >>> group_means([Entry(0, 0, 7, 10.0), Entry(1, 0, 7, 20.0), Entry(0, 4, 7, 1.0)])
    {(True, 7): 15.0, (False, 7): 1.0}
    """
    groups: dict[tuple[bool, int], list[float]] = defaultdict(list)
    for e in entries:
        groups[e.starting, e.channel].append(e.value)
    return {group: sum(values) / len(values) for group, values in groups.items()}


def set_entries(hidden: Tensor, entries: Sequence[Entry], values: Sequence[float]) -> Tensor:
    """A copy of ``hidden`` with each entry set to its value; entries outside of it are passed over."""
    changed = hidden.clone()
    view = changed if changed.ndim == 3 else changed[None]
    for e, v in zip(entries, values, strict=True):
        if e.sequence < view.shape[0] and e.token < view.shape[1]:
            view[e.sequence, e.token, e.channel] = v
    return changed


def attention_sink_mass(weights: Tensor, slot: int = 0) -> float:
    """Attention mass on one slot, averaged over heads and over queries that see more than that slot.

    Args:
        weights: Softmax rows, shape ``(..., queries, keys)``.
        slot: The key: 0 for the first token, or an extra slot.

    Returns:
        The mean mass, between 0 and 1. The first query is left out: under a causal mask it sees only itself.

    Raises:
        InputError: Fewer than two queries, or no such slot.

    Example:
        >>> attention_sink_mass(torch.tensor([[1.0, 0.0], [0.25, 0.75]]))
        0.25
    """
    if weights.ndim < 2 or weights.shape[-2] < 2 or not -weights.shape[-1] <= slot < weights.shape[-1]:
        raise InputError(
            f"Expected weights of shape (..., queries, keys) with two queries or more and a key {slot}, "
            f"got {tuple(weights.shape)}."
        )
    return float(weights[..., 1:, slot].double().mean())
