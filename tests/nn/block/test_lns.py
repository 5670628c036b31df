"""LayerNorm Scaling: its factors, its folded form, its growth, and the keys that it shares with Pre-LN."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.models import Transformer, TransformerConfig
from setpoint.nn import DyT, LayerNorm, LayerNormScaling, PreLN, PreNorm, RMSNorm, ScaledPreNorm

CONFIG = TransformerConfig(vocab_size=11, dim=16, depth=4, num_heads=2)
TOKENS = torch.tensor([[1, 5, 2, 7, 3]])


@pytest.mark.parametrize(
    ("layer", "scale"), [(1, 1.0), (2, 0.70710678), (3, 0.57735027), (4, 0.5), (9, 0.33333333), (16, 0.25)]
)
def test_scale_is_one_over_the_root_of_the_layer(layer: int, scale: float) -> None:
    norm, x = LayerNormScaling(RMSNorm(8), layer), torch.randn(3, 8)
    assert norm.scale == pytest.approx(scale, abs=1e-8)
    torch.testing.assert_close(norm(x), RMSNorm(8)(x) * scale)


def test_first_layer_is_the_pre_norm_layer_exactly() -> None:
    scaled = Transformer(CONFIG, block=ScaledPreNorm()).eval()
    plain = Transformer(CONFIG).eval()
    plain.load_state_dict(scaled.state_dict())
    x = torch.randn(1, 5, 16)
    assert torch.equal(scaled.stack.blocks[0](x), plain.stack.blocks[0](x))
    assert not torch.allclose(scaled.stack.blocks[1](x), plain.stack.blocks[1](x))


def test_what_both_sublayers_of_layer_four_read_is_halved_and_the_final_norm_is_not() -> None:
    model = Transformer(CONFIG, block=ScaledPreNorm()).eval()
    seen: dict[str, Tensor] = {}
    block = model.stack.blocks[3]
    hooks = {"attention": block.attention.sublayer, "feed_forward": block.feed_forward.sublayer, "final": model.head}
    for name, module in hooks.items():
        module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0]))
    nn.init.normal_(model.embedding.weight)  # so that epsilon is small beside it
    with torch.no_grad():
        model(TOKENS)
    rms = {name: float(x.square().mean(-1).sqrt().mean()) for name, x in seen.items()}
    assert rms == pytest.approx({"attention": 0.5, "feed_forward": 0.5, "final": 1.0}, abs=1e-3)


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm, DyT, nn.LayerNorm])
def test_fold_moves_the_scale_into_gain_and_bias(norm: type[nn.Module]) -> None:
    wrapped = LayerNormScaling(norm(8), 3)
    with torch.no_grad():
        for parameter in wrapped.norm.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    kept, x = wrapped.norm.weight.clone(), torch.randn(5, 8)
    folded = wrapped.fold()
    assert type(folded) is norm
    torch.testing.assert_close(folded(x), wrapped(x), atol=1e-6, rtol=0)
    torch.testing.assert_close(folded.weight, kept * 3**-0.5)
    assert torch.equal(wrapped.norm.weight, kept)


def test_fold_without_a_gain_is_refused_though_the_wrapper_works() -> None:
    wrapped = LayerNormScaling(LayerNorm(8, elementwise_affine=False), 4)
    assert float(wrapped(torch.randn(3, 8)).std()) == pytest.approx(0.5, rel=0.1)
    with pytest.raises(TypeError, match="without one"):
        wrapped.fold()


def test_fold_of_a_norm_that_stores_its_gain_less_one_is_refused() -> None:
    class Shifted(RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.rms_norm(x, (8,), self.weight + 1.0, 1e-6)

    with pytest.raises(TypeError, match="multiple of its weight"):
        LayerNormScaling(Shifted(8), 4).fold()


def test_gradient_of_the_gain_is_the_folded_gains_times_the_scale() -> None:
    scaled = PreLN(nn.Linear(8, 8), 8, norm_layer=lambda d: LayerNormScaling(RMSNorm(d), 4)).double()
    folded = copy.deepcopy(scaled)
    folded.norm = scaled.norm.fold()
    x = torch.randn(5, 8, dtype=torch.float64)
    direction = torch.randn_like(x)
    (wanted,) = torch.autograd.grad((folded(x) * direction).sum(), folded.norm.weight)
    (found,) = torch.autograd.grad((scaled(x) * direction).sum(), scaled.norm.norm.weight)
    torch.testing.assert_close(found, 0.5 * wanted)


class Iid(nn.Module):
    """A fresh linear map that keeps the expected square."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.map = torch.randn(dim, dim) / dim**0.5

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.map


@pytest.mark.parametrize(("depth", "harmonic"), [(12, 3.1032), (24, 3.7760)])
def test_stream_grows_as_the_harmonic_number_and_linearly_without_scaling(depth: int, harmonic: float) -> None:
    dim, sizes = 64, {"scaled": 0.0, "plain": 0.0}
    for _ in range(64):
        start = torch.randn(dim)
        streams = dict.fromkeys(sizes, start * dim**0.5 / start.norm())
        for layer in range(1, depth + 1):
            linear = Iid(dim)
            scaled = ScaledPreNorm().residual(linear, dim, norm=RMSNorm, layer=layer, depth=depth)
            plain = PreNorm().residual(linear, dim, norm=RMSNorm, layer=layer, depth=depth)
            with torch.no_grad():
                streams = {"scaled": scaled(streams["scaled"]), "plain": plain(streams["plain"])}
        sizes = {name: size + float(streams[name].square().mean()) / 64 for name, size in sizes.items()}
    assert sizes["scaled"] == pytest.approx(1 + harmonic, rel=0.1)
    assert sizes["plain"] == pytest.approx(1 + depth, rel=0.1)


def test_state_dict_keys_and_parameters_are_those_of_pre_norm() -> None:
    scaled, plain = Transformer(CONFIG, block=ScaledPreNorm()), Transformer(CONFIG)
    assert scaled.state_dict().keys() == plain.state_dict().keys()
    assert scaled.num_parameters == plain.num_parameters
    plain.load_state_dict(scaled.state_dict())
    scaled.load_state_dict(plain.state_dict())
    scaled.load_state_dict(plain.state_dict(), assign=True)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"weight\""):
        LayerNormScaling(RMSNorm(8), 2).load_state_dict({})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        LayerNormScaling(RMSNorm(8), 2).load_state_dict({"weight": torch.ones(8), "more": torch.ones(8)})


def test_names_of_parameters_are_those_of_pre_norm_for_every_tool_that_goes_by_names() -> None:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    scaled, plain = Transformer(CONFIG, block=ScaledPreNorm()), Transformer(CONFIG)
    assert [name for name, _ in scaled.named_parameters()] == [name for name, _ in plain.named_parameters()]
    set_model_state_dict(plain, get_model_state_dict(scaled))
    found = torch.func.functional_call(scaled, dict(plain.named_parameters()), (TOKENS,))
    torch.testing.assert_close(found, scaled(TOKENS))


def test_conversion_to_another_dtype_or_from_the_meta_device_reaches_the_norm() -> None:
    norm = LayerNormScaling(RMSNorm(8), 4).double()
    assert norm(torch.randn(2, 8, dtype=torch.float64)).dtype == torch.float64
    with torch.device("meta"):
        empty = LayerNormScaling(RMSNorm(8), 4)
    empty.to_empty(device="cpu").reset_parameters()
    x = torch.randn(2, 8)
    torch.testing.assert_close(empty(x), 0.5 * RMSNorm(8)(x))


def test_reset_starts_the_gain_where_the_form_wants_it() -> None:
    for learnable, start in ((False, 1.0), (True, 0.5)):
        norm = LayerNormScaling(RMSNorm(8), 4, learnable=learnable)
        nn.init.normal_(norm.weight)
        norm.reset_parameters()
        assert torch.equal(norm.weight, torch.full((8,), start))
    squash = LayerNormScaling(DyT(8, alpha_init_value=0.3), 4, learnable=True)
    squash.reset_parameters()
    assert (squash.alpha.item(), squash.weight[0].item()) == (pytest.approx(0.3), 0.5)


def test_a_norm_with_modes_follows_them() -> None:
    norm, x = LayerNormScaling(nn.BatchNorm1d(8), 4), torch.randn(6, 8)
    norm(x)
    norm.eval()
    torch.testing.assert_close(norm(x), 0.5 * norm.norm(x))
    assert not norm.norm.training
    assert "running_mean" in norm.state_dict()


def test_copies_and_pickles_keep_keys_and_values() -> None:
    norm, x = LayerNormScaling(RMSNorm(8), 4), torch.randn(2, 8)
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert torch.equal(other(x), norm(x))
        assert list(other.state_dict()) == ["weight"]
        other.load_state_dict(norm.state_dict())


def test_learnable_form_equals_the_constant_one_at_first_and_trains_the_whole_gain() -> None:
    x = torch.randn(3, 8)
    given = RMSNorm(8)
    constant, learnable = LayerNormScaling(RMSNorm(8), 4), LayerNormScaling(given, 4, learnable=True)
    torch.testing.assert_close(learnable(x), constant(x))
    assert torch.equal(learnable.norm.weight, torch.full((8,), 0.5))
    with torch.no_grad():
        learnable.norm.weight.fill_(1.0)
    torch.testing.assert_close(learnable(x), RMSNorm(8)(x))
    with pytest.raises(TypeError, match="without one"):
        LayerNormScaling(LayerNorm(8, elementwise_affine=False), 4, learnable=True)


@pytest.mark.parametrize("learnable", [False, True])
def test_the_parameters_are_those_of_the_given_norm(learnable: bool) -> None:
    given = LayerNorm(8)
    weight, bias = given.weight, given.bias
    wrapped = LayerNormScaling(given, 4, learnable=learnable)
    assert wrapped.norm is given
    assert wrapped.weight is weight
    assert wrapped.bias is bias


def test_a_norm_that_can_not_take_the_scale_is_left_as_it_was() -> None:
    class Shifted(RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.rms_norm(x, (8,), self.weight + 1.0, 1e-6)

    norm = Shifted(8)
    with pytest.raises(TypeError, match="multiple of its weight"):
        LayerNormScaling(norm, 4, learnable=True)
    assert torch.equal(norm.weight, torch.ones(8))


@pytest.mark.parametrize("index", [0, -1, 1.0, True, "2"])
def test_index_that_does_not_count_from_one_is_refused(index: object) -> None:
    with pytest.raises(InputError, match="1-based"):
        LayerNormScaling(RMSNorm(8), index)  # type: ignore[arg-type]


def test_another_power_scales_otherwise() -> None:
    assert LayerNormScaling(RMSNorm(8), 4, power=1.0).scale == 0.25
