from __future__ import annotations

import copy
import json
from dataclasses import FrozenInstanceError, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.models import (
    MLP,
    Attention,
    ClassToken,
    DepthScaledNormal,
    LayerIndexNormal,
    Learned,
    Normal,
    Position,
    Rotary,
    Sinusoidal,
    SwiGLU,
    Transformer,
    TransformerConfig,
    VisionConfig,
    VisionTransformer,
    XavierNormal,
)
from setpoint.models.generation import LayerCache
from setpoint.models.plain import from_plain, to_plain
from setpoint.models.position import Llama3Rotary, rotate
from setpoint.models.presets import SIZES
from setpoint.nn import DyT, LayerNorm, OutputNorm, PeriNorm, Placement, PostNorm, PreNorm, RMSNorm, ScaledPreNorm
from setpoint.optim import decay_groups

CONFIG = TransformerConfig(vocab_size=23, context=32, dim=16, depth=3, num_heads=4, num_kv_heads=2)
TOKENS = torch.tensor([[1, 5, 2, 7, 3, 11], [4, 4, 9, 0, 22, 6]])
PLACEMENTS = [PreNorm(), PostNorm(), PeriNorm(), OutputNorm(), ScaledPreNorm(), PreNorm(embed_norm=True)]
DYT = {"norm": partial(DyT, alpha_init_value=0.2), "attention_norm": partial(DyT, alpha_init_value=0.8)}


@pytest.mark.parametrize("block", PLACEMENTS, ids=repr)
@pytest.mark.parametrize("position", [Rotary(), Learned(), Sinusoidal()], ids=lambda p: type(p).__name__)
def test_a_decoder_never_looks_ahead(block: Placement, position: Position) -> None:
    model = Transformer(CONFIG, block=block, position=position).eval()
    changed = TOKENS.clone()
    changed[:, 4:] = 1
    with torch.no_grad():
        before, after = model(TOKENS), model(changed)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_an_encoder_looks_ahead() -> None:
    model = Transformer(replace(CONFIG, causal=False)).eval()
    changed = TOKENS.clone()
    changed[:, 5] = 1
    with torch.no_grad():
        assert not torch.allclose(model(TOKENS)[:, 0], model(changed)[:, 0])


@pytest.mark.parametrize("position", [Rotary(), Learned(), Sinusoidal()], ids=lambda p: type(p).__name__)
def test_order_of_tokens_matters_with_positions(position: Position) -> None:
    config = replace(CONFIG, causal=False)
    model, none = Transformer(config, position=position).eval(), Transformer(config, position=Position()).eval()
    turned = TOKENS.flip(1)
    with torch.no_grad():
        assert not torch.allclose(model(TOKENS), model(turned).flip(1), atol=1e-6)
        torch.testing.assert_close(none(TOKENS), none(turned).flip(1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_padding_changes_nothing_for_the_tokens_that_count(causal: bool) -> None:
    model = Transformer(replace(CONFIG, causal=causal)).eval()
    padded = torch.cat((TOKENS, torch.zeros(2, 3, dtype=torch.long)), dim=1)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[:, 6:] = False
    with torch.no_grad():
        torch.testing.assert_close(model(padded, attention_mask=mask)[:, :6], model(TOKENS), atol=1e-6, rtol=1e-5)
        left = torch.cat((padded[:, 6:], TOKENS), dim=1)  # rotary positions count distances alone
        found = model(left, attention_mask=mask.flip(1))
        torch.testing.assert_close(found[:, 3:], model(TOKENS), atol=1e-6, rtol=1e-5)
    assert bool(found.isfinite().all())


def test_attention_equals_the_plain_formula() -> None:
    attention = Attention(16, 4, num_kv_heads=2, qk_norm=RMSNorm, bias=True).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    q = attention.q_norm(attention.q_proj(x).view(2, 5, 4, 4))
    k = attention.k_norm(attention.k_proj(x).view(2, 5, 2, 4)).repeat_interleave(2, dim=2)
    v = attention.v_proj(x).view(2, 5, 2, 4).repeat_interleave(2, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 2.0
    scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)
    torch.testing.assert_close(attention(x), attention.o_proj(mixed))


class Slot:
    """An attention with a learnable slot, taken apart: weights of every query over [slot, tokens]."""

    def __init__(self, key: float, value: float) -> None:
        self.attention = Attention(8, 4, num_kv_heads=2, kv_bias=True).double()
        nn.init.constant_(self.attention.kv_bias.key, key)
        nn.init.constant_(self.attention.kv_bias.value, value)
        self.x = torch.randn(1, 5, 8, dtype=torch.float64)

    def parts(self) -> tuple[Tensor, Tensor]:
        a = self.attention
        q = a.q_proj(self.x).view(1, 5, 4, 2).transpose(1, 2)
        k = a.k_proj(self.x).view(1, 5, 2, 2).transpose(1, 2)
        v = a.v_proj(self.x).view(1, 5, 2, 2).transpose(1, 2)
        k = torch.cat((a.kv_bias.key[None], k), dim=2).repeat_interleave(2, dim=1)
        v = torch.cat((a.kv_bias.value[None], v), dim=2).repeat_interleave(2, dim=1)
        scores = (q @ k.transpose(-1, -2)) / 2**0.5
        hidden = torch.cat((torch.zeros(5, 1), torch.ones(5, 5).triu(1)), dim=1).bool()
        return scores.masked_fill(hidden, -torch.inf), v


def test_kv_bias_row_t_sees_t_plus_two_places_and_groups_share_the_slot() -> None:
    slot = Slot(key=0.3, value=0.7)
    scores, values = slot.parts()
    weights = scores.softmax(-1)
    assert [int((row > 0).sum()) for row in weights[0, 0]] == [2, 3, 4, 5, 6]
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4, 5, dtype=torch.float64))
    mixed = (weights @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(slot.attention(slot.x), slot.attention.o_proj(mixed))


def test_kv_bias_of_zero_is_softmax_with_one_more_in_the_denominator() -> None:
    slot = Slot(key=0.0, value=0.0)
    scores, values = slot.parts()
    scores, values = scores[..., 1:], values[..., 1:, :]
    weights = scores.exp() / (1.0 + scores.exp().sum(-1, keepdim=True))
    mixed = (weights @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(slot.attention(slot.x), slot.attention.o_proj(mixed))


def test_kv_bias_starts_small_and_works_with_masks_and_in_an_encoder() -> None:
    torch.manual_seed(1)
    attention = partial(Attention, kv_bias=True)
    model = Transformer(replace(CONFIG, dim=64, head_dim=64), attention=attention).eval()
    slot = model.stack.blocks[0].attention.sublayer
    assert slot.kv_bias.key.shape == slot.kv_bias.value.shape == (2, 1, 64)
    assert 0.015 < float(torch.cat((slot.kv_bias.key, slot.kv_bias.value)).detach().std()) < 0.025
    mask = torch.ones(2, 6, dtype=torch.bool)
    torch.testing.assert_close(model(TOKENS, attention_mask=mask), model(TOKENS), atol=1e-6, rtol=1e-5)
    assert Transformer(replace(CONFIG, causal=False), attention=attention)(TOKENS).shape == (2, 6, 23)


def test_attention_alone_takes_a_cache_in_chunks() -> None:
    for kv_bias in (False, True):
        attention, x, cache = Attention(16, 4, kv_bias=kv_bias), torch.randn(2, 7, 16), LayerCache()
        with torch.no_grad():
            found = [attention(part, cache=cache) for part in x.split([3, 1, 3], dim=1)]
            torch.testing.assert_close(torch.cat(found, dim=1), attention(x), atol=1e-6, rtol=1e-5)


def test_attention_refuses_what_is_no_batch_of_tokens() -> None:
    with pytest.raises(InputError, match=r"\(batch, tokens, dim\), got \(5, 16\)"):
        Attention(16, 4)(torch.randn(5, 16))


def test_slots_class_tokens_and_scales_are_not_decayed() -> None:
    config = replace(CONFIG, embedding_scale=4.0)
    groups = decay_groups(Transformer(config, attention=partial(Attention, kv_bias=True)), 0.1)
    shrunk, kept = (set(group["names"]) for group in groups)
    assert "embedding.weight" in shrunk
    assert kept >= {"embedding_scale", "stack.blocks.0.attention.sublayer.kv_bias.key", "stack.final_norm.weight"}
    vision = VisionTransformer(VisionConfig(image_size=8, patch_size=4, dim=16), pooling=ClassToken())
    assert set(decay_groups(vision, 0.1)[1]["names"]) >= {"class_token", "position_embedding.weight", "patches.bias"}


def test_rotation_turns_by_distance_alone() -> None:
    q, k = torch.randn(2, 8, dtype=torch.float64)
    products = []
    for start in (0, 5):
        rotation = Rotary().rotation(torch.tensor([start, start + 3]), 8, torch.float64)
        turned = rotate(torch.stack((q, k)), rotation)
        products.append(turned[0] @ turned[1])
        torch.testing.assert_close(turned.norm(dim=-1), torch.stack((q, k)).norm(dim=-1), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(*products, atol=1e-6, rtol=1e-6)


def test_rotation_is_computed_in_float32_for_half_precision() -> None:
    far = torch.tensor([256, 257])
    exact, half = (Rotary().rotation(far, 4, dtype)[0][:, 0] for dtype in (torch.float64, torch.bfloat16))
    torch.testing.assert_close(half.double(), exact, atol=4e-3, rtol=0)


def test_sinusoids_are_the_published_formula() -> None:
    table = Sinusoidal().table(16, 6)
    assert table is not None
    found = table(torch.tensor([3]))[0]
    angles = [3 / 10000 ** (i / 6) for i in (0, 2, 4)]
    wanted = [f(torch.tensor(a)) for a in angles for f in (torch.sin, torch.cos)]
    torch.testing.assert_close(found, torch.stack(wanted))


def test_embedding_scale_is_a_learnable_factor_of_the_token_table() -> None:
    model = Transformer(replace(CONFIG, embedding_scale=4.0)).eval()
    plain = Transformer(CONFIG).eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k != "embedding_scale"})
    plain.head.weight = nn.Parameter(plain.head.weight.clone())
    with torch.no_grad():
        plain.embedding.weight.mul_(4.0)
    torch.testing.assert_close(model(TOKENS), plain(TOKENS))
    assert model.embedding_scale is not None
    assert model.embedding_scale.requires_grad


def test_norms_of_attention_feed_forward_and_end_can_differ() -> None:
    final = partial(DyT, alpha_init_value=0.3)
    model = Transformer(CONFIG, norm=DYT["norm"], attention_norm=DYT["attention_norm"], final_norm=final)
    block = model.stack.blocks[1]
    found = [norm.alpha.item() for norm in (block.attention.norm, block.feed_forward.norm, model.stack.final_norm)]
    assert found == pytest.approx([0.8, 0.2, 0.3])


def test_tables_have_the_configured_spread() -> None:
    config = replace(CONFIG, vocab_size=2000, embedding_std=0.63, tie_embeddings=False)
    model = Transformer(config, position=Learned())
    assert float(model.embedding.weight.detach().std()) == pytest.approx(0.63, rel=0.05)
    assert float(model.position_embedding.weight.detach().std()) == pytest.approx(0.63, rel=0.15)
    assert float(model.head.weight.detach().std()) == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
    ("init", "ordinary", "output"),
    [
        (Normal(0.1), [0.1] * 4, [0.1] * 4),
        (DepthScaledNormal(0.1), [0.1] * 4, [0.1 / 8**0.5] * 4),
        (LayerIndexNormal(0.1), [0.1, 0.1 / 2**0.5, 0.1 / 3**0.5, 0.05], [0.1, 0.1 / 2**0.5, 0.1 / 3**0.5, 0.05]),
    ],
)
def test_matrices_have_the_spread_of_their_layer_and_role(
    init: Any, ordinary: list[float], output: list[float]
) -> None:
    config = TransformerConfig(dim=64, depth=4, num_heads=4, bias=True)
    model = Transformer(config, init=init)
    for block, wide, narrow in zip(model.stack.blocks, ordinary, output, strict=True):
        attention, feed_forward = block.attention.sublayer, block.feed_forward.sublayer
        for linear in (attention.q_proj, attention.v_proj, feed_forward.up_proj, feed_forward.gate_proj):
            assert float(linear.weight.detach().std()) == pytest.approx(wide, rel=0.06)
        for linear in (attention.o_proj, feed_forward.down_proj):
            assert float(linear.weight.detach().std()) == pytest.approx(narrow, rel=0.06)
            assert not linear.bias.any()


def test_xavier_matrices_have_the_spread_of_their_shape() -> None:
    model = Transformer(TransformerConfig(dim=64, depth=1, num_heads=4), init=XavierNormal())
    up = model.stack.blocks[0].feed_forward.sublayer.up_proj.weight
    assert float(up.detach().std()) == pytest.approx((2 / sum(up.shape)) ** 0.5, rel=0.05)


@pytest.mark.parametrize(("size", "wanted"), [("1M", 1e6), ("3M", 3e6), ("10M", 1e7), ("30M", 3e7), ("100M", 1e8)])
def test_preset_has_the_parameters_of_its_name(size: str, wanted: float) -> None:
    count(size, wanted)


@pytest.mark.parametrize(("size", "wanted"), [("300M", 3e8), ("1B", 1e9)])
def test_large_preset_has_the_parameters_of_its_name(size: str, wanted: float) -> None:
    count(size, wanted)


def count(size: str, wanted: float) -> None:
    with torch.device("meta"):
        model = Transformer(TransformerConfig.preset(size, vocab_size=256))
    assert model.num_parameters - model.embedding.weight.numel() == pytest.approx(wanted, rel=0.08)


def test_presets_cover_one_million_to_one_billion_and_unknown_ones_are_listed() -> None:
    assert next(iter(SIZES)) == "1M"
    assert list(SIZES)[-1] == "1B"
    with pytest.raises(InputError, match="'7B'; there are 1M, 3M"):
        TransformerConfig.preset("7B")
    with pytest.raises(InputError, match="got width"):
        TransformerConfig.preset("1M", width=3)


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"block": PeriNorm(out_gain_init=0.5), "norm": LayerNorm, "final_norm": partial(LayerNorm, eps=1e-12)},
        {"block": ScaledPreNorm(power=1.0), **DYT, "init": LayerIndexNormal(), "position": Sinusoidal()},
        {"norm": nn.LayerNorm, "feed_forward": partial(MLP, activation=partial(nn.GELU, approximate="tanh"))},
        {"attention": partial(Attention, kv_bias=True, qk_norm=partial(RMSNorm, eps=1e-6)), "position": Llama3Rotary()},
    ],
    ids=["default", "peri", "dyt", "gpt", "slot"],
)
def test_model_is_rebuilt_from_plain_data(parts: dict[str, Any]) -> None:
    model = Transformer(CONFIG, **parts).eval()
    data = model.to_dict()
    again = Transformer.from_dict(json.loads(json.dumps(data))).eval()
    assert again.to_dict() == data
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(TOKENS), model(TOKENS))
    assert repr(again) == repr(model)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "with config and any of block, norm"),
        ({"config": {}, "blocks": None}, "got config, blocks"),
        ({"config": {"width": 3}}, "TransformerConfig takes .*got width"),
    ],
)
def test_data_of_no_model_is_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Transformer.from_dict(data)


def test_a_part_of_ones_own_is_refused_as_data() -> None:
    class Mine(nn.LayerNorm):
        pass

    with pytest.raises(InputError, match=r"class of setpoint\.nn.*Mine"):
        Transformer(CONFIG, norm=Mine).to_dict()
    with pytest.raises(InputError, match="class of setpoint"):
        to_plain(lambda dim: nn.LayerNorm(dim))


@pytest.mark.parametrize("name", ["os.system", "torch.load", "Tensor", "torch.nn.init", "Popen", "__import__"])
def test_data_can_name_parts_alone(name: str) -> None:
    with pytest.raises(InputError, match="expected the name of a part"):
        from_plain({"name": name, "args": ["x"]})


def test_unknown_field_of_a_part_is_refused_with_the_known() -> None:
    with pytest.raises(InputError, match="Rotary takes theta; got base"):
        from_plain({"name": "Rotary", "base": 3.0})


def test_positional_options_of_a_part_are_kept() -> None:
    assert from_plain(to_plain(partial(nn.GroupNorm, 2)))(8).num_groups == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 18}, "num_heads divides, got dim=18 and num_heads=4"),
        ({"num_kv_heads": 3}, "got num_kv_heads=3"),
        ({"depth": 0}, "depth of at least 1, got 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(CONFIG, **changes)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [(torch.zeros(2, 3), "integer token ids"), (torch.tensor([1, 2]), r"shaped \(batch, tokens\)")],
)
def test_what_is_no_tokens_is_refused(tokens: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Transformer(CONFIG)(tokens)


def test_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(InputError, match=r"\(2, 6\).*got \(2, 5\)"):
        Transformer(CONFIG)(TOKENS, attention_mask=torch.ones(2, 5))


def test_more_tokens_than_learned_positions_are_refused() -> None:
    long = torch.zeros(1, 33, dtype=torch.long)
    with pytest.raises(InputError, match="at most 32 tokens"):
        Transformer(CONFIG, position=Learned())(long)
    assert Transformer(CONFIG)(long).shape == (1, 33, 23)


def test_config_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        CONFIG.dim = 3  # type: ignore[misc]


def test_checkpointed_blocks_give_the_same_loss_and_gradients() -> None:
    plain = Transformer(replace(CONFIG, dropout=0.3))
    recomputed = Transformer(replace(CONFIG, dropout=0.3, activation_checkpointing=True))
    recomputed.load_state_dict(plain.state_dict())
    gradients = []
    for model in (plain, recomputed):
        torch.manual_seed(3)
        model.train()(TOKENS).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, wanted in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], wanted)


def test_checkpointed_blocks_keep_less_for_the_backward_pass() -> None:
    kept = []
    for checkpointing in (False, True):
        model = Transformer(replace(CONFIG, activation_checkpointing=checkpointing))
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=sizes: to.append(t.numel()) or t, lambda t: t):
            model(TOKENS)
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize(
    ("block", "checkpointing"), [(ScaledPreNorm(), False), (PeriNorm(), True)], ids=["kept-lns", "recomputed-peri"]
)
def test_compiles_whole_to_the_same_loss_and_gradients(block: Placement, checkpointing: bool) -> None:
    torch._dynamo.reset()
    config = replace(CONFIG, depth=2, activation_checkpointing=checkpointing)
    model = Transformer(config, block=block, attention=partial(Attention, kv_bias=True))
    other = copy.deepcopy(model)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    for one in (model, compiled):
        one(TOKENS).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=name, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_compiles_to_kernels_and_exports_to_the_same_logits() -> None:
    torch._dynamo.reset()
    model = Transformer(replace(CONFIG, depth=2), attention=partial(Attention, qk_norm=RMSNorm)).eval()
    with torch.no_grad():
        wanted = model(TOKENS)
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(TOKENS), wanted, atol=1e-5, rtol=1e-4)
        exported = torch.export.export(model, (TOKENS,))
        torch.testing.assert_close(exported.module()(TOKENS), wanted, atol=1e-6, rtol=1e-5)


def test_runs_in_bfloat16_and_under_autocast() -> None:
    assert Transformer(CONFIG).bfloat16()(TOKENS).dtype == torch.bfloat16
    for position in (Rotary(), Learned()):
        model = Transformer(CONFIG, position=position, attention=partial(Attention, kv_bias=True)).eval()
        wanted = model(TOKENS)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found, cached = model(TOKENS), model(TOKENS, cache=model.cache())
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), wanted, atol=5e-3, rtol=5e-2)
        torch.testing.assert_close(cached, found)


def test_deepcopy_keeps_the_tie() -> None:
    copied = copy.deepcopy(Transformer(CONFIG))
    assert copied.head.weight is copied.embedding.weight
    assert Transformer(replace(CONFIG, tie_embeddings=False)).head.weight is not copied.embedding.weight


def test_feed_forwards_have_about_as_many_weights_as_each_other() -> None:
    gated, plain = SwiGLU(192), MLP(192)
    assert sum(p.numel() for p in gated.parameters()) == sum(p.numel() for p in plain.parameters())
