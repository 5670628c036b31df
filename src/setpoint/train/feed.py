"""Batches for a run: endless, shared out over processes, and to be entered at any point."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader

from setpoint.data.batches import Batches
from setpoint.errors import InputError
from setpoint.train.random import RandomState


class Feed:
    """The stream of batches of one process.

    `setpoint.data.Batches` are entered directly. Any other iterable is started anew when it ends, and entered by
    skipping; its random draws (the shuffle of a `DataLoader`, augmentations) come from a stream of their own, so that
    they are the same whether the run was interrupted or not.

    Args:
        data: The user's iterable of batches.
        seed: Start of the stream of random numbers of an iterable that draws any.
        rank, world_size: This process, and how many share the data.
    """

    def __init__(self, data: Iterable[Any], *, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if not isinstance(data, Iterable):
            raise InputError(
                f"expected data as an iterable of batches (data.text(...).batches('train', 32), a DataLoader, a list), "
                f"got {type(data).__name__}"
            )
        self._data = data
        self._rank, self._world_size = rank, world_size
        self._random = RandomState.seeded(seed)
        self._draws = not isinstance(data, Batches | list | tuple)

    def from_batch(self, number: int) -> Iterator[Any]:
        """Batches from the ``number``-th on, counted from 0 for each process."""
        if isinstance(self._data, Batches) and self._data.endless:
            return iter(self._data.shard(self._rank, self._world_size).from_batch(number))
        start = number * self._world_size + self._rank
        return islice(self._anew(), start, None, self._world_size)

    def _anew(self) -> Iterator[Any]:
        given = 0
        while True:
            before = given
            with self._own_random():
                iterator = iter(self._data)
            while True:
                with self._own_random():
                    try:
                        batch = next(iterator)
                    except StopIteration:
                        break
                given += 1
                yield batch
            if given == before:
                raise InputError(_ended(self._data, given))

    @contextmanager
    def _own_random(self) -> Iterator[None]:
        if not self._draws:
            yield
            return
        outside = RandomState.now()
        self._random.put()
        try:
            yield
        finally:
            self._random = RandomState.now()
            outside.put()


def _ended(data: Iterable[Any], given: int) -> str:
    if given == 0:
        return "The data holds no batch. Give at least one."
    what = "a DataLoader" if isinstance(data, DataLoader) else type(data).__name__
    return f"The data ({what}) ended after {given:,} batches and can't be started again. Give a list or a DataLoader."
