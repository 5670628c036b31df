"""What is added to the residual stream, held to the recentring that it promises: no mean is left in the stream."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from setpoint.surgery import Anatomy
from setpoint.types import Writer


def recentred(model: nn.Module, writers: tuple[Writer, ...]) -> nn.Module:
    """A float64 copy whose writers have no mean along their output axes, LayerScale counted in."""
    made = copy.deepcopy(model).double()
    for name in {writer.projection.parameter for writer in writers}:
        writer = next(w for w in writers if w.projection.parameter == name)
        scale = made.get_parameter(writer.scale).flatten() if writer.scale else torch.ones(1).double()
        for key, axis in ((name, writer.projection.output_axis), (writer.projection.bias, 0)):
            if key:
                parameter = made.get_parameter(key)
                with torch.no_grad():
                    seen = parameter.movedim(axis, -1) * scale
                    seen = (seen - seen.mean(-1, keepdim=True)) / scale
                    parameter.copy_(seen.movedim(-1, axis))
    return made


def largest_mean(model: nn.Module, anatomy: Anatomy, batch: Any) -> float:
    """The largest mean over channels of the stream at the start and behind each block, in units of its size."""
    sites = [site for site in anatomy.sites() if site.role in ("embedding", "residual")]
    assert len(sites) == len(anatomy.blocks) + 1
    found = []

    def look(h: Tensor, axis: int) -> None:
        found.append(float(h.mean(axis).abs().max() / h.abs().max()))

    def hook(site: Any) -> Any:
        if site.tap.side == "output":
            return lambda m, a, y: look(y if isinstance(y, Tensor) else y[site.tap.index], site.channel_axis)
        return lambda m, a, k, y: look([*a, *k.values()][site.tap.index], site.channel_axis)

    for site in sites:
        model.get_submodule(site.tap.module).register_forward_hook(hook(site), with_kwargs=site.tap.side == "input")
    with torch.no_grad():
        model(**batch) if isinstance(batch, dict) else model(batch)
    assert len(found) == len(sites)
    return max(found)


def names(anatomy: Anatomy) -> list[tuple[str, str]]:
    return [(w.projection.parameter, w.role) for w in anatomy.writers]


class Scaled(nn.Module):
    """A linear whose output is multiplied by a learned factor per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.gamma = nn.Linear(24, 16), nn.Parameter(torch.linspace(0.2, 1.0, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.gamma  # type: ignore[no-any-return]


class Vision(nn.Module):
    """Patches with a class token and learned positions, then two feed-forward blocks with LayerScale and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.cls = nn.Parameter(torch.randn(1, 1, 16))
        self.positions = nn.Parameter(torch.randn(1, 5, 16))
        self.bias = nn.Parameter(torch.randn(16))
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.ups = nn.ModuleList(nn.Linear(16, 24) for _ in range(2))
        self.downs = nn.ModuleList(Scaled() for _ in range(2))
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        x = self.drop(torch.cat([self.cls.expand(len(x), -1, -1), patches], 1) + self.positions)
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=True):
            x = x + self.drop(0.5 * down(functional.gelu(up(norm(x)))) + self.bias)
        return x


def pictures(size: int) -> Tensor:
    return torch.linspace(-2, 2, 3 * size * size).sin().reshape(1, 3, size, size)


def test_tokens_positions_and_patches_are_writers_beside_the_weights() -> None:
    anatomy = Anatomy.trace(Vision(), pictures(8))
    assert names(anatomy) == [
        ("cls", "embedding"),
        ("patches.weight", "embedding"),
        ("positions", "embedding"),
        ("downs.0.linear.weight", "feed_forward"),
        ("bias", "feed_forward"),
        ("downs.1.linear.weight", "feed_forward"),
        ("bias", "feed_forward"),
    ]
    by_name = {w.projection.parameter: w for w in anatomy.writers}
    assert {name: w.projection.output_axis for name, w in by_name.items() if w.block is None} == {
        "cls": 2,
        "patches.weight": 0,
        "positions": 2,
    }
    assert by_name["patches.weight"].projection.bias == "patches.bias"
    down = by_name["downs.1.linear.weight"]
    assert (down.block, down.projection.bias) == (1, "downs.1.linear.bias")
    assert (down.via, down.scale, down.linear) == (("scale", "scale"), "downs.1.gamma", True)
    assert anatomy.unwritten == ()


def test_centring_every_writer_leaves_no_mean_in_the_stream() -> None:
    model, x = Vision().eval(), pictures(8).double()
    anatomy = Anatomy.trace(model, pictures(8))
    sites = [w for w in anatomy.writers if w.projection.parameter != "bias"]
    ends: list[Tensor] = []
    for writers in (tuple(sites), anatomy.writers):
        made = recentred(model, writers)
        with torch.no_grad():
            ends.append(made(x).mean(-1).abs().max())
    assert ends[0] > 1e-3  # one writer forgotten shows
    assert ends[1] < 1e-12


class Dripping(nn.Module):
    """A stream that a gate varies, and into which the forward itself pours."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(11, 16), nn.LayerNorm(16)
        self.up, self.down, self.gate = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 16)
        self.register_buffer("waves", torch.linspace(-1, 1, 96).cos().reshape(6, 16))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) * 4.0 + self.waves + torch.sin(torch.arange(6.0))[:, None].expand(6, 16)
        h = self.norm(x)
        return x + self.down(functional.relu(self.up(h))) * torch.sigmoid(self.gate(h))  # type: ignore[no-any-return]


def test_gates_buffers_and_tensors_made_on_the_way_are_told_apart() -> None:
    anatomy = Anatomy.trace(Dripping(), torch.arange(6)[None])
    table, waves, down = anatomy.writers
    assert (table.projection.parameter, table.via, table.linear) == ("table.weight", ("scale",), True)
    assert (waves.projection.parameter, waves.projection.module, waves.linear) == ("waves", "", True)
    assert (down.projection.parameter, down.via, down.linear) == ("down.weight", ("mul",), False)
    assert [part.reason for part in anatomy.unwritten] == ["a tensor made in the forward is added to the stream"]


def test_a_stream_that_starts_from_the_input_is_unwritten() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    anatomy = Anatomy.trace(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), torch.randn(1, 5, 8))
    assert names(anatomy) == [
        ("layers.0.self_attn.out_proj.weight", "attention"),
        ("layers.0.linear2.weight", "feed_forward"),
    ]
    assert [part.reason for part in anatomy.unwritten] == ["the stream starts from the model's input"]


class Adapted(nn.Module):
    """A linear with a low-rank adapter beside it, as LoRA adds one."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.base = linear
        self.a, self.b = nn.Linear(linear.in_features, 3, bias=False), nn.Linear(3, linear.out_features, bias=False)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(self.drop(x))) * 2.0  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and a gated feed-forward whose every linear can be adapted."""

    def __init__(self, parallel: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.parallel = parallel

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (2, 8)).transpose(1, 2) for w in (self.q, self.k, self.v))
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return self.o(mixed.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]

    def feed(self, x: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        if self.parallel:
            return x + (self.feed(self.norm2(x)) + self.attend(self.norm1(x)))
        x = x + self.attend(self.norm1(x))
        return x + self.feed(self.norm2(x))


def adapted() -> Block:
    block = Block()
    for name in ("q", "k", "v", "o", "gate", "up", "down"):
        setattr(block, name, Adapted(getattr(block, name)))
    return block


TOKENS = torch.linspace(-3, 3, 160).sin().reshape(2, 5, 16)


def test_a_low_rank_adapter_is_part_of_its_branch() -> None:
    anatomy = Anatomy.trace(nn.Sequential(adapted(), adapted()), TOKENS)
    assert [[b.role for b in block.branches] for block in anatomy.blocks] == [["attention", "feed_forward"]] * 2
    for block in anatomy.blocks:
        attend, feed = block.branches
        site, ff = attend.attention, feed.feed_forward
        assert site is not None
        assert ff is not None
        found = [p and p.module for p in (site.q, site.k, site.v, site.out, ff.gate, ff.up, ff.down)]
        assert found == [f"{block.name}.{n}.base" for n in ("q", "k", "v", "o", "gate", "up", "down")]
        assert [b.writer and b.writer.module for b in block.branches] == [
            f"{block.name}.{n}.base" for n in ("o", "down")
        ]
        assert anatomy.feeds[f"{block.name}.norm2"] == {
            f"{block.name}.{n}.{w}" for n in ("gate", "up") for w in ("base", "a")
        }
    assert [w.projection.module for w in anatomy.writers] == [
        f"{index}.{name}.{part}" for index in range(2) for name in ("o", "down") for part in ("base", "b")
    ]


def test_parallel_branches_come_in_order_of_execution() -> None:
    class Attention_first(Block):
        def forward(self, x: Tensor) -> Tensor:
            mixed = self.attend(self.norm1(x))
            return self.feed(self.norm2(x)) + mixed + x

    assert [b.role for b in Anatomy.trace(Block(True), TOKENS).blocks[0].branches] == ["feed_forward", "attention"]
    first = Anatomy.trace(Attention_first(), TOKENS).blocks[0]
    assert [b.role for b in first.branches] == ["attention", "feed_forward"]
    assert [b.input_norms for b in first.branches] == [("norm1",), ("norm2",)]


# other people's models -----------------------------------------------------------------------------------------------

COUNTS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGES = {"image_size": 16, "patch_size": 4}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
OPT = {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
OPT |= {"max_position_embeddings": 32}
IDS = {"input_ids": torch.arange(6)[None]}


def build(model: str, config: str, **settings: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    network: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**settings))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return network.eval()


PRE_NORM = [
    pytest.param("ViTModel", "ViTConfig", {**COUNTS, **IMAGES}, id="vit"),
    pytest.param("Dinov2Model", "Dinov2Config", {**COUNTS, **IMAGES}, id="dinov2"),
    pytest.param("BeitModel", "BeitConfig", {**COUNTS, **IMAGES}, id="beit"),
    pytest.param("GPT2Model", "GPT2Config", GPT2, id="gpt2"),
    pytest.param("OPTModel", "OPTConfig", {**OPT, "word_embed_proj_dim": 16}, id="opt"),
    pytest.param("GPTNeoXModel", "GPTNeoXConfig", {"vocab_size": 64, **COUNTS}, id="gpt-neox"),
]


@pytest.mark.parametrize(("model", "config", "settings"), PRE_NORM)
def test_centring_every_writer_of_a_published_model(model: str, config: str, settings: dict[str, Any]) -> None:
    network = build(model, config, **settings)
    batch = {"pixel_values": pictures(16)} if "patch_size" in settings else IDS
    anatomy = Anatomy.trace(network, batch)
    assert all(writer.linear for writer in anatomy.writers)
    assert anatomy.unwritten == ()
    doubled = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    assert largest_mean(copy.deepcopy(network).double(), anatomy, doubled) > 1e-3
    assert largest_mean(recentred(network, anatomy.writers), anatomy, doubled) < 1e-12


def test_positions_that_are_interpolated_are_a_writer() -> None:
    network = build("Dinov2Model", "Dinov2Config", **COUNTS, image_size=24, patch_size=4)
    batch = {"pixel_values": pictures(16)}  # fewer patches than positions were learned for
    anatomy = Anatomy.trace(network, batch)
    positions = {w.via for w in anatomy.writers if w.projection.parameter == "embeddings.position_embeddings"}
    assert len(positions) == 2  # the class token's is cut out, those of the patches are resampled
    assert any("resample" in via for via in positions)
    assert anatomy.unwritten == ()
    doubled = {"pixel_values": pictures(16).double()}
    made = largest_mean(recentred(network, anatomy.writers), anatomy, doubled)
    assert made < 1e-7  # this model interpolates in float32, whatever its weights are


def test_vit_writes_a_class_token_patches_and_positions() -> None:
    anatomy = Anatomy.trace(build("ViTModel", "ViTConfig", **COUNTS, **IMAGES), {"pixel_values": pictures(16)})
    assert [(w.projection.parameter, w.projection.output_axis) for w in anatomy.writers if w.block is None] == [
        ("embeddings.cls_token", 2),
        ("embeddings.patch_embeddings.projection.weight", 0),
        ("embeddings.position_embeddings", 2),
    ]


def test_albert_projects_its_tables_into_the_stream() -> None:
    anatomy = Anatomy.trace(build("AlbertModel", "AlbertConfig", vocab_size=64, **COUNTS, embedding_size=16), IDS)
    assert names(anatomy)[0] == ("encoder.embedding_hidden_mapping_in.weight", "embedding")
    assert [w.block for w in anatomy.writers] == [None, 0, 0, 1, 1]
    assert [table.parameter.split(".")[1] for table in anatomy.embeddings] == [
        "word_embeddings",
        "token_type_embeddings",
        "position_embeddings",
    ]


def test_bert_tables_reach_the_stream_through_a_norm() -> None:
    anatomy = Anatomy.trace(build("BertModel", "BertConfig", vocab_size=64, **COUNTS), IDS)
    starts = [w for w in anatomy.writers if w.block is None]
    assert len(starts) == 3
    assert {(w.via, w.norms, w.linear) for w in starts} == {(("layer_norm",), ("embeddings.LayerNorm",), False)}


def test_gemma_writers_pass_an_output_norm() -> None:
    settings = {"vocab_size": 64, **COUNTS, "num_key_value_heads": 2, "head_dim": 8}
    anatomy = Anatomy.trace(build("Gemma2Model", "Gemma2Config", **settings), IDS)
    table, attention, *_ = anatomy.writers
    assert (table.via, table.linear) == (("scale",), True)
    assert (attention.norms, attention.linear) == (("layers.0.post_attention_layernorm",), False)


def test_a_beit_without_positions_starts_from_its_class_token() -> None:
    anatomy = Anatomy.trace(build("BeitModel", "BeitConfig", **COUNTS, **IMAGES), {"pixel_values": pictures(16)})
    assert [[b.role for b in block.branches] for block in anatomy.blocks] == [["attention", "feed_forward"]] * 2
    assert [w.scale for w in anatomy.writers if w.block == 1] == ["layers.1.lambda_1", "layers.1.lambda_2"]
