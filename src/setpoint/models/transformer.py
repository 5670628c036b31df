"""A transformer over tokens, decoder or encoder; its blocks are in `setpoint.models.stack`.

Norms, their placement, attention, feed-forward, positions and initialization are objects that are passed in:

    Transformer(config, block=PeriNorm(), norm=partial(DyT, alpha_init_value=0.8), feed_forward=MLP, position=Learned())
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.models import generation, presets
from setpoint.models.initialize import Normal
from setpoint.models.plain import build, rebuild
from setpoint.models.position import Position, Rotary
from setpoint.models.stack import Attention, Initializer, Parts, Stack, StackConfig, SwiGLU
from setpoint.nn.block import NormFactory, Placement, PreNorm
from setpoint.nn.norm.rmsnorm import RMSNorm


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(StackConfig):
    """Sizes of a `Transformer`; those of its stack are described at `StackConfig`.

    Args:
        vocab_size: Number of tokens.
        context: Most tokens in a sequence. Only learned positions hold a model to it.
        tie_embeddings: Whether the head's matrix is the token table.
        embedding_std: Token and position tables are drawn from N(0, embedding_std²).
        embedding_scale: Start value of a learnable scalar that the token embeddings are multiplied by, None for none.
            (Norm-free language models need one: sqrt(dim) in DyT's recipe.)

    Example:
        >>> TransformerConfig.preset("10M", vocab_size=256).depth
        8
    """

    vocab_size: int = 256
    context: int = 1024
    tie_embeddings: bool = True
    embedding_std: float = 0.02
    embedding_scale: float | None = None

    @classmethod
    def preset(cls, size: str, **changes: Any) -> TransformerConfig:
        """Sizes for a number of parameters, the token table not counted.

        Args:
            size: One of those that `setpoint.models.presets.SIZES` lists, ``"1M"`` to ``"1B"``.
            changes: Fields to set otherwise.

        Raises:
            InputError: An unknown size or field.
        """
        return build(cls, {**presets.sizes(size), **changes})


class Transformer(nn.Module):
    """A transformer over tokens: a decoder (``config.causal``) or an encoder with a token head.

    Args:
        config: Sizes.
        block: Where norms stand, a placement of `setpoint.nn.block`.
        norm: Makes each norm from its width.
        attention_norm: Makes the norms around attention, where they differ from those around the feed-forward.
        final_norm: Makes the norm after the last block, where it differs.
        attention: Makes the attention of each block, as `Attention` is called.
        feed_forward: Makes the feed-forward of each block, as `SwiGLU` is called.
        position: How positions are told, see `setpoint.models.position`.
        init: Draws the matrices, see `setpoint.models.initialize`.

    Example:
        >>> from setpoint.models import MLP
        >>> config = TransformerConfig(vocab_size=11, dim=16, depth=2, num_heads=2)
        >>> model = Transformer(config, norm=nn.LayerNorm, feed_forward=MLP)
        >>> model(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 11])
        >>> model.generate(torch.tensor([[1, 2, 3]]), 5).shape
        torch.Size([1, 8])
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        block: Placement = PreNorm(),  # noqa: B008  frozen
        norm: NormFactory = RMSNorm,
        attention_norm: NormFactory | None = None,
        final_norm: NormFactory | None = None,
        attention: Callable[..., nn.Module] = Attention,
        feed_forward: Callable[..., nn.Module] = SwiGLU,
        position: Position = Rotary(),  # noqa: B008
        init: Initializer = Normal(),  # noqa: B008
    ) -> None:
        super().__init__()
        self.config = config
        self.parts = Parts(
            block, norm, attention_norm or norm, final_norm or norm, attention, feed_forward, position, init
        )
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        scale = config.embedding_scale
        self.embedding_scale = None if scale is None else nn.Parameter(torch.tensor([scale]))
        self.position_embedding = position.table(config.context, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.stack = Stack(config, self.parts)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.initialize_weights()

    def forward(
        self,
        tokens: Int[Tensor, "batch tokens"],
        *,
        cache: generation.Cache | None = None,
        attention_mask: Bool[Tensor, "batch keys"] | None = None,
    ) -> Float[Tensor, "batch tokens vocab"]:
        """Logits for each token (of a decoder: of the token that follows it).

        Args:
            tokens: Token ids.
            cache: Keys and values of earlier tokens, from `cache`; these tokens are added to it.
            attention_mask: True for tokens that count, False for padding; covers cached tokens too.

        Raises:
            InputError: Tokens that are no ids in ``(batch, tokens)``, or more than a learned context holds.
        """
        logits: Tensor = self.head(self.features(tokens, cache=cache, attention_mask=attention_mask))
        return logits

    def features(
        self,
        tokens: Int[Tensor, "batch tokens"],
        *,
        cache: generation.Cache | None = None,
        attention_mask: Bool[Tensor, "batch keys"] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """What the head reads; arguments as for `forward`."""
        if tokens.dim() != 2 or tokens.is_floating_point():
            raise InputError(
                f"expected integer token ids shaped (batch, tokens), got {tokens.dtype} shaped {tuple(tokens.shape)}"
            )
        if cache is not None and not self.config.causal:
            raise InputError("expected no cache: an encoder (causal=False) has to see all tokens at once")
        start = 0 if cache is None else cache.length
        self.check_length(start + tokens.shape[1])
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        x = self.embedding(tokens)
        if self.embedding_scale is not None:
            x = x * self.embedding_scale
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions).to(x.dtype)
        y: Tensor = self.stack(self.dropout(x), positions, cache=cache, attention_mask=attention_mask)
        return y

    def check_length(self, tokens: int) -> None:
        """Refuse more tokens than a learned position table has rows.

        Raises:
            InputError: There are more.
        """
        if isinstance(self.position_embedding, nn.Embedding) and tokens > self.position_embedding.num_embeddings:
            raise InputError(
                f"expected at most {self.position_embedding.num_embeddings} tokens, as many as there are learned "
                f"positions, got {tokens}; shorten the text or build the model with a larger context"
            )

    def cache(self) -> generation.Cache:
        """An empty cache for `forward`."""
        return generation.Cache(self.config.depth)

    def generate(
        self, tokens: Int[Tensor, "batch prompt"], max_new_tokens: int, **choices: Any
    ) -> Int[Tensor, "batch total"]:
        """Continue each prompt; arguments as for `setpoint.models.generation.generate`."""
        return generation.generate(self, tokens, max_new_tokens, **choices)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Draw tables and matrices anew; norms and learnable scalars stay as they are."""
        nn.init.normal_(self.embedding.weight, 0.0, self.config.embedding_std)
        if isinstance(self.position_embedding, nn.Embedding):
            nn.init.normal_(self.position_embedding.weight, 0.0, self.config.embedding_std)
        self.stack.initialize_weights()
        if not self.config.tie_embeddings:
            self.parts.init(self.head.weight, layer=None, depth=self.config.depth, output=False)

    @property
    def num_parameters(self) -> int:
        """Trained numbers, shared ones counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def to_dict(self) -> dict[str, Any]:
        """Sizes and parts as data that JSON can hold; `from_dict` builds the model from it.

        Raises:
            InputError: A part is of the user's own, so that its name would say nothing.
        """
        return {"config": asdict(self.config), **self.parts.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Transformer:
        """A model, freshly initialized, from what `to_dict` returned.

        Raises:
            InputError: A name that is no part, or a field that there is not.
        """
        return rebuild(cls, TransformerConfig, data, Parts.names())
