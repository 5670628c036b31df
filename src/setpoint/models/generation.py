"""Writing text with a decoder: a cache of keys and values, and the choice of the next token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from setpoint.errors import InputError

if TYPE_CHECKING:
    from setpoint.models.transformer import Transformer

_FIRST_CAPACITY = 64


class LayerCache:
    """Keys and values of one layer, ``(batch, kv heads, tokens, head_dim)`` each, in buffers that double."""

    def __init__(self) -> None:
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of new tokens.

        Args:
            keys, values: ``(batch, kv heads, new tokens, head_dim)``.

        Returns:
            All keys and values so far.
        """
        start, stop = self.length, self.length + keys.shape[-2]
        self._keys = _stored(self._keys, keys, start, stop)
        self._values = _stored(self._values, values, start, stop)
        self.length = stop
        return self._keys[..., :stop, :], self._values[..., :stop, :]


class Cache:
    """Keys and values of every layer, so that a decoder reads each token once. For inference: no gradients flow back.

    Args:
        depth: Number of layers.

    Example:
        >>> from setpoint.models import Transformer, TransformerConfig
        >>> model = Transformer(TransformerConfig(vocab_size=11, dim=8, depth=2, num_heads=2)).eval()
        >>> cache = model.cache()
        >>> with torch.no_grad():
        ...     _ = model(torch.tensor([[1, 2, 3]]), cache=cache)
        ...     logits = model(torch.tensor([[4]]), cache=cache)
        >>> logits.shape, cache.length
        (torch.Size([1, 1, 11]), 4)
    """

    def __init__(self, depth: int) -> None:
        self.layers = tuple(LayerCache() for _ in range(depth))

    @property
    def length(self) -> int:
        """Tokens that have been read."""
        return self.layers[0].length if self.layers else 0


def choose(
    logits: Float[Tensor, "batch vocab"],
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, " batch"]:
    """The next token of each row.

    Args:
        logits: Scores of the next token.
        temperature: Logits are divided by it before the draw; 0 takes the best token.
        top_k: Draw among this many best tokens.
        top_p: Draw among the fewest best tokens whose probabilities sum to at least this.
        generator: Source of randomness.

    Raises:
        InputError: A value out of range.

    Example:
        >>> choose(torch.tensor([[0.0, 3.0, 1.0]]))
        tensor([1])
    """
    if not temperature >= 0.0:
        raise InputError(f"expected a temperature of at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise InputError(f"expected top_k of at least 1, got {top_k}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise InputError(f"expected top_p above 0 and up to 1, got {top_p}")
    if temperature == 0.0:
        return logits.argmax(-1)
    scores = logits.float() / temperature
    if top_k is not None and top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], -torch.inf)
    if top_p is not None:
        ranked, order = scores.sort(descending=True)
        probabilities = ranked.softmax(-1)
        beyond = probabilities.cumsum(-1) - probabilities >= top_p  # the token that crosses the line still counts
        scores = scores.scatter(-1, order, ranked.masked_fill(beyond, -torch.inf))
    return torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]


@torch.no_grad()
def generate(
    model: Transformer,
    tokens: Int[Tensor, "batch prompt"],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos: int | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "batch total"]:
    """Continue each prompt.

    Args:
        model: A causal transformer. It runs in eval mode and is left in the mode it was in.
        tokens: The prompts, all of one length.
        max_new_tokens: How many tokens to add at most.
        temperature, top_k, top_p, generator: As for `choose`.
        eos: Token that ends a row; a row that has ended is filled up with it, and when all have, the text ends.

    Returns:
        Prompts and continuations.

    Raises:
        InputError: The model is no decoder, a prompt is empty, or prompt and new tokens exceed a learned context.
    """
    if not model.config.causal:
        raise InputError("expected a causal transformer to generate with, got an encoder (causal=False)")
    if tokens.dim() != 2 or tokens.shape[1] == 0:
        raise InputError(f"expected prompts shaped (batch, tokens) with at least one token, got {tuple(tokens.shape)}")
    if max_new_tokens < 0:
        raise InputError(f"expected max_new_tokens of at least 0, got {max_new_tokens}")
    model.check_length(tokens.shape[1] + max_new_tokens)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        cache, unread = model.cache(), tokens
        ended = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
        for _ in range(max_new_tokens):
            logits = model(unread, cache=cache)[:, -1]
            new = choose(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
            if eos is not None:
                new = new.masked_fill(ended, eos)
                ended = ended | (new == eos)
            unread = new[:, None]
            tokens = torch.cat((tokens, unread), dim=1)
            if eos is not None and bool(ended.all()):
                break
    finally:
        for module, training in modes:
            module.training = training
    return tokens


def _stored(buffer: Tensor | None, new: Tensor, start: int, stop: int) -> Tensor:
    if buffer is None or stop > buffer.shape[-2]:
        capacity = max(_FIRST_CAPACITY, stop, 0 if buffer is None else 2 * buffer.shape[-2])
        grown = new.new_empty((*new.shape[:-2], capacity, new.shape[-1]))
        if buffer is not None:
            grown[..., :start, :] = buffer[..., :start, :]
        buffer = grown
    buffer[..., start:stop, :] = new
    return buffer
