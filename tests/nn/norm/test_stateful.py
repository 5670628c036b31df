"""What power, unified and online normalization have in common: state, and a backward pass that moves it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils.checkpoint import checkpoint

from setpoint.errors import InputError
from setpoint.nn import OnlineNorm1d, PowerNorm, UnifiedNorm
from setpoint.nn.norm.stateful import mean_over_positions
from setpoint.testing.layer_case import Case, pattern
from setpoint.testing.pair import gradients_on_two

KINDS: dict[str, Callable[[], nn.Module]] = {
    "power": lambda: PowerNorm(3, group_num=None),
    "unified": lambda: UnifiedNorm(3),
    "online": lambda: OnlineNorm1d(3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_second_backward_through_one_call_is_refused(kind: str) -> None:
    x = torch.randn(4, 3, requires_grad=True)
    y = KINDS[kind]()(x).sum()
    y.backward(retain_graph=True)
    with pytest.raises(InputError, match="one backward pass for each call, got a second"):
        y.backward()


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_a_gradient_is_refused(kind: str) -> None:
    x = torch.randn(4, 3, requires_grad=True)
    with pytest.raises(InputError, match="without create_graph"):
        torch.autograd.grad(KINDS[kind]()(x).sum(), x, create_graph=True)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_recomputation_is_refused(kind: str, reentrant: bool) -> None:
    x = torch.randn(4, 3, requires_grad=True)
    y = checkpoint(KINDS[kind](), x, use_reentrant=reentrant)
    with pytest.raises(InputError, match="leave it out of what is checkpointed"):
        y.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_for_evaluation_it_can_be_checkpointed_and_differentiated_twice(kind: str) -> None:
    layer, x = KINDS[kind]().eval(), torch.randn(4, 3, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)[0].sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_over_batches_is_refused_in_training(kind: str) -> None:
    layer = KINDS[kind]()
    buffers = {name: b.expand(2, *b.shape).clone() for name, b in layer.named_buffers()}
    parameters = dict(layer.named_parameters())
    with pytest.raises(InputError, match=r"under torch\.func\.vmap"):
        vmap(lambda x, b: functional_call(layer, parameters | b, (x,)))(torch.randn(2, 4, 3), buffers)


@pytest.mark.parametrize("kind", KINDS)
def test_state_stays_in_single_precision_in_a_half_precision_model(kind: str) -> None:
    layer = KINDS[kind]().bfloat16()
    assert layer.weight.dtype == torch.bfloat16
    before = {name: b.clone() for name, b in layer.named_buffers()}
    assert layer(torch.randn(8, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16
    floating = {name: b for name, b in layer.named_buffers() if b.is_floating_point()}
    assert {b.dtype for b in floating.values()} == {torch.float32}
    assert any((b != before[name]).any() for name, b in floating.items())
    assert all(b.dtype == torch.float64 for b in layer.double().buffers() if b.is_floating_point())


@pytest.mark.parametrize("kind", KINDS)
def test_infinite_gradients_of_a_loss_scaler_do_not_stay_in_the_state(kind: str) -> None:
    layer, x = KINDS[kind](), torch.randn(4, 3, requires_grad=True)
    (layer(x) * float("inf")).sum().backward()
    assert all(b.isfinite().all() for b in layer.buffers())


@pytest.mark.parametrize("kind", KINDS)
def test_reset_brings_back_a_fresh_layer(kind: str) -> None:
    layer, fresh = KINDS[kind](), KINDS[kind]()
    layer(torch.randn(4, 3)).square().sum().backward()
    nn.init.normal_(layer.weight)
    layer.reset_parameters()
    torch.testing.assert_close(layer.state_dict(), fresh.state_dict(), atol=0, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_training_moves_the_same_state(kind: str) -> None:
    plain, other = KINDS[kind](), KINDS[kind]()
    torch._dynamo.reset()
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(4, 3)
        plain(x).square().sum().backward()
        compiled(x).square().sum().backward()
    torch.testing.assert_close(other.state_dict(), plain.state_dict())
    torch._dynamo.reset()


def test_mean_over_no_position_is_zero() -> None:
    mean, count = mean_over_positions(torch.randn(4, 3), torch.zeros(4, dtype=torch.bool))
    assert not mean.any()
    assert count == 0


@pytest.mark.parametrize("kind", ["power", "unified"])
def test_statistics_are_those_of_both_processes(kind: str) -> None:
    """The gain's gradient is a sum of g z, and z divides by the quadratic mean of both halves."""
    x = torch.randn(4, 3) * torch.tensor([[1.0], [1.0], [5.0], [5.0]])
    layer = Case(KINDS[kind], (x,)).layer()
    whole = layer(x).detach()
    z = (whole - layer.bias) / layer.weight

    def half(part: Tensor) -> Tensor:
        return (pattern(part) * part).sum(0)

    wanted = (half(z[:2]) + half(z[2:])).detach() / 2
    for outcome, problem in gradients_on_two(Case(KINDS[kind], (x,)).layer(), [(x[:2],), (x[2:],)]):
        assert outcome is not None, problem
        torch.testing.assert_close(outcome["weight"], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["power", "unified"])
def test_averages_of_the_gradient_are_those_of_both_processes(kind: str) -> None:
    """The second backward pass through a linear layer in front shows what the first left behind."""
    x = torch.randn(4, 3) * torch.tensor([[1.0], [1.0], [5.0], [5.0]])
    case = Case(lambda: nn.Sequential(nn.Linear(3, 3), KINDS[kind]()), (x,))
    model = case.layer()
    for _ in range(2):
        model.zero_grad()
        y = model(x)
        torch.cat([pattern(y[:2]), pattern(y[2:])]).mul(y).sum().backward()
    for outcome, problem in gradients_on_two(case.layer(), [(x[:2],), (x[2:],)]):
        assert outcome is not None, problem
        torch.testing.assert_close(outcome["0.weight"], model[0].weight.grad / 2, atol=1e-5, rtol=1e-4)
