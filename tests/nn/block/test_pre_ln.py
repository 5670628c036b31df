"""Pre-LN and Post-LN against torch's layer, their definitions, and the mean-field figures at initialization."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.models import MLP, Attention, Transformer, TransformerConfig, XavierNormal
from setpoint.models.checkpoints import encoder_layer_state, from_encoder_layer
from setpoint.models.stack import Parts, Stack, StackConfig
from setpoint.nn import LayerNorm, PostLN, PostNorm, PreLN, PreNorm, RMSNorm
from setpoint.nn.block import Placement


class Zero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre", "post"])
def test_block_equals_torch_encoder_layer_in_values_and_gradients(norm_first: bool, activation: str) -> None:
    layer = nn.TransformerEncoderLayer(
        32, 4, 64, dropout=0.0, activation=activation, batch_first=True, norm_first=norm_first
    )
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 0.5, 0.3)
    block = from_encoder_layer(layer)
    x = torch.randn(2, 7, 32)
    theirs, ours = layer(x), block(x)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    weighting = torch.randn_like(x)
    (theirs * weighting).sum().backward()
    (ours * weighting).sum().backward()
    wanted = encoder_layer_state({name: p.grad for name, p in layer.named_parameters()})
    found = {name: p.grad for name, p in block.named_parameters()}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, atol=1e-5 * max(scale, 1.0), rtol=1e-4, msg=name)


def test_encoder_layer_with_another_activation_is_refused() -> None:
    with pytest.raises(InputError, match="ReLU or GELU"):
        from_encoder_layer(nn.TransformerEncoderLayer(8, 2, 16, activation=torch.tanh))


def test_pre_unit_with_zero_branch_is_the_identity_and_passes_the_gradient_whole() -> None:
    x = torch.randn(2, 3, 8, requires_grad=True)
    y = x
    for _ in range(3):
        y = PreLN(Zero(), 8)(y)
    assert torch.equal(y, x)
    weighting = torch.randn_like(x)
    (gradient,) = torch.autograd.grad((y * weighting).sum(), x)
    assert torch.equal(gradient, weighting)


def test_post_unit_with_zero_branch_is_the_norm() -> None:
    x, unit = torch.randn(2, 3, 8), PostLN(Zero(), 8)
    nn.init.normal_(unit.norm.weight)
    assert torch.equal(unit(x), unit.norm(x))


def test_scale_of_the_stream_leaves_the_pre_branch_alone() -> None:
    unit, x = PreLN(nn.Linear(8, 8), 8, eps=1e-12).double(), torch.randn(2, 3, 8, dtype=torch.float64)
    for c in (0.1, 7.0):
        torch.testing.assert_close(unit(c * x) - c * x, unit(x) - x, atol=1e-9, rtol=0)


def uniform_stack(placement: Placement, depth: int, dim: int = 256) -> Stack:
    """The assumptions of the paper's analysis: uniform attention, one head, a ReLU network as wide as the stream."""
    config = StackConfig(dim=dim, depth=depth, num_heads=1, hidden_dim=dim, causal=False)
    parts = Parts(placement, *[LayerNorm] * 3, Attention, partial(MLP, activation=nn.ReLU), init=XavierNormal())
    stack = Stack(config, parts)
    stack.initialize_weights()
    with torch.no_grad():
        for block in stack.blocks:
            attention = block.attention.sublayer
            attention.q_proj.weight.zero_()
            attention.k_proj.weight.zero_()
            attention.o_proj.weight.copy_(torch.eye(dim))
    return stack


def embeddings(dim: int = 256, tokens: int = 16) -> Tensor:
    x = torch.randn(1, tokens, dim)
    return x * dim**0.5 / x.norm(dim=-1, keepdim=True)


POSITIONS = torch.arange(16)


@pytest.mark.parametrize("depth", [6, 12, 24])
def test_pre_stream_grows_linearly_in_depth_within_the_papers_bounds(depth: int) -> None:
    sizes = []
    for _ in range(4):
        stack = uniform_stack(PreNorm(), depth)
        stack.final_norm = nn.Identity()
        with torch.no_grad():
            sizes.append(stack(embeddings(), POSITIONS).square().mean())
    mean = float(torch.stack(sizes).mean())
    assert 1 + depth / 2 <= mean <= 1 + 3 * depth / 2
    assert mean == pytest.approx({6: 6.2, 12: 14.3, 24: 31.4}[depth], rel=0.25)


def test_post_stream_is_one_and_a_half_before_every_second_norm() -> None:
    seen: list[list[float]] = []
    for _ in range(4):
        stack, one = uniform_stack(PostNorm(), 6), []
        for block in stack.blocks:
            block.feed_forward.norm.register_forward_pre_hook(
                lambda _, args, one=one: one.append(float(args[0].square().mean()))
            )
        with torch.no_grad():
            stack(embeddings(), POSITIONS)
        seen.append(one)
    means = torch.tensor(seen).mean(0)
    assert bool(((means > 1.35) & (means < 1.65)).all()), means


def last_gradient(placement: Placement, depth: int) -> float:
    """Norm of the gradient of the last block's second feed-forward matrix, under a Xavier head and cross-entropy."""
    total = 0.0
    for _ in range(4):
        stack = uniform_stack(placement, depth)
        head = nn.Linear(256, 256, bias=False)
        nn.init.xavier_normal_(head.weight)
        loss = nn.functional.cross_entropy(head(stack(embeddings(), POSITIONS))[0], torch.randint(256, (16,)))
        weight = stack.blocks[-1].feed_forward.sublayer.down_proj.weight
        (gradient,) = torch.autograd.grad(loss, weight)
        total += float(gradient.norm()) / 4
    return total


def test_last_gradient_falls_as_root_depth_in_pre_and_not_in_post() -> None:
    pre = [last_gradient(PreNorm(), depth) * depth**0.5 for depth in (6, 12, 24)]
    post = [last_gradient(PostNorm(), depth) for depth in (6, 12, 24)]
    for values in (pre, post):
        assert max(values) / min(values) < 1.25, (pre, post)


def test_final_norm_stands_in_pre_and_not_in_post() -> None:
    config = TransformerConfig(vocab_size=11, dim=16, depth=2, num_heads=2)
    tokens = torch.tensor([[1, 2, 3]])
    pre = Transformer(config, block=PreNorm()).eval()
    assert isinstance(pre.stack.final_norm, RMSNorm)
    assert isinstance(Transformer(config, block=PostNorm()).stack.final_norm, nn.Identity)
    with_norm = pre(tokens)
    pre.stack.final_norm = nn.Identity()
    assert not torch.allclose(pre(tokens), with_norm)


def test_the_two_sublayers_have_norms_of_their_own() -> None:
    block = Transformer(TransformerConfig(vocab_size=11, dim=16, depth=1, num_heads=2)).stack.blocks[0]
    assert block.attention.norm is not block.feed_forward.norm


def test_training_without_dropout_equals_evaluation() -> None:
    unit, x = PreLN(nn.Linear(8, 8), 8), torch.randn(2, 3, 8)
    assert torch.equal(unit.train()(x), unit.eval()(x))
    assert torch.equal(unit(x), unit(x))


@pytest.mark.parametrize("kind", [PreLN, PostLN])
def test_dropout_falls_on_the_branch_alone(kind: type[nn.Module]) -> None:
    unit, x = kind(nn.Linear(8, 8), 8, dropout=1.0), torch.randn(2, 3, 8)
    assert torch.equal(unit(x), x if kind is PreLN else unit.norm(x))


class Attentive(nn.Module):
    def forward(self, x: Tensor, memory: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor, str]:
        return memory * scale, x, "tail"


@pytest.mark.parametrize("kind", [PreLN, PostLN])
def test_arguments_reach_the_sublayer_and_a_tuple_keeps_its_tail(kind: type[nn.Module]) -> None:
    x, memory = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    y, seen, tail = kind(Attentive(), 8)(x, memory, scale=2.0)
    assert y.shape == x.shape
    assert seen.shape == x.shape
    assert tail == "tail"


@pytest.mark.parametrize("kind", [PreLN, PostLN])
def test_sublayer_of_another_width_is_refused_with_both_shapes(kind: type[nn.Module]) -> None:
    with pytest.raises(InputError, match=r"\(2, 3, 8\), got \(2, 3, 5\)"):
        kind(nn.Linear(8, 5), 8)(torch.randn(2, 3, 8))


def test_stream_of_another_width_is_refused_with_both_shapes() -> None:
    with pytest.raises(InputError, match=r"\(\*, 8\), got \(2, 3, 5\)"):
        PreLN(nn.Linear(8, 8), 8)(torch.randn(2, 3, 5))


def test_half_precision_branch_is_added_to_a_float32_stream_in_float32() -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.bfloat16()

    assert PreLN(Half(), 8)(torch.randn(2, 8)).dtype == torch.float32
