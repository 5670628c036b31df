"""GGUF files as torch models.

Plain Llama files (SmolLM2, Llama 2, TinyLlama) are built here directly: metadata to config, dequantized tensors to
weights, vocabulary and merges to tokenizer. It takes a few seconds where the general converter in transformers
takes several times as long. Every other family goes through that converter.

Two things differ between the file and the model that is built. Query and key rows are stored in the order of rotary
pairs (0, 1), (2, 3), …; transformers pairs row i with row i + head_dim/2, so the rows are put back. And the head is
absent from the file where it is tied to the embeddings.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from setpoint.errors import InputError
from setpoint.extras import require
from setpoint.loading.gguf_file import GGUFFile
from setpoint.loading.quiet import quiet
from setpoint.loading.wording import one_line
from setpoint.words import listed

_ROOT_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK_TENSOR = re.compile(rf"blk\.(\d+)\.({'|'.join(_BLOCK_NAMES)})\.weight")
_SPECIAL_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_SINGLE_DIGITS = {"smollm", "starcoder", "refact", "command-r"}
"""Pre-tokenizers that split every digit off and then split as GPT-2 does."""
_CONTROL, _USER_DEFINED = 3, 4


def load_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any, tuple[str, ...]]:
    """Build the model and the tokenizer that a GGUF file describes.

    Args:
        path: The file.
        dtype: What the dequantized weights are cast to.

    Returns:
        Model in eval mode, tokenizer, and notes on how the weights were stored.

    Raises:
        InputError: The file is damaged, incomplete, or of a family that cannot be built.
    """
    require("transformers", "hf", "to build models from GGUF files")
    file = GGUFFile.open(path)
    with quiet():
        model = _llama(file, dtype) if _is_plain_llama(file) else _converted(file, dtype)
        tokenizer = _tokenizer(file)
    return model.eval(), tokenizer, (describe_weights(file, dtype), *_not_applied(file))


def load_tokenizer(path: Path) -> Any:
    """The tokenizer that a GGUF file describes, without its weights.

    Args:
        path: The file.

    Raises:
        InputError: The file is damaged, or its vocabulary cannot be read.
    """
    require("transformers", "hf", "to build tokenizers from GGUF files")
    with quiet():
        return _tokenizer(GGUFFile.open(path))


def _tokenizer(file: GGUFFile) -> Any:
    return _byte_level_tokenizer(file) if _is_plain_byte_level(file) else _converted_tokenizer(file)


def describe_weights(file: GGUFFile, dtype: torch.dtype) -> str:
    """How the weights are stored, in one line, counted from the file's own table.

    Args:
        file: An open GGUF file.
        dtype: What they are cast to.

    Returns:
        For example "weights are 4-bit (Q4_1 in groups of 32, embeddings Q8_0), dequantized to float32".
    """
    target = str(dtype).removeprefix("torch.")
    sizes: Counter[str] = Counter()
    for tensor in file.tensors.values():
        if len(tensor.shape) > 1 and tensor.name not in _ROOT_NAMES:
            sizes[tensor.kind] += prod(tensor.shape)
    kinds = [kind for kind, _ in sizes.most_common()]
    if not kinds:
        return f"weights run in {target}"
    main = kinds[0]
    if main in ("F32", "F16", "BF16"):
        return f"weights are stored as {main}, run in {target}"
    block, _ = require("gguf.constants", "hf", "to read GGUF files").GGML_QUANT_SIZES[_kind(main)]
    parts = [f"{main} in groups of {block}", *kinds[1:]]
    embedding = file.tensors.get("token_embd.weight")
    if embedding is not None and embedding.kind != main:
        parts.append(f"embeddings {embedding.kind}")
    bits = re.search(r"\d+", main)
    return f"weights are {bits.group() if bits else main}-bit ({', '.join(parts)}), dequantized to {target}"


def _not_applied(file: GGUFFile) -> list[str]:
    """What the file asks for and the general converter passes over in silence."""
    scaled = "rope_freqs.weight" in file.tensors or any(".rope.scaling." in key for key in file.metadata)
    if not scaled or file.architecture == "gpt-oss":
        return []
    return ["the rotary scaling that the file asks for is not applied; figures for long inputs are off"]


def _kind(name: str) -> Any:
    return require("gguf.constants", "hf", "to read GGUF files").GGMLQuantizationType[name]


# --------------------------------------------------------------------------------------------------------------------
# Llama, directly


def _is_plain_llama(file: GGUFFile) -> bool:
    """Whether every tensor and rotary setting is one that `_llama` understands."""
    heads = file.metadata.get("llama.attention.head_count") or 1
    head_dim = file.metadata.get("llama.attention.key_length", file.metadata.get("llama.embedding_length", 0) // heads)
    return (
        file.architecture == "llama"
        and file.metadata.get("llama.rope.dimension_count", head_dim) == head_dim
        and all(name in _ROOT_NAMES or _BLOCK_TENSOR.fullmatch(name) for name in file.tensors)
        and not any(".rope.scaling." in key for key in file.metadata)
    )


def _llama(file: GGUFFile, dtype: torch.dtype) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = file.need("llama.attention.head_count")
    key_heads = file.metadata.get("llama.attention.head_count_kv", heads)
    width = file.need("llama.embedding_length")
    tied = "output.weight" not in file.tensors
    embedding = file.tensors.get("token_embd.weight")
    vocabulary = embedding.shape[0] if embedding is not None else file.need("llama.vocab_size")
    try:
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=file.need("llama.feed_forward_length"),
            num_hidden_layers=file.need("llama.block_count"),
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            head_dim=file.metadata.get("llama.attention.key_length", width // heads),
            max_position_embeddings=file.need("llama.context_length"),
            rms_norm_eps=file.need("llama.attention.layer_norm_rms_epsilon"),
            rope_parameters={"rope_type": "default", "rope_theta": file.metadata.get("llama.rope.freq_base", 10_000.0)},
            tie_word_embeddings=tied,
            bos_token_id=file.metadata.get("tokenizer.ggml.bos_token_id"),
            eos_token_id=file.metadata.get("tokenizer.ggml.eos_token_id"),
            pad_token_id=file.metadata.get("tokenizer.ggml.padding_token_id"),
        )
        with torch.device("meta"):
            expected = {name: tuple(value.shape) for name, value in LlamaForCausalLM(config).state_dict().items()}
    except (TypeError, ValueError, ZeroDivisionError, RuntimeError) as error:
        raise InputError(f"{file.path} describes no Llama that can be built: {one_line(error)}") from error
    _require_same_shapes(file, expected, tied)
    weights = {}
    for name in file.tensors:
        value = file.tensor(name)
        if ".attn_q." in name or ".attn_k." in name:
            value = _rows_for_half_rotation(value, heads if ".attn_q." in name else key_heads)
        weights[_transformers_name(name)] = value.to(dtype)
    model, info = LlamaForCausalLM.from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
    )
    assert not info["missing_keys"], info
    return model


def _require_same_shapes(file: GGUFFile, expected: dict[str, tuple[int, ...]], tied: bool) -> None:
    """Hold the file's table against the model that its metadata describes, before any weight is read."""
    present = {_transformers_name(name): tensor for name, tensor in file.tensors.items()}
    absent = [name for name in expected if name not in present and not (tied and name == "lm_head.weight")]
    surplus = [tensor.name for name, tensor in present.items() if name not in expected]
    if absent or surplus:
        wrong = f"lacks the weights of {listed(absent)}" if absent else f"has {listed(surplus)} beyond its stated depth"
        raise InputError(f"{file.path} {wrong}")
    for name, shape in expected.items():
        if name in present and present[name].shape != shape:
            raise InputError(
                f"{file.path}: tensor {present[name].name!r} has shape {present[name].shape}, "
                f"its metadata asks for {shape}"
            )


def _transformers_name(name: str) -> str:
    block = _BLOCK_TENSOR.fullmatch(name)
    return f"model.layers.{block[1]}.{_BLOCK_NAMES[block[2]]}.weight" if block else _ROOT_NAMES[name]


def _rows_for_half_rotation(weight: Tensor, heads: int) -> Tensor:
    """Reorder rows from adjacent rotary pairs to pairs half a head apart, ``(heads * head_dim, width)``."""
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


# --------------------------------------------------------------------------------------------------------------------
# Tokenizer, directly


def _is_plain_byte_level(file: GGUFFile) -> bool:
    splits = _SINGLE_DIGITS | {"gpt-2", "default"}
    return (
        file.metadata.get("tokenizer.ggml.model") == "gpt2"
        and file.metadata.get("tokenizer.ggml.pre", "default") in splits
        and "tokenizer.ggml.merges" in file.metadata
    )


def _byte_level_tokenizer(file: GGUFFile) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = file.need("tokenizer.ggml.tokens")
    if "token_embd.weight" in file.tensors and len(tokens) > file.tensors["token_embd.weight"].shape[0]:
        raise InputError(
            f"{file.path} has {len(tokens):,} tokens but only {file.tensors['token_embd.weight'].shape[0]:,} embeddings"
        )
    pairs = [tuple(merge.split(" ")) for merge in file.need("tokenizer.ggml.merges")]
    try:
        tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=pairs))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise InputError(f"{file.path} has an inconsistent vocabulary: {one_line(error)}") from error
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    single_digits = file.metadata.get("tokenizer.ggml.pre") in _SINGLE_DIGITS
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
        if single_digits
        else byte_level
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = file.metadata.get("tokenizer.ggml.token_type", [])
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        marked = [token for token, its_kind in zip(tokens, kinds, strict=False) if its_kind == kind]
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=special) for token in marked])
    special_ids = {
        role: file.metadata[f"tokenizer.ggml.{key}"]
        for role, key in _SPECIAL_TOKENS.items()
        if f"tokenizer.ggml.{key}" in file.metadata
    }
    for role, index in special_ids.items():
        if not 0 <= index < len(tokens):
            raise InputError(f"{file.path}: {role} is token {index:,}, the vocabulary has {len(tokens):,}")
    if file.metadata.get("tokenizer.ggml.add_bos_token", False) and "bos_token" in special_ids:
        bos = tokens[special_ids["bos_token"]]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, special_ids["bos_token"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=file.metadata.get("tokenizer.chat_template"),
        model_max_length=file.metadata.get(f"{file.architecture}.context_length"),
        clean_up_tokenization_spaces=False,
        **{role: tokens[index] for role, index in special_ids.items()},
    )


# --------------------------------------------------------------------------------------------------------------------
# Every other family, by the general converter


def _converted(file: GGUFFile, dtype: torch.dtype) -> Any:
    from transformers import AutoModel, AutoModelForCausalLM

    require("accelerate", "hf", "to convert GGUF files")
    kwargs = {"gguf_file": file.path.name, "dtype": dtype, "local_files_only": True, "output_loading_info": True}
    auto = AutoModel if "bert" in file.architecture or file.architecture == "t5encoder" else AutoModelForCausalLM
    model, info = _convert(file, lambda: auto.from_pretrained(file.path.parent, **kwargs))
    if info["missing_keys"] or info["mismatched_keys"]:
        names = [*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])]
        raise InputError(f"{file.path} lacks the weights of {listed(names)}")
    return model


def _converted_tokenizer(file: GGUFFile) -> Any:
    from transformers import AutoTokenizer

    return _convert(
        file,
        lambda: AutoTokenizer.from_pretrained(file.path.parent, gguf_file=file.path.name, local_files_only=True),
    )


def _convert(file: GGUFFile, build: Any) -> Any:
    """Run the converter; its progress bar obeys no setting, so what it writes to standard error is dropped."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return build()
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{file.path} ({file.architecture}) could not be converted by transformers: {one_line(error)}"
        ) from error
