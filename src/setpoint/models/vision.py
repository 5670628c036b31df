"""A vision transformer: square patches as tokens, the blocks of `setpoint.models.stack`, pooling and a classifier.

Reference: Dosovitskiy et al., 2021, "An Image is Worth 16x16 Words", arXiv 2010.11929.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.models.initialize import Normal
from setpoint.models.plain import rebuild, to_plain
from setpoint.models.position import Learned, Position
from setpoint.models.stack import MLP, Attention, Initializer, Parts, Stack, StackConfig
from setpoint.nn.block import NormFactory, Placement, PreNorm
from setpoint.nn.norm.layernorm import LayerNorm
from setpoint.optim.decay import no_weight_decay


@dataclass(frozen=True, kw_only=True)
class VisionConfig(StackConfig):
    """Sizes of a `VisionTransformer`; those of its stack are described at `StackConfig`.

    Args:
        image_size: Height and width, in pixels.
        patch_size: Side of a patch, in pixels; it divides ``image_size``.
        channels: Colours of the image.
        num_classes: Number of classes; 0 for no classifier, so that the pooled features come out.
        embedding_std: The position table is drawn from N(0, embedding_std²).

    Example:
        >>> VisionConfig(image_size=28, patch_size=7, channels=1).num_patches
        16
    """

    image_size: int = 224
    patch_size: int = 16
    channels: int = 3
    num_classes: int = 10
    bias: bool = True
    causal: bool = False
    embedding_std: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch_size < 1 or self.image_size % self.patch_size:
            raise InputError(f"expected a patch_size that divides image_size={self.image_size}, got {self.patch_size}")

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class MeanPooling:
    """The mean over all patches."""

    extra_tokens: ClassVar[int] = 0

    def __call__(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch dim"]:
        """Pool."""
        return x.mean(1)


@dataclass(frozen=True)
class ClassToken:
    """A learned token before the patches, from which the class is read."""

    extra_tokens: ClassVar[int] = 1

    def __call__(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch dim"]:
        """Pool."""
        return x[:, 0]


class VisionTransformer(nn.Module):
    """A transformer over the patches of an image.

    Args:
        config: Sizes.
        pooling: How the classifier reads the tokens: `MeanPooling` or `ClassToken`.
        block, norm, attention_norm, final_norm, attention, feed_forward, position, init: As for
            `setpoint.models.Transformer`; the defaults are those of the paper.

    Example:
        >>> config = VisionConfig(image_size=28, patch_size=7, channels=1, dim=32, depth=2, num_heads=4)
        >>> VisionTransformer(config)(torch.randn(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        config: VisionConfig,
        *,
        pooling: MeanPooling | ClassToken = MeanPooling(),
        block: Placement = PreNorm(),  # noqa: B008
        norm: NormFactory = LayerNorm,
        attention_norm: NormFactory | None = None,
        final_norm: NormFactory | None = None,
        attention: Callable[..., nn.Module] = Attention,
        feed_forward: Callable[..., nn.Module] = MLP,
        position: Position = Learned(),  # noqa: B008
        init: Initializer = Normal(),  # noqa: B008
    ) -> None:
        super().__init__()
        self.config, self.pooling = config, pooling
        self.parts = Parts(
            block, norm, attention_norm or norm, final_norm or norm, attention, feed_forward, position, init
        )
        self.patches = nn.Conv2d(config.channels, config.dim, config.patch_size, stride=config.patch_size)
        extra = pooling.extra_tokens
        self.class_token = nn.Parameter(torch.zeros(1, extra, config.dim)) if extra else None
        if extra:
            no_weight_decay(self, "class_token")
        self.position_embedding = position.table(extra + config.num_patches, config.dim)
        if isinstance(self.position_embedding, nn.Embedding):
            no_weight_decay(self.position_embedding)
        self.dropout = nn.Dropout(config.dropout)
        self.stack = Stack(config, self.parts)
        self.head = nn.Linear(config.dim, config.num_classes) if config.num_classes else nn.Identity()
        self.initialize_weights()

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Class logits.

        Args:
            images: Of the configured size.

        Raises:
            InputError: Images of another size.
        """
        logits: Tensor = self.head(self.pooling(self.features(images)))
        return logits

    def features(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch tokens dim"]:
        """Every token after the last norm, the class token first if there is one."""
        config = self.config
        wanted = (config.channels, config.image_size, config.image_size)
        if images.dim() != 4 or images.shape[1:] != wanted:
            raise InputError(
                f"expected images shaped (batch, {', '.join(map(str, wanted))}), got {tuple(images.shape)}; "
                f"resize them, or build the model for their size"
            )
        x = self.patches(images).flatten(2).transpose(1, 2)
        if self.class_token is not None:
            x = torch.cat((self.class_token.expand(len(x), -1, -1), x), dim=1)
        positions = torch.arange(x.shape[1], device=x.device)
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions).to(x.dtype)
        y: Tensor = self.stack(self.dropout(x), positions)
        return y

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Draw tables and matrices anew; norms stay as they are."""
        self.parts.init(self.patches.weight.flatten(1), layer=None, depth=self.config.depth, output=False)
        nn.init.zeros_(self.patches.bias)  # type: ignore[arg-type]
        if isinstance(self.position_embedding, nn.Embedding):
            nn.init.normal_(self.position_embedding.weight, 0.0, self.config.embedding_std)
        if self.class_token is not None:
            nn.init.normal_(self.class_token, 0.0, self.config.embedding_std)
        self.stack.initialize_weights()
        if isinstance(self.head, nn.Linear):
            self.parts.init(self.head.weight, layer=None, depth=self.config.depth, output=False)
            nn.init.zeros_(self.head.bias)

    @property
    def num_parameters(self) -> int:
        """Trained numbers."""
        return sum(parameter.numel() for parameter in self.parameters())

    def to_dict(self) -> dict[str, Any]:
        """Sizes and parts as data that JSON can hold; `from_dict` builds the model from it."""
        return {"config": asdict(self.config), "pooling": to_plain(self.pooling), **self.parts.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> VisionTransformer:
        """A model, freshly initialized, from what `to_dict` returned.

        Raises:
            InputError: A name that is no part, or a field that there is not.
        """
        return rebuild(cls, VisionConfig, data, ("pooling", *Parts.names()))
