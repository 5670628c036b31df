"""The fix that makes plain weights of parametrized ones."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from setpoint import fix
from setpoint.errors import InputError
from setpoint.nn import (
    apply_weight_norm,
    condition_model,
    fold_weights,
    spectral_norm,
    weight_norm,
    weight_standardization,
)
from setpoint.nn.weight.reparametrize import parametrized


def images() -> nn.Sequential:
    return nn.Sequential(
        weight_standardization(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")),
        nn.ReLU(),
        weight_norm(nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2, bias=False)),
        spectral_norm(nn.Conv2d(6, 4, 1, groups=2)),
        nn.Flatten(),
        nn.Linear(4 * 36, 2),
    )


def test_every_kind_of_layer_and_parametrization_becomes_plain_with_the_same_outputs() -> None:
    model, x = images().eval(), torch.randn(2, 3, 3, 3)
    fixed = fix(model, "fold-weights", [x], timed=False)
    assert [type(m).__name__ for m in fixed.model] == [
        "Conv2d", "ReLU", "ConvTranspose2d", "Conv2d", "Flatten", "Linear",
    ]  # fmt: skip
    assert fixed.change.exact is not None
    assert fixed.change.exact[0] < 1e-12
    torch.testing.assert_close(fixed.model(x), model(x))
    pickle.dumps(fixed.model)


def test_the_original_keeps_its_parametrizations_and_still_runs() -> None:
    model, x = images().eval(), torch.randn(2, 3, 3, 3)
    before = model(x)
    fix(model, "fold-weights", [x], timed=False)
    assert len(list(parametrized(model))) == 3
    torch.testing.assert_close(model(x), before)


def test_spectral_norm_is_folded_where_its_estimate_stands() -> None:
    layer = spectral_norm(nn.Linear(6, 5)).train()
    u = layer.parametrizations.weight[0]._u.clone()
    fixed = fix(nn.Sequential(layer), "fold-weights", [torch.randn(3, 6)], timed=False).model
    assert torch.equal(layer.parametrizations.weight[0]._u, u)
    torch.testing.assert_close(fixed[0].weight, layer.eval().weight)


def test_shared_weights_are_one_tensor_afterwards() -> None:
    first, second = nn.Linear(5, 5), nn.Linear(5, 5)
    second.weight = first.weight
    model = apply_weight_norm(nn.Sequential(first, second))
    fixed = fix(model, "fold-weights", [torch.randn(3, 5)], timed=False).model
    assert fixed[0].weight is fixed[1].weight


def test_a_speech_models_positional_convolution_is_folded() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    front = {"conv_dim": (8, 8), "conv_stride": (4, 4), "conv_kernel": (4, 4), "num_conv_pos_embeddings": 4}
    groups = {"num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2}
    model = transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**sizes, **front, **groups)).eval()
    assert [name for _, name in parametrized(model)] == ["weight"]
    fixed = fix(model, "fold-weights", [torch.randn(1, 400)], timed=False)
    assert not list(parametrized(fixed.model))
    assert type(fixed.model.encoder.pos_conv_embed.conv) is nn.Conv1d


def test_attention_of_torch_is_folded_though_its_output_layer_is_of_a_private_class() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model, x = nn.Sequential(nn.TransformerEncoder(layer, 2)).eval(), torch.randn(2, 5, 8)
    before = model(x)
    apply_weight_norm(model)
    fixed = fix(model, "fold-weights", [x], timed=False).model
    torch.testing.assert_close(fixed(x), before)
    with torch.no_grad():
        torch.testing.assert_close(fixed(x), before)
    assert type(fixed[0].layers[0].self_attn.out_proj) is nn.Linear


def test_a_model_without_such_weights_is_refused() -> None:
    with pytest.raises(InputError, match="nothing to fold"):
        fix(nn.Sequential(nn.Linear(3, 2)), "fold-weights", [torch.randn(2, 3)], timed=False)


class Own(nn.Linear):
    """A layer of somebody's own."""


def test_what_can_not_be_described_is_refused_and_the_function_takes_it() -> None:
    model, x = nn.Sequential(weight_norm(Own(3, 4))), torch.randn(2, 3)
    before = model(x)
    with pytest.raises(InputError, match=r"0: is of the class Own, .* use setpoint\.nn\.fold_weights"):
        fix(model, "fold-weights", [x], timed=False)
    torch.testing.assert_close(fold_weights(model)(x), before)
    assert type(model[0]) is Own
    alone = condition_model(nn.Linear(3, 2), lambda *_: True)
    with pytest.raises(InputError, match="is the whole model"):
        fix(alone, "fold-weights", [torch.randn(2, 3)], timed=False)
    assert parametrize.is_parametrized(alone)
