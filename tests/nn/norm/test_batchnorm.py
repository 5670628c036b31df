"""The fidelity checks of batch normalization (Ioffe and Szegedy, 2015), on torch's layers and those beside."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.nn import (  # fmt: skip
    BatchNorm1d,
    BatchNorm2d,
    FrozenBatchNorm,
    GhostBatchNorm,
    MaskedBatchNorm1d,
    fold_batchnorm,
    freeze_batchnorm,
    recalibrate,
)

Double = torch.float64
TINY = 1e-300  # no eps at all is refused by torch in training
EVERYTHING = {"all of it": lambda n: GhostBatchNorm(n, 10**6), "torch": BatchNorm1d, "masked": MaskedBatchNorm1d}


def settled(norm: nn.Module) -> nn.Module:
    """A norm whose four tensors are all at values of their own."""
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(norm, name).copy_(torch.rand_like(getattr(norm, name)) + 0.5)
    return norm


def moments(x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return x.mean(axes), x.var(axes, correction=0)


# the definition, held against every layer that claims to follow it ---------------------------------------------------


@pytest.mark.parametrize("kind", EVERYTHING)
def test_one_and_three_is_the_definitions_example(kind: str) -> None:
    layer = EVERYTHING[kind](1)
    x = torch.tensor([[[1.0]], [[3.0]]])
    torch.testing.assert_close(layer(x).flatten(), torch.tensor([-1.0, 1.0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(layer.running_mean, torch.tensor([0.2]))
    torch.testing.assert_close(layer.running_var, torch.tensor([1.1]))


@pytest.mark.parametrize("kind", EVERYTHING)
def test_without_momentum_the_averages_are_plain_ones(kind: str) -> None:
    layer = EVERYTHING[kind](1)
    layer.momentum = None
    layer(torch.tensor([[[1.0]], [[3.0]]]))
    layer(torch.tensor([[[5.0]], [[9.0]]]))
    torch.testing.assert_close(layer.running_mean, torch.tensor([4.5]))
    torch.testing.assert_close(layer.running_var, torch.tensor([5.0]))
    assert layer.num_batches_tracked == 2


@pytest.mark.parametrize("kind", ["all of it", "masked"])
def test_five_training_calls_and_an_evaluation_are_torchs(kind: str) -> None:
    own, theirs = EVERYTHING[kind](3).double(), BatchNorm1d(3, dtype=Double)
    own.load_state_dict(settled(theirs).state_dict())
    for _ in range(5):
        x = (2 * torch.randn(4, 3, 6, dtype=Double) + 1).requires_grad_()
        g = torch.randn(4, 3, 6, dtype=Double)
        got = torch.autograd.grad(own(x), (x, *own.parameters()), g)
        wanted = torch.autograd.grad(theirs(x), (x, *theirs.parameters()), g)
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(own.state_dict(), theirs.state_dict(), atol=1e-12, rtol=0)
    torch.testing.assert_close(own.eval()(x), theirs.eval()(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", EVERYTHING)
def test_channels_come_out_with_the_bias_for_mean_and_the_gain_for_deviation(kind: str) -> None:
    layer, x = settled(EVERYTHING[kind](3).double()), torch.randn(5, 3, 4, dtype=Double)
    mean, variance = moments(layer(x), (0, 2))
    given = moments(x, (0, 2))[1]
    torch.testing.assert_close(mean, layer.bias, atol=1e-12, rtol=0)
    torch.testing.assert_close(variance, layer.weight**2 * given / (given + 1e-5), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", EVERYTHING)
def test_larger_weights_in_front_give_the_same_output_and_smaller_gradients(kind: str) -> None:
    layer, u = EVERYTHING[kind](3).double(), torch.randn(8, 4, dtype=Double)
    layer.eps = TINY
    weight, g = torch.randn(3, 4, dtype=Double), torch.randn(8, 3, 1, dtype=Double)

    def through(scale: float) -> tuple[Tensor, Tensor]:
        w = (scale * weight).requires_grad_()
        y = layer((u @ w.T).unsqueeze(-1))
        return y, torch.autograd.grad(y, w, g)[0]

    (y, dw), (y4, dw4) = through(1.0), through(4.0)
    torch.testing.assert_close(y4, y, atol=1e-12, rtol=0)
    torch.testing.assert_close(dw4, dw / 4, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("kind", EVERYTHING)
def test_gradient_is_orthogonal_to_ones_and_to_the_output(kind: str) -> None:
    layer, x = EVERYTHING[kind](3).double(), torch.randn(8, 3, 2, dtype=Double, requires_grad=True)
    layer.eps = TINY
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert dx.sum((0, 2)).abs().max() < 1e-10
    assert (dx * y).sum((0, 2)).abs().max() < 1e-10


@pytest.mark.parametrize("kind", [*EVERYTHING, "frozen"])
def test_evaluation_sees_one_example_at_a_time_and_writes_nothing(kind: str) -> None:
    layer = settled(FrozenBatchNorm(3) if kind == "frozen" else EVERYTHING[kind](3)).eval()
    before = deepcopy(layer.state_dict())
    x = torch.randn(4, 3, 5)
    torch.testing.assert_close(layer(x)[:1], layer(x[:1]))
    torch.testing.assert_close(layer.state_dict(), before, atol=0, rtol=0)
    if kind != "frozen":
        assert (layer.train()(x)[:1] - layer(x[:1])).abs().max() > 0.05


# padding -------------------------------------------------------------------------------------------------------------


def test_padding_stays_out_of_statistics_gradients_and_output() -> None:
    own, theirs = MaskedBatchNorm1d(3, dtype=Double), BatchNorm1d(3, dtype=Double)
    own.load_state_dict(settled(theirs).state_dict())
    lengths = [5, 2, 7]
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    x = torch.randn(3, 3, 7, dtype=Double).requires_grad_()
    tokens = torch.cat([x[n, :, :length] for n, length in enumerate(lengths)], 1).T
    g = torch.randn(14, 3, dtype=Double)
    wanted = theirs(tokens)
    y = own(x, mask)
    got = torch.cat([y[n, :, :length] for n, length in enumerate(lengths)], 1).T
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)
    torch.testing.assert_close(torch.autograd.grad(got, x, g), torch.autograd.grad(wanted, x, g), atol=1e-12, rtol=0)
    torch.testing.assert_close(own.state_dict(), theirs.state_dict(), atol=1e-12, rtol=0)
    assert not y.masked_select(~mask[:, None]).any()
    torch.testing.assert_close(own.eval()(x, mask)[0, :, :5].T, theirs.eval()(tokens[:5]), atol=1e-12, rtol=0)


def test_what_is_in_the_padding_does_not_matter() -> None:
    layer, x = MaskedBatchNorm1d(2), torch.randn(3, 2, 4)
    mask = torch.arange(4) < torch.tensor([[4], [2], [3]])
    odd = torch.where(mask[:, None], x, float("nan"))
    torch.testing.assert_close(layer(odd, mask), layer(x, mask))


def test_all_padding_falls_back_to_the_averages_and_leaves_them() -> None:
    layer = settled(MaskedBatchNorm1d(2))
    before, x = deepcopy(layer.state_dict()), torch.randn(3, 2, 4)
    with pytest.warns(UserWarning, match="no real position; the running averages stand in"):
        y = layer(x, torch.zeros(3, 4, dtype=torch.bool))
    assert not y.any()
    torch.testing.assert_close(layer.state_dict(), before, atol=0, rtol=0)


def test_wrong_masks_and_inputs_are_refused_in_words() -> None:
    layer, x = MaskedBatchNorm1d(2), torch.randn(3, 2, 4)
    with pytest.raises(TypeError, match=r"expected a boolean mask, true at real positions, got torch\.float32"):
        layer(x, torch.ones(3, 4))
    with pytest.raises(InputError, match=r"expected a mask of shape \(3, 4\) .* got \(4, 3\)"):
        layer(x, torch.ones(4, 3, dtype=torch.bool))
    with pytest.raises(InputError, match=r"expected an input of shape \(N, 2, \*\), got \(3, 5, 4\)"):
        layer(torch.randn(3, 5, 4))
    with pytest.raises(InputError, match="expected an input with 3 axes, got 2"):
        layer(torch.randn(3, 2))
    one = torch.zeros(3, 4, dtype=torch.bool)
    one[1, 2] = True
    with pytest.raises(InputError, match="more than one real position per batch in training, got 1"):
        layer(x, one)


# parts of a batch ----------------------------------------------------------------------------------------------------


def test_each_ghost_batch_is_normalized_by_itself() -> None:
    ghost, plain = GhostBatchNorm(3, 4, dtype=Double), BatchNorm2d(3, dtype=Double)
    ghost.load_state_dict(settled(plain).state_dict())
    x = torch.randn(8, 3, 2, 2, dtype=Double)
    torch.testing.assert_close(ghost(x), torch.cat([plain(x[:4]), plain(x[4:])]))
    torch.testing.assert_close(ghost.state_dict(), plain.state_dict())


def test_ghost_batches_differ_by_one_example_at_most() -> None:
    layer = GhostBatchNorm(1, 4)
    layer(torch.randn(9, 1))
    assert layer.num_batches_tracked == 3


def test_ghost_batch_size_is_checked() -> None:
    with pytest.raises(InputError, match="ghost_batch_size of at least 1, got 0"):
        GhostBatchNorm(3, 0)


# whole models --------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """conv -> norm on a branch whose input is read twice, as in any residual network."""

    def __init__(self, leak: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.norm2 = BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.norm3 = BatchNorm2d(6)
        self.head = nn.Linear(6, 5)
        self.norm4 = BatchNorm1d(5)
        self.leak = leak

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        branch = self.conv(x)
        x = x + self.norm2(branch)
        if self.leak:
            x = x + branch
        x = torch.relu(self.norm3(self.up(x))).mean((2, 3))
        return self.norm4(self.head(x))


def residual(leak: bool = False) -> nn.Module:
    model = Residual(leak)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            settled(module)
    return model.eval()


def test_folding_keeps_the_function_through_grouped_transposed_and_linear_layers() -> None:
    model, x = residual(), torch.randn(2, 3, 7, 7)
    before = deepcopy(model.state_dict())
    folded = fold_batchnorm(model, x)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())
    assert (folded(x) - model(x)).abs().max() < 1e-5
    torch.testing.assert_close(model.state_dict(), before, atol=0, rtol=0)
    exact = fold_batchnorm(model.double(), x.double())
    assert (exact(x.double()) - model(x.double())).abs().max() < 1e-12


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_folding_works_in_every_dimension(dims: int, transposed: bool) -> None:
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")
    norm = settled(getattr(nn, f"BatchNorm{dims}d")(6))
    model = nn.Sequential(kind(4, 6, 2, groups=2, bias=False), norm).double().eval()
    x = torch.randn(3, 4, *(4,) * dims, dtype=Double)
    torch.testing.assert_close(fold_batchnorm(model, x)(x), model(x))


def test_folding_takes_a_model_with_frozen_norms_and_can_work_in_place() -> None:
    model, x = residual(), torch.randn(2, 3, 7, 7)
    wanted = model(x)
    frozen = freeze_batchnorm(model)
    folded = fold_batchnorm(frozen, x, inplace=True)
    assert folded is frozen
    torch.testing.assert_close(folded(x), wanted, atol=1e-5, rtol=1e-5)


def test_folding_is_refused_where_the_output_is_used_twice() -> None:
    model, x = residual(leak=True), torch.randn(2, 3, 7, 7)
    with pytest.raises(InputError, match="can't fold norm2: the output of conv is used elsewhere too"):
        fold_batchnorm(model, x)
    folded = fold_batchnorm(model, x, only=["norm", "norm3", "norm4"])
    assert isinstance(folded.norm2, BatchNorm2d)
    torch.testing.assert_close(folded(x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)), "doesn't read a convolution"),
        (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)), "doesn't read a convolution"),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.ZeroPad2d(1), nn.BatchNorm2d(4)), "doesn't read a convolution"),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)), "no running averages"),
        (nn.Sequential(*[nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)] * 2), "ran 2 times"),
    ],
)
def test_what_can_not_be_folded_is_refused_with_the_reason(model: nn.Module, reason: str) -> None:
    before = deepcopy(model.state_dict())
    with pytest.raises(InputError, match=reason):
        fold_batchnorm(model, torch.randn(2, 3, 4, 4))
    torch.testing.assert_close(model.state_dict(), before, atol=0, rtol=0)


def test_folding_is_refused_where_the_result_of_the_layer_is_returned() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm = nn.Linear(3, 4), BatchNorm1d(4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.fc(x)
            return hidden, self.norm(hidden)

    with pytest.raises(InputError, match="the output of fc is used elsewhere too"):
        fold_batchnorm(Both(), torch.randn(2, 3))


def test_folding_is_refused_where_a_weight_is_shared() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    with pytest.raises(InputError, match="0 runs several times or shares its weight"):
        fold_batchnorm(model, torch.randn(2, 3))


def test_names_that_do_not_exist_are_answered_with_those_that_do() -> None:
    with pytest.raises(InputError, match="no batch norm is called 'norm9'; the nearest names are norm, norm4"):
        fold_batchnorm(residual(), torch.randn(2, 3, 7, 7), only=["norm9"])


def test_recalibration_averages_over_batches_without_bias() -> None:
    model = nn.Sequential(nn.BatchNorm1d(1), nn.Dropout(0.9), nn.BatchNorm1d(1)).train()
    batches = [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [9.0]]), torch.tensor([[0.0], [1e9]])]
    assert recalibrate(model, batches, steps=2) is model
    torch.testing.assert_close(model[0].running_mean, torch.tensor([4.5]))
    torch.testing.assert_close(model[0].running_var, torch.tensor([5.0]))
    # dropout is off meanwhile: the second norm sees the first one's outputs, which are ±1
    torch.testing.assert_close(model[2].running_var, torch.tensor([2.0]), atol=1e-4, rtol=0)
    assert all(m.training for m in model.modules())
    assert model[0].momentum == 0.1


def test_a_norm_that_no_batch_reaches_keeps_its_averages() -> None:
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.aside = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.used(x)
            return out

    model = Forked()
    torch.nn.init.constant_(model.aside.running_mean, 3.0)
    recalibrate(model, [torch.randn(4, 2) + 5])
    assert model.aside.running_mean.tolist() == [3.0, 3.0]
    assert (model.used.running_mean > 1).all()


def test_failed_recalibration_puts_the_averages_back() -> None:
    model = nn.Sequential(settled(nn.BatchNorm1d(2)))
    before = deepcopy(model.state_dict())
    with pytest.raises(RuntimeError):
        recalibrate(model, [torch.randn(3, 2), torch.randn(3, 7)])
    torch.testing.assert_close(model.state_dict(), before, atol=0, rtol=0)
    with pytest.raises(InputError, match="at least one batch"):
        recalibrate(model, [])
    torch.testing.assert_close(model.state_dict(), before, atol=0, rtol=0)


def test_frozen_norms_stay_as_they_are_in_training() -> None:
    model, x = residual(), torch.randn(2, 3, 7, 7)
    frozen = freeze_batchnorm(model).train()
    before = deepcopy(frozen.state_dict())
    torch.testing.assert_close(frozen(x), model(x))
    torch.testing.assert_close(frozen.state_dict(), before, atol=0, rtol=0)
    assert not any("norm" in name for name, _ in frozen.named_parameters())
    assert isinstance(model.norm, BatchNorm2d)
    frozen.load_state_dict(model.state_dict())


@pytest.mark.parametrize("tool", [freeze_batchnorm, lambda m: recalibrate(m, []), lambda m: fold_batchnorm(m, None)])
def test_model_without_batch_norms_is_refused(tool) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=r"expected a model with batch norms.*found none"):
        tool(nn.Linear(2, 2))
