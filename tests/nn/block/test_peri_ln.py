"""Peri-LN: what it bounds, what it is invariant to, and the Gemma-2 layer that has the same placement."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.models import MLP, Attention, SwiGLU, Transformer, TransformerConfig, XavierNormal
from setpoint.models.position import Position, Rotary
from setpoint.models.stack import Parts, Stack, StackConfig
from setpoint.nn import DyT, LayerNorm, OutputLN, OutputNorm, PeriLN, PeriNorm, PreLN, PreNorm, RMSNorm


def rms(x: Tensor) -> Tensor:
    return x.square().mean(-1).sqrt()


@pytest.mark.parametrize("size", [0.05, 1.0, 300.0])
def test_branch_has_the_root_mean_square_of_the_output_gain(size: float) -> None:
    unit, x = PeriLN(nn.Linear(8, 8), 8, eps=1e-12).double(), torch.randn(2, 3, 8, dtype=torch.float64)
    nn.init.normal_(unit.sublayer.weight, 0.0, size)
    torch.testing.assert_close(rms(unit(x) - x), torch.ones(2, 3, dtype=torch.float64), atol=1e-6, rtol=0)
    nn.init.constant_(unit.out_norm.weight, 0.25)
    torch.testing.assert_close(rms(unit(x) - x), torch.full((2, 3), 0.25, dtype=torch.float64), atol=1e-6, rtol=0)


def test_output_gain_starts_where_it_is_told() -> None:
    unit = PeriLN(nn.Linear(8, 8), 8, out_gain_init=0.5)
    assert torch.equal(unit.out_norm.weight, torch.full((8,), 0.5))
    assert torch.equal(unit.norm.weight, torch.ones(8))
    with pytest.raises(InputError, match="learnable gain"):
        PeriLN(nn.Linear(8, 8), 8, out_gain_init=0.5, elementwise_affine=False)


def test_scale_of_the_last_matrix_does_nothing_and_its_gradient_is_orthogonal_to_it() -> None:
    unit = PeriLN(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)), 8, eps=1e-14).double()
    x = torch.randn(4, 8, dtype=torch.float64)
    before, last = unit(x), unit.sublayer[2]
    with torch.no_grad():
        last.weight.mul_(3.0)
        last.bias.mul_(3.0)
    after = unit(x)
    torch.testing.assert_close(after, before, atol=1e-10, rtol=0)
    both = torch.autograd.grad((after * torch.randn_like(after)).sum(), [last.weight, last.bias])
    inner = sum((g * p).sum() for g, p in zip(both, [last.weight, last.bias], strict=True))
    size = sum((g * p).abs().sum() for g, p in zip(both, [last.weight, last.bias], strict=True))
    assert abs(float((inner / size).detach())) < 1e-5


def test_scale_of_the_stream_leaves_the_branch_alone() -> None:
    unit, x = PeriLN(nn.Linear(8, 8), 8, eps=1e-14).double(), torch.randn(4, 8, dtype=torch.float64)
    torch.testing.assert_close(unit(5 * x) - 5 * x, unit(x) - x, atol=1e-9, rtol=0)


def uniform_growth(depth: int, dim: int = 256, tokens: int = 16) -> float:
    """Mean square of the stream after the last block, under uniform attention, mean over four draws."""
    sizes = []
    for _ in range(4):
        parts = Parts(PeriNorm(), *[LayerNorm] * 3, Attention, partial(MLP, activation=nn.ReLU), init=XavierNormal())
        stack = Stack(StackConfig(dim=dim, depth=depth, num_heads=1, hidden_dim=dim, causal=False), parts)
        stack.initialize_weights()
        stack.final_norm = nn.Identity()
        with torch.no_grad():
            for block in stack.blocks:
                block.attention.sublayer.q_proj.weight.zero_()
                block.attention.sublayer.o_proj.weight.copy_(torch.eye(dim))
            sizes.append(stack(torch.randn(1, tokens, dim), torch.arange(tokens)).square().mean())
    return float(torch.stack(sizes).mean())


def test_stream_grows_linearly_in_depth() -> None:
    found = {depth: uniform_growth(depth) for depth in (6, 12, 24)}
    assert found == pytest.approx({6: 12.7, 12: 27.1, 24: 53.4}, rel=0.15)
    assert 1.8 <= found[24] / found[12] <= 2.1


def test_stream_stays_below_one_plus_two_per_block_whatever_the_weights() -> None:
    parts = Parts(PeriNorm(), RMSNorm, RMSNorm, RMSNorm, Attention, SwiGLU)
    stack = Stack(StackConfig(dim=16, depth=4, num_heads=2), parts)
    for parameter in stack.blocks.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 1.0, 100.0)
    after: list[Tensor] = []
    for block in stack.blocks:
        block.register_forward_hook(lambda _, __, output: after.append(rms(output.detach())))
    stack(torch.randn(1, 9, 16), torch.arange(9))
    for layer, size in enumerate(after, start=1):
        assert float(size.max()) <= 1 + 2 * layer + 1e-4


def test_massive_last_matrix_passes_peri_by_and_blows_up_pre() -> None:
    x = torch.randn(4, 8, dtype=torch.float64)
    sublayer = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 8, bias=False))
    peri, pre = PeriLN(sublayer, 8, eps=1e-14).double(), PreLN(sublayer, 8, norm_layer=RMSNorm, eps=1e-14).double()
    weight, direction = sublayer[2].weight, torch.randn_like(x)

    def measure(unit: nn.Module) -> tuple[Tensor, float]:
        y = unit(x)
        return y.detach(), float(torch.autograd.grad((y * direction).sum(), weight)[0].norm())

    small, gradient = measure(peri)
    branch = rms(pre(x) - x).detach()
    with torch.no_grad():
        weight.mul_(1e3)
    large, shrunk = measure(peri)
    torch.testing.assert_close(large, small, atol=1e-8, rtol=0)
    assert shrunk * 1e3 == pytest.approx(gradient, rel=1e-6)
    torch.testing.assert_close(rms(pre(x) - x).detach(), 1e3 * branch)


def test_without_the_output_norm_it_is_pre_and_without_the_input_norm_output_only() -> None:
    x, sublayer = torch.randn(2, 3, 8), nn.Linear(8, 8)
    peri = PeriLN(sublayer, 8)
    peri.out_norm = nn.Identity()
    assert torch.equal(peri(x), PreLN(sublayer, 8, norm_layer=RMSNorm)(x))
    output = OutputLN(sublayer, 8)
    torch.testing.assert_close(output(x), x + output.out_norm(sublayer(x)), atol=0, rtol=0)
    peri = PeriLN(sublayer, 8)
    peri.norm = nn.Identity()
    assert torch.equal(peri(x), output(x))


@pytest.mark.parametrize(("embed_norm", "count"), [(True, 2 + 4 * 3), (False, 1 + 4 * 3)])
def test_number_of_norms(embed_norm: bool, count: int) -> None:
    config = TransformerConfig(vocab_size=11, dim=16, depth=3, num_heads=2)
    model = Transformer(config, block=PeriNorm(embed_norm=embed_norm))
    assert sum(isinstance(module, RMSNorm) for module in model.modules()) == count


def test_output_only_has_half_as_many_norms() -> None:
    config = TransformerConfig(vocab_size=11, dim=16, depth=3, num_heads=2)
    model = Transformer(config, block=OutputNorm())
    assert sum(isinstance(module, RMSNorm) for module in model.modules()) == 1 + 2 * 3


def test_pre_norm_takes_an_embedding_norm_too() -> None:
    config = TransformerConfig(vocab_size=11, dim=16, depth=1, num_heads=2)
    assert isinstance(Transformer(config, block=PreNorm(embed_norm=True)).stack.embed_norm, RMSNorm)


def test_works_with_a_norm_that_squashes() -> None:
    assert PeriLN(nn.Linear(8, 8), 8, norm_layer=DyT)(torch.randn(2, 8)).shape == (2, 8)


def test_stack_equals_a_gemma2_model() -> None:
    """Gemma-2 stores its gains less one, and multiplies the embedding by sqrt(dim); soft-capping is off."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            vocab_size=29,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=4,
            query_pre_attn_scalar=4,
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
            max_position_embeddings=32,
            sliding_window=32,
            rms_norm_eps=1e-6,
            attn_implementation="eager",
        )
    ).eval()
    state = {}
    renamed = (
        ("model.embed_tokens.weight", "embedding.weight"),
        ("model.layers.", "stack.blocks."),
        ("model.norm.", "stack.final_norm."),
        ("lm_head.", "head."),
        (".input_layernorm.", ".attention.norm."),
        (".post_attention_layernorm.", ".attention.out_norm."),
        (".pre_feedforward_layernorm.", ".feed_forward.norm."),
        (".post_feedforward_layernorm.", ".feed_forward.out_norm."),
        (".self_attn.", ".attention.sublayer."),
        (".mlp.", ".feed_forward.sublayer."),
    )
    for name, tensor in theirs.state_dict().items():
        is_norm = "norm" in name
        if is_norm:
            nn.init.normal_(tensor, 0.0, 0.3)
        for old, new in renamed:
            name = name.replace(old, new)
        state[name] = tensor + 1.0 if is_norm else tensor
    config = TransformerConfig(
        vocab_size=29,
        dim=16,
        depth=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        hidden_dim=24,
        embedding_scale=16**0.5,
    )
    ours = Transformer(
        config,
        block=PeriNorm(embed_norm=False),
        norm=partial(RMSNorm, eps=1e-6),
        feed_forward=partial(SwiGLU, activation=partial(nn.GELU, approximate="tanh")),
        position=Rotary(),
    ).eval()
    ours.load_state_dict({**state, "embedding_scale": torch.tensor([4.0])})
    tokens = torch.randint(29, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-5)


def test_position_base_tells_nothing() -> None:
    assert Position().table(4, 8) is None
