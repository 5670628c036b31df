"""Weights of other libraries in the transformer of this one, with the same logits.

A converter knows three things of a family: the sizes, the parts, and what its tensors are called here. It reads a
configuration and a state dict, so that a folder can be loaded without the library that wrote it. What a converter can't
express it refuses by name, and every tensor has to find its place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.models.position import Learned, Llama3Rotary, Rotary
from setpoint.models.stack import MLP, Attention, Block, Parts, StackConfig, SwiGLU
from setpoint.models.transformer import Transformer, TransformerConfig
from setpoint.nn.block import PostNorm, PreNorm
from setpoint.nn.norm.layernorm import LayerNorm
from setpoint.nn.norm.rmsnorm import RMSNorm

State = dict[str, Tensor]
Config = Mapping[str, Any]


@dataclass(frozen=True)
class _Converted:
    sizes: dict[str, Any]
    parts: dict[str, Any]
    names: tuple[tuple[str, str], ...]
    """Pattern and replacement; the first that matches a whole name renames it."""
    ignored: str = r"(?!)"
    """Pattern of stored tensors that are no weights."""
    prepare: Callable[[State], State] = field(default=lambda state: state)


_ACTIVATIONS: dict[str, Any] = {
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_new": partial(nn.GELU, approximate="tanh"),
    "gelu_pytorch_tanh": partial(nn.GELU, approximate="tanh"),
}


def from_transformers(model: nn.Module) -> Transformer:
    """A `transformers` language model as a `Transformer` with a copy of its weights.

    Args:
        model: Llama, Mistral, Qwen2, Qwen3, GPT-2 or OPT, with its language-model head.

    Returns:
        A model in eval mode with the same logits.

    Raises:
        InputError: Another family, or a setting of one of these that has no counterpart; the message names it.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        raise InputError(f"expected a model of transformers, got {type(model).__name__} without its config")
    return convert(config.to_dict(), model.state_dict())


def from_folder(folder: str | Path) -> Transformer:
    """A language model in Hugging Face's layout as a `Transformer`; transformers is not needed.

    Args:
        folder: Holds ``config.json`` and ``*.safetensors``.

    Raises:
        InputError: A file is missing or damaged, or the family is not known.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"expected a readable config.json in {folder}: {error}") from error
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"expected weights as *.safetensors in {folder}, found none")
    state: State = {}
    for file in files:
        try:
            state |= load_file(file)
        except SafetensorError as error:
            raise InputError(f"{file} is no safetensors file, or is damaged: {error}") from error
    return convert(config, state)


def convert(config: Config, state: Mapping[str, Tensor]) -> Transformer:
    """A `Transformer` from a configuration and a state dict of transformers.

    Args:
        config: As in ``config.json``.
        state: The weights; they are copied.

    Raises:
        InputError: An unknown family or setting, or tensors that are missing, left over or of another shape.
    """
    family = config.get("model_type", "")
    if family not in _FAMILIES:
        raise InputError(f"expected a checkpoint of {', '.join(_FAMILIES)}, got model_type {family!r}")
    converted = _FAMILIES[family](config)
    renamed = _renamed(converted, state, str(family))
    if converted.sizes["tie_embeddings"]:
        renamed["head.weight"] = renamed["embedding.weight"]
    dtype = renamed["embedding.weight"].dtype
    with torch.device("meta"):
        model = Transformer(TransformerConfig(**converted.sizes), **converted.parts)
    model.to_empty(device=renamed["embedding.weight"].device).to(dtype)
    if converted.sizes["tie_embeddings"]:
        model.head.weight = model.embedding.weight
    try:
        model.load_state_dict(renamed)
    except RuntimeError as error:
        raise InputError(f"the weights do not fit a {family}: {' '.join(str(error).split())[:300]}") from error
    return model.eval()


def _renamed(converted: _Converted, state: Mapping[str, Tensor], family: str) -> State:
    found: State = {}
    for name, tensor in converted.prepare(dict(state)).items():
        if re.fullmatch(converted.ignored, name):
            continue
        for pattern, replacement in converted.names:
            if match := re.fullmatch(pattern, name):
                found[match.expand(replacement)] = tensor
                break
        else:
            raise InputError(f"the checkpoint holds {name}, which a {family} of this kind has no place for")
    if "embedding.weight" not in found:
        raise InputError(f"the checkpoint holds no token table of a {family}")
    return found


def _expect(config: Config, **wanted: Any) -> None:
    """Refuse settings that change the function and that the transformer does not have."""
    for name, value in wanted.items():
        if config.get(name, value) != value:
            raise InputError(f"expected {name}={value!r} in the checkpoint's config, got {config[name]!r}")


def _activation(config: Config, name: str) -> Any:
    if config[name] not in _ACTIVATIONS:
        raise InputError(f"expected {name} to be one of {', '.join(_ACTIVATIONS)}, got {config[name]!r}")
    return _ACTIVATIONS[config[name]]


# Llama and its relatives ---------------------------------------------------------------------------------------------


def _llama(config: Config) -> _Converted:
    _expect(config, mlp_bias=False, pretraining_tp=1)
    family = config["model_type"]
    if config.get("sliding_window") and config.get("use_sliding_window", family == "mistral"):
        raise InputError(f"expected attention over the whole context, got sliding_window={config['sliding_window']}")
    norm = partial(RMSNorm, eps=config["rms_norm_eps"])
    options: dict[str, Any] = {}
    if family == "qwen2" or config.get("attention_bias"):
        options["qkv_bias"] = True
    if config.get("attention_bias"):
        raise InputError("expected attention_bias=False in the checkpoint's config, got True")
    if family == "qwen3":
        options["qk_norm"] = norm
    sizes = {
        "vocab_size": config["vocab_size"],
        "context": config["max_position_embeddings"],
        "dim": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "num_kv_heads": config.get("num_key_value_heads"),
        "head_dim": config.get("head_dim"),
        "hidden_dim": config["intermediate_size"],
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
    }
    parts = {
        "norm": norm,
        "attention": partial(Attention, **options) if options else Attention,
        "feed_forward": partial(SwiGLU, activation=_activation(config, "hidden_act")),
        "position": _rotary(config),
    }
    block = r"model\.layers\.(\d+)\."
    names = (
        (r"model\.embed_tokens\.weight", "embedding.weight"),
        (block + r"input_layernorm\.(.+)", r"stack.blocks.\1.attention.norm.\2"),
        (block + r"self_attn\.(.+)", r"stack.blocks.\1.attention.sublayer.\2"),
        (block + r"post_attention_layernorm\.(.+)", r"stack.blocks.\1.feed_forward.norm.\2"),
        (block + r"mlp\.(.+)", r"stack.blocks.\1.feed_forward.sublayer.\2"),
        (r"model\.norm\.weight", "stack.final_norm.weight"),
        (r"lm_head\.weight", "head.weight"),
    )
    return _Converted(sizes, parts, names, ignored=r".*\.rotary_emb\.inv_freq")


def _rotary(config: Config) -> Rotary:
    """Positions as transformers writes them: in one ``rope_parameters``, or in two fields in older files."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(scaling.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError("expected rotary positions on whole heads, got a partial_rotary_factor")
    if kind == "default":
        return Rotary(theta)
    if kind == "llama3":
        return Llama3Rotary(
            theta,
            factor=scaling["factor"],
            low_frequency=scaling["low_freq_factor"],
            high_frequency=scaling["high_freq_factor"],
            original_context=scaling["original_max_position_embeddings"],
        )
    raise InputError(f"expected rotary positions of type default or llama3, got {kind!r}")


# GPT-2 ---------------------------------------------------------------------------------------------------------------


def _gpt2(config: Config) -> _Converted:
    _expect(config, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    sizes = {
        "vocab_size": config["vocab_size"],
        "context": config["n_positions"],
        "dim": config["n_embd"],
        "depth": config["n_layer"],
        "num_heads": config["n_head"],
        "hidden_dim": config.get("n_inner"),
        "bias": True,
        "tie_embeddings": bool(config.get("tie_word_embeddings", True)),
    }
    parts = {
        "norm": partial(LayerNorm, eps=config["layer_norm_epsilon"]),
        "feed_forward": partial(MLP, activation=_activation(config, "activation_function")),
        "position": Learned(),
    }
    block = r"(?:transformer\.)?h\.(\d+)\."
    names = (
        (r"(?:transformer\.)?wte\.weight", "embedding.weight"),
        (r"(?:transformer\.)?wpe\.weight", "position_embedding.weight"),
        (block + r"ln_1\.(.+)", r"stack.blocks.\1.attention.norm.\2"),
        (block + r"attn\.([qkv]_proj\..+)", r"stack.blocks.\1.attention.sublayer.\2"),
        (block + r"attn\.c_proj\.(.+)", r"stack.blocks.\1.attention.sublayer.o_proj.\2"),
        (block + r"ln_2\.(.+)", r"stack.blocks.\1.feed_forward.norm.\2"),
        (block + r"mlp\.c_fc\.(.+)", r"stack.blocks.\1.feed_forward.sublayer.up_proj.\2"),
        (block + r"mlp\.c_proj\.(.+)", r"stack.blocks.\1.feed_forward.sublayer.down_proj.\2"),
        (r"(?:transformer\.)?ln_f\.(.+)", r"stack.final_norm.\1"),
        (r"lm_head\.weight", "head.weight"),
    )
    return _Converted(sizes, parts, names, r".*attn\.(masked_)?bias", _split_gpt2)


def _split_gpt2(state: State) -> State:
    """GPT-2 stores matrices as (in, out), and queries, keys and values in one."""

    def parts() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in state.items():
            turned = tensor.t() if re.search(r"\.(c_attn|c_proj|c_fc)\.weight$", name) else tensor
            if ".c_attn." in name:
                for letter, part in zip("qkv", turned.chunk(3), strict=True):
                    yield name.replace("c_attn", f"{letter}_proj"), part
            else:
                yield name, turned

    return dict(parts())


# OPT -----------------------------------------------------------------------------------------------------------------

_OPT_OFFSET = 2  # its position table starts with two rows that no token uses


def _opt(config: Config) -> _Converted:
    _expect(config, do_layer_norm_before=True, _remove_final_layer_norm=False, enable_bias=True)
    if config.get("word_embed_proj_dim", config["hidden_size"]) != config["hidden_size"]:
        raise InputError("expected word_embed_proj_dim to be hidden_size in the checkpoint's config, got another width")
    sizes = {
        "vocab_size": config["vocab_size"],
        "context": config["max_position_embeddings"],
        "dim": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "hidden_dim": config["ffn_dim"],
        "bias": True,
        "tie_embeddings": bool(config.get("tie_word_embeddings", True)),
    }
    affine = bool(config.get("layer_norm_elementwise_affine", True))
    parts = {
        "norm": LayerNorm if affine else partial(LayerNorm, elementwise_affine=False),
        "feed_forward": partial(MLP, activation=_activation(config, "activation_function")),
        "position": Learned(),
    }
    decoder = r"(?:model\.)?decoder\."
    block = decoder + r"layers\.(\d+)\."
    names = (
        (decoder + r"embed_tokens\.weight", "embedding.weight"),
        (decoder + r"embed_positions\.weight", "position_embedding.weight"),
        (block + r"self_attn_layer_norm\.(.+)", r"stack.blocks.\1.attention.norm.\2"),
        (block + r"self_attn\.out_proj\.(.+)", r"stack.blocks.\1.attention.sublayer.o_proj.\2"),
        (block + r"self_attn\.(.+)", r"stack.blocks.\1.attention.sublayer.\2"),
        (block + r"final_layer_norm\.(.+)", r"stack.blocks.\1.feed_forward.norm.\2"),
        (block + r"fc1\.(.+)", r"stack.blocks.\1.feed_forward.sublayer.up_proj.\2"),
        (block + r"fc2\.(.+)", r"stack.blocks.\1.feed_forward.sublayer.down_proj.\2"),
        (decoder + r"final_layer_norm\.(.+)", r"stack.final_norm.\1"),
        (r"lm_head\.weight", "head.weight"),
    )

    def prepare(state: State) -> State:
        return {
            name: tensor[_OPT_OFFSET:] if name.endswith("embed_positions.weight") else tensor
            for name, tensor in state.items()
        }

    return _Converted(sizes, parts, names, prepare=prepare)


_FAMILIES: dict[str, Callable[[Config], _Converted]] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
    "gpt2": _gpt2,
    "opt": _opt,
}


# torch's own encoder layer -------------------------------------------------------------------------------------------


def from_encoder_layer(layer: nn.TransformerEncoderLayer) -> Block:
    """torch's encoder layer as a `Block` with a copy of its weights: Pre-LN if it has ``norm_first``, Post-LN if not.

    Args:
        layer: With ReLU or GELU; batch-first or not, the block takes ``(batch, tokens, dim)``.

    Returns:
        A block in the layer's mode. Dropout is the layer's.

    Raises:
        InputError: Another activation, no biases, or unequal norms.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        >>> x = torch.randn(1, 5, 8)
        >>> torch.allclose(from_encoder_layer(layer)(x), layer(x), atol=1e-5)
        True
    """
    names = {torch.nn.functional.relu: nn.ReLU, torch.nn.functional.gelu: nn.GELU}
    activation = names.get(layer.activation) if not isinstance(layer.activation, nn.Module) else type(layer.activation)
    if activation not in (nn.ReLU, nn.GELU):
        raise InputError(f"expected an encoder layer with ReLU or GELU, got {layer.activation!r}")
    if layer.linear1.bias is None or layer.norm1.eps != layer.norm2.eps:
        raise InputError("expected an encoder layer with biases and the same eps in both norms")
    weight = layer.linear1.weight
    config = StackConfig(
        dim=layer.linear1.in_features,
        depth=1,
        num_heads=layer.self_attn.num_heads,
        hidden_dim=layer.linear1.out_features,
        bias=True,
        dropout=layer.dropout1.p,
        causal=False,
    )
    norm = partial(LayerNorm, eps=layer.norm1.eps)
    placement = PreNorm() if layer.norm_first else PostNorm()
    parts = Parts(placement, norm, norm, norm, Attention, partial(MLP, activation=activation))
    block = Block(config, parts, layer=1).to(weight.device, weight.dtype)
    block.load_state_dict(encoder_layer_state(layer.state_dict()))
    return block.train(layer.training)


def encoder_layer_state(state: Mapping[str, Tensor]) -> State:
    """The state dict of torch's encoder layer, or its gradients under the same names, named as in a `Block`.

    Args:
        state: With the keys of `torch.nn.TransformerEncoderLayer`.
    """
    found: State = {}
    renamed = {
        "self_attn.out_proj": "attention.sublayer.o_proj",
        "norm1": "attention.norm",
        "norm2": "feed_forward.norm",
        "linear1": "feed_forward.sublayer.up_proj",
        "linear2": "feed_forward.sublayer.down_proj",
    }
    for name, tensor in state.items():
        owner, _, leaf = name.rpartition(".")
        if leaf in ("in_proj_weight", "in_proj_bias"):
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                found[f"attention.sublayer.{letter}_proj.{leaf.removeprefix('in_proj_')}"] = part
        else:
            found[f"{renamed[owner]}.{leaf}"] = tensor
    return found
