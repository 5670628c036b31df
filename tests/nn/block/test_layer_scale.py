"""LayerScale (Touvron et al., 2021)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.nn import LayerScale
from setpoint.optim.decay import decay_groups
from setpoint.surgery import Anatomy


def test_every_channel_is_multiplied_by_its_number() -> None:
    layer, x = LayerScale(4), torch.randn(2, 3, 4)
    nn.init.normal_(layer.gamma)
    torch.testing.assert_close(layer(x), x * layer.gamma)
    first = LayerScale(4, channels_last=False)
    first.load_state_dict(layer.state_dict())
    torch.testing.assert_close(first(x.movedim(-1, 1)), layer(x).movedim(-1, 1))


def test_it_starts_near_zero_and_is_not_decayed() -> None:
    layer = LayerScale(4)
    assert layer.gamma.tolist() == pytest.approx([1e-5] * 4)
    groups = decay_groups(nn.Sequential(nn.Linear(4, 4), layer), 0.1)
    assert "1.gamma" in groups[1]["names"]


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.scale = nn.LayerNorm(8), nn.Linear(8, 8), LayerScale(8, init_values=0.1)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.scale(self.linear(self.norm(x))))


def test_an_anatomy_reads_it_as_the_scale_of_what_a_branch_writes() -> None:
    writers = Anatomy.trace(Branch(), torch.randn(2, 5, 8)).writers
    assert [(w.projection.parameter, w.scale) for w in writers if w.block is not None] == [
        ("linear.weight", "scale.gamma")
    ]


def test_bad_arguments_and_inputs_are_refused() -> None:
    with pytest.raises(InputError, match="dim of at least 1"):
        LayerScale(0)
    with pytest.raises(InputError, match=r"\(\*, 4\), got \(2, 5\)"):
        LayerScale(4)(torch.randn(2, 5))
    with pytest.raises(InputError, match=r"\(N, 4, \*\), got \(2, 5, 3\)"):
        LayerScale(4, channels_last=False)(torch.randn(2, 5, 3))
