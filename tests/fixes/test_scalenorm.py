"""The fix that puts ScaleNorm in the place of every norm."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from setpoint import fix
from setpoint.errors import InputError
from setpoint.fixes.scalenorm import ScaleNorms
from setpoint.nn import ScaleNorm
from setpoint.testing.tiny import tiny


@pytest.mark.parametrize("family", ["opt", "llama", "bert", "vit", "encoder", "decoder"])
def test_no_other_norm_over_features_is_left(family: str) -> None:
    model, batch = tiny(family)
    fixed = fix(model, "scalenorm", [batch], timed=False).model
    names = [type(m).__name__ for m in fixed.modules() if "Norm" in type(m).__name__ and not list(m.children())]
    assert set(names) - {"PreNorm"} == {"ScaleNorm"}
    assert len(names) == 5


def test_fixed_lengths_are_root_width_but_for_the_norm_in_front_of_the_head() -> None:
    model, batch = tiny("llama")
    fixed = fix(model, "scalenorm:learnable=false", [batch], timed=False).model
    norms = {name: m for name, m in fixed.named_modules() if isinstance(m, ScaleNorm)}
    assert {float(m.scale.detach()) for m in norms.values()} == {4.0}
    assert [name for name, m in norms.items() if m.learnable] == ["model.norm"]


def test_a_second_time_there_is_nothing_to_do() -> None:
    model, batch = tiny("encoder")
    once = fix(model, "scalenorm", [batch], timed=False).model
    again = fix(once, "scalenorm", [batch], timed=False)
    assert not again.edits
    assert "nothing to" in again.notes[0]


def test_norms_over_other_axes_than_the_last_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(1, 4), nn.Conv2d(4, 2, 1))
    with pytest.raises(InputError, match="over other axes than the last"):
        fix(model, "scalenorm", [torch.randn(2, 3, 5, 5)], timed=False)
    with pytest.raises(InputError, match="batch norms, which ScaleNorm does not replace"):
        fix(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), "scalenorm", [torch.randn(5, 3)], timed=False)


def test_eps_must_be_positive() -> None:
    with pytest.raises(InputError, match="eps above 0"):
        ScaleNorms(eps=0.0)
