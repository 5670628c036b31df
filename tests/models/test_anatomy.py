"""What anatomy reads in the backbones, and that `setpoint check` runs on them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import setpoint
from setpoint.models import (
    MLP,
    Attention,
    Bottleneck,
    ClassToken,
    Learned,
    ResNet,
    ResNetConfig,
    Transformer,
    TransformerConfig,
    VisionConfig,
    VisionTransformer,
)
from setpoint.nn import LayerNorm, OutputNorm, PeriNorm, Placement, PostNorm, PreNorm, RMSNorm, ScaledPreNorm
from setpoint.surgery import Anatomy

CONFIG = TransformerConfig(vocab_size=23, context=16, dim=16, depth=2, num_heads=4, num_kv_heads=2)
TOKENS = torch.tensor([[1, 5, 2, 7, 3, 11], [4, 4, 9, 0, 22, 6]])
IMAGES = torch.linspace(-3, 3, 2 * 3 * 16 * 16).sin().reshape(2, 3, 16, 16)


@pytest.mark.parametrize(
    ("block", "placement", "norms"),
    [
        (PreNorm(), "pre", ("norm", "", "")),
        (PostNorm(), "post", ("", "", "norm")),
        (PeriNorm(), "peri", ("norm", "out_norm", "")),
        (OutputNorm(), "output", ("", "out_norm", "")),
        (ScaledPreNorm(), "pre", ("norm", "", "")),
    ],
    ids=["pre", "post", "peri", "output", "lns"],
)
def test_blocks_norms_and_writers_of_each_placement(
    block: Placement, placement: str, norms: tuple[str, str, str]
) -> None:
    last = ("attention.sublayer.o_proj", "feed_forward.sublayer.down_proj")
    anatomy = Anatomy.trace(Transformer(CONFIG, block=block), TOKENS)
    assert [b.name for b in anatomy.blocks] == ["stack.blocks.0", "stack.blocks.1"]
    assert anatomy.head is not None
    assert anatomy.head.module == "head"
    for index, one in enumerate(anatomy.blocks):
        assert one.placement == placement
        assert [branch.role for branch in one.branches] == ["attention", "feed_forward"]
        for branch in one.branches:
            unit = f"{one.name}.{branch.role}"
            found = (branch.input_norms, branch.output_norms, branch.after_norms)
            assert found == tuple((f"{unit}.{name}",) if name else () for name in norms), index
    assert [writer.projection.module for writer in anatomy.writers] == [
        "embedding",
        *(f"stack.blocks.{i}.{part}" for i in (0, 1) for part in last),
    ]


def test_pre_norms_of_a_decoder_feed_projections_and_head_alone() -> None:
    anatomy = Anatomy.trace(Transformer(CONFIG), TOKENS)
    attention, feed_forward = "stack.blocks.0.attention", "stack.blocks.0.feed_forward"
    assert anatomy.feeds[f"{attention}.norm"] == {f"{attention}.sublayer.{letter}_proj" for letter in "qkv"}
    assert anatomy.feeds[f"{feed_forward}.norm"] == {f"{feed_forward}.sublayer.{name}_proj" for name in ("gate", "up")}
    assert anatomy.feeds["stack.final_norm"] == {"head"}
    assert all(norm.foldable and norm.kind == "rms" for norm in anatomy.norms.values())
    site = anatomy.attention[0]
    assert (site.num_heads, site.num_kv_heads, site.head_dim, site.causal) == (4, 2, 4, True)
    assert anatomy.tied == (("embedding.weight", "head.weight"),)


def test_gpt_form_has_layer_norms_a_plain_feed_forward_and_two_tables() -> None:
    model = Transformer(CONFIG, norm=LayerNorm, feed_forward=MLP, position=Learned())
    anatomy = Anatomy.trace(model, TOKENS)
    assert {norm.kind for norm in anatomy.norms.values()} == {"layer"}
    site = anatomy.blocks[0].branches[1].feed_forward
    assert site is not None
    assert site.gate is None
    assert site.activation == "gelu"
    assert [writer.projection.module for writer in anatomy.writers[:2]] == ["embedding", "position_embedding"]


def test_query_and_key_norms_are_read_and_a_learnable_slot_does_not_hide_the_heads() -> None:
    attention = partial(Attention, qk_norm=RMSNorm, kv_bias=True)
    site = Anatomy.trace(Transformer(CONFIG, attention=attention), TOKENS).attention[1]
    owner = "stack.blocks.1.attention.sublayer"
    assert (site.query_norm, site.key_norm) == (f"{owner}.q_norm", f"{owner}.k_norm")
    assert (site.num_heads, site.num_kv_heads, site.head_dim, site.causal) == (4, 2, 4, True)
    assert site.k is not None
    assert site.k.module == f"{owner}.k_proj"


def test_scaled_norm_has_the_scale_in_its_gain() -> None:
    norms = Anatomy.trace(Transformer(CONFIG, block=ScaledPreNorm()), TOKENS).norms
    first, second = (norms[f"stack.blocks.{i}.attention.norm"] for i in (0, 1))
    assert first.gain is not None
    assert second.gain is not None
    torch.testing.assert_close(first.gain, torch.ones(16))
    torch.testing.assert_close(second.gain, torch.full((16,), 0.5**0.5), atol=1e-3, rtol=0)
    assert (first.gain_parameter, second.gain_parameter) == ("stack.blocks.0.attention.norm.weight", "")


def test_encoder_is_not_causal() -> None:
    anatomy = Anatomy.trace(Transformer(replace(CONFIG, causal=False)), TOKENS)
    assert not any(site.causal for site in anatomy.attention)


def test_vision_transformer_has_patches_class_token_and_positions_for_writers() -> None:
    config = VisionConfig(image_size=16, patch_size=4, dim=16, depth=2, num_heads=4)
    anatomy = Anatomy.trace(VisionTransformer(config, pooling=ClassToken()), IMAGES)
    assert [block.placement for block in anatomy.blocks] == ["pre", "pre"]
    found = {writer.projection.parameter for writer in anatomy.writers if writer.role == "embedding"}
    assert found == {"patches.weight", "class_token", "position_embedding.weight"}
    assert anatomy.feeds["stack.final_norm"] == {"head"}
    assert anatomy.unread == ()


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_residual_network_is_read_as_units_and_chains(block: str) -> None:
    config = ResNetConfig(stem_width=8, widths=(8, 16), depths=(1, 1))
    model = ResNet(config, block=Bottleneck) if block == "bottleneck" else ResNet(config)
    anatomy = Anatomy.trace(model, IMAGES)
    assert [b.name for b in anatomy.blocks] == ["stages.0.0", "stages.1.0"]
    last = 3 if block == "bottleneck" else 2
    assert [b.branches[0].writer.module for b in anatomy.blocks if b.branches[0].writer] == [
        f"stages.{i}.0.conv{last}" for i in (0, 1)
    ]
    chains = {chain.convolution.module: (chain.norm, chain.activation) for chain in anatomy.chains}
    assert chains["stem.0"] == ("stem.1", "relu")
    assert chains["stages.0.0.conv1"] == ("stages.0.0.norm1", "relu")
    assert chains[f"stages.1.0.conv{last}"] == (f"stages.1.0.norm{last}", "")
    assert {norm.kind for norm in anatomy.norms.values()} == {"batch"}
    assert anatomy.unread == ()


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (Transformer(replace(CONFIG, dim=32)), TOKENS),
        (Transformer(CONFIG, block=ScaledPreNorm(), attention=partial(Attention, kv_bias=True)), TOKENS),
        (VisionTransformer(VisionConfig(image_size=16, patch_size=4, dim=16, depth=2, num_heads=4)), IMAGES),
        (ResNet(ResNetConfig(stem_width=8, widths=(8, 16), depths=(1, 1))), IMAGES),
    ],
    ids=["decoder", "lns-slot", "vision", "resnet"],
)
def test_check_runs_and_leaves_the_model_as_it_was(model: nn.Module, batch: Tensor) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = setpoint.check(model, [batch])
    assert not [finding for finding in report.findings if finding.severity == "error"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
