"""Folders in Hugging Face's layout: what is there is loaded exactly, what is not is named."""

from __future__ import annotations

import json
import logging
import os
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import setpoint
from setpoint.errors import InputError
from setpoint.loading import batches_for, loss_for

transformers = pytest.importorskip("transformers")

Folder = Callable[[str], Path]


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("llama", "language-model"),
        ("gpt2", "language-model"),
        ("t5", "language-model"),
        ("bert", "encoder"),
        ("roberta", "encoder"),
        ("t5-encoder", "encoder"),
        ("vit", "image-classification"),
        ("resnet", "image-features"),
    ],
)
def test_every_family_loads_and_runs_on_its_default_inputs(folder: Folder, name: str, task: str) -> None:
    path = folder(name)
    loaded = setpoint.load(path)
    assert loaded.task == task
    assert loaded.source == str(path)
    assert not loaded.model.training
    batches = batches_for(loaded, tokens=100, count=2)
    with torch.no_grad():
        output = loaded.forward(loaded.model, batches[0])
    loss = loss_for(loaded)
    if task == "language-model":
        assert loss is not None
        assert 5 < loss(output, batches[0]) < 7  # a random model of 400 tokens: log 400 = 5.99
    else:
        assert loss is None


def test_weights_are_those_of_the_file(folder: Folder) -> None:
    path = folder("llama")
    stored = load_file(path / "model.safetensors")
    state = setpoint.load(path).model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in stored.items())
    assert set(stored) <= set(state)


def test_a_decoder_gets_the_second_half_of_each_window(folder: Folder) -> None:
    batch = batches_for(setpoint.load(folder("t5")), tokens=100, count=1)[0]
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "input_ids": (1, 50),
        "decoder_input_ids": (1, 50),
    }


def test_windows_are_cut_to_the_positions_that_a_model_has(folder: Folder) -> None:
    assert batches_for(setpoint.load(folder("gpt2")))[0]["input_ids"].shape == (1, 128)
    # RoBERTa starts counting behind its padding token: 66 rows hold 64 positions.
    loaded = setpoint.load(folder("roberta"))
    batch = batches_for(loaded)[0]
    assert batch["input_ids"].shape == (1, 64)
    loaded.forward(loaded.model, batch)


def test_no_cache_of_keys_and_values_is_built(folder: Folder) -> None:
    loaded = setpoint.load(folder("llama"))
    assert loaded.forward(loaded.model, {"input_ids": torch.tensor([[1, 2, 3]])}).past_key_values is None


def test_loading_is_silent_and_restores_what_it_silenced(folder: Folder, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging as hf_logging

    before = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled(), list(warnings.filters)
    hf_logging.set_verbosity_warning()
    try:
        setpoint.load(folder("gpt2"))
        assert hf_logging.get_verbosity() == logging.WARNING
    finally:
        hf_logging.set_verbosity(before[0])
    assert (hf_logging.is_progress_bar_enabled(), list(warnings.filters)) == before[1:]
    assert capfd.readouterr() == ("", "")


def test_loading_opens_no_connection(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def refuse(*arguments: Any, **keywords: Any) -> None:
        opened.append(arguments)
        raise OSError("no network in this test")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    path = folder("llama")
    with pytest.raises(InputError, match="could not be downloaded"):
        setpoint.load("someone/some-model", hub=True)
    assert opened  # so the trap works
    opened.clear()
    setpoint.load(path)
    assert not opened


def test_stored_half_precision_is_widened_and_said(folder: Folder) -> None:
    path = folder("llama")
    state = {name: value.bfloat16() for name, value in load_file(path / "model.safetensors").items()}
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    loaded = setpoint.load(path)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert loaded.notes == ("weights are stored as bfloat16, run in float32",)
    assert setpoint.load(path, dtype=torch.bfloat16).notes == ()


def test_a_sharded_model_loads_and_a_missing_shard_is_named(folder: Folder) -> None:
    path = folder("llama")
    state = load_file(path / "model.safetensors")
    names = sorted(state)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, its_names in shards.items():
        save_file({name: state[name] for name in its_names}, path / shard, metadata={"format": "pt"})
    index = {name: shard for shard, its_names in shards.items() for name in its_names}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (path / "model.safetensors").unlink()
    loaded = setpoint.load(path)
    assert all(torch.equal(loaded.model.state_dict()[name], value) for name, value in state.items())
    (path / "b.safetensors").unlink()
    with pytest.raises(InputError, match=r"b\.safetensors is missing"):
        setpoint.load(path)


# -- Damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.999])
def test_truncated_safetensors_are_named(folder: Folder, share: float) -> None:
    path = folder("llama") / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(InputError, match=r"model\.safetensors is truncated or damaged"):
        setpoint.load(path.parent)


def test_garbage_safetensors_are_named(folder: Folder) -> None:
    path = folder("bert") / "model.safetensors"
    path.write_bytes(os.urandom(4096))
    with pytest.raises(InputError, match=r"model\.safetensors is truncated or damaged"):
        setpoint.load(path.parent)


def test_missing_weights_are_an_error_and_not_a_random_draw(folder: Folder) -> None:
    path = folder("llama") / "model.safetensors"
    state = load_file(path)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks the weights of model\.layers\.1\.mlp\.up_proj\.weight"):
        setpoint.load(path.parent)


def test_weights_of_another_shape_are_an_error(folder: Folder) -> None:
    path = folder("llama")
    edit(path / "config.json", intermediate_size=64)
    with pytest.raises(InputError, match=r"weight .*mlp.* has shape \(.*48.*\), config\.json asks for \(.*64.*\)"):
        setpoint.load(path)


def test_weights_of_another_model_are_an_error(folder: Folder) -> None:
    path = folder("llama")
    (folder("gpt2") / "model.safetensors").replace(path / "model.safetensors")
    with pytest.raises(InputError, match="lacks the weights of"):
        setpoint.load(path)


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "\x00\x01"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_damaged_json_is_named(folder: Folder, name: str, content: str) -> None:
    path = folder("llama")
    (path / name).write_text(content)
    with pytest.raises(InputError, match=name.replace(".", r"\.")) as error:
        setpoint.load(path)
    assert "\n" not in str(error.value)


def test_a_tokenizer_file_that_holds_none_is_named(folder: Folder) -> None:
    path = folder("llama")
    (path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(InputError, match=r"tokenizer\.json holds no tokenizer"):
        setpoint.load(path)


def test_settings_that_cannot_be_are_one_line(folder: Folder) -> None:
    path = folder("llama")
    edit(path / "config.json", hidden_size="wide")
    with pytest.raises(InputError, match="could not be built by transformers") as error:
        setpoint.load(path)
    assert "\n" not in str(error.value)


def test_an_unknown_family_is_named(folder: Folder) -> None:
    path = folder("llama")
    edit(path / "config.json", model_type="llamma", architectures=["LlammaForCausalLM"])
    with pytest.raises(InputError, match="model_type 'llamma'"):
        setpoint.load(path)


def test_a_folder_without_a_config_or_without_weights_says_so(folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no config\.json"):
        setpoint.load(tmp_path)
    path = folder("llama")
    (path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"holds no weights: expected model\.safetensors"):
        setpoint.load(path)


def test_a_folder_with_only_a_gguf_file_names_it(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"give the file itself: .*m\.gguf"):
        setpoint.load(tmp_path)


def test_a_model_without_a_tokenizer_loads_but_reads_no_text(folder: Folder) -> None:
    path = folder("llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).unlink()
    loaded = setpoint.load(path)
    assert loaded.processor is None
    with pytest.raises(InputError, match="has no tokenizer"):
        batches_for(loaded)


def test_a_tokenizer_larger_than_the_embeddings_is_an_error(folder: Folder) -> None:
    path = folder("llama")
    edit(path / "config.json", vocab_size=50, bos_token_id=1, eos_token_id=2)
    state = load_file(path / "model.safetensors")
    state = {n: v[:50].clone() if "embed" in n or "lm_head" in n else v for n, v in state.items()}
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"the tokenizer gives token .* but the model has 50 embeddings"):
        batches_for(setpoint.load(path), tokens=64, count=1)


# -- Code ------------------------------------------------------------------------------------------------------------


def test_pickled_tensors_load(folder: Folder) -> None:
    path = folder("gpt2")
    state = load_file(path / "model.safetensors")
    torch.save(state, path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    loaded = setpoint.load(path)
    assert all(torch.equal(loaded.model.state_dict()[name], value) for name, value in state.items())


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.touch, (self.target,))


def test_a_pickle_that_would_run_code_is_refused_and_runs_none(folder: Folder, tmp_path: Path) -> None:
    path = folder("gpt2")
    (path / "model.safetensors").unlink()
    payloads = {"torch.nn.modules.linear.Linear": nn.Linear(2, 2), ".*": {"x": Bomb(tmp_path / "boom")}}
    for what, payload in payloads.items():
        torch.save(payload, path / "pytorch_model.bin")
        with pytest.raises(InputError, match=rf"pytorch_model\.bin is refused: it pickles {what}.* would run code"):
            setpoint.load(path)
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("content", [b"", b"garbage" * 9, b"PK\x03\x04half a zip"])
def test_a_damaged_pickle_is_named(folder: Folder, content: bytes) -> None:
    path = folder("gpt2")
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(InputError, match=r"pytorch_model\.bin is .*damaged"):
        setpoint.load(path)


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
from pathlib import Path
Path(r"{witness}").touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_in_a_folder_runs_only_when_trusted(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(cache))
    monkeypatch.syspath_prepend(str(cache))
    path, witness = folder("llama"), tmp_path / "ran"
    (path / "own.py").write_text(CODE.format(witness=witness))
    edit(
        path / "config.json",
        model_type="own",
        architectures=["OwnModel"],
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    )
    with pytest.raises(InputError, match=r"is refused: its config\.json asks to run code .* --trust-code"):
        setpoint.load(path)
    assert not witness.exists()
    loaded = setpoint.load(path, trust_code=True)
    assert type(loaded.model).__name__ == "OwnModel"
    assert loaded.task == "language-model"
    assert witness.exists()


def test_a_hub_id_needs_the_flag(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="add --hub"):
        setpoint.load("someone/some-model")


def test_a_hub_model_is_fetched_and_loaded_as_a_folder(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    path, asked = folder("llama"), []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, "*.py" in allow_patterns))
        return str(path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    loaded = setpoint.load("someone/some-model", hub=True)
    assert asked == [("someone/some-model", False)]
    assert loaded.source == "someone/some-model"


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(InputError, match="someone/x could not be downloaded from the hub: no route to host"):
        setpoint.load("someone/x", hub=True)


def test_a_preprocessor_config_decides_the_image_transform(folder: Folder) -> None:
    path = folder("vit")
    settings = {"size": {"height": 36, "width": 36}, "crop_size": 32, "do_center_crop": True}
    settings |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255}
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    transform = setpoint.load(path).processor
    assert (transform.crop, transform.resize, transform.mean) == (32, 36, (0.5, 0.5, 0.5))


def test_minilm_tells_paraphrases_from_strangers(packaged_model: Callable[[str], Any]) -> None:
    loaded = packaged_model("minilm")
    assert loaded.task == "encoder"
    texts = ["A man is eating food.", "Someone is having a meal.", "The stock market fell sharply."]
    vectors = []
    for text in texts:
        ids = torch.tensor([loaded.processor(text)["input_ids"]])
        with torch.no_grad():
            vectors.append(loaded.forward(loaded.model, {"input_ids": ids}).last_hidden_state.mean(1)[0])
    cosine = nn.functional.cosine_similarity
    assert cosine(vectors[0], vectors[1], dim=0) > 0.6
    assert cosine(vectors[0], vectors[2], dim=0) < 0.2
