"""α-BN (You, Li and Zhao, 2021)."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.nn import AlphaBatchNorm, adapt_batchnorm, batchnorm_adapted


def trained(kind: type[nn.Module] = nn.BatchNorm2d, features: int = 3) -> nn.Module:
    """A batch norm in float64 and eval mode with statistics, gain and addend of its own."""
    norm = kind(features, dtype=torch.float64).eval()
    with torch.no_grad():
        for index, tensor in enumerate((norm.weight, norm.bias, norm.running_mean, norm.running_var)):
            tensor.copy_(1.2 + torch.cos(torch.arange(features) + index))
    return norm


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(2, 4, 3), trained(features=4), nn.ReLU(), nn.Conv2d(4, 3, 3), trained(), nn.Dropout(0.5))
    return nn.Sequential(*layers).double().eval()


def images(count: int = 6) -> Tensor:
    return 2 + 3 * torch.randn(count, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


FORMS = [
    (nn.BatchNorm1d, (5, 3)),
    (nn.BatchNorm1d, (5, 3, 4)),
    (nn.BatchNorm2d, (5, 3, 2, 2)),
    (nn.BatchNorm3d, (5, 3, 2, 2, 2)),
    (nn.SyncBatchNorm, (5, 3, 4)),
]


@pytest.mark.parametrize(("kind", "shape"), FORMS)
def test_all_weight_on_the_source_is_evaluation_bit_for_bit(kind: type[nn.Module], shape: tuple[int, ...]) -> None:
    norm, x = trained(kind), torch.randn(shape, dtype=torch.float64)
    assert torch.equal(AlphaBatchNorm(norm, 1.0)(x), norm(x))


@pytest.mark.parametrize(("kind", "shape"), FORMS[:4])
def test_all_weight_on_the_batch_is_training_with_running_averages_untouched(
    kind: type[nn.Module], shape: tuple[int, ...]
) -> None:
    norm, x = trained(kind), torch.randn(shape, dtype=torch.float64)
    before = deepcopy(norm.state_dict())
    got = AlphaBatchNorm(norm, 0.0)(x)
    torch.testing.assert_close(norm.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(got, deepcopy(norm).train()(x))


@pytest.mark.parametrize(("unbiased", "wanted"), [(False, [1.7, 3.7]), (True, [1.6209, 3.5278])])
def test_two_values_worked_out_by_hand(unbiased: bool, wanted: list[float]) -> None:
    layer = AlphaBatchNorm(nn.BatchNorm1d(1).eval(), 0.9, unbiased=unbiased)
    assert layer(torch.tensor([[2.0], [4.0]])).flatten().tolist() == pytest.approx(wanted, abs=1e-4)


def test_mixture_is_that_of_the_definition_with_its_gradient() -> None:
    norm, x = trained(), torch.randn(5, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    mean = 0.7 * norm.running_mean + 0.3 * x.mean((0, 2, 3))
    variance = 0.7 * norm.running_var + 0.3 * x.var((0, 2, 3), correction=0)
    per_channel = [t[:, None, None] for t in (mean, variance, norm.weight, norm.bias)]
    wanted = per_channel[2] * (x - per_channel[0]) / (per_channel[1] + norm.eps).sqrt() + per_channel[3]
    got, g, leaves = AlphaBatchNorm(norm, 0.7)(x), torch.randn_like(x), [x, norm.weight, norm.bias]
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(torch.autograd.grad(got, leaves, g), torch.autograd.grad(wanted, leaves, g))


def test_state_is_the_same_after_ten_batches_and_the_model_after_the_context() -> None:
    model, x = network(), images()
    state, wanted, modules = deepcopy(model.state_dict()), model(x), list(model)
    with batchnorm_adapted(model, 0.3) as adapted:
        outputs = [adapted(images(n + 1)) for n in range(10)]
        assert not torch.allclose(adapted(x), wanted)
    assert all(output.isfinite().all() for output in outputs)
    assert all(one is other for one, other in zip(model, modules, strict=True))
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(x), wanted)


def test_context_restores_after_an_error_and_gives_modes_back() -> None:
    model = network().train()

    def fail() -> None:
        with batchnorm_adapted(model):
            assert isinstance(model[1], AlphaBatchNorm)
            model(torch.zeros(1))

    with pytest.raises(RuntimeError):
        fail()
    assert type(model[1]) is nn.BatchNorm2d
    assert all(module.training for module in model.modules())


def test_batch_with_the_sources_statistics_gives_the_same_for_every_weight() -> None:
    x = torch.randn(50, 3, dtype=torch.float64)
    norm = nn.BatchNorm1d(3, dtype=torch.float64).eval()
    norm.running_mean.copy_(x.mean(0)), norm.running_var.copy_(x.var(0, correction=0))
    for weight in (0.0, 0.4, 1.0):
        torch.testing.assert_close(AlphaBatchNorm(norm, weight)(x), norm(x))


def test_shift_and_scale_of_the_input_go_away_only_without_the_source() -> None:
    norm, x = trained(), images().repeat(1, 2, 1, 1)[:, :3]
    for weight, same in ((0.0, True), (1.0, False)):
        layer = AlphaBatchNorm(norm, weight)
        assert torch.allclose(layer(3 * x + 5), layer(x), rtol=1e-3, atol=1e-3) is same


def test_second_norm_sees_what_the_first_made_of_the_adapted_batch() -> None:
    model, x = network(), images()
    adapted = adapt_batchnorm(model, 0.0)
    first = deepcopy(model[1]).train()(model[0](x)).relu()
    torch.testing.assert_close(adapted(x), deepcopy(model[4]).train()(model[3](first)))


def test_prior_weighs_by_the_size_of_the_batch() -> None:
    norm, x = trained(nn.BatchNorm1d), torch.randn(16, 3, dtype=torch.float64)
    torch.testing.assert_close(AlphaBatchNorm(norm, prior=16)(x), AlphaBatchNorm(norm, 0.5)(x))
    torch.testing.assert_close(AlphaBatchNorm(norm, prior=16)(x[:4]), AlphaBatchNorm(norm, 0.8)(x[:4]))


def test_train_mode_turns_on_dropout_and_leaves_the_norms() -> None:
    adapted, x = adapt_batchnorm(network(), 0.5).train(), images()
    before = deepcopy(adapted.state_dict())
    assert (adapted(x) == 0).any()
    torch.testing.assert_close(adapted.state_dict(), before, rtol=0, atol=0)


class NormAndReLU(nn.BatchNorm2d):
    """As in models that fuse an activation into their norm."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def test_norm_with_an_activation_in_it_keeps_it() -> None:
    norm, x = trained(NormAndReLU), images().repeat(1, 2, 1, 1)[:, :3]
    plain = trained()
    torch.testing.assert_close(AlphaBatchNorm(norm, 0.2)(x), AlphaBatchNorm(plain, 0.2)(x).relu())
    assert isinstance(adapt_batchnorm(nn.Sequential(norm))[0], AlphaBatchNorm)


def test_weights_can_be_given_by_name() -> None:
    model = network()
    adapted = adapt_batchnorm(model, {"4": 0.25})
    assert type(adapted[1]) is nn.BatchNorm2d
    assert adapted[4].source_weight == 0.25
    assert type(model[4]) is nn.BatchNorm2d
    assert adapt_batchnorm(model, inplace=True) is model
    assert isinstance(model[1], AlphaBatchNorm)


def test_shared_norm_stays_shared_and_one_without_averages_is_left_alone() -> None:
    shared, bare = nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False)
    adapted = adapt_batchnorm(nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": bare}))
    assert adapted["a"] is adapted["b"][0]
    assert type(adapted["c"]) is nn.BatchNorm1d


def test_single_value_per_channel_warns() -> None:
    layer = AlphaBatchNorm(nn.BatchNorm1d(3).eval(), 0.9)
    with pytest.warns(UserWarning, match="one value per channel has variance 0"):
        assert layer(torch.ones(1, 3)).isfinite().all()


def test_an_empty_batch_gives_an_empty_output() -> None:
    assert AlphaBatchNorm(nn.BatchNorm1d(3).eval())(torch.zeros(0, 3)).shape == (0, 3)


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match=r"between 0 and 1, got 1\.5"):
        AlphaBatchNorm(nn.BatchNorm1d(3), 1.5)
    with pytest.raises(InputError, match="prior above 0"):
        AlphaBatchNorm(nn.BatchNorm1d(3), prior=-1)
    with pytest.raises(InputError, match="track_running_stats=False"):
        AlphaBatchNorm(nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(TypeError, match="a batch norm, got LayerNorm"):
        AlphaBatchNorm(nn.LayerNorm(3))
    with pytest.raises(InputError, match=r"\(N, 3, \*\), got \(2, 4\)"):
        AlphaBatchNorm(nn.BatchNorm1d(3))(torch.zeros(2, 4))
    with pytest.raises(InputError, match="were they folded"):
        adapt_batchnorm(nn.Linear(2, 2))
    with pytest.raises(InputError, match="or adapted already"):
        adapt_batchnorm(adapt_batchnorm(network()))
    with pytest.raises(InputError, match="no batch norm is called '5'; the nearest names are"):
        adapt_batchnorm(network(), {"5": 0.5})
    with pytest.raises(InputError, match="got a batch norm; use AlphaBatchNorm"), batchnorm_adapted(nn.BatchNorm1d(3)):
        pass
