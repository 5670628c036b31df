from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from setpoint.loading import load, packaged
from setpoint.loading.shelf import find
from setpoint.types import Loaded

WIDTH, BLOCKS, HEADS, KEY_HEADS, HIDDEN = 64, 2, 4, 2, 96


@pytest.fixture(scope="session")
def packaged_model() -> Callable[[str], Loaded]:
    """``packaged_model("vit-s")``: loaded once a session; the test is skipped where the package is not installed."""

    @cache
    def loaded(name: str) -> Loaded:
        model = packaged()[name]
        if not model.available:
            pytest.skip(f"{model.package} is not installed")
        return load(name)

    return loaded


@pytest.fixture(scope="session")
def smollm2(packaged_model: Callable[[str], Loaded]) -> Any:
    """SmolLM2, and gguf's own reader of its file."""
    import gguf

    return SimpleNamespace(loaded=packaged_model("smollm2"), reader=gguf.GGUFReader(find("smollm2")))


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level BPE of 400 tokens, learned from the default text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from setpoint.data.windows import default_text

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([default_text().content[:50_000]], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


@pytest.fixture(scope="session")
def _saved(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Callable[[str], Path]:
    """Tiny models of several families, each saved once."""
    import transformers as hf

    from setpoint.loading.quiet import quiet

    root = tmp_path_factory.mktemp("models")
    text = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    t5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 1}
    build: dict[str, Callable[[], Any]] = {
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**text, **sizes, max_position_embeddings=256)),
        "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**text, n_embd=32, n_layer=2, n_head=4, n_positions=128)),
        "bert": lambda: hf.BertModel(hf.BertConfig(**text, **sizes)),
        "roberta": lambda: hf.RobertaForMaskedLM(
            hf.RobertaConfig(**{**text, "pad_token_id": 1}, **sizes, max_position_embeddings=66)
        ),
        "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**text, **t5)),
        "t5-encoder": lambda: hf.T5EncoderModel(hf.T5Config(**text, **t5)),
        "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**sizes, image_size=32, patch_size=8)),
        "resnet": lambda: hf.ResNetModel(
            hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
        ),
    }

    def saved(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            torch.manual_seed(1)
            with quiet():
                build[name]().eval().save_pretrained(folder)
                if name not in ("vit", "resnet"):
                    tokenizer.save_pretrained(folder)
        return folder

    return saved


@pytest.fixture
def folder(tmp_path: Path, _saved: Callable[[str], Path]) -> Callable[[str], Path]:
    """``folder("llama")``: a copy of a tiny saved model that the test may damage."""
    return lambda name: Path(shutil.copytree(_saved(name), tmp_path / name))


@pytest.fixture(scope="session")
def _gguf(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Callable[..., Path]:
    """A tiny Llama-like model written as GGUF, each variant once."""
    import gguf

    root = tmp_path_factory.mktemp("gguf")

    def write(architecture: str = "llama", tied: bool = True, kind: str = "Q4_1", **changes: Any) -> Path:
        path = root / f"{architecture}-{tied}-{kind}-{'-'.join(map(str, changes))}.gguf"
        if path.exists():
            return path
        rng = np.random.default_rng(0)
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_name("tiny")
        writer.add_block_count(BLOCKS)
        writer.add_context_length(changes.get("context", 256))
        writer.add_embedding_length(WIDTH)
        writer.add_feed_forward_length(changes.get("hidden", HIDDEN))
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KEY_HEADS)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(10_000.0)
        writer.add_vocab_size(len(tokenizer))
        tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(changes.get("pre", "gpt-2"))
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token in ("<unk>", "<s>", "</s>") else 1 for token in tokens])
        merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
        writer.add_token_merges([" ".join(pair) for pair in merges])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_add_bos_token(changes.get("add_bos", False))

        def add(name: str, *shape: int) -> None:
            values = rng.normal(size=shape).astype(np.float32) / np.sqrt(shape[-1])
            quant = gguf.GGMLQuantizationType["F32" if len(shape) == 1 else "Q8_0" if "embd" in name else kind]
            raw = gguf.quants.quantize(values, quant)
            writer.add_tensor(name, raw, raw_dtype=quant)

        add("token_embd.weight", len(tokenizer), WIDTH)
        for block in range(BLOCKS):
            keys = WIDTH // HEADS * KEY_HEADS
            for name, rows, columns in (
                ("attn_q", WIDTH, WIDTH),
                ("attn_k", keys, WIDTH),
                ("attn_v", keys, WIDTH),
                ("attn_output", WIDTH, WIDTH),
                ("ffn_gate", HIDDEN, WIDTH),
                ("ffn_up", HIDDEN, WIDTH),
                ("ffn_down", WIDTH, HIDDEN),
            ):
                if (block, name) != changes.get("without"):
                    add(f"blk.{block}.{name}.weight", rows, columns)
                if architecture == "qwen2" and name in ("attn_q", "attn_k", "attn_v"):
                    add(f"blk.{block}.{name}.bias", rows)
            add(f"blk.{block}.attn_norm.weight", WIDTH)
            add(f"blk.{block}.ffn_norm.weight", WIDTH)
        add("output_norm.weight", WIDTH)
        if not tied:
            add("output.weight", len(tokenizer), WIDTH)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


@pytest.fixture
def gguf_file(tmp_path: Path, _gguf: Callable[..., Path]) -> Callable[..., Path]:
    """``gguf_file(...)``: a copy of a tiny GGUF file that the test may damage."""

    def copy(*arguments: Any, **changes: Any) -> Path:
        return Path(shutil.copy(_gguf(*arguments, **changes), tmp_path / "tiny.gguf"))

    return copy
