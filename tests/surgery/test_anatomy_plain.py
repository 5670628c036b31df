"""Anatomies of plain PyTorch models: torch's own encoder, hand-written blocks, and one flat functional forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from setpoint.errors import InputError
from setpoint.surgery import Anatomy


def batch(width: int = 16) -> Tensor:
    return torch.linspace(-3, 3, 2 * 5 * width).sin().reshape(2, 5, width)


def encoder(norm_first: bool) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


@pytest.mark.parametrize("norm_first", [True, False], ids=["pre", "post"])
def test_torch_encoder_roles(norm_first: bool) -> None:
    anatomy = Anatomy.trace(encoder(norm_first), batch())
    assert [block.name for block in anatomy.blocks] == ["layers.0", "layers.1"]
    for block in anatomy.blocks:
        first, second = block.branches
        assert block.placement == ("pre" if norm_first else "post")
        assert (first.role, second.role) == ("attention", "feed_forward")
        norms = [(f"{block.name}.norm1",), (f"{block.name}.norm2",)]
        assert [b.input_norms if norm_first else b.after_norms for b in block.branches] == norms
        site, ff = first.attention, second.feed_forward
        assert site is not None
        assert ff is not None
        packed = f"{block.name}.self_attn.in_proj_weight"
        parts = [site.q, site.k, site.v]
        assert [p and (p.parameter, p.rows) for p in parts] == [
            (packed, range(16)),
            (packed, range(16, 32)),
            (packed, range(32, 48)),
        ]
        assert site.out is not None
        assert site.out.parameter == f"{block.name}.self_attn.out_proj.weight"
        assert (site.num_heads, site.num_kv_heads, site.head_dim, site.causal) == (2, 2, 8, False)
        assert ff.up is not None
        assert ff.down is not None
        assert (ff.up.module, ff.gate, ff.down.module) == (f"{block.name}.linear1", None, f"{block.name}.linear2")
        assert ff.activation == "relu"
    assert [w.projection.module for w in anatomy.writers] == [
        "layers.0.self_attn",
        "layers.0.linear2",
        "layers.1.self_attn",
        "layers.1.linear2",
    ]
    assert anatomy.head is None
    assert anatomy.embeddings == ()
    assert anatomy.unread == ()


def test_torch_pre_norm_encoder_feeds() -> None:
    assert Anatomy.trace(encoder(True), batch()).feeds == {
        "layers.0.norm1": {"layers.0.self_attn"},
        "layers.0.norm2": {"layers.0.linear1"},
        "layers.1.norm1": {"layers.1.self_attn"},
        "layers.1.norm2": {"layers.1.linear1"},
    }


def test_torch_post_norm_encoder_norms_also_feed_the_residual() -> None:
    anatomy = Anatomy.trace(encoder(False), batch())
    assert anatomy.feeds == {
        "layers.0.norm1": {"layers.0.linear1"},
        "layers.0.norm2": {"layers.1.self_attn"},
        "layers.1.norm1": {"layers.1.linear1"},
        "layers.1.norm2": frozenset(),
    }
    added = {name: [use.module for use in norm.uses if use.op == "add"] for name, norm in anatomy.norms.items()}
    assert added == {
        "layers.0.norm1": ["layers.0"],
        "layers.0.norm2": ["layers.1"],
        "layers.1.norm1": ["layers.1"],
        "layers.1.norm2": [],
    }


class Unit(nn.Module):
    """x + f(x) with the norm before f or behind the sum; a gate on request."""

    def __init__(self, width: int, placement: str, gated: bool = False) -> None:
        super().__init__()
        self.placement = placement
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 24), nn.Linear(24, width)
        self.gate = nn.Linear(width, 24) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x) if self.placement == "pre" else x
        wide = self.up(h)
        wide = functional.silu(self.gate(h)) * wide if self.gate is not None else functional.gelu(wide)
        x = self.down(wide) + x
        return x if self.placement == "pre" else self.norm(x)


class Stack(nn.Module):
    def __init__(self, *units: nn.Module, norm: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.units = nn.ModuleList(units)
        self.norm: nn.Module = nn.LayerNorm(16) if norm else nn.Identity()
        self.head = nn.Linear(16, 11, bias=False)

    def forward(self, ids: Tensor) -> Any:
        x = self.embed(ids)
        for unit in self.units:
            x = unit(x)
        return self.head(self.norm(x))


IDS = torch.arange(6)[None]


@pytest.mark.parametrize("gated", [False, True])
def test_hand_written_pre_norm(gated: bool) -> None:
    model = Stack(Unit(16, "pre", gated), Unit(16, "pre", gated), norm=True)
    anatomy = Anatomy.trace(model, IDS)
    assert [(b.name, b.placement) for b in anatomy.blocks] == [("units.0", "pre"), ("units.1", "pre")]
    ff = anatomy.blocks[1].branches[0].feed_forward
    assert ff is not None
    assert ff.up is not None
    assert ff.down is not None
    assert (ff.up.module, ff.up.bias, ff.down.module) == ("units.1.up", "units.1.up.bias", "units.1.down")
    assert (ff.gate and ff.gate.module, ff.activation) == (("units.1.gate", "silu") if gated else (None, "gelu"))
    first = {"units.0.up", "units.0.gate"} if gated else {"units.0.up"}
    assert anatomy.feeds["units.0.norm"] == first
    assert anatomy.feeds["norm"] == {"head"}
    assert anatomy.head is not None
    assert anatomy.head.module == "head"
    assert [w.projection.module for w in anatomy.writers] == ["embed", "units.0.down", "units.1.down"]


def test_hand_written_post_norm() -> None:
    anatomy = Anatomy.trace(Stack(Unit(16, "post"), Unit(16, "post")), IDS)
    assert [(b.name, b.placement) for b in anatomy.blocks] == [("units.0", "post"), ("units.1", "post")]
    assert anatomy.feeds == {"units.0.norm": {"units.1.up"}, "units.1.norm": {"head"}}
    assert [use.module for use in anatomy.norms["units.0.norm"].uses if use.op == "add"] == ["units.1"]


def test_a_shared_unit_is_two_blocks() -> None:
    unit = Unit(16, "pre")
    anatomy = Anatomy.trace(Stack(unit, unit), IDS)
    assert [block.call for block in anatomy.blocks] == [0, 1]
    assert {block.name for block in anatomy.blocks} == {"units.0"}
    assert anatomy.norms["units.0.norm"].calls == 2


class Flat(nn.Module):
    """Two layers in one forward, from parameters and functions alone."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ParameterList(nn.Parameter(torch.randn(48, 16) * 0.2) for _ in range(2))
        self.out = nn.ParameterList(nn.Parameter(torch.randn(16, 16) * 0.2) for _ in range(2))
        self.up = nn.ParameterList(nn.Parameter(torch.randn(16, 24) * 0.2) for _ in range(2))
        self.down = nn.ParameterList(nn.Parameter(torch.randn(24, 16) * 0.2) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for qkv, out, up, down in zip(self.qkv, self.out, self.up, self.down, strict=True):
            h = functional.layer_norm(x, (16,))
            q, k, v = functional.linear(h, qkv).reshape(*h.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + functional.linear(mixed.transpose(1, 2).flatten(-2), out)
            x = x + functional.relu(functional.layer_norm(x, (16,)) @ up) @ down
        return x


def test_flat_functional_model() -> None:
    anatomy = Anatomy.trace(Flat(), batch())
    assert [[b.role for b in block.branches] for block in anatomy.blocks] == [["attention", "feed_forward"]] * 2
    assert [block.placement for block in anatomy.blocks] == ["pre", "pre"]
    for index, block in enumerate(anatomy.blocks):
        site, ff = block.branches[0].attention, block.branches[1].feed_forward
        assert site is not None
        assert ff is not None
        parts = [site.q, site.k, site.v]
        assert [p and (p.parameter, p.rows) for p in parts] == [
            (f"qkv.{index}", range(16)),
            (f"qkv.{index}", range(16, 32)),
            (f"qkv.{index}", range(32, 48)),
        ]
        assert (site.num_heads, site.head_dim, site.causal) == (2, 8, True)
        assert ff.up is not None
        assert ff.down is not None
        assert (ff.up.parameter, ff.up.output_axis) == (f"up.{index}", 1)
        assert (ff.down.parameter, ff.down.output_axis) == (f"down.{index}", 1)
    read_by = [[use.parameter for use in norm.uses if use.is_weight] for norm in anatomy.norms.values()]
    assert read_by == [["qkv.0"], ["up.0"], ["qkv.1"], ["up.1"]]


class Detour(Stack):
    """Has a unit that this input doesn't reach."""

    def __init__(self) -> None:
        super().__init__(Unit(16, "pre"))
        self.other = Unit(16, "pre")

    def forward(self, ids: Tensor) -> Any:
        return super().forward(ids) if ids.shape[1] < 100 else self.other(self.embed(ids))


def test_a_branch_not_taken_is_unread() -> None:
    unread = {part.name: part.reason for part in Anatomy.trace(Detour(), IDS).unread}
    assert set(unread) == {"other.norm", "other.up", "other.down"}
    assert set(unread.values()) == {"never called in this pass"}


class Scaled(torch.autograd.Function):
    """Multiplies by a weight in torch, which the trace sees, or in NumPy, which it can't."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, hidden: bool) -> Tensor:
        return torch.from_numpy(x.detach().numpy() * weight.detach().numpy()) if hidden else x * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None, None


class Custom(nn.Module):
    def __init__(self, hidden: bool) -> None:
        super().__init__()
        self.weight, self.hidden = nn.Parameter(torch.ones(16)), hidden

    def forward(self, x: Tensor) -> Tensor:
        return Scaled.apply(x, self.weight, self.hidden)  # type: ignore[no-any-return, no-untyped-call]


def test_a_custom_function_outside_torch_is_unread() -> None:
    anatomy = Anatomy.trace(Stack(Unit(16, "pre"), Custom(hidden=True), Unit(16, "pre")), IDS)
    reason = "the autograd function Scaled computes outside torch's Python calls"
    assert [(part.name, part.reason) for part in anatomy.unread] == [("units.1", reason)]
    assert [block.name for block in anatomy.blocks] == ["units.0", "units.2"]


def test_a_custom_function_in_the_middle_of_a_forward_breaks_no_stream() -> None:
    class Middle(Unit):
        def forward(self, x: Tensor) -> Tensor:
            h = Scaled.apply(self.norm(x), self.norm.weight, True)  # type: ignore[no-untyped-call]
            return x + self.down(functional.gelu(self.up(h)))  # type: ignore[no-any-return]

    anatomy = Anatomy.trace(Stack(Middle(16, "pre"), Unit(16, "pre")), IDS)
    assert [part.name for part in anatomy.unread] == ["units.0"]
    assert [(b.name, b.placement, len(b.branches)) for b in anatomy.blocks] == [
        ("units.0", "pre", 1),
        ("units.1", "pre", 1),
    ]
    assert not anatomy.norms["units.0.norm"].foldable


def test_a_custom_function_made_of_torch_is_followed() -> None:
    anatomy = Anatomy.trace(Stack(Unit(16, "pre"), Custom(hidden=False), Unit(16, "pre")), IDS)
    reason = "the autograd function Scaled has a backward of its own (its forward was followed)"
    assert [(part.name, part.reason) for part in anatomy.unread] == [("units.1", reason)]
    assert [block.name for block in anatomy.blocks] == ["units.0", "units.2"]


@pytest.mark.parametrize("freeze", [torch.jit.script, lambda m: torch.jit.trace(m, batch())], ids=["script", "trace"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_part_is_unread_and_the_rest_is_read(freeze: Any) -> None:
    anatomy = Anatomy.trace(nn.Sequential(Unit(16, "pre"), freeze(Unit(16, "pre")), Unit(16, "pre")), batch())
    assert [(part.name, part.reason) for part in anatomy.unread] == [
        ("1", "a ScriptModule, whose operations can't be seen")
    ]
    assert [block.name for block in anatomy.blocks] == ["0", "2"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_that_is_scripted_whole_is_refused() -> None:
    with pytest.raises(InputError, match="trace the model before it is scripted"):
        Anatomy.trace(torch.jit.script(nn.Sequential(nn.Linear(4, 4))), torch.ones(2, 4))


def test_a_final_norm_is_not_part_of_the_last_post_norm_block() -> None:
    anatomy = Anatomy.trace(Stack(Unit(16, "post"), Unit(16, "post"), norm=True), IDS)
    assert [block.branches[0].after_norms for block in anatomy.blocks] == [("units.0.norm",), ("units.1.norm",)]
    assert anatomy.feeds["norm"] == {"head"}


WRITTEN = {
    "gelu_tanh": lambda x: 0.5 * x * (1.0 + torch.tanh((2.0 / torch.pi) ** 0.5 * (x + 0.044715 * torch.pow(x, 3.0)))),
    "gelu": lambda x: x * 0.5 * (1.0 + torch.erf(x / 2.0**0.5)),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": lambda x: torch.sigmoid(x) * x,
    "relu2": lambda x: torch.relu(x).square(),
    "mish": lambda x: x * torch.tanh(functional.softplus(x)),
    "sigmoid": torch.sigmoid,
}


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_an_activation_written_out_in_a_forward_goes_by_its_name(name: str, gated: bool) -> None:
    class Written(Unit):
        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            wide = WRITTEN[name](self.gate(h)) * self.up(h) if self.gate is not None else WRITTEN[name](self.up(h))
            return x + self.down(wide)  # type: ignore[no-any-return]

    ff = Anatomy.trace(Stack(Written(16, "pre", gated)), IDS).blocks[0].branches[0].feed_forward
    assert ff is not None
    assert ff.activation == name
    assert [p and p.module for p in (ff.gate, ff.up)] == ["units.0.gate" if gated else None, "units.0.up"]


def as_buffer(linear: nn.Linear) -> None:
    weight = linear.weight.detach()
    del linear.weight
    linear.register_buffer("weight", weight)


PARAMETRIZED = [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm, as_buffer]


@pytest.mark.parametrize("wrap", PARAMETRIZED, ids=["weight norm", "spectral norm", "buffer"])
def test_a_weight_that_is_no_parameter_is_unread_and_its_branch_stays_a_branch(wrap: Any) -> None:
    unit = Unit(16, "pre")
    wrap(unit.down)
    anatomy = Anatomy.trace(Stack(Unit(16, "pre"), unit).eval(), IDS)
    assert [block.name for block in anatomy.blocks] == ["units.0", "units.1"]
    reasons = {part.name: part.reason for part in anatomy.unread}
    assert (
        reasons["units.1.down"] == "multiplies by a weight that is no parameter but a buffer, or computed in the pass"
    )


def test_the_steps_of_a_recurrence_are_no_residual_stream() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.keep, self.write, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            state = torch.zeros_like(x[:, 0])
            outputs = []
            for keep, write in zip(self.keep(x).sigmoid().unbind(1), self.write(x).unbind(1), strict=True):
                state = keep * state + write * keep
                outputs.append(state)
            return x + self.out(torch.stack(outputs, 1))  # type: ignore[no-any-return]

    anatomy = Anatomy.trace(nn.Sequential(Recurrent(), Recurrent()), batch())
    assert [(block.name, len(block.branches)) for block in anatomy.blocks] == [("0", 1), ("1", 1)]


def test_dividing_by_the_mean_over_channels_is_no_rms_norm() -> None:
    class Response(nn.Module):
        """Global response normalization: each channel's size over the mean size."""

        def __init__(self) -> None:
            super().__init__()
            self.gamma, self.beta = nn.Parameter(torch.ones(16)), nn.Parameter(torch.zeros(16))

        def forward(self, x: Tensor) -> Tensor:
            size = x.norm(dim=1, keepdim=True)
            return self.gamma * (x * (size / (size.mean(-1, keepdim=True) + 1e-6))) + self.beta + x

    assert Anatomy.trace(nn.Sequential(Response(), nn.Linear(16, 4)), batch()).norms == {}


def test_an_addition_in_a_module_around_the_blocks_is_a_block_of_its_own() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.layers = nn.Linear(16, 16), nn.ModuleList([Unit(16, "pre"), Unit(16, "pre")])

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.mix(x)
            for layer in self.layers:
                x = layer(x)
            return x

    blocks = Anatomy.trace(nn.Sequential(Encoder(), nn.Linear(16, 3)), batch()).blocks
    assert [(b.name, b.branches[0].role) for b in blocks] == [
        ("0", "other"),
        ("0.layers.0", "feed_forward"),
        ("0.layers.1", "feed_forward"),
    ]
    first = blocks[0].output
    assert first is not None
    assert (first.module, first.side) == ("0.layers.0", "input")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_function_in_a_forward_is_unread_and_an_attribute_is_not() -> None:
    @torch.jit.script
    def squash(x: torch.Tensor) -> torch.Tensor:
        return x / (1.0 + x.abs())

    class Squashed(Unit):
        def __init__(self, function: Any) -> None:
            super().__init__(16, "pre")
            self.slope, self.function = torch.linspace(0.5, 1.0, 16), function

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(self.up(self.function(self.norm(x) * self.slope)))  # type: ignore[no-any-return]

    model = nn.Sequential(Squashed(torch.tanh), Squashed(squash))
    found = [(part.name, part.reason.split(" (")[0]) for part in Anatomy.trace(model, batch()).unread]
    assert found == [("1.up", "reads a tensor that no call seen here made")]


def test_a_learned_query_is_projected_like_any_other() -> None:
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unit, self.probe = Unit(16, "pre"), nn.Parameter(torch.randn(1, 1, 16))
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.unit(x)
            return self.attention(self.probe.repeat(len(x), 1, 1), x, x)[0]  # type: ignore[no-any-return]

    anatomy = Anatomy.trace(Pool(), batch())
    assert anatomy.unread == ()
    assert [block.name for block in anatomy.blocks] == ["unit"]


def test_a_packed_cross_attention_is_cut_before_its_products() -> None:
    model = nn.Transformer(16, 2, 1, 1, 32, batch_first=True).eval()
    anatomy = Anatomy.trace(model, (batch(), batch()[:, :3]))
    across = anatomy.blocks[1].branches[1]
    assert across.role == "cross_attention"
    site = across.attention
    assert site is not None
    packed = "decoder.layers.0.multihead_attn.in_proj_weight"
    assert [p and (p.parameter, p.rows) for p in (site.q, site.k, site.v)] == [
        (packed, range(16)),
        (packed, range(16, 32)),
        (packed, range(32, 48)),
    ]
    query, memory = (anatomy.norms[name] for name in ("decoder.layers.0.norm1", "encoder.norm"))
    assert [use.rows for use in query.uses if use.parameter == packed] == [range(16)]
    assert [use.rows for use in memory.uses if use.parameter == packed] == [range(16, 48)]
    assert [use.bias for use in memory.uses] == ["decoder.layers.0.multihead_attn.in_proj_bias"]
