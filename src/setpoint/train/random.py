"""The state of every random number generator that training draws from, as tensors that fit into a checkpoint."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RandomState:
    """States of Python's, numpy's and torch's generators (those of all GPUs too, once CUDA runs)."""

    python: Any
    numpy: Any
    cpu: Tensor
    cuda: tuple[Tensor, ...] = ()

    @classmethod
    def now(cls) -> RandomState:
        """The states as they are."""
        cuda = tuple(torch.cuda.get_rng_state_all()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)

    @classmethod
    def seeded(cls, seed: int) -> RandomState:
        """The states after seeding; the generators themselves stay as they are."""
        with kept():
            put_seed(seed)
            return cls.now()

    def put(self) -> None:
        """Set the generators to these states."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(list(self.cuda))

    def to_tensors(self) -> dict[str, Any]:
        """As tensors and numbers, which a checkpoint can hold without pickling code."""
        version, words, gauss = self.python
        name, keys, place, has_gauss, cached = self.numpy
        return {
            "python": [version, torch.tensor(words, dtype=torch.int64), gauss],
            "numpy": [name, torch.from_numpy(keys.astype(np.int64)), int(place), int(has_gauss), float(cached)],
            "cpu": self.cpu,
            "cuda": list(self.cuda),
        }

    @classmethod
    def from_tensors(cls, state: dict[str, Any]) -> RandomState:
        """The inverse of `to_tensors`."""
        version, words, gauss = state["python"]
        name, keys, place, has_gauss, cached = state["numpy"]
        return cls(
            (version, tuple(words.tolist()), gauss),
            (name, keys.numpy().astype(np.uint32), place, has_gauss, cached),
            state["cpu"].cpu(),
            tuple(part.cpu() for part in state["cuda"]),
        )


def put_seed(seed: int) -> None:
    """Seed every generator."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def kept() -> Iterator[None]:
    """Whatever is drawn or seeded inside, the generators are afterwards as they were."""
    before = RandomState.now()
    try:
        yield
    finally:
        before.put()
