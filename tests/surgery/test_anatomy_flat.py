"""Models that are one forward of functions and parameters: everything has only a parameter's name to go by."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from setpoint.surgery import Anatomy


def parameters(count: int, *shape: int) -> nn.ParameterList:
    size = 1
    for n in shape:
        size *= n
    return nn.ParameterList(nn.Parameter(torch.linspace(1, 50 + i, size).sin().reshape(shape)) for i in range(count))


class FromTokens(nn.Module):
    """A language model without a single module: indexed tables, norms written out, attention, feed-forward, head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.linspace(0, 9, 11 * 16).sin().reshape(11, 16))
        self.positions = nn.Parameter(torch.linspace(0, 7, 8 * 16).cos().reshape(8, 16))
        self.gain, self.excess = parameters(2, 16), parameters(2, 16)
        self.qkv, self.out = parameters(2, 48, 16), parameters(2, 16, 16)
        self.up, self.down = parameters(2, 16, 24), parameters(2, 24, 16)
        self.last, self.bias = nn.Parameter(torch.ones(16) * 2), nn.Parameter(torch.ones(16))
        self.head = nn.Parameter(torch.linspace(0, 30, 11 * 16).sin().reshape(11, 16))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table[ids] + self.positions[torch.arange(ids.shape[1])]
        for i in range(2):
            h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.gain[i]
            q, k, v = functional.linear(h, self.qkv[i]).reshape(*h.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + functional.linear(mixed.transpose(1, 2).flatten(-2), self.out[i])
            wide = x.double()
            h = (wide / torch.sqrt((wide * wide).mean(-1, keepdim=True) + 1e-4)).to(x.dtype) * (1.0 + self.excess[i])
            x = x + functional.relu(h @ self.up[i]) @ self.down[i]
        centred = x - x.mean(-1, keepdim=True)
        x = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5) * self.last + self.bias
        return x @ self.head.t()


IDS = torch.arange(6)[None]


@pytest.fixture(scope="module")
def anatomy() -> Anatomy:
    return Anatomy.trace(FromTokens(), IDS)


def test_indexed_parameters_are_embeddings(anatomy: Anatomy) -> None:
    assert [table.parameter for table in anatomy.embeddings] == ["table", "positions"]
    assert [(w.projection.parameter, w.role) for w in anatomy.writers] == [
        ("table", "embedding"),
        ("positions", "embedding"),
        ("out.0", "attention"),
        ("down.0", "feed_forward"),
        ("out.1", "attention"),
        ("down.1", "feed_forward"),
    ]
    assert anatomy.head is not None
    assert anatomy.head.parameter == "head"


def test_attention_behind_an_indexed_table_is_read_in_every_block(anatomy: Anatomy) -> None:
    assert [[b.role for b in block.branches] for block in anatomy.blocks] == [["attention", "feed_forward"]] * 2
    for index, site in enumerate(anatomy.attention):
        assert [p and (p.parameter, p.rows) for p in (site.q, site.k, site.v)] == [
            (f"qkv.{index}", range(16)),
            (f"qkv.{index}", range(16, 32)),
            (f"qkv.{index}", range(32, 48)),
        ]
        assert (site.num_heads, site.causal) == (2, True)


def test_norms_written_out_in_the_forward_are_numbered(anatomy: Anatomy) -> None:
    assert [block.placement for block in anatomy.blocks] == ["pre", "pre"]
    assert [b.input_norms for block in anatomy.blocks for b in block.branches] == [("#0",), ("#1",), ("#2",), ("#3",)]
    read = [(n.kind, n.centred, n.eps, n.gain_parameter, n.shift_parameter) for n in anatomy.norms.values()]
    assert read == [
        ("rms", False, 1e-6, "gain.0", ""),
        ("rms", False, 1e-4, "excess.0", ""),
        ("rms", False, 1e-6, "gain.1", ""),
        ("rms", False, 1e-4, "excess.1", ""),
        ("layer", True, 1e-5, "last", "bias"),
    ]
    assert [[use.parameter for use in norm.uses] for norm in anatomy.norms.values()] == [
        ["qkv.0"],
        ["up.0"],
        ["qkv.1"],
        ["up.1"],
        ["head"],
    ]
    assert all(norm.foldable for norm in anatomy.norms.values())


def test_a_gain_of_one_plus_a_parameter_is_read_as_it_acts(anatomy: Anatomy) -> None:
    gain = anatomy.norms["#1"].gain
    assert gain is not None
    torch.testing.assert_close(gain, 1.0 + FromTokens().excess[0].detach())


def test_what_no_hook_can_catch_is_unread_with_the_names_of_its_parameters(anatomy: Anatomy) -> None:
    assert all(branch.reads is None and branch.writes is None for block in anatomy.blocks for branch in block.branches)
    assert [part.reason for part in anatomy.unread] == [
        "what its branches read (out.0, down.0) can't be caught by a hook, nor in 1 other block",
        "what its branches add (out.0, down.0) can't be caught by a hook, nor in 1 other block",
    ]


class PostNorm(nn.Module):
    """A norm in the middle of a forward whose input something else reads as well."""

    def __init__(self, normalize: str) -> None:
        super().__init__()
        self.up, self.down, self.side = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 16)
        self.normalize = normalize

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.norm(x + self.down(torch.relu(self.up(x))))
        return x + self.side(functional.layer_norm(x, (16,)))  # type: ignore[no-any-return]

    def norm(self, x: Tensor) -> Tensor:
        if self.normalize == "op":
            return functional.layer_norm(x, (16,), eps=1e-6)
        variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
        return (x - mean) * (variance + 1e-6) ** -0.5


@pytest.mark.parametrize("normalize", ["op", "arithmetic"])
def test_readers_beside_a_norm_in_the_same_forward_are_uses(normalize: str) -> None:
    anatomy = Anatomy.trace(PostNorm(normalize), torch.linspace(-3, 3, 80).sin().reshape(1, 5, 16))
    norms = anatomy.norms
    assert [(n.name, n.kind, n.eps, n.gain) for n in norms.values()][:2] == [
        ("#0", "layer", 1e-6, None),
        ("#1", "layer", 1e-6, None),
    ]
    assert {use.module or use.op for use in norms["#0"].uses} == {"up", "add"}
    assert [use.op for use in norms["#1"].uses] == ["layer_norm", "add"]


def test_functions_that_divide_by_something_else_are_no_norms() -> None:
    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            h = self.weight(x)
            h = h / (h.abs().sum(-1, keepdim=True) + 1.0)
            h = h * h.mean(-1, keepdim=True)
            return h / (1.0 + h.square().mean(-1, keepdim=True))

    assert Anatomy.trace(Attend(), torch.linspace(-3, 3, 80).sin().reshape(1, 5, 16)).norms == {}


class Groups(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.group, self.instance = nn.GroupNorm(4, 8, eps=1e-3), nn.InstanceNorm2d(8, affine=True, eps=1e-4)
        self.rms = nn.RMSNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.convs[1](torch.relu(self.group(self.convs[0](x))))
        return self.rms(self.convs[2](self.instance(x)))  # type: ignore[no-any-return]


def test_group_and_instance_norms_say_what_they_average_over() -> None:
    norms = Anatomy.trace(Groups().eval(), torch.linspace(-3, 3, 288).sin().reshape(1, 8, 6, 6)).norms
    group, instance, rms = norms["group"], norms["instance"], norms["rms"]
    assert (group.kind, group.axes, group.groups, group.eps) == ("group", (-3, -2, -1), 4, 1e-3)
    assert (instance.kind, instance.axes, instance.groups, instance.eps) == ("instance", (-2, -1), 1, 1e-4)
    assert (group.gain_parameter, group.shift_parameter) == ("group.weight", "group.bias")
    assert (instance.gain_parameter, instance.shift_parameter) == ("instance.weight", "instance.bias")
    assert [(use.module, use.via, use.input_axis) for use in group.uses] == [("convs.1", ("relu",), 1)]
    assert [(use.module, use.via, use.foldable) for use in instance.uses] == [("convs.2", (), True)]
    assert rms.eps == torch.finfo(torch.float32).eps  # what torch adds when none is given


class Written(nn.Module):
    """A layer norm of its own, with the gain and shift that training starts from."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.scale = nn.Parameter(torch.zeros(16)), nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 3e-6).sqrt() * self.scale + self.shift


def test_gain_and_shift_are_told_apart_by_what_is_done_with_them() -> None:
    norm = Anatomy.trace(
        nn.Sequential(Written(), nn.Linear(16, 3)), torch.linspace(-3, 3, 80).sin().reshape(5, 16)
    ).norms["0"]
    assert (norm.gain_parameter, norm.shift_parameter, norm.centred) == ("0.scale", "0.shift", True)
    assert norm.eps == 3e-6  # a number in the forward, no attribute
