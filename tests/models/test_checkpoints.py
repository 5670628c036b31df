"""Weights of transformers' models give the same logits here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from setpoint.errors import InputError
from setpoint.models import Transformer, from_folder, from_transformers
from setpoint.models.checkpoints import convert

transformers = pytest.importorskip("transformers")

LLAMA = {
    "vocab_size": 29,
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GPT2 = {"vocab_size": 29, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
OPT = {
    "vocab_size": 29,
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "ffn_dim": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", LLAMA),
    "llama-tied": ("Llama", {**LLAMA, "tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    "llama-all-heads": ("Llama", {**LLAMA, "num_key_value_heads": 4, "head_dim": 8}),
    "llama-3": ("Llama", {**LLAMA, "rope_parameters": LLAMA3}),
    "mistral": ("Mistral", {**LLAMA, "sliding_window": None}),
    "qwen2": ("Qwen2", LLAMA),
    "qwen3": ("Qwen3", {**LLAMA, "head_dim": 8}),
    "gpt2": ("GPT2", GPT2),
    "gpt2-wide": ("GPT2", {**GPT2, "n_inner": 24, "activation_function": "relu", "tie_word_embeddings": False}),
    "opt": ("OPT", OPT),
    "opt-gelu": ("OPT", {**OPT, "activation_function": "gelu", "layer_norm_elementwise_affine": False}),
}
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6] * 5, [2, 7, 1, 8, 2, 8, 1, 8] * 5])


def build(name: str, **changes: Any) -> nn.Module:
    family, settings = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**settings, **changes})
    head = {"GPT2": "GPT2LMHeadModel"}.get(family, f"{family}ForCausalLM")
    model = getattr(transformers, head)(config).eval()
    for parameter in model.parameters():  # norms, biases and all: nothing may stand at a value that hides a mistake
        nn.init.normal_(parameter, 0.1, 0.4)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name: str) -> None:
    theirs = build(name).double()
    ours = from_transformers(theirs)
    with torch.no_grad():
        wanted, found = theirs(TOKENS).logits, ours(TOKENS)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)  # transformers' norms and rotations are in float32


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_logits_are_those_of_transformers_in_float32_within_rounding(name: str) -> None:
    theirs = build(name)
    exact = build(name).double()
    exact.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        reference = exact(TOKENS).logits
        own = float((theirs(TOKENS).logits - reference).abs().max())
        ours = float((from_transformers(theirs)(TOKENS) - reference).abs().max())
    assert ours <= 4 * own + 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_converted_model_is_rebuilt_from_plain_data(name: str) -> None:
    model = from_transformers(build(name))
    again = Transformer.from_dict(json.loads(json.dumps(model.to_dict()))).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(TOKENS), model(TOKENS))


@pytest.mark.parametrize("name", ["llama", "llama-3", "gpt2", "opt"])
def test_folder_gives_the_same_logits_as_the_model_that_wrote_it(name: str, tmp_path: Path) -> None:
    theirs = build(name)
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(from_folder(tmp_path)(TOKENS), theirs(TOKENS).logits, atol=2e-4, rtol=1e-4)


def test_fields_of_older_files_are_read() -> None:
    theirs = build("llama", rope_parameters={"rope_type": "default", "rope_theta": 77.0})
    config = theirs.config.to_dict()
    del config["rope_parameters"]
    ours = convert({**config, "rope_theta": 77.0, "rope_scaling": None}, theirs.state_dict())
    assert ours.parts.position.theta == 77.0  # type: ignore[attr-defined]
    with torch.no_grad():
        torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).logits, atol=2e-4, rtol=1e-4)


def test_weights_are_copies() -> None:
    theirs = build("llama")
    ours = from_transformers(theirs)
    before = theirs.model.embed_tokens.weight.clone()
    with torch.no_grad():
        ours.embedding.weight.zero_()
    assert torch.equal(theirs.model.embed_tokens.weight, before)


def test_tie_survives() -> None:
    ours = from_transformers(build("gpt2"))
    assert ours.head.weight is ours.embedding.weight
    untied = from_transformers(build("llama"))
    assert untied.head.weight is not untied.embedding.weight


def test_generated_text_is_that_of_transformers() -> None:
    theirs = build("llama")
    wanted = theirs.generate(TOKENS[:, :6], max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(from_transformers(theirs).generate(TOKENS[:, :6], 12), wanted)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"attention_bias": True}, "attention_bias=False"),
        ("llama", {"mlp_bias": True}, "mlp_bias=False"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "got 'linear'"),
        ("llama", {"hidden_act": "tanh"}, "hidden_act to be one of silu"),
        ("mistral", {"sliding_window": 8}, "sliding_window=8"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=False"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before=True"),
        ("opt", {"word_embed_proj_dim": 8}, "word_embed_proj_dim"),
    ],
)
def test_settings_without_a_counterpart_are_refused_by_name(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_transformers(build(name, **changes))


def test_other_families_and_other_modules_are_refused() -> None:
    with pytest.raises(InputError, match=r"llama, mistral, .* got model_type 'bert'"):
        convert({"model_type": "bert"}, {})
    with pytest.raises(InputError, match="model of transformers, got Linear"):
        from_transformers(nn.Linear(2, 2))


def test_missing_and_foreign_tensors_are_refused() -> None:
    theirs = build("llama")
    config, state = theirs.config.to_dict(), dict(theirs.state_dict())
    with pytest.raises(InputError, match=r"holds model\.extra"):
        convert(config, {**state, "model.extra": torch.ones(1)})
    del state["model.norm.weight"]
    with pytest.raises(InputError, match=r"do not fit a llama.*stack\.final_norm\.weight"):
        convert(config, state)


def test_folders_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"readable config\.json"):
        from_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(InputError, match=r"\*\.safetensors"):
        from_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match="damaged"):
        from_folder(tmp_path)


@pytest.mark.slow
def test_smollm2_has_the_same_logits_and_writes_the_same_text() -> None:
    from setpoint.loading import load

    loaded = load("smollm2")
    ours = from_transformers(loaded.model)
    tokens = torch.tensor([loaded.processor.encode("The capital of France is Paris, and the capital of Italy is")])
    with torch.no_grad():
        wanted, found = loaded.model(input_ids=tokens).logits, ours(tokens)
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=1e-4)
    assert torch.equal(found.argmax(-1), wanted.argmax(-1))
    text = loaded.model.generate(tokens, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(ours.generate(tokens, 8), text)
