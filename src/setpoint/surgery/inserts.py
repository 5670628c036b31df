"""Modules that fixes put around, or in place of, parts of somebody's model.

What stands *around* a module hands on every attribute that it does not have itself, since models look into their
parts (``layer.self_attn.batch_first``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from setpoint.nn.attention.kv_bias import KVBias
from setpoint.running import tensors_of


class Around(nn.Module):
    """Runs a module and does something before or behind it.

    Args:
        inner: The module.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "inner":
                raise
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the inner module's."""
        return self.inner(*args, **kwargs)


def _on_stream(change: Callable[[Tensor], Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Change the first floating-point tensor of a call, which is where blocks take the residual stream."""
    for index, value in enumerate(args):
        if isinstance(value, Tensor) and value.is_floating_point():
            return (*args[:index], change(value), *args[index + 1 :]), kwargs
    for name, value in kwargs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            return args, {**kwargs, name: change(value)}
    return args, kwargs


class CentredInput(Around):
    """A block whose stream enters with zero mean over features.

    Args:
        inner: The block; the first floating-point tensor it is called with is the stream.
        drop_last: Also leave the last feature out, which the others determine.
    """

    def __init__(self, inner: nn.Module, drop_last: bool = False) -> None:
        super().__init__(inner)
        self.drop_last = drop_last

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the block's."""

        def centre(stream: Tensor) -> Tensor:
            stream = stream - stream.mean(-1, keepdim=True)
            return stream[..., :-1] if self.drop_last else stream

        args, kwargs = _on_stream(centre, args, kwargs)
        return self.inner(*args, **kwargs)


class NormedInput(Around):
    """A block whose stream is normalized where it enters (the norm on the embeddings).

    Args:
        inner: The block.
        norm: The norm.
    """

    def __init__(self, inner: nn.Module, norm: nn.Module) -> None:
        super().__init__(inner)
        self.norm = norm

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the block's."""
        args, kwargs = _on_stream(self.norm, args, kwargs)
        return self.inner(*args, **kwargs)


class NormedOutput(Around):
    """A sub-layer whose output is normalized, before anything adds it to the stream.

    Args:
        inner: The sub-layer.
        norm: The norm.
        index: Which of the tensors it returns, in order.
    """

    def __init__(self, inner: nn.Module, norm: nn.Module, index: int = 0) -> None:
        super().__init__(inner)
        self.norm = norm
        self.index = index

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the sub-layer's."""
        output = self.inner(*args, **kwargs)
        if isinstance(output, Tensor):
            return self.norm(output)
        chosen = tensors_of(output)[self.index]
        return type(output)(self.norm(part) if part is chosen else part for part in output)


class CentredEmbedding(nn.Embedding):
    """A table whose rows are centred as they are looked up; the table itself, and a head tied to it, stay as they are.

    >>> table = CentredEmbedding(3, 4)
    >>> bool(table(torch.tensor([2])).mean().abs() < 1e-6)
    True
    """

    def forward(self, input: Tensor) -> Tensor:
        """Rows ``(..., embedding_dim)`` with zero mean."""
        rows = super().forward(input)
        return rows - rows.mean(-1, keepdim=True)


class ScaledEmbedding(nn.Embedding):
    """A table whose rows are multiplied by one learnable number as they are looked up.

    Args:
        num_embeddings, embedding_dim, padding_idx, device, dtype: As `nn.Embedding`.
        scale: Start of the number.

    >>> ScaledEmbedding(3, 4, scale=2.0).scale.item()
    2.0
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        scale: float = 1.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self.scale = nn.Parameter(torch.full((1,), float(scale), device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        """Rows ``(..., embedding_dim)`` times the scale."""
        return super().forward(input) * self.scale


class CentredLinear(nn.Linear):
    """A linear that writes no mean over its outputs: weight and bias are centred in the forward.

    With it in place of what writes to a Pre-LN stream, training a model with RMSNorm takes the same steps as training
    the LayerNorm model: the gradient at the stream has zero mean in both, so the free part of the weights moves alike.

    >>> layer = CentredLinear(3, 4)
    >>> bool(layer(torch.randn(2, 3)).mean(-1).abs().max() < 1e-6)
    True
    """

    def forward(self, input: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)`` with zero mean."""
        bias = self.bias - self.bias.mean() if self.bias is not None else None
        return functional.linear(input, self.weight - self.weight.mean(0, keepdim=True), bias)


class WithKVBias(Around):
    """An attention with a learnable key and value in front of its own.

    What the module hands to ``scaled_dot_product_attention`` is extended on the way, after any rotation and any cache.

    Args:
        inner: The attention.
        num_kv_heads, head_dim, slot_logit, device, dtype: As `setpoint.nn.KVBias`.
    """

    def __init__(
        self,
        inner: nn.Module,
        num_kv_heads: int,
        head_dim: int,
        *,
        slot_logit: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(inner)
        self.kv_bias = KVBias(num_kv_heads, head_dim, slot_logit=slot_logit, device=device, dtype=dtype)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the attention's."""
        with _Extended(self.kv_bias):
            return self.inner(*args, **kwargs)


class _Extended(TorchFunctionMode):
    """Puts a `KVBias` into every attention core that runs inside."""

    def __init__(self, bias: KVBias) -> None:
        super().__init__()
        self.bias = bias

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        return func(*args, **kwargs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **rest: Any,
    ) -> Tensor:
        key, value, mask = self.bias(key, value, attn_mask, queries=query.shape[-2], causal=is_causal)
        return functional.scaled_dot_product_attention(query, key, value, mask, dropout_p, **rest)
