"""Tiny models of many families, for trying fixes and other surgery on.

Their weights are not at their starting values, so that no gain is 1 and no bias 0: a fix that forgets one is seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from setpoint.errors import InputError, nearest
from setpoint.extras import require


def shaken(model: nn.Module, seed: int = 1) -> nn.Module:
    """The model in eval mode with noise added to every parameter, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def gpt2(**changes: Any) -> nn.Module:
    """GPT-2: learned positions, a head tied to its table, Conv1D weights, fused queries, keys and values."""
    require("transformers", "hf", "to build the example")
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    config = GPT2Config(**{**sizes, "bos_token_id": 0, "eos_token_id": 0, "use_cache": False, **changes})
    return shaken(GPT2LMHeadModel(config))


def opt() -> nn.Module:
    """OPT: learned positions with an offset, a tied head."""
    require("transformers", "hf", "to build the example")
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 2}
    config = OPTConfig(**sizes, num_attention_heads=2, max_position_embeddings=32, use_cache=False)
    return shaken(OPTForCausalLM(config))


def llama() -> nn.Module:
    """Llama: RMSNorm, rotary positions, grouped queries, a gated feed-forward."""
    require("transformers", "hf", "to build the example")
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, use_cache=False)
    return shaken(LlamaForCausalLM(config))


def bert() -> nn.Module:
    """BERT: post-norm, norms on the embeddings."""
    require("transformers", "hf", "to build the example")
    from transformers import BertConfig, BertModel

    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    return shaken(BertModel(BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=32)))


def vit() -> nn.Module:
    """ViT: a patch convolution, a class token and positions as bare parameters."""
    require("transformers", "hf", "to build the example")
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return shaken(ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=5)))


def encoder(*, norm_first: bool = True, final: bool = True, start: bool = True) -> nn.Module:
    """torch's own encoder, with a linear in front and a classifier behind."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
    stack = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8) if final else None, enable_nested_tensor=False)
    return shaken(nn.Sequential(nn.Linear(8, 8) if start else nn.Identity(), stack, nn.Linear(8, 3)))


def decoder(**parts: Any) -> nn.Module:
    """setpoint's own decoder: RMSNorm, rotary positions, a gated feed-forward, a tied head."""
    from setpoint.models import Transformer, TransformerConfig

    return shaken(Transformer(TransformerConfig(vocab_size=64, dim=16, depth=2, num_heads=2), **parts))


def scaled() -> nn.Module:
    """The same with LayerNorm Scaling."""
    from setpoint.nn import ScaledPreNorm

    return decoder(block=ScaledPreNorm())


def tokens() -> Tensor:
    """Token ids ``(2, 9)``."""
    return torch.randint(2, 64, (2, 9), generator=torch.Generator().manual_seed(2))


def pixels() -> Tensor:
    """Images ``(2, 3, 16, 16)``."""
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def features() -> Tensor:
    """Vectors ``(2, 5, 8)``."""
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(2))


MAKERS: dict[str, tuple[Callable[..., nn.Module], Callable[[], Tensor]]] = {
    "gpt2": (gpt2, tokens),
    "opt": (opt, tokens),
    "llama": (llama, tokens),
    "bert": (bert, tokens),
    "vit": (vit, pixels),
    "encoder": (encoder, features),
    "decoder": (decoder, tokens),
    "scaled": (scaled, tokens),
}


def tiny(family: str, **options: Any) -> tuple[nn.Module, Tensor]:
    """A tiny model and a batch for it.

    Args:
        family: One of `MAKERS`.
        options: For its maker.

    Returns:
        The model in eval mode, the same at every call, and the batch.

    Raises:
        InputError: An unknown family, or transformers is not installed.

    >>> model, batch = tiny("encoder")
    >>> model(batch).shape
    torch.Size([2, 5, 3])
    """
    if family not in MAKERS:
        raise InputError(f"no tiny model is called {family!r}; nearest: {', '.join(nearest(family, MAKERS))}")
    make, batch = MAKERS[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(**options), batch()
