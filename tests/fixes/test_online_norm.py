from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from setpoint import fix
from setpoint.errors import InputError
from setpoint.fixes.online_norm import OnlineNorms
from setpoint.nn import GhostBatchNorm, OnlineNorm1d, OnlineNorm2d


def convolutional() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 6),
        nn.BatchNorm1d(6, affine=False),
    )
    for _ in range(3):
        model(2 * torch.randn(8, 3, 8, 8) + 1)
    nn.init.normal_(model[1].weight), nn.init.normal_(model[1].bias)
    return model.eval(), torch.randn(2, 3, 8, 8)


def test_every_batch_norm_is_replaced_by_its_kind() -> None:
    model, batch = convolutional()
    fixed = fix(model, "online-norm:alpha_fwd=0.99", [batch], timed=False).model
    assert isinstance(fixed[1], OnlineNorm2d)
    assert isinstance(fixed[5], OnlineNorm1d)
    assert fixed[1].alpha_fwd == 0.99
    assert fixed[5].weight is None


def test_without_a_guard_evaluation_stays() -> None:
    model, batch = convolutional()
    fixed = fix(model, OnlineNorms(ecm="none"), [batch], timed=False).model
    torch.testing.assert_close(fixed(batch), model(batch))


def test_fixed_model_trains_at_a_batch_of_one_and_leaves_the_original() -> None:
    model, batch = convolutional()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    fixed = fix(model, OnlineNorms(), [batch], timed=False).model.train()
    fixed(batch[:1]).square().sum().backward()
    torch.testing.assert_close(model.state_dict(), before, atol=0, rtol=0)
    assert not torch.equal(fixed[1].m, model[1].running_mean)


def test_other_batch_norms_are_refused_with_the_place() -> None:
    model = nn.Sequential(nn.Linear(3, 4), GhostBatchNorm(4)).eval()
    with pytest.raises(InputError, match=r"1: is a GhostBatchNorm"):
        fix(model, OnlineNorms(), [torch.randn(2, 3)])


def test_wrong_fields_are_refused() -> None:
    with pytest.raises(InputError, match="between 0 and 1, got 2 and"):
        OnlineNorms(alpha_fwd=2)
    with pytest.raises(InputError, match=r"ecm to be ls .* got 'xx'"):
        OnlineNorms(ecm="xx")
