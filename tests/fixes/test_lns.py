from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from setpoint import fix
from setpoint.errors import InputError
from setpoint.fixing import Refused
from setpoint.models import Transformer, TransformerConfig
from setpoint.nn import LayerNormScaling, ScaledPreNorm

Make = Callable[..., tuple[nn.Module, Tensor]]


def tokens() -> Tensor:
    return torch.randint(0, 32, (2, 7))


def decoder(depth: int = 4, **parts: object) -> Transformer:
    return Transformer(TransformerConfig(vocab_size=32, dim=16, depth=depth, num_heads=2), **parts).eval()


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "vit", "encoder"])
def test_both_norms_of_layer_l_are_scaled_by_its_inverse_root_and_the_final_norm_is_not(
    make: Make, family: str
) -> None:
    model, batch = make(family)
    fixed = fix(model, "lns", [batch], timed=False).model
    scales = [m.scale for m in fixed.modules() if isinstance(m, LayerNormScaling)]
    assert scales == pytest.approx([1.0, 1.0, 2**-0.5, 2**-0.5])


def test_it_makes_the_model_that_the_placement_makes() -> None:
    plain = decoder()
    scaled = decoder(block=ScaledPreNorm())
    scaled.load_state_dict(plain.state_dict())
    batch = tokens()
    fixed = fix(plain, "lns", [batch], timed=False).model
    with torch.no_grad():
        assert torch.equal(fixed(batch), scaled(batch))


def test_no_parameter_is_added_and_checkpoints_fit_as_before(make: Make) -> None:
    model, batch = make("gpt2")
    fixed = fix(model, "lns", [batch], timed=False)
    assert fixed.model.state_dict().keys() == model.state_dict().keys()
    assert fixed.change.parameters[0] == fixed.change.parameters[1]


def test_scaling_twice_is_scaling_once() -> None:
    batch = tokens()
    once = fix(decoder(), "lns", [batch], timed=False).model
    twice = fix(once, "lns", [batch], timed=False)
    assert twice.edits == ()


def test_folding_gives_gains_of_the_scale_and_the_same_outputs() -> None:
    batch = tokens()
    fixed = fix(decoder(block=ScaledPreNorm()), "lns-fold", [batch], timed=False)
    assert not any(isinstance(m, LayerNormScaling) for m in fixed.model.modules())
    gains = [block.attention.norm.weight[0].item() for block in fixed.model.stack.blocks]
    assert gains == pytest.approx([1.0, 2**-0.5, 3**-0.5, 0.5])
    assert fixed.change.exact is not None
    assert fixed.change.exact[0] < 1e-12


def test_folding_a_model_without_scaling_is_refused() -> None:
    with pytest.raises(InputError, match="nothing to fold"):
        fix(decoder(), "lns-fold", [tokens()], timed=False)


def test_scaling_before_folding_runs_in_the_order_named() -> None:
    fixed = fix(decoder(), "lns,lns-fold", [tokens()], timed=False)
    assert fixed.model.stack.blocks[3].attention.norm.weight[0].item() == pytest.approx(0.5)


def test_the_folded_gain_has_the_gradient_over_the_scale() -> None:
    """Chain rule: with gain = scale * g, the loss moves by dL/dg = scale * dL/dgain."""
    batch = tokens()
    model = decoder(block=ScaledPreNorm())
    fixed = fix(model, "lns-fold", [batch], timed=False).model
    gradients = []
    for each in (model, fixed):
        each(batch).square().sum().backward()
        norm = each.stack.blocks[3].attention.norm
        gradients.append(getattr(norm, "norm", norm).weight.grad)
    torch.testing.assert_close(gradients[0], 0.5 * gradients[1], rtol=1e-4, atol=1e-6)


def without_gain(width: int) -> nn.Module:
    return nn.RMSNorm(width, elementwise_affine=False)


def test_the_factor_of_a_norm_without_a_gain_goes_into_the_weights_that_read_it() -> None:
    batch = tokens()
    model = decoder(norm=without_gain, block=ScaledPreNorm())
    fixed = fix(model, "lns-fold", [batch], timed=False)
    assert not any(isinstance(m, LayerNormScaling) for m in fixed.model.modules())
    old, new = (m.stack.blocks[3].feed_forward.sublayer for m in (model, fixed.model))
    torch.testing.assert_close(new.up_proj.weight, 0.5 * old.up_proj.weight)
    assert new.down_proj.weight is old.down_proj.weight
    assert fixed.change.exact is not None
    assert fixed.change.exact[0] < 1e-12


def test_a_bias_behind_a_norm_without_a_gain_is_not_scaled() -> None:
    model = nn.Sequential(LayerNormScaling(nn.LayerNorm(8, elementwise_affine=False), 4), nn.Linear(8, 2))
    fixed = fix(model, "lns-fold", [torch.randn(3, 8)], timed=False)
    torch.testing.assert_close(fixed.model[1].weight, 0.5 * model[1].weight)
    assert fixed.model[1].bias is model[1].bias
    assert fixed.change.exact is not None


def test_norms_that_share_a_gain_keep_it_and_their_readers_take_the_factors() -> None:
    model = nn.Sequential(
        LayerNormScaling(nn.LayerNorm(8), 4), nn.Linear(8, 8), LayerNormScaling(nn.LayerNorm(8), 9), nn.Linear(8, 2)
    )
    model[2].norm.weight = model[0].norm.weight
    fixed = fix(model, "lns-fold", [torch.randn(3, 8)], timed=False)
    assert fixed.model[0].weight is fixed.model[2].weight
    torch.testing.assert_close(fixed.model[3].weight, model[3].weight / 3)
    assert fixed.change.exact is not None


def test_a_factor_that_no_weight_can_take_is_refused_by_name() -> None:
    model = nn.Sequential(LayerNormScaling(nn.LayerNorm(8, elementwise_affine=False), 4), nn.GELU(), nn.Linear(8, 2))
    with pytest.raises(Refused, match=r"0: has no gain of its own.*lets no scale through"):
        fix(model, "lns-fold", [torch.randn(3, 8)])


def test_a_post_norm_model_is_refused(make: Make) -> None:
    model, batch = make("bert")
    with pytest.raises(InputError, match="no norm in front"):
        fix(model, "lns", [batch])
