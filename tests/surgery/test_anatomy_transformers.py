"""Anatomies of tiny random transformers models against truths written by hand from their source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from setpoint.surgery import Anatomy
from setpoint.types import AttentionSite, Block, FeedForwardSite, Projection

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
COUNTS = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    yield
    transformers.logging.set_verbosity(level)


def build(model: str, config: str, attention: Any = "sdpa", **settings: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = getattr(transformers, config)(**settings)
        if attention == "eager":
            made._attn_implementation = "eager"
        network: nn.Module = getattr(transformers, model)(made)
    return network.eval()


def read(model: nn.Module, batch: Mapping[str, Tensor] | None = None) -> Anatomy:
    return Anatomy.trace(model, batch or {"input_ids": torch.arange(6)[None]})


def pixels(size: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.linspace(-2, 2, 3 * size * size).sin().reshape(1, 3, size, size)}


def names(anatomy: Anatomy) -> list[str]:
    return [block.name for block in anatomy.blocks]


def roles(block: Block) -> list[str]:
    return [branch.role for branch in block.branches]


def attention(block: Block) -> AttentionSite:
    return next(branch.attention for branch in block.branches if branch.attention is not None)


def feed_forward(block: Block) -> FeedForwardSite:
    return next(branch.feed_forward for branch in block.branches if branch.feed_forward is not None)


def modules(*projections: Projection | None) -> list[str]:
    return [projection.module if projection is not None else "?" for projection in projections]


def qkvo(site: AttentionSite) -> list[str]:
    return modules(site.q, site.k, site.v, site.out)


def rows(*projections: Projection | None) -> list[list[int] | None]:
    return [None if p is None or p.rows is None else list(p.rows) for p in projections]


def under(prefix: str, *parts: str) -> list[str]:
    return [f"{prefix}.{part}" for part in parts]


def writers(anatomy: Anatomy) -> list[tuple[str, int | None, str]]:
    return [(writer.projection.module, writer.block, writer.role) for writer in anatomy.writers]


def adds(anatomy: Anatomy, norm: str) -> set[str]:
    return {use.module for use in anatomy.norms[norm].uses if use.op == "add"}


# decoders ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_llama_norms_feed_q_k_v_and_gate_up(implementation: str) -> None:
    anatomy = read(build("LlamaForCausalLM", "LlamaConfig", implementation, **GROUPED))
    assert names(anatomy) == ["model.layers.0", "model.layers.1"]
    for block in anatomy.blocks:
        assert block.placement == "pre"
        assert roles(block) == ["attention", "feed_forward"]
        assert [b.input_norms for b in block.branches] == [
            (f"{block.name}.input_layernorm",),
            (f"{block.name}.post_attention_layernorm",),
        ]
        site = attention(block)
        assert qkvo(site) == under(block.name, *(f"self_attn.{n}_proj" for n in "qkvo"))
        assert rows(site.q, site.k, site.v) == [None, None, None]
        assert (site.num_heads, site.num_kv_heads, site.head_dim, site.causal) == (4, 2, 8, True)
        assert site.op == ("softmax" if implementation == "eager" else "scaled_dot_product_attention")
        assert (site.call_index, site.name) == (block.index, f"{block.name}.self_attn")
        ff = feed_forward(block)
        assert modules(ff.gate, ff.up, ff.down) == under(block.name, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
        assert (ff.activation, ff.experts, ff.name) == ("silu", 1, f"{block.name}.mlp")
        assert ff.hidden is not None
        assert (ff.hidden.module, ff.hidden.side) == (f"{block.name}.mlp.down_proj", "input")
    expected = {"model.norm": frozenset({"lm_head"})}
    for name in names(anatomy):
        expected[f"{name}.input_layernorm"] = frozenset(under(f"{name}.self_attn", "q_proj", "k_proj", "v_proj"))
        expected[f"{name}.post_attention_layernorm"] = frozenset(under(f"{name}.mlp", "gate_proj", "up_proj"))
    assert anatomy.feeds == expected
    assert {(norm.kind, norm.centred, norm.axes) for norm in anatomy.norms.values()} == {("rms", False, (-1,))}
    assert writers(anatomy) == [
        ("model.embed_tokens", None, "embedding"),
        ("model.layers.0.self_attn.o_proj", 0, "attention"),
        ("model.layers.0.mlp.down_proj", 0, "feed_forward"),
        ("model.layers.1.self_attn.o_proj", 1, "attention"),
        ("model.layers.1.mlp.down_proj", 1, "feed_forward"),
    ]
    assert modules(*anatomy.embeddings, anatomy.head) == ["model.embed_tokens", "lm_head"]
    assert anatomy.tied == ()
    assert anatomy.unread == ()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_gpt2_norms_feed_fused_qkv(implementation: str) -> None:
    anatomy = read(build("GPT2LMHeadModel", "GPT2Config", implementation, **GPT2))
    assert names(anatomy) == ["transformer.h.0", "transformer.h.1"]
    for block in anatomy.blocks:
        assert block.placement == "pre"
        assert roles(block) == ["attention", "feed_forward"]
        site = attention(block)
        assert qkvo(site) == under(block.name, "attn.c_attn", "attn.c_attn", "attn.c_attn", "attn.c_proj")
        assert [p.rows for p in (site.q, site.k, site.v) if p] == [range(32), range(32, 64), range(64, 96)]
        assert [p.output_axis for p in (site.q, site.out) if p] == [1, 1]
        assert (site.num_heads, site.num_kv_heads, site.head_dim, site.causal) == (4, 4, 8, True)
        ff = feed_forward(block)
        assert ff.gate is None
        assert modules(ff.up, ff.down) == under(block.name, "mlp.c_fc", "mlp.c_proj")
        assert ff.activation == "gelu_tanh"
        assert anatomy.feeds[f"{block.name}.ln_1"] == {f"{block.name}.attn.c_attn"}
        assert anatomy.feeds[f"{block.name}.ln_2"] == {f"{block.name}.mlp.c_fc"}
        assert {use.input_axis for use in anatomy.norms[f"{block.name}.ln_1"].uses if use.is_weight} == {0}
    assert anatomy.feeds["transformer.ln_f"] == {"lm_head"}
    assert modules(*anatomy.embeddings, anatomy.head) == ["transformer.wte", "transformer.wpe", "lm_head"]
    assert anatomy.tied == (("transformer.wte.weight", "lm_head.weight"),)
    assert all(norm.kind == "layer" and norm.eps == 1e-5 for norm in anatomy.norms.values())
    assert anatomy.unread == ()


def test_qwen3_normalizes_queries_and_keys() -> None:
    anatomy = read(build("Qwen3ForCausalLM", "Qwen3Config", **GROUPED, head_dim=8))
    for block in anatomy.blocks:
        site = attention(block)
        assert [site.query_norm, site.key_norm] == under(block.name, "self_attn.q_norm", "self_attn.k_norm")
        assert qkvo(site) == under(block.name, *(f"self_attn.{n}_proj" for n in "qkvo"))
        assert (site.num_heads, site.num_kv_heads, site.head_dim) == (4, 2, 8)
        assert anatomy.feeds[site.query_norm] == anatomy.feeds[site.key_norm] == frozenset()
        assert block.branches[0].input_norms == (f"{block.name}.input_layernorm",)
    assert len(anatomy.norms) == 2 * 4 + 1


def test_gemma_gain_is_one_plus_the_weight() -> None:
    model = build("Gemma2ForCausalLM", "Gemma2Config", **GROUPED, head_dim=8)
    stored = model.get_parameter("model.layers.0.input_layernorm.weight")
    with torch.no_grad():
        stored.copy_(torch.linspace(-0.5, 0.5, 32))
    anatomy = read(model)
    norm = anatomy.norms["model.layers.0.input_layernorm"]
    assert (norm.kind, norm.gain_parameter) == ("rms", "model.layers.0.input_layernorm.weight")
    assert norm.gain is not None
    torch.testing.assert_close(norm.gain.float(), 1.0 + stored.detach())
    for block in anatomy.blocks:
        assert block.placement == "peri"
        first, second = block.branches
        assert first.output_norms == (f"{block.name}.post_attention_layernorm",)
        assert second.input_norms == (f"{block.name}.pre_feedforward_layernorm",)
        assert second.output_norms == (f"{block.name}.post_feedforward_layernorm",)
        assert feed_forward(block).activation == "gelu_tanh"
        assert adds(anatomy, f"{block.name}.post_attention_layernorm") == {block.name}
    assert anatomy.tied == (("model.embed_tokens.weight", "lm_head.weight"),)


def test_opt_norms_feed_separate_weights_with_biases() -> None:
    settings = {key: value for key, value in SMALL.items() if key != "intermediate_size"}
    settings |= {"ffn_dim": 48, "max_position_embeddings": 32, "word_embed_proj_dim": 32}
    anatomy = read(build("OPTForCausalLM", "OPTConfig", **settings))
    assert names(anatomy) == under("model.decoder.layers", "0", "1")
    for block in anatomy.blocks:
        site, ff = attention(block), feed_forward(block)
        assert block.placement == "pre"
        assert qkvo(site) == under(block.name, *(f"self_attn.{n}_proj" for n in ("q", "k", "v", "out")))
        assert site.q is not None
        assert site.q.bias == f"{block.name}.self_attn.q_proj.bias"
        assert site.causal
        assert (modules(ff.up, ff.down), ff.activation) == (under(block.name, "fc1", "fc2"), "relu")
        assert anatomy.feeds[f"{block.name}.final_layer_norm"] == {f"{block.name}.fc1"}
    assert anatomy.feeds["model.decoder.final_layer_norm"] == {"lm_head"}
    assert modules(*anatomy.embeddings) == under("model.decoder", "embed_tokens", "embed_positions")


def test_gpt_neox_rows_are_interleaved_and_its_branches_parallel() -> None:
    anatomy = read(build("GPTNeoXForCausalLM", "GPTNeoXConfig", **SMALL))
    assert names(anatomy) == ["gpt_neox.layers.0", "gpt_neox.layers.1"]
    for block in anatomy.blocks:
        assert roles(block) == ["attention", "feed_forward"]
        assert {b.reads for b in block.branches} == {block.input}
        site, ff = attention(block), feed_forward(block)
        fused = f"{block.name}.attention.query_key_value"
        assert qkvo(site) == [fused, fused, fused, f"{block.name}.attention.dense"]
        for part, start in zip((site.q, site.k, site.v), (0, 8, 16), strict=True):
            assert rows(part) == [[24 * head + start + i for head in range(4) for i in range(8)]]
        assert modules(ff.up, ff.down) == under(block.name, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
        assert anatomy.feeds[f"{block.name}.input_layernorm"] == {fused}
        assert anatomy.feeds[f"{block.name}.post_attention_layernorm"] == {f"{block.name}.mlp.dense_h_to_4h"}
        by_role = {b.role: b.input_norms for b in block.branches}
        assert by_role == {
            "attention": (f"{block.name}.input_layernorm",),
            "feed_forward": (f"{block.name}.post_attention_layernorm",),
        }


def test_phi3_fuses_qkv_and_gate_up() -> None:
    anatomy = read(build("Phi3ForCausalLM", "Phi3Config", **GROUPED, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    for block in anatomy.blocks:
        site, ff = attention(block), feed_forward(block)
        assert [p.rows for p in (site.q, site.k, site.v) if p] == [range(32), range(32, 48), range(48, 64)]
        assert (site.num_heads, site.num_kv_heads) == (4, 2)
        assert ff.gate is not None
        assert ff.up is not None
        assert (ff.gate.rows, ff.up.rows) == (range(48), range(48, 96))
        assert modules(ff.gate, ff.up) == [f"{block.name}.mlp.gate_up_proj"] * 2
        assert anatomy.feeds[f"{block.name}.post_attention_layernorm"] == {f"{block.name}.mlp.gate_up_proj"}


def test_mixtral_experts_are_read_with_their_router() -> None:
    anatomy = read(build("MixtralForCausalLM", "MixtralConfig", **GROUPED, num_local_experts=4))
    for block in anatomy.blocks:
        ff = feed_forward(block)
        assert roles(block) == ["attention", "feed_forward"]
        assert (ff.experts, ff.activation, ff.hidden) == (4, "silu", None)
        assert modules(ff.gate, ff.up, ff.down) == [f"{block.name}.mlp.experts"] * 3
        assert ff.gate is not None
        assert ff.up is not None
        assert ff.down is not None
        assert (ff.gate.rows, ff.up.rows) == (range(48), range(48, 96))
        assert ff.up.parameter == f"{block.name}.mlp.experts.gate_up_proj"
        assert ff.down.parameter == f"{block.name}.mlp.experts.down_proj"
        assert anatomy.feeds[f"{block.name}.post_attention_layernorm"] == {
            f"{block.name}.mlp.gate",
            f"{block.name}.mlp.experts",
        }


# encoders ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_bert_norms_also_feed_the_residual(implementation: str) -> None:
    anatomy = read(build("BertModel", "BertConfig", implementation, **SMALL))
    assert names(anatomy) == ["encoder.layer.0", "encoder.layer.1"]
    for block in anatomy.blocks:
        assert block.placement == "post"
        assert roles(block) == ["attention", "feed_forward"]
        site, ff = attention(block), feed_forward(block)
        assert qkvo(site) == under(
            block.name, *(f"attention.self.{n}" for n in ("query", "key", "value")), "attention.output.dense"
        )
        assert (site.num_heads, site.head_dim, site.causal) == (4, 8, False)
        assert (modules(ff.up, ff.down), ff.activation) == (
            under(block.name, "intermediate.dense", "output.dense"),
            "gelu",
        )
        middle, last = under(block.name, "attention.output.LayerNorm", "output.LayerNorm")
        assert [b.after_norms for b in block.branches] == [(middle,), (last,)]
        assert anatomy.feeds[middle] == {f"{block.name}.intermediate.dense"}
        assert adds(anatomy, middle) == {f"{block.name}.output"}
    queries = under("encoder.layer.1.attention.self", "query", "key", "value")
    assert anatomy.feeds["encoder.layer.0.output.LayerNorm"] == set(queries)
    assert adds(anatomy, "encoder.layer.0.output.LayerNorm") == {"encoder.layer.1.attention.output"}
    assert adds(anatomy, "embeddings.LayerNorm") == {"encoder.layer.0.attention.output"}
    assert adds(anatomy, "encoder.layer.1.output.LayerNorm") == set()
    assert modules(*anatomy.embeddings) == under(
        "embeddings", "word_embeddings", "token_type_embeddings", "position_embeddings"
    )


def test_albert_runs_one_block_twice() -> None:
    anatomy = read(build("AlbertModel", "AlbertConfig", **SMALL, embedding_size=16))
    shared = "encoder.albert_layer_groups.0.albert_layers.0"
    assert names(anatomy) == [shared, shared]
    assert [block.call for block in anatomy.blocks] == [0, 1]
    assert [block.placement for block in anatomy.blocks] == ["post", "post"]
    site, ff = attention(anatomy.blocks[1]), feed_forward(anatomy.blocks[1])
    assert qkvo(site) == under(shared, *(f"attention.{n}" for n in ("query", "key", "value", "dense")))
    assert [attention(block).call_index for block in anatomy.blocks] == [0, 1]
    assert modules(ff.up, ff.down) == under(shared, "ffn", "ffn_output")
    last = anatomy.norms[f"{shared}.full_layer_layer_norm"]
    assert last.calls == 2
    queries = set(under(f"{shared}.attention", "query", "key", "value"))
    assert last.feeds == queries | {"pooler"}
    assert adds(anatomy, last.name) == {f"{shared}.attention"}
    assert adds(anatomy, f"{shared}.attention.LayerNorm") == {shared}
    assert anatomy.feeds["embeddings.LayerNorm"] == {"encoder.embedding_hidden_mapping_in"}


def test_t5_encoder_position_bias_does_not_write_to_the_stream() -> None:
    settings = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    anatomy = read(build("T5EncoderModel", "T5Config", **settings))
    assert names(anatomy) == ["encoder.block.0", "encoder.block.1"]
    for block in anatomy.blocks:
        assert block.placement == "pre"
        assert qkvo(attention(block)) == under(block.name, *(f"layer.0.SelfAttention.{n}" for n in "qkvo"))
        ff = feed_forward(block)
        assert modules(ff.up, ff.down) == under(block.name, "layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wo")
        assert ff.activation == "relu"
        assert anatomy.norms[f"{block.name}.layer.0.layer_norm"].kind == "rms"
        assert anatomy.feeds[f"{block.name}.layer.1.layer_norm"] == {f"{block.name}.layer.1.DenseReluDense.wi"}
    assert [module for module, block, _ in writers(anatomy) if block is None] == ["encoder.embed_tokens"]
    assert anatomy.tied == (("shared.weight", "encoder.embed_tokens.weight"),)


def test_bart_encoder_keeps_its_last_norm_and_its_decoder_reads_across() -> None:
    settings = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in COUNTS.items()}
    settings |= {"vocab_size": 64, "d_model": 32, "max_position_embeddings": 32, "decoder_start_token_id": 2}
    model = build("BartModel", "BartConfig", **settings, bos_token_id=0, eos_token_id=2)
    anatomy = read(model, {"input_ids": torch.arange(6)[None], "decoder_input_ids": torch.arange(4)[None]})
    assert names(anatomy) == [f"{side}.layers.{i}" for side in ("encoder", "decoder") for i in range(2)]
    assert [block.placement for block in anatomy.blocks] == ["post"] * 4
    assert [roles(block) for block in anatomy.blocks] == [
        *[["attention", "feed_forward"]] * 2,
        *[["attention", "cross_attention", "feed_forward"]] * 2,
    ]
    assert anatomy.blocks[1].branches[1].after_norms == ("encoder.layers.1.final_layer_norm",)
    across = {f"decoder.layers.{i}.encoder_attn.{n}_proj" for i in range(2) for n in "kv"}
    assert anatomy.feeds["encoder.layers.1.final_layer_norm"] == across


# images --------------------------------------------------------------------------------------------------------------


def test_vit_is_pre_norm_over_patches() -> None:
    anatomy = read(build("ViTModel", "ViTConfig", **VISION, image_size=16, patch_size=4), pixels(16))
    assert [name.split(".")[-2:] for name in names(anatomy)] == [["layers", "0"], ["layers", "1"]]
    for block in anatomy.blocks:
        site, ff = attention(block), feed_forward(block)
        assert block.placement == "pre"
        assert qkvo(site) == under(block.name, *(f"attention.{n}_proj" for n in "qkvo"))
        assert (site.num_heads, site.head_dim, site.causal) == (4, 8, False)
        assert (modules(ff.up, ff.down), ff.activation) == (under(block.name, "mlp.fc1", "mlp.fc2"), "gelu")
        assert anatomy.feeds[f"{block.name}.layernorm_after"] == {f"{block.name}.mlp.fc1"}
    assert [chain.convolution.module for chain in anatomy.chains] == ["embeddings.patch_embeddings.projection"]


def test_resnet_blocks_are_residual_units_of_chains() -> None:
    model = build("ResNetModel", "ResNetConfig", embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2])
    anatomy = read(model, pixels(32))
    assert names(anatomy) == [f"encoder.stages.{s}.layers.{i}" for s in range(2) for i in range(2)]
    for block in anatomy.blocks:
        assert roles(block) == ["convolution"]
        assert block.placement == "output"
        assert block.branches[0].output_norms == (f"{block.name}.layer.2.normalization",)
        assert modules(block.branches[0].writer) == [f"{block.name}.layer.2.convolution"]
    chains = {chain.convolution.module: chain for chain in anatomy.chains}
    stem = chains["embedder.embedder.convolution"]
    assert (stem.norm, stem.activation) == ("embedder.embedder.normalization", "relu")
    inner = chains["encoder.stages.0.layers.1.layer.0.convolution"]
    assert (inner.norm, inner.activation) == ("encoder.stages.0.layers.1.layer.0.normalization", "relu")
    outer = chains["encoder.stages.0.layers.1.layer.2.convolution"]
    assert (outer.norm, outer.activation) == ("encoder.stages.0.layers.1.layer.2.normalization", "")
    assert {norm.kind for norm in anatomy.norms.values()} == {"batch"}
    assert "encoder.stages.1.layers.0.shortcut.normalization" in anatomy.norms


def test_convnext_stem_norm_also_feeds_the_residual() -> None:
    model = build("ConvNextModel", "ConvNextConfig", hidden_sizes=[16, 32], depths=[2, 2], num_stages=2)
    anatomy = read(model, pixels(32))
    assert names(anatomy) == [f"encoder.stages.{s}.layers.{i}" for s in range(2) for i in range(2)]
    for block in anatomy.blocks:
        assert roles(block) == ["convolution"]
        assert block.placement == "inner"
        assert block.branches[0].inner_norms == (f"{block.name}.layernorm",)
        assert modules(block.branches[0].writer) == [f"{block.name}.pwconv2"]
        assert anatomy.feeds[f"{block.name}.layernorm"] == {f"{block.name}.pwconv1"}
    assert anatomy.feeds["embeddings.layernorm"] == {"encoder.stages.0.layers.0.dwconv"}
    assert adds(anatomy, "embeddings.layernorm") == {"encoder.stages.0.layers.0"}
    assert anatomy.feeds["encoder.stages.1.downsampling_layer.0"] == {"encoder.stages.1.downsampling_layer.1"}
