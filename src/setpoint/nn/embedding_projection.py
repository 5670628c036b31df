"""Embedding projection: square matrices behind the token table and in front of the head, folded away after training.

``x = P1 E[token]`` and ``logits = H P2 norm(x)``, with both matrices orthogonal at the start (Park, Lee, Kim and Kang,
2025, arXiv 2506.19697). Tables are trained by Adam, whose steps are taken entry by entry and so favour the axes; the
projections, trained by Muon like the other matrices, turn what the tables hold before the stream sees it. For inference
``E P1ᵀ`` and ``H P2`` are plain tables again, and the model is the one that it would have been without. A head that was
the token table has a matrix of its own afterwards, since the two projections differ.

The authors' example has biases here, their checkpoints have none; there are none.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from setpoint.errors import InputError


class EmbeddingProjection(nn.Linear):
    """A square linear layer without a bias, orthogonal at the start.

    Args:
        dim: Width of input and output.
        device, dtype: Of ``weight``.

    Shape:
        Input and output ``(*, dim)``.

    Raises:
        InputError: ``dim`` below 1; on call, another width.

    Reference:
        Park, Lee, Kim and Kang, 2025, "Outlier-Safe Pre-Training for Robust 4-Bit Quantization of Large Language
        Models", arXiv 2506.19697.

    Example:
        >>> x = torch.randn(3, 8)
        >>> torch.allclose(EmbeddingProjection(8)(x).norm(dim=-1), x.norm(dim=-1))
        True
    """

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        if dim < 1:
            raise InputError(f"EmbeddingProjection: expected dim of at least 1, got {dim!r}; give the model's width")
        super().__init__(dim, dim, bias=False, device=device, dtype=dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """An orthogonal matrix, drawn uniformly."""
        if self.weight.is_meta:
            return
        exact = torch.promote_types(self.weight.dtype, torch.float32)  # half precision knows no decomposition
        drawn = torch.empty_like(self.weight, dtype=exact)
        self.weight.copy_(nn.init.orthogonal_(drawn))

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Turn ``(*, dim)``."""
        if x.shape[-1] != self.in_features:
            raise InputError(
                f"EmbeddingProjection: expected an input of shape (*, {self.in_features}), got {tuple(x.shape)}; make "
                "the layer with the width that comes"
            )
        return super().forward(x)

    def extra_repr(self) -> str:
        """Width."""
        return f"{self.in_features}"


class ProjectedEmbedding(nn.Embedding):
    """A token table with a projection behind it: ``P E[token]``.

    Args:
        num_embeddings, embedding_dim, padding_idx: As `torch.nn.Embedding`.
        device, dtype: Of both weights.

    Shape:
        Integers of any shape to ``(*, embedding_dim)``.

    Reference:
        Park, Lee, Kim and Kang, 2025, arXiv 2506.19697.

    Example:
        >>> ProjectedEmbedding(10, 4)
        ProjectedEmbedding(
          10, 4
          (projection): EmbeddingProjection(4)
        )
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self.projection = EmbeddingProjection(embedding_dim, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Both weights anew."""
        super().reset_parameters()
        if hasattr(self, "projection"):  # not yet where the table is made
            self.projection.reset_parameters()

    def forward(self, tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch dim"]:
        """Projected rows."""
        projected: Tensor = self.projection(super().forward(tokens))
        return projected

    def folded_weight(self) -> Float[Tensor, "tokens dim"]:
        """``E Pᵀ``: the table that gives the same rows without a projection; computed in float64."""
        product = self.weight.detach().double() @ self.projection.weight.detach().double().T
        return product.to(self.weight.dtype)


class ProjectedHead(nn.Linear):
    """A head with a projection in front of it: ``H P x + bias``.

    Args:
        in_features, out_features, bias: As `torch.nn.Linear`.
        device, dtype: Of the weights.

    Shape:
        ``(*, in_features)`` to ``(*, out_features)``.

    Raises:
        InputError: On call, another width than ``in_features``.

    Reference:
        Park, Lee, Kim and Kang, 2025, arXiv 2506.19697.

    Example:
        >>> ProjectedHead(4, 10, bias=False).projection
        EmbeddingProjection(4)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.projection = EmbeddingProjection(in_features, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """All weights anew."""
        super().reset_parameters()
        if hasattr(self, "projection"):
            self.projection.reset_parameters()

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch out"]:
        """Logits."""
        return super().forward(self.projection(x))

    def folded_weight(self) -> Float[Tensor, "out dim"]:
        """``H P``: the head that gives the same logits without a projection; computed in float64."""
        product = self.weight.detach().double() @ self.projection.weight.detach().double()
        return product.to(self.weight.dtype)
