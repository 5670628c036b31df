"""Tiny models with weights that are not at their starting values, so that no gain is 1 and no bias 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn


def shaken(model: nn.Module, seed: int = 1) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def gpt2(**changes: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    config = GPT2Config(**{**sizes, "bos_token_id": 0, "eos_token_id": 0, "use_cache": False, **changes})
    return shaken(GPT2LMHeadModel(config))


def opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 2}
    config = OPTConfig(**sizes, num_attention_heads=2, max_position_embeddings=32, use_cache=False)
    return shaken(OPTForCausalLM(config))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, use_cache=False)
    return shaken(LlamaForCausalLM(config))


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    return shaken(BertModel(BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=32)))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return shaken(ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=5)))


def encoder(*, norm_first: bool = True, final: bool = True, start: bool = True) -> nn.Module:
    """torch's own encoder, with a linear in front and a classifier behind."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
    stack = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8) if final else None, enable_nested_tensor=False)
    return shaken(nn.Sequential(nn.Linear(8, 8) if start else nn.Identity(), stack, nn.Linear(8, 3)))


def tokens() -> Tensor:
    return torch.randint(2, 64, (2, 9), generator=torch.Generator().manual_seed(2))


def pixels() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def features() -> Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(2))


MAKERS: dict[str, tuple[Callable[..., nn.Module], Callable[[], Tensor]]] = {
    "gpt2": (gpt2, tokens),
    "opt": (opt, tokens),
    "llama": (llama, tokens),
    "bert": (bert, tokens),
    "vit": (vit, pixels),
    "encoder": (encoder, features),
}


@pytest.fixture
def make() -> Callable[..., tuple[nn.Module, Tensor]]:
    """``make(name, **options)`` gives a tiny model of a family and a batch for it."""

    def model_and_batch(name: str, **options: Any) -> tuple[nn.Module, Tensor]:
        model, batch = MAKERS[name]
        return model(**options), batch()

    return model_and_batch
