"""Branches that are subtracted or scaled on their way to the residual stream."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from setpoint.surgery import Anatomy
from setpoint.surgery.centre import centre_writers
from setpoint.surgery.editing import commit


def batch() -> Tensor:
    return torch.linspace(-3, 3, 160).sin().reshape(2, 5, 16)


class Signed(nn.Module):
    """A pre-norm unit that puts its branch on the stream by a function of its own."""

    def __init__(self, put: Any) -> None:
        super().__init__()
        self.put, self.norm, self.linear = put, nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.put(x, self.linear(self.norm(x)))  # type: ignore[no-any-return]


PUTS = {
    "add": lambda x, y: x + y,
    "subtract": lambda x, y: x - y,
    "in place": lambda x, y: x.clone().sub_(y),
    "alpha": lambda x, y: torch.add(x, y, alpha=0.5),
    "subtract alpha": lambda x, y: torch.sub(x, y, alpha=0.5),
    "half": lambda x, y: x + 0.5 * y,
    "negative": lambda x, y: x + (-y),
    "divided": lambda x, y: y / 3 + x,
}


@pytest.mark.parametrize("put", PUTS.values(), ids=PUTS)
def test_a_branch_may_be_subtracted_or_scaled_on_its_way_to_the_stream(put: Any) -> None:
    anatomy = Anatomy.trace(nn.Sequential(Signed(put), Signed(put), nn.LayerNorm(16)), batch())
    assert [(b.name, b.placement, len(b.branches)) for b in anatomy.blocks] == [("0", "pre", 1), ("1", "pre", 1)]
    writers = [writer for writer in anatomy.writers if writer.block is not None]
    assert [writer.projection.module for writer in writers] == ["0.linear", "1.linear"]
    expected = () if put is PUTS["add"] else ("scale",)
    assert all(tuple(v for v in writer.via if v != "clone") == expected and writer.linear for writer in writers)


@pytest.mark.parametrize("put", PUTS.values(), ids=PUTS)
def test_centring_what_is_subtracted_or_scaled_leaves_no_mean(put: Any) -> None:
    model = nn.Sequential(nn.Linear(16, 16), Signed(put), Signed(put)).double()
    x = batch().double()
    edits = centre_writers(model, Anatomy.trace(nn.Sequential(*model, nn.LayerNorm(16).double()), x).writers)
    commit(model, edits)
    assert float(model(x).detach().mean(-1).abs().max()) < 1e-12


def test_an_error_that_is_squared_is_no_stream() -> None:
    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(16, 4), nn.Linear(4, 16)

        def forward(self, x: Tensor) -> Tensor:
            return (x - self.decoder(self.encoder(x))).square().mean()  # type: ignore[no-any-return]

    assert Anatomy.trace(Autoencoder(), batch()).blocks == ()
