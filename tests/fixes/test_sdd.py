"""The fix that decouples scale and distribution of linear layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from setpoint import fix
from setpoint.errors import InputError
from setpoint.fixes.sdd import Decoupling
from setpoint.nn import SDDLinear
from setpoint.testing.tiny import tiny


def decoupled(model: nn.Module) -> dict[str, SDDLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, SDDLinear)}


@pytest.mark.parametrize("family", ["opt", "llama", "bert", "vit", "decoder"])
def test_every_linear_layer_of_attention_and_feed_forward_is_decoupled_and_no_other(family: str) -> None:
    model, batch = tiny(family)
    fixed = fix(model, "sdd", [batch], timed=False).model
    per_block = 7 if family in ("llama", "decoder") else 6
    assert len(decoupled(fixed)) == 2 * per_block
    for name, layer in fixed.named_modules():
        if isinstance(layer, nn.Linear):
            assert any(part in name for part in ("head", "pooler", "classifier")), name


def test_alpha_starts_at_one_and_in_writers_at_one_over_root_two_l() -> None:
    model, batch = tiny("llama")
    layers = decoupled(fix(model, "sdd", [batch], timed=False).model)
    starts = {name.rpartition(".")[2]: set(layer.alpha.tolist()) for name, layer in layers.items()}
    assert starts.pop("o_proj") == starts.pop("down_proj") == {0.5}  # two blocks of two branches
    assert all(found == {1.0} for found in starts.values())
    given = decoupled(fix(model, "sdd:residual_alpha=0.25", [batch], timed=False).model)
    assert given["model.layers.1.mlp.down_proj"].alpha.unique().tolist() == [0.25]


def test_weights_and_biases_are_kept() -> None:
    model, batch = tiny("opt")
    fixed = fix(model, "sdd", [batch], timed=False).model
    old, new = model.model.decoder.layers[0].fc1, fixed.model.decoder.layers[0].fc1
    assert torch.equal(old.weight, new.weight)
    assert torch.equal(old.bias, new.bias)


def test_queries_and_keys_with_a_norm_of_their_own_stay_plain() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    config = transformers.Qwen3Config(**sizes, num_attention_heads=2, num_key_value_heads=1, use_cache=False)
    model = transformers.Qwen3ForCausalLM(config).eval()
    layers = decoupled(fix(model, "sdd", [torch.randint(64, (1, 7))], timed=False).model)
    assert {name.rpartition(".")[2] for name in layers} == {"v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("family", ["gpt2", "encoder"])
def test_queries_keys_and_values_in_one_matrix_are_refused(family: str) -> None:
    model, batch = tiny(family)
    with pytest.raises(InputError, match="queries, keys and values in one matrix"):
        fix(model, "sdd", [batch], timed=False)


def test_a_second_time_there_is_nothing_to_do() -> None:
    model, batch = tiny("decoder")
    again = fix(fix(model, "sdd", [batch], timed=False).model, "sdd", [batch], timed=False)
    assert not again.edits


def test_a_model_without_blocks_is_refused_and_bad_numbers_are() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(InputError, match="no attention and no feed-forward"):
        fix(model, "sdd", [torch.randn(2, 3)], timed=False)
    with pytest.raises(InputError, match="residual_alpha above 0"):
        Decoupling(residual_alpha=0.0)
    with pytest.raises(InputError, match="eps above 0"):
        Decoupling(eps=0.0)
