from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from setpoint import fix
from setpoint.errors import InputError
from setpoint.fixes.powernorm import PowerFolding, PowerNorms
from setpoint.nn import GroupScaling, PowerNorm

Make = Callable[..., tuple[nn.Module, Tensor]]


def norms_of(model: nn.Module) -> list[PowerNorm]:
    return [module for module in model.modules() if isinstance(module, PowerNorm)]


@pytest.mark.parametrize(("family", "count"), [("vit", 5), ("encoder", 5), ("bert", 5)])
def test_every_norm_is_replaced_with_a_group_for_each_head(make: Make, family: str, count: int) -> None:
    model, batch = make(family)
    norms = norms_of(fix(model, "powernorm:warmup_iters=7", [batch], timed=False).model)
    assert len(norms) == count
    assert {norm.scaling.group_num for norm in norms} == {2}
    assert {norm.warmup_iters for norm in norms} == {7}


def test_groups_can_be_given_and_must_divide_the_width(make: Make) -> None:
    model, batch = make("encoder")
    assert norms_of(fix(model, PowerNorms(group_num=4), [batch], timed=False).model)[0].scaling.group_num == 4
    with pytest.raises(InputError, match="widths 8 do not divide into 3 groups"):
        fix(model, PowerNorms(group_num=3), [batch])
    with pytest.raises(InputError, match="group_num above 0"):
        PowerNorms(group_num=0)


def test_decoders_are_refused(make: Make) -> None:
    model, batch = make("gpt2")
    with pytest.raises(InputError, match="a decoder, where statistics over tokens would show it those yet to come"):
        fix(model, PowerNorms(), [batch])


def test_trained_model_folds_to_scalings_of_groups(make: Make) -> None:
    model, batch = make("encoder")
    model = fix(model, "powernorm", [batch], timed=False).model
    for _ in range(3):
        model.train()(torch.randn(4, 5, 8)).square().mean().backward()
    for norm in norms_of(model):
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    model.eval()
    fixed = fix(model, PowerFolding(), [batch], timed=False)
    assert not norms_of(fixed.model)
    assert sum(isinstance(m, GroupScaling) for m in fixed.model.modules()) == 5
    assert fixed.change.exact is not None
    torch.testing.assert_close(fixed.model(batch), model(batch), atol=1e-5, rtol=1e-5)


def test_nothing_is_left_of_one_without_groups() -> None:
    model = nn.Sequential(PowerNorm(8, group_num=None), nn.Linear(8, 2)).eval()
    assert isinstance(fix(model, PowerFolding(), [torch.randn(3, 8)], timed=False).model[0], nn.Identity)
