"""On which axis channels lie, in models that keep them on more than one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from setpoint.running import run_batch, tensors_of
from setpoint.surgery import Anatomy
from setpoint.types import Site

IMAGE = torch.linspace(-2, 2, 3 * 64 * 64).sin().reshape(1, 3, 64, 64)
SMALL = IMAGE[..., :32, :32]


def caught(model: nn.Module, batch: Any, sites: tuple[Site, ...]) -> dict[str, Tensor]:
    """What hooks at sites see, by the name of the site."""
    seen: dict[str, Tensor] = {}
    calls: dict[tuple[str, str], int] = {}

    def note(module: str, side: str, tensors: list[Tensor]) -> None:
        call = calls[module, side] = calls.get((module, side), -1) + 1
        for site in sites:
            tap = site.tap
            if (tap.module, tap.side, tap.call) == (module, side, call):
                seen[site.name] = tensors[tap.index]

    handles = []
    for name, module in model.named_modules():
        handles += [
            module.register_forward_pre_hook(
                lambda m, args, kwargs, name=name: note(name, "input", tensors_of(args, kwargs)), with_kwargs=True
            ),
            module.register_forward_hook(lambda m, args, y, name=name: note(name, "output", tensors_of(y))),
        ]
    with torch.no_grad():
        run_batch(model, batch)
    for handle in handles:
        handle.remove()
    return seen


def widths(model: nn.Module, batch: Any) -> dict[str, set[tuple[int, int]]]:
    """Role -> (channel axis, size of that axis) of its sites, attention apart: its channels are heads."""
    model.eval()
    sites = tuple(site for site in Anatomy.trace(model, batch).sites() if site.role != "attention")
    seen = caught(model, batch, sites)
    assert set(seen) == {site.name for site in sites}
    found: dict[str, set[tuple[int, int]]] = {}
    for site in sites:
        axis, shape = site.channel_axis, seen[site.name].shape
        assert axis == -1 or 0 < axis < len(shape) - 1
        found.setdefault(site.role, set()).add((axis, shape[axis]))
    return found


class Mix(nn.Module):
    """A block of an MLP-Mixer: a feed-forward over tokens, one over channels; in either order of the operands."""

    def __init__(self, tokens: int, dim: int, norm: type[nn.Module], stream_first: bool) -> None:
        super().__init__()
        self.stream_first = stream_first
        self.norm1, self.norm2 = norm(dim), norm(dim)
        self.tokens = nn.Sequential(nn.Linear(tokens, 48), nn.GELU(), nn.Linear(48, tokens))
        self.channels = nn.Sequential(nn.Linear(dim, 64), nn.GELU(), nn.Linear(64, dim))

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        x = x + mixed if self.stream_first else mixed + x
        return x + self.channels(self.norm2(x))  # type: ignore[no-any-return]


class Affine(nn.Module):
    """What stands in place of a norm in ResMLP."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain + self.shift


class Mixer(nn.Module):
    def __init__(self, norm: type[nn.Module], stream_first: bool) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.blocks = nn.Sequential(Mix(16, 32, norm, stream_first), Mix(16, 32, norm, stream_first))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.blocks(x).mean(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("stream_first", [True, False])
@pytest.mark.parametrize("norm", [nn.LayerNorm, Affine])
def test_a_mixer_keeps_its_stream_channels_last_though_tokens_are_mixed(
    norm: type[nn.Module], stream_first: bool
) -> None:
    found = widths(Mixer(norm, stream_first), SMALL)
    assert found["residual"] == found["embedding"] == {(-1, 32)}
    assert found["branch"] == {(-1, 32)}
    assert found["hidden"] == {(-1, 48), (-1, 64)}
    assert found["convolution"] == {(1, 32)}


class Square(nn.Module):
    """As many tokens as channels, so that shapes tell nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Mix(16, 16, nn.LayerNorm, True), Mix(16, 16, nn.LayerNorm, True))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x.transpose(1, 2)).transpose(1, 2)  # type: ignore[no-any-return]


def test_a_stream_is_told_apart_from_its_transpose_of_the_same_shape() -> None:
    x = torch.linspace(-2, 2, 256).sin().reshape(1, 16, 16)
    sites = Anatomy.trace(Square().eval(), x).sites()
    assert {site.channel_axis for site in sites if site.role in ("residual", "embedding", "hidden")} == {-1}


class Unit(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.a, self.b = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(functional.silu(self.a(self.norm(x))))  # type: ignore[no-any-return]


class MapAttention(nn.Module):
    """Attention between pixels; projections as 1x1 convolutions on the map, or as linears on a row of pixels."""

    def __init__(self, channels: int, linear: bool) -> None:
        super().__init__()
        self.linear, self.norm = linear, nn.GroupNorm(4, channels)
        make: Any = nn.Linear if linear else lambda i, o: nn.Conv2d(i, o, 1)
        self.qkv, self.out = make(channels, 3 * channels), make(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        y = self.norm(x)
        if self.linear:
            q, k, v = self.qkv(y.flatten(2).transpose(1, 2)).chunk(3, -1)
        else:
            q, k, v = self.qkv(y).reshape(b, 3, c, h * w).transpose(2, 3).unbind(1)
        mixed = functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        if self.linear:
            return x + self.out(mixed).transpose(1, 2).reshape(b, c, h, w)  # type: ignore[no-any-return]
        return x + self.out(mixed.transpose(1, 2).reshape(b, c, h, w))  # type: ignore[no-any-return]


class UNet(nn.Module):
    def __init__(self, linear: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 3, 3, padding=1)
        self.units = nn.Sequential(Unit(24), MapAttention(24, linear), Unit(24))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.units(self.first(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("linear", [False, True])
def test_attention_on_feature_maps_leaves_channels_before_the_pixels(linear: bool) -> None:
    found = widths(UNet(linear), SMALL)
    assert found["residual"] == found["embedding"] == found["norm"] == {(1, 24)}
    assert found["branch"] <= {(1, 24)}
    assert found["logits"] == {(1, 3)}


class Temporal(nn.Module):
    """A one-dimensional convolutional network: three axes like tokens, channels in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.convolution, self.mix = (
            nn.Conv1d(4, 12, 3),
            nn.Conv1d(12, 12, 3, padding=1),
            nn.Conv1d(12, 5, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.mix(x + self.convolution(torch.relu(x)))  # type: ignore[no-any-return]


def test_one_dimensional_convolutions_have_channels_in_the_middle() -> None:
    found = widths(Temporal(), torch.linspace(-2, 2, 4 * 30).sin().reshape(1, 4, 30))
    assert found["residual"] == found["embedding"] == {(1, 12)}
    assert found["logits"] == {(1, 5)}


class ChannelsLastNorm(nn.LayerNorm):
    """A layer norm over the channels of a map, as many convolutional networks write it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def test_a_layer_norm_between_permutes_has_the_axis_that_its_module_gives_out() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), ChannelsLastNorm(6), nn.Conv2d(6, 5, 1))
    assert widths(model, SMALL)["norm"] == {(1, 6)}


TOKENS = {"input_ids": torch.arange(12).reshape(1, 12)}
PUBLISHED: dict[str, tuple[str, str, dict[str, Any], Any, dict[str, set[tuple[int, int]]]]] = {
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
        TOKENS,
        {"residual": {(-1, 32)}, "embedding": {(-1, 32)}, "norm": {(-1, 32)}, "logits": {(-1, 50)}},
    ),
    "mobilevit": (
        "MobileViTModel",
        "MobileViTConfig",
        {
            "hidden_sizes": [16, 24, 32],
            "neck_hidden_sizes": [8, 8, 16, 16, 16, 24, 40],
            "num_attention_heads": 2,
            "image_size": 64,
        },
        {"pixel_values": IMAGE},
        {"residual": {(1, 8), (1, 16), (-1, 16), (-1, 24), (-1, 32)}},
    ),
    "convnext": (
        "ConvNextModel",
        "ConvNextConfig",
        {"hidden_sizes": [8, 16, 24, 40], "depths": [1, 1, 1, 1]},
        {"pixel_values": IMAGE},
        {"residual": {(1, 8), (1, 16), (1, 24), (1, 40)}, "hidden": {(-1, 32), (-1, 64), (-1, 96), (-1, 160)}},
    ),
    "vit": (
        "ViTModel",
        "ViTConfig",
        {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40,
         "image_size": 32, "patch_size": 8},
        {"pixel_values": SMALL},
        {"residual": {(-1, 24)}, "embedding": {(-1, 24)}, "hidden": {(-1, 40), (-1, 24)}, "norm": {(-1, 24)}},
    ),
    "resnet": (
        "ResNetModel",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 40], "depths": [1, 1, 1, 1], "layer_type": "basic"},
        {"pixel_values": IMAGE},
        {"residual": {(1, 8), (1, 16), (1, 24), (1, 40)}, "norm": {(1, 8), (1, 16), (1, 24), (1, 40)}},
    ),
    "poolformer": (
        "PoolFormerModel",
        "PoolFormerConfig",
        {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 40], "num_encoder_blocks": 4},
        {"pixel_values": IMAGE},
        {"residual": {(1, 8), (1, 16), (1, 24), (1, 40)}, "hidden": {(1, 32), (1, 64), (1, 96), (1, 160)}},
    ),
    "swin": (
        "SwinModel",
        "SwinConfig",
        {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "image_size": 32, "window_size": 4},
        {"pixel_values": SMALL},
        {"residual": {(-1, 8), (-1, 16)}, "hidden": {(-1, 32), (-1, 64)}},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("model", "config", "settings", "batch", "expected"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_models(
    model: str,
    config: str,
    settings: Mapping[str, Any],
    batch: Any,
    expected: Mapping[str, set[tuple[int, int]]],
) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    found = widths(getattr(transformers, model)(getattr(transformers, config)(**settings)), batch)
    assert {role: found[role] for role in expected} == expected
