"""A stack of transformer blocks: configuration, attention, feed-forward, block and stack, in that order.

What papers vary is passed in as an object (`Parts`): where the norms stand, which norm, attention, feed-forward,
positions and initialization. What remains in the configuration are sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from setpoint.errors import InputError
from setpoint.models.generation import Cache, LayerCache
from setpoint.models.initialize import Normal
from setpoint.models.plain import to_plain
from setpoint.models.position import Position, Rotation, rotate
from setpoint.nn.attention.kv_bias import KVBias
from setpoint.nn.block import NormFactory, Placement

Initializer = Callable[..., None]
"""``init(weight, *, layer, depth, output)`` draws a matrix in place; see `setpoint.models.initialize`."""


# configuration -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """Sizes of a stack of blocks.

    Args:
        dim: Width of the residual stream.
        depth: Number of blocks.
        num_heads: Query heads.
        num_kv_heads: Key and value heads, a divisor of ``num_heads``; as many as query heads if None.
        head_dim: Width of a head, ``dim / num_heads`` if None.
        hidden_dim: Width inside the feed-forward; its own choice if None.
        bias: Whether linear layers have biases. (Norms have what their factory gives them.)
        dropout: Probability on the embedding, inside attention and feed-forward, and on what branches add.
        causal: Whether a token sees only those before it: a decoder, or else an encoder.
        activation_checkpointing: Run each block's forward again in the backward pass instead of keeping what is in it.

    Raises:
        InputError: Sizes that don't fit together.
    """

    dim: int = 128
    depth: int = 4
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    hidden_dim: int | None = None
    bias: bool = False
    dropout: float = 0.0
    causal: bool = True
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("dim", "depth", "num_heads", "num_kv_heads", "head_dim", "hidden_dim"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise InputError(f"expected {name} of at least 1, got {size}")
        if self.head_dim is None and self.dim % self.num_heads:
            raise InputError(
                f"expected a dim that num_heads divides, got dim={self.dim} and num_heads={self.num_heads}; "
                f"change one of them or give head_dim"
            )
        if self.num_heads % (self.num_kv_heads or 1):
            raise InputError(
                f"expected num_kv_heads to divide num_heads={self.num_heads}, got num_kv_heads={self.num_kv_heads}"
            )


@dataclass(frozen=True)
class Parts:
    """What a stack is assembled from; the arguments of `Transformer` describe each."""

    block: Placement
    norm: NormFactory
    attention_norm: NormFactory
    final_norm: NormFactory
    attention: Callable[..., nn.Module]
    feed_forward: Callable[..., nn.Module]
    position: Position = Position()  # noqa: RUF009  frozen
    init: Initializer = Normal()  # noqa: RUF009

    def to_dict(self) -> dict[str, Any]:
        """The parts by name, as `setpoint.models.plain` writes them."""
        return {name: to_plain(getattr(self, name)) for name in self.names()}

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of the parts."""
        return tuple(field.name for field in fields(cls))


# attention -----------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Softmax attention with grouped queries.

    Args:
        dim: Width of input and output.
        num_heads: Query heads.
        num_kv_heads: Key and value heads, each shared by ``num_heads / num_kv_heads`` query heads.
        head_dim: Width of a head.
        causal: Whether later tokens are hidden.
        bias: Whether the four projections have biases; ``qkv_bias`` overrules it for the first three.
        dropout: Probability on the attention weights.
        qk_norm: Makes a norm over ``head_dim`` for queries and one for keys, before any rotation.
        kv_bias: Put a learnable key and value in front of the others in each key head, see
            `setpoint.nn.attention.kv_bias.KVBias`.

    Example:
        >>> Attention(8, 2, kv_bias=True)(torch.randn(1, 5, 8)).shape
        torch.Size([1, 5, 8])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = True,
        bias: bool = False,
        qkv_bias: bool | None = None,
        dropout: float = 0.0,
        qk_norm: NormFactory | None = None,
        kv_bias: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        self.head_dim = head_dim or dim // num_heads
        self.causal, self.dropout = causal, dropout
        qkv_bias = bias if qkv_bias is None else qkv_bias
        self.q_proj = nn.Linear(dim, self.num_heads * self.head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(dim, self.num_kv_heads * self.head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(dim, self.num_kv_heads * self.head_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, dim, bias=bias)
        self.q_norm = qk_norm(self.head_dim) if qk_norm is not None else nn.Identity()
        self.k_norm = qk_norm(self.head_dim) if qk_norm is not None else nn.Identity()
        self.kv_bias = KVBias(self.num_kv_heads, self.head_dim) if kv_bias else None

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        *,
        rotation: Rotation | None = None,
        mask: Bool[Tensor, "*batch tokens keys"] | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """Mix the tokens.

        Args:
            x: Input.
            rotation: Turns queries and keys, see `setpoint.models.position.rotate`.
            mask: True where a query may look. Without it a causal attention hides what comes later.
            cache: Keys and values of earlier tokens; those of ``x`` are added to it.

        Raises:
            InputError: Other than three axes.
        """
        if x.dim() != 3:
            raise InputError(f"Attention: expected an input of shape (batch, tokens, dim), got {tuple(x.shape)}")
        q = self.q_norm(self._heads(self.q_proj(x)))
        k = self.k_norm(self._heads(self.k_proj(x)))
        v = self._heads(self.v_proj(x))
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        if cache is not None:
            k, v = cache.append(k, v)
        queries, keys = q.shape[2], k.shape[2]
        causal = self.causal and mask is None and queries > 1
        if causal and (keys > queries or self.kv_bias is not None):  # the kernel's own rule knows neither
            mask, causal = _causal_mask(queries, keys, x.device), False
        if self.kv_bias is not None:
            k, v, mask = self.kv_bias(k, v, mask, queries=queries)
        mixed = functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=causal,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)


def _causal_mask(queries: int, keys: int, device: torch.device) -> Bool[Tensor, "queries keys"]:
    """True where a key is not later than the query; the last query stands at the last key."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


# feed-forward --------------------------------------------------------------------------------------------------------


class SwiGLU(nn.Module):
    """Gated feed-forward ``down(silu(gate(x)) * up(x))`` (Shazeer, 2020, arXiv 2002.05202).

    Args:
        dim: Width of input and output.
        hidden_dim: Width inside; if None, 8/3 of ``dim``, rounded up to a multiple of 64, which makes about as many
            weights as an `MLP` of its usual width has.
        bias: Whether the projections have biases.
        dropout: Probability on what ``down`` reads.
        activation: Makes the gate's activation.

    Example:
        >>> SwiGLU(96).down_proj.in_features
        256
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int | None = None,
        *,
        bias: bool = False,
        dropout: float = 0.0,
        activation: Callable[[], nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__()
        hidden_dim = hidden_dim or -(-8 * dim // (3 * 64)) * 64
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.activation = activation()
        self.dropout = nn.Dropout(dropout)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Apply to each token."""
        out: Tensor = self.down_proj(self.dropout(self.activation(self.gate_proj(x)) * self.up_proj(x)))
        return out


class MLP(nn.Module):
    """Feed-forward ``down(activation(up(x)))``.

    Args:
        dim: Width of input and output.
        hidden_dim: Width inside, ``4 dim`` if None.
        bias: Whether the projections have biases.
        dropout: Probability on what ``down`` reads.
        activation: Makes the activation.

    Example:
        >>> MLP(96, activation=nn.ReLU).down_proj.in_features
        384
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int | None = None,
        *,
        bias: bool = False,
        dropout: float = 0.0,
        activation: Callable[[], nn.Module] = nn.GELU,
    ) -> None:
        super().__init__()
        hidden_dim = hidden_dim or 4 * dim
        self.up_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.activation = activation()
        self.dropout = nn.Dropout(dropout)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Apply to each token."""
        out: Tensor = self.down_proj(self.dropout(self.activation(self.up_proj(x))))
        return out


# block and stack -----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention and feed-forward, each in the residual unit of the placement.

    Args:
        config: Sizes.
        parts: What it is made of.
        layer: Its number, counted from 1.
    """

    def __init__(self, config: StackConfig, parts: Parts, layer: int) -> None:
        super().__init__()
        attention = parts.attention(
            config.dim,
            config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            causal=config.causal,
            bias=config.bias,
            dropout=config.dropout,
        )
        feed_forward = parts.feed_forward(config.dim, config.hidden_dim, bias=config.bias, dropout=config.dropout)
        place: dict[str, Any] = {"layer": layer, "depth": config.depth, "dropout": config.dropout}
        self.attention = parts.block.residual(attention, config.dim, norm=parts.attention_norm, **place)
        self.feed_forward = parts.block.residual(feed_forward, config.dim, norm=parts.norm, **place)

    def forward(self, x: Float[Tensor, "batch tokens dim"], **context: Any) -> Float[Tensor, "batch tokens dim"]:
        """The stream after the block; ``context`` goes to the attention."""
        x = self.attention(x, **context)
        y: Tensor = self.feed_forward(x)
        return y


class Stack(nn.Module):
    """Blocks in a row, with the norms before and after them that the placement asks for.

    Args:
        config: Sizes.
        parts: What it is made of.
    """

    def __init__(self, config: StackConfig, parts: Parts) -> None:
        super().__init__()
        self.config, self.parts = config, parts
        self.embed_norm = parts.norm(config.dim) if parts.block.embed_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(config, parts, layer) for layer in range(1, config.depth + 1))
        self.final_norm = parts.final_norm(config.dim) if parts.block.final_norm else nn.Identity()
        self.head_dim = config.head_dim or config.dim // config.num_heads

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        positions: Int[Tensor, " tokens"],
        *,
        cache: Cache | None = None,
        attention_mask: Bool[Tensor, "batch keys"] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """The stream after the last block and norm.

        Args:
            x: Embeddings.
            positions: Where the tokens stand.
            cache: Keys and values of earlier tokens.
            attention_mask: True for tokens that may be looked at, earlier ones included.
        """
        rotation = self.parts.position.rotation(positions, self.head_dim, x.dtype)
        mask = self._mask(x, 0 if cache is None else cache.length, attention_mask)
        x = self.embed_norm(x)
        for index, block in enumerate(self.blocks):
            layer_cache = None if cache is None else cache.layers[index]
            if self.config.activation_checkpointing and self.training and cache is None:
                x = checkpoint(block, x, rotation=rotation, mask=mask, use_reentrant=False)
            else:
                x = block(x, rotation=rotation, mask=mask, cache=layer_cache)
        y: Tensor = self.final_norm(x)
        return y

    def _mask(self, x: Tensor, earlier: int, attention_mask: Tensor | None) -> Tensor | None:
        """None without padding: the attention's own causal rule is then enough, and quicker."""
        batch, tokens = x.shape[:2]
        keys = earlier + tokens
        if attention_mask is None:
            return None
        if attention_mask.shape != (batch, keys):
            raise InputError(
                f"expected an attention_mask shaped {(batch, keys)}: (batch, tokens), cached ones included; "
                f"got {tuple(attention_mask.shape)}"
            )
        mask = attention_mask.bool()[:, None, None, :].expand(-1, 1, tokens, -1)
        if self.config.causal:
            mask = mask & _causal_mask(tokens, keys, x.device)
        # A padding token sees at least itself: a softmax over nothing is NaN.
        return mask | torch.eye(tokens, keys, dtype=torch.bool, device=x.device).roll(earlier, -1)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Draw every matrix anew."""
        for layer, block in enumerate(self.blocks, start=1):
            for name, module in block.named_modules():
                if isinstance(module, nn.Linear):
                    output = name.endswith(("o_proj", "down_proj"))
                    self.parts.init(module.weight, layer=layer, depth=self.config.depth, output=output)
                    if module.bias is not None:
                        module.bias.zero_()
