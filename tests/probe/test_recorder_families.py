"""The recorder on tiny models of real families, sited by their anatomy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from setpoint.probe import CHEAP, Recorder, record
from setpoint.surgery import Anatomy
from setpoint.types import Stat, Trace

transformers = pytest.importorskip("transformers")
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 60,
    "max_position_embeddings": 64,
}


def llama(**changes: Any) -> nn.Module:
    config = transformers.LlamaConfig(**{**SMALL, "num_key_value_heads": 2, **changes})
    return transformers.LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return transformers.GPT2LMHeadModel(config).eval()


def bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**SMALL)).eval()


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=60, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8
    )
    return transformers.ViTModel(config).eval()


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic", num_labels=3
    )
    return transformers.ResNetForImageClassification(config).eval()


def tokens(batch: int = 2, length: int = 16) -> dict[str, Any]:
    return {"input_ids": torch.randint(1, 60, (batch, length))}


def next_token(out: Any, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())


def unreached(model: nn.Module, batch: Any, trace: Trace) -> list[str]:
    seen = {*trace.records, *trace.attention}
    return [site.name for site in Anatomy.trace(model, batch).sites() if site.name not in seen]


CASES: dict[str, tuple[Any, Any]] = {
    "llama": (llama, tokens),
    "llama-eager": (lambda: llama(attn_implementation="eager"), tokens),
    "gpt2": (gpt2, tokens),
    "bert": (bert, tokens),
    "t5": (t5, lambda: {**tokens(), "decoder_input_ids": torch.randint(1, 60, (2, 9))}),
    "vit": (vit, lambda: {"pixel_values": torch.randn(2, 3, 32, 32)}),
    "resnet": (resnet, lambda: {"pixel_values": torch.randn(2, 3, 64, 64)}),
}


@pytest.mark.parametrize("family", CASES)
def test_every_site_of_the_anatomy_is_reached(family: str) -> None:
    build, make = CASES[family]
    model, batch = build(), make()
    trace = record(model, [batch])
    assert unreached(model, batch, trace) == []
    assert all(r.rms is not None and r.non_finite == 0 for r in trace.records.values())


@pytest.mark.parametrize("family", ["t5", "resnet"])
def test_models_that_add_in_place_give_gradients_at_every_block(family: str) -> None:
    build, make = CASES[family]
    model, batch = build(), make()
    trace = record(model, [batch], loss=lambda out, _: out.logits.square().mean())
    assert all(r.gradient_rms is not None and r.gradient_rms > 0 for r in trace.by_role("residual"))
    with_gradient = [p for p in trace.parameters.values() if p.gradient_norm is not None]
    assert len(with_gradient) == len(list(model.parameters()))


def test_residual_records_are_the_hidden_states_of_the_model() -> None:
    model, batch = llama(), tokens()
    hidden = model(**batch, output_hidden_states=True).hidden_states
    trace = record(model, [batch])
    streams = [*trace.by_role("embedding"), *trace.by_role("residual")]
    assert [r.rms for r in streams[:-1]] == pytest.approx(
        [h.double().square().mean().sqrt().item() for h in hidden[:-1]], rel=1e-5
    )  # the last hidden state of transformers is normed


def test_eager_and_fused_attention_agree() -> None:
    fused, eager, batch = llama(), llama(attn_implementation="eager"), tokens()
    eager.load_state_dict(fused.state_dict())
    a, b = (list(record(m, [batch]).attention.values()) for m in (fused, eager))
    assert len(a) == len(b) == 2
    for x, y in zip(a, b, strict=True):
        for name in ("entropy", "sink", "largest", "logit_max", "saturated"):
            assert getattr(x, name) == pytest.approx(getattr(y, name), rel=1e-4, abs=1e-6)
        assert x.queries == y.queries == 2 * 15


def test_padding_changes_nothing_in_an_encoder() -> None:
    model, batch = bert(), tokens(1, 10)
    padded = {
        "input_ids": nn.functional.pad(batch["input_ids"], (0, 6)),
        "attention_mask": torch.tensor([[1] * 10 + [0] * 6]),
    }
    plain, masked = record(model, [batch]), record(model, [padded])
    assert (plain.tokens, masked.tokens) == (10, 10)
    for name, found in plain.records.items():
        assert masked.records[name].rms == pytest.approx(found.rms, rel=1e-4), name
    for name, site in plain.attention.items():
        assert masked.attention[name].entropy == pytest.approx(site.entropy, rel=1e-4), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_transformers_counts_once(reentrant: bool) -> None:
    model, batch = llama(), tokens()
    sites, calls = Anatomy.trace(model, batch).sites(), []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))

    def traced() -> Trace:
        with Recorder(model, sites, needs={**CHEAP, "residual": {Stat.MOMENTS, Stat.GRADIENT}}) as recorder:
            next_token(model(**batch), batch).backward()
        model.zero_grad()
        return recorder.trace()

    model.train()  # transformers checkpoints in training mode only; this model has no dropout
    plain = traced()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.get_input_embeddings().register_forward_hook(lambda _, __, out: out.requires_grad_())
    again = traced()
    assert len(calls) == 1 + 2, "the second pass must have recomputed the layer"
    assert {n: a.queries for n, a in again.attention.items()} == {n: a.queries for n, a in plain.attention.items()}
    for name, found in plain.records.items():
        assert again.records[name].tokens == found.tokens
    rms = {r.site.name: r.gradient_rms for r in plain.by_role("residual")}
    assert {r.site.name: r.gradient_rms for r in again.by_role("residual")} == pytest.approx(rms, rel=1e-4)
    for name, parameter in plain.parameters.items():
        assert again.parameters[name].gradient_norm == pytest.approx(parameter.gradient_norm, rel=1e-4)


def test_tied_weights_have_one_gradient() -> None:
    model, batch = gpt2(), tokens()
    trace = record(model, [batch], loss=next_token)
    next_token(model(**batch), batch).backward()
    found = trace.parameters["transformer.wte.weight"].gradient_norm
    assert found == pytest.approx(model.transformer.wte.weight.grad.norm().item(), rel=1e-4)
    assert "lm_head.weight" not in trace.parameters
