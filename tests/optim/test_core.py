"""Core: online training of batch norms on class correlations."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.nn import adapt_batchnorm
from setpoint.optim.core import CoreAdapter, class_correlation_loss


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3)).eval()


def batches(count: int = 4) -> list[Tensor]:
    numbers = torch.Generator().manual_seed(0)
    return [1 + 2 * torch.randn(16, 4, generator=numbers) for _ in range(count)]


def test_loss_is_what_the_normalized_class_correlation_has_off_its_diagonal() -> None:
    logits = torch.randn(6, 4, dtype=torch.float64)
    p = logits.softmax(1)
    r = torch.stack([torch.stack([(p[:, j] * p[:, k]).sum() for k in range(4)]) for j in range(4)])
    r = r / r.sum(1, keepdim=True)
    wanted = sum(r[j, k] for j in range(4) for k in range(4) if j != k) / 4
    assert class_correlation_loss(logits).item() == pytest.approx(float(wanted), abs=1e-6)


def test_loss_is_zero_for_certain_and_largest_for_uniform_predictions() -> None:
    certain = 50 * torch.eye(5)[torch.tensor([0, 1, 1, 4, 3, 2])]
    assert class_correlation_loss(certain).item() == pytest.approx(0.0, abs=1e-6)
    assert class_correlation_loss(torch.zeros(7, 5)).item() == pytest.approx(0.8)


def test_class_that_is_never_predicted_gives_no_nan() -> None:
    logits = torch.tensor([[200.0, 0.0, -200.0]] * 3, requires_grad=True)
    loss = class_correlation_loss(logits)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()


def test_every_pixel_of_a_map_is_a_prediction() -> None:
    maps = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(class_correlation_loss(maps), class_correlation_loss(maps.movedim(1, -1).reshape(-1, 3)))


def test_predictions_are_those_before_the_step_and_only_gains_and_addends_move() -> None:
    model, x = classifier(), batches()[0]
    before = deepcopy(model.state_dict())
    adapter = CoreAdapter(model, 0.5)
    torch.testing.assert_close(adapter(x), adapt_batchnorm(model, 0.5)(x).detach())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    moved = [name for name, value in adapter.model.state_dict().items() if not torch.equal(value, old(before, name))]
    assert moved == ["1.norm.weight", "1.norm.bias"]


def old(state: dict[str, Tensor], name: str) -> Tensor:
    return state[name.replace(".norm", "")]


def test_steps_lower_the_loss_also_under_no_grad() -> None:
    adapter, x = CoreAdapter(classifier(), 0.5, lr=1e-2), batches()[0]
    with torch.no_grad():
        losses = [float(class_correlation_loss(adapter(x))) for _ in range(30)]
    assert losses[-1] < losses[0] - 0.01


def test_reset_starts_over() -> None:
    adapter = CoreAdapter(classifier(), 0.5, lr=1e-2)
    first = [adapter(x) for x in batches()]
    adapter.reset()
    for logits, again in zip(first, [adapter(x) for x in batches()], strict=True):
        assert torch.equal(logits, again)


def test_bad_input_is_refused_and_no_step_taken() -> None:
    with pytest.raises(InputError, match="found none; were they folded"):
        CoreAdapter(nn.Linear(2, 2))
    with pytest.raises(InputError, match="got affine=False in all"):
        CoreAdapter(nn.Sequential(nn.BatchNorm1d(2, affine=False)))
    adapter = CoreAdapter(classifier())
    before = deepcopy(adapter.model.state_dict())
    with pytest.raises(InputError, match="loss of this batch is not finite"):
        adapter(torch.full((4, 4), float("nan")))
    torch.testing.assert_close(adapter.model.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(InputError, match=r"at least two classes, got \(3, 1\)"):
        class_correlation_loss(torch.zeros(3, 1))
