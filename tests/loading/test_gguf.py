"""GGUF files: exact weights, right tokens, and a clear line for every kind of damage."""

from __future__ import annotations

import contextlib
import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import setpoint
from setpoint.data.windows import default_text
from setpoint.errors import InputError
from setpoint.loading.gguf_file import GGUFFile
from setpoint.loading.shelf import find

pytest.importorskip("transformers")
pytest.importorskip("gguf")

HEADS, KEY_HEADS = 4, 2  # of the tiny files
PROMPT = (
    "3299 16797 6966 16299 13867 216 34 30 32 28 4450 216 34 32 32 36 "
    "3337 3622 1742 3065 30 24874 30 2295 31 21571 31 39892 312 1754 5247 7485"
)


def decode(raw: np.ndarray, kind: str) -> np.ndarray:
    """Blocks to numbers, written from the format's description alone: an independent reader."""
    if kind == "F32":
        return raw.view(np.float32)
    raw = raw.reshape(-1, {"Q4_1": 20, "Q8_0": 34}[kind])
    scale = raw[:, :2].copy().view(np.float16).astype(np.float32)
    if kind == "Q8_0":
        return (raw[:, 2:].view(np.int8).astype(np.float32) * scale).ravel()
    low = raw[:, 2:4].copy().view(np.float16).astype(np.float32)
    codes = np.concatenate([raw[:, 4:] & 15, raw[:, 4:] >> 4], axis=1).astype(np.float32)
    return (codes * scale + low).ravel()


def rows_of_half_rotation(heads: int, head_dim: int) -> np.ndarray:
    """For each row that transformers expects, the row of the file that holds it."""
    half = head_dim // 2
    return np.array([head * head_dim + 2 * (i % half) + i // half for head in range(heads) for i in range(head_dim)])


def general_converter(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    from setpoint.loading.quiet import quiet

    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


@pytest.mark.parametrize(
    ("ours", "theirs", "heads"),
    [
        ("model.embed_tokens.weight", "token_embd.weight", 0),
        ("model.norm.weight", "output_norm.weight", 0),
        ("model.layers.0.self_attn.q_proj.weight", "blk.0.attn_q.weight", 9),
        ("model.layers.29.self_attn.k_proj.weight", "blk.29.attn_k.weight", 3),
        ("model.layers.11.self_attn.v_proj.weight", "blk.11.attn_v.weight", 0),
        ("model.layers.12.self_attn.o_proj.weight", "blk.12.attn_output.weight", 0),
        ("model.layers.5.mlp.gate_proj.weight", "blk.5.ffn_gate.weight", 0),
        ("model.layers.17.mlp.down_proj.weight", "blk.17.ffn_down.weight", 0),
    ],
)
def test_smollm2_weights_are_what_the_bytes_say(smollm2: Any, ours: str, theirs: str, heads: int) -> None:
    tensor = next(tensor for tensor in smollm2.reader.tensors if tensor.name == theirs)
    expected = decode(np.asarray(tensor.data).reshape(-1).view(np.uint8), tensor.tensor_type.name)
    expected = expected.reshape(tuple(tensor.shape)[::-1])
    if heads:
        expected = expected[rows_of_half_rotation(heads, expected.shape[0] // heads)]
    np.testing.assert_array_equal(smollm2.loaded.model.state_dict()[ours].numpy(), expected)


def test_smollm2_says_that_its_weights_are_four_bit(smollm2: Any) -> None:
    assert smollm2.loaded.notes == (
        "weights are 4-bit (Q4_1 in groups of 32, embeddings Q8_0), dequantized to float32",
    )
    assert smollm2.loaded.task == "language-model"
    assert not smollm2.loaded.model.training
    assert smollm2.loaded.model.lm_head.weight is smollm2.loaded.model.model.embed_tokens.weight
    assert sum(p.numel() for p in smollm2.loaded.model.parameters()) == 134_515_008


@pytest.mark.parametrize("text", ["Hello, world", "  x = 1999\n\t# naïve 日本 🙂", "<|im_start|>user\nhi<|im_end|>"])
def test_smollm2_tokenizer_gives_the_text_back(smollm2: Any, text: str) -> None:
    tokenizer = smollm2.loaded.processor
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_smollm2_tokenizer_agrees_with_the_general_converter_on_text_without_digits(smollm2: Any) -> None:
    from transformers import AutoTokenizer

    from setpoint.loading.quiet import quiet

    path = find("smollm2")
    with quiet():
        theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = "".join(c for c in default_text().content[:60_000] if not c.isdigit()) + "<|im_end|>é ünï 日本"
    assert smollm2.loaded.processor(text)["input_ids"] == theirs(text)["input_ids"]
    # The file names a pre-tokenizer that splits digits off first, which the general converter passes over.
    assert smollm2.loaded.processor.tokenize("a   12") == ["a", "ĠĠĠ", "1", "2"]


def test_smollm2_logits_are_those_of_llama_cpp(smollm2: Any) -> None:
    prompt = [int(token) for token in PROMPT.split()]
    # llama.cpp (build 11549) on the same weights widened to F32, so that it does not round activations to 8 bits.
    theirs = {26819: -1.6949, 28158: -2.9019, 422: -3.061, 13454: -3.6243, 14250: -3.9856, 28051: -3.9871}
    with torch.no_grad():
        logits = smollm2.loaded.model(torch.tensor([prompt])).logits[0, -1].double()
    ours = logits.log_softmax(-1)
    assert ours.topk(len(theirs)).indices.tolist() == list(theirs)
    assert [ours[token].item() for token in theirs] == pytest.approx(list(theirs.values()), abs=1e-3)


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_file_gives_the_weights_of_the_general_converter(gguf_file: Callable[..., Path], tied: bool) -> None:
    path = gguf_file(tied=tied)
    ours, theirs = setpoint.load(path).model, general_converter(path)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs.eval()(ids).logits)


def test_rotary_rows_are_put_back_in_order(gguf_file: Callable[..., Path]) -> None:
    path = gguf_file()
    file, model = GGUFFile.open(path), setpoint.load(path).model
    for name, ours, heads in (("attn_q", "q_proj", HEADS), ("attn_k", "k_proj", KEY_HEADS)):
        stored = file.tensor(f"blk.1.{name}.weight").numpy()
        expected = stored[rows_of_half_rotation(heads, stored.shape[0] // heads)]
        got = model.get_parameter(f"model.layers.1.self_attn.{ours}.weight").detach().numpy()
        np.testing.assert_array_equal(got, expected)
        assert not np.array_equal(got, stored)


def test_another_family_goes_through_the_general_converter(
    gguf_file: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    path = gguf_file("qwen2", tied=False, kind="Q8_0")
    loaded = setpoint.load(path)
    assert type(loaded.model).__name__ == "Qwen2ForCausalLM"
    bias = GGUFFile.open(path).tensor("blk.1.attn_q.bias")
    assert torch.equal(loaded.model.get_parameter("model.layers.1.self_attn.q_proj.bias"), bias)
    assert loaded.notes == ("weights are 8-bit (Q8_0 in groups of 32), dequantized to float32",)
    assert capfd.readouterr() == ("", "")


def test_weights_can_run_in_another_type_without_a_word(
    gguf_file: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    loaded = setpoint.load(gguf_file(), dtype="bfloat16")
    assert capfd.readouterr() == ("", "")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert "dequantized to bfloat16" in loaded.notes[0]


def test_a_file_that_asks_for_a_first_token_gets_one(gguf_file: Callable[..., Path]) -> None:
    tokenizer = setpoint.load(gguf_file(add_bos=True)).processor
    assert tokenizer("hello")["input_ids"][0] == 1
    assert tokenizer("hello")["input_ids"][1:] == tokenizer("hello", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_named(gguf_file: Callable[..., Path], share: float) -> None:
    path = gguf_file()
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * share)])
    with pytest.raises(InputError, match=r"tiny\.gguf is truncated") as error:
        setpoint.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"GGU", b"\0" * 64, b"not a model at all"])
def test_a_file_that_is_no_gguf_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.gguf is not a GGUF file: it starts with"):
        setpoint.load(path)


def test_an_unknown_version_is_named(gguf_file: Callable[..., Path]) -> None:
    path = gguf_file()
    raw = bytearray(path.read_bytes())
    raw[4:8] = struct.pack("<I", 9)
    path.write_bytes(raw)
    with pytest.raises(InputError, match="GGUF version 9"):
        setpoint.load(path)


def test_random_bytes_in_the_header_never_give_a_traceback(gguf_file: Callable[..., Path]) -> None:
    path = gguf_file()
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    messages = []
    for _ in range(40):
        raw = bytearray(whole)
        for at in rng.integers(8, 400, size=3):
            raw[at] = rng.integers(256)
        path.write_bytes(raw)
        try:
            GGUFFile.open(path)
        except InputError as error:
            messages.append(str(error))
    assert len(messages) > 10
    assert all(str(path) in message and "\n" not in message for message in messages)


def test_an_absent_tensor_is_named(gguf_file: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=r"lacks the weights of model\.layers\.1\.mlp\.up_proj\.weight"):
        setpoint.load(gguf_file(without=(1, "ffn_up")))


def test_a_tensor_of_the_wrong_shape_is_named(gguf_file: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=r"'blk\.0\.ffn_gate\.weight' has shape \(96, 64\), .* asks for \(128, 64\)"):
        setpoint.load(gguf_file(hidden=128))


def test_an_unknown_family_is_named(gguf_file: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=r"tiny\.gguf \(rwkv7\) could not be converted"):
        setpoint.load(gguf_file("rwkv7"))
