from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor, nn

from setpoint.testing.tiny import tiny


@pytest.fixture
def make() -> Callable[..., tuple[nn.Module, Tensor]]:
    """``make(family, **options)`` gives a tiny model and a batch for it."""
    return tiny
