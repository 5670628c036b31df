"""FixNorm: word embeddings of unit length, at the input and as the weight of the softmax.

Rows of a table that is trained as it is grow with the frequency of their words. Dividing each by its length at every
use leaves a word its direction only, which helps rare words (Nguyen and Chiang, 2018; Nguyen and Salazar, 2019, arXiv
1910.05895). The same table gives the logits, ``h · e_w / ||e_w|| + b_w``; if h comes from a ScaleNorm of length g, they
are ``g cos(h, e_w) + b_w``.
"""

from __future__ import annotations

from math import sqrt

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from setpoint.errors import InputError
from setpoint.nn.norm.checks import expect_trailing
from setpoint.nn.norm.scalenorm import scale_norm
from setpoint.optim.decay import no_weight_decay

_EPS = 1e-12


class FixNormEmbedding(nn.Module):
    """A table of embeddings whose rows are used with unit length, times ``scale`` at the input.

    Weight decay leaves the table alone: it could only change lengths, which nothing sees.

    Args:
        num_embeddings: Number of words.
        embedding_dim: Width d.
        scale: What an embedding is multiplied by; None for sqrt(d). The logits are made without it.
        padding_idx: A word whose embedding is zero and takes no gradient from the input.
        device, dtype: Of the table ``weight``, which starts uniform in ±0.01.

    Shape:
        Token ids ``(*)`` to embeddings ``(*, d)``; `as_logits`: ``(*, d)`` to ``(*, num_embeddings)``.

    Raises:
        InputError: A size below 1, ``scale`` not above 0, ``padding_idx`` not in the table; on `as_logits`, another
            width.

    Reference:
        Nguyen and Salazar, 2019, "Transformers without Tears", arXiv 1910.05895.

    Example:
        >>> table = FixNormEmbedding(10, 4)
        >>> table(torch.tensor([1, 7])).norm(dim=-1).detach().round(decimals=4)
        tensor([2., 2.])
        >>> table.as_logits(torch.randn(3, 4)).shape
        torch.Size([3, 10])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        scale: float | None = None,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_embeddings < 1 or embedding_dim < 1:
            raise InputError(
                f"FixNormEmbedding: expected sizes of at least 1, got {num_embeddings!r} and {embedding_dim!r}"
            )
        if scale is not None and not scale > 0:
            raise InputError(f"FixNormEmbedding: expected scale above 0, got {scale!r}")
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise InputError(
                f"FixNormEmbedding: expected padding_idx within a table of {num_embeddings}, got {padding_idx!r}"
            )
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.scale = sqrt(embedding_dim) if scale is None else scale
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        self.weight = nn.Parameter(torch.empty(num_embeddings, embedding_dim, device=device, dtype=dtype))
        no_weight_decay(self, "weight")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every row uniform in ±0.01, that of the padding zero."""
        nn.init.uniform_(self.weight, -0.01, 0.01)
        if self.padding_idx is not None:
            with torch.no_grad():
                self.weight[self.padding_idx].zero_()

    def forward(self, tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch dim"]:
        """Embeddings of length ``scale``."""
        rows = F.embedding(tokens, self.weight, self.padding_idx)
        return scale_norm(rows, self.scale, _EPS)

    def as_logits(
        self, h: Float[Tensor, "*batch dim"], bias: Float[Tensor, " words"] | None = None
    ) -> Float[Tensor, "*batch words"]:
        """Products of ``h`` with every row at unit length, plus ``bias``.

        Args:
            h: What the network gives ``(*, d)``.
            bias: An addend for each word ``(num_embeddings,)``.

        Returns:
            Logits ``(*, num_embeddings)``.
        """
        expect_trailing(h, (self.embedding_dim,), "FixNormEmbedding.as_logits")
        return F.linear(h, scale_norm(self.weight, 1.0, _EPS), bias)

    def extra_repr(self) -> str:
        """Sizes, scale and padding."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}, scale={self.scale:.4g}{padding}"
