"""Batches by number: the i-th batch is a pure function of the seed and i.

So a run that stops can go on at the very batch it would have read next, without reading the ones before, and several
processes can share the stream without a sampler that has to be told the epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.running import run_batch

Batch = TypeVar("Batch")
Index = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Batches(Generic[Batch]):
    """A stream of batches that can be entered anywhere.

    Iterating starts at ``first`` each time; an endless stream never stops, a pass stops after its last batch.

    Args:
        make: ``make(items, epoch)`` turns the numbers of the chosen items into a batch.
        count: How many items there are.
        batch_size: Items in a batch.
        seed: Order of an endless stream: every epoch is a new permutation of all items, and its last items, if fewer
            than a batch, are left out. None for one pass in order, whose last batch may be smaller.
        first: Number of the first batch to give.
        step: How far the next batch is from the last (the number of processes that share the stream).

    >>> stream = Batches(lambda items, epoch: items.tolist(), count=5, batch_size=2, seed=0)
    >>> iterator = iter(stream)
    >>> [next(iterator) for _ in range(3)]
    [[2, 4], [3, 0], [1, 4]]
    >>> next(iter(stream.from_batch(2)))
    [1, 4]
    >>> list(Batches(lambda items, epoch: items.tolist(), count=5, batch_size=2, seed=None))
    [[0, 1], [2, 3], [4]]
    """

    make: Callable[[Index, int], Batch]
    count: int
    batch_size: int
    seed: int | None
    first: int = 0
    step: int = 1
    _order: dict[int, Index] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"expected a batch size of at least 1, got {self.batch_size}")
        if self.seed is not None and self.count < self.batch_size:
            raise InputError(
                f"a batch of {self.batch_size} is larger than the data, which has {self.count} items; "
                f"use a smaller batch size"
            )

    @property
    def endless(self) -> bool:
        """Whether the stream goes on for ever."""
        return self.seed is not None

    @property
    def per_epoch(self) -> int:
        """Batches in which every item comes once."""
        return self.count // self.batch_size if self.endless else -(-self.count // self.batch_size)

    def __len__(self) -> int:
        """Batches of a pass.

        Raises:
            TypeError: The stream is endless.
        """
        if self.endless:
            raise TypeError("an endless stream of batches has no length; take as many as you need")
        return max(0, -(-(self.per_epoch - self.first) // self.step))

    def __bool__(self) -> bool:
        """True: an endless stream has no length to be judged by."""
        return True

    def __getitem__(self, number: int) -> Batch:
        """The batch of that number, counted from the start of the whole stream."""
        if number < 0 or (not self.endless and number >= self.per_epoch):
            raise IndexError(f"there is no batch {number}; a pass has {self.per_epoch}")
        epoch, place = divmod(number, self.per_epoch)
        start = place * self.batch_size
        return self.make(self._items(epoch)[start : start + self.batch_size], epoch)

    def __iter__(self) -> Iterator[Batch]:
        """Batches from ``first`` on."""
        number = self.first
        while self.endless or number < self.per_epoch:
            yield self[number]
            number += self.step

    def from_batch(self, number: int) -> Batches[Batch]:
        """The same stream, ``number`` batches further on."""
        return replace(self, first=self.first + number * self.step)

    def shard(self, rank: int, world_size: int) -> Batches[Batch]:
        """The part of the stream for one of several processes: every ``world_size``-th batch."""
        return replace(self, first=self.first + rank * self.step, step=self.step * world_size)

    def _items(self, epoch: int) -> Index:
        if self.seed is None:
            epoch = 0
        if epoch not in self._order:
            if self.seed is None:
                order = np.arange(self.count)
            else:
                order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
            self._order.clear()
            self._order[epoch] = order
        return self._order[epoch]


def run_inputs(model: nn.Module, batch: Any) -> Any:
    """Run a model on the inputs of a batch, and leave the targets to the loss.

    Args:
        model: The network.
        batch: A pair ``(inputs, targets)``; or a mapping, whose ``tokens`` are the only argument, or else whose
            entries without ``targets`` are the keyword arguments; anything else is passed as `setpoint.check` does.

    Returns:
        The model's output.

    >>> import torch
    >>> run_inputs(nn.Linear(3, 2), (torch.zeros(5, 3), torch.zeros(5))).shape
    torch.Size([5, 2])
    """
    if isinstance(batch, Mapping):
        if "tokens" in batch:
            return model(batch["tokens"])
        return model(**{name: value for name, value in batch.items() if name != "targets"})
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return run_batch(model, batch[0])
    return run_batch(model, batch)


def next_token_loss(output: Any, batch: Any) -> Tensor:
    """Cross-entropy of the next token, for batches of `TokenData`.

    Args:
        output: Logits ``(batch, tokens, vocabulary)``, or an output that has them as ``logits``.
        batch: A mapping with ``targets`` of shape ``(batch, tokens)``; -100 marks a token that does not count.

    Returns:
        Mean over the tokens that count, in nats.

    >>> import math, torch
    >>> loss = next_token_loss(torch.zeros(1, 4, 100), {"targets": torch.arange(4)[None]})
    >>> math.isclose(loss.item(), math.log(100), rel_tol=1e-6)
    True
    """
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return F.cross_entropy(logits.flatten(0, 1).float(), batch["targets"].flatten())


def label_loss(output: Any, batch: Any) -> Tensor:
    """Cross-entropy of the label, for batches of `ImageData`.

    Args:
        output: Logits ``(batch, classes)``, or an output that has them as ``logits``.
        batch: A pair whose second is the labels ``(batch,)``.

    Returns:
        Mean over the batch, in nats.
    """
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return F.cross_entropy(logits.float(), batch[1])


def accuracy(output: Any, batch: Any) -> Tensor:
    """Share of labels, or of next tokens, that have the largest logit.

    Args:
        output: Logits with the classes last, or an output that has them as ``logits``.
        batch: As for `label_loss` or `next_token_loss`.

    Returns:
        A scalar between 0 and 1.
    """
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    labels: Tensor = batch["targets"] if isinstance(batch, Mapping) else batch[1]
    counted = labels != -100
    return (logits.argmax(-1) == labels)[counted].float().mean()
