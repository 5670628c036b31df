"""Inputs and losses: what `batches_for` gives and where it says it came from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import setpoint
from setpoint.errors import InputError
from setpoint.loading import batches_for, describe_data, loss_for

pytest.importorskip("transformers")

Folder = Callable[[str], Path]


def test_the_users_text_is_what_the_model_reads(folder: Folder, tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("the cat sat on the mat. " * 200)
    loaded = setpoint.load(folder("llama"))
    batches = batches_for(loaded, path, tokens=32, count=2)
    assert len(batches) == 2
    assert "the cat sat on the mat" in loaded.processor.decode(batches[0]["input_ids"][0])
    assert describe_data(loaded, path) == str(path)


def test_too_short_a_text_is_an_error_with_counts(folder: Folder, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("the cat sat on the mat")
    with pytest.raises(InputError, match=r"short\.txt has \d+ tokens, 256 are needed \(2 windows of 128\)"):
        batches_for(setpoint.load(folder("llama")), path, tokens=128, count=2)


def test_default_inputs_say_where_they_come_from(folder: Folder) -> None:
    assert describe_data(setpoint.load(folder("llama"))).startswith("Python 3.")
    assert describe_data(setpoint.load(folder("vit"))) == "pictures that ship with scikit-image"


def test_default_windows_are_the_same_every_time(folder: Folder) -> None:
    loaded = setpoint.load(folder("bert"))
    first, again = (torch.cat([b["input_ids"] for b in batches_for(loaded, tokens=64)]) for _ in range(2))
    assert first.shape == (4, 64)
    assert torch.equal(first, again)


def test_the_users_pictures_are_what_the_model_sees(folder: Folder, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for shade in (0, 255):
        image.new("L", (40, 40), shade).save(pictures / f"{shade}.png")
    batch = batches_for(setpoint.load(folder("vit")), pictures, count=5)[0]["pixel_values"]
    assert batch.shape == (2, 3, 32, 32)
    assert (batch[0] < 0).all()
    assert (batch[1] > 0).all()


def test_a_text_for_an_image_model_is_an_error(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(InputError, match="an image model reads a folder of pictures"):
        batches_for(setpoint.load(folder("vit")), tmp_path / "a.txt")


def test_data_for_a_model_of_ones_own_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"let the factory return \(model, batches\), --data is for"):
        batches_for(setpoint.load(nn.Linear(2, 2)), tmp_path)


def test_the_loss_is_the_one_that_transformers_computes(folder: Folder) -> None:
    loaded = setpoint.load(folder("gpt2"))
    batch = batches_for(loaded, tokens=60, count=1)[0]
    with torch.no_grad():
        output = loaded.forward(loaded.model, batch)
        theirs = loaded.model(**batch, labels=batch["input_ids"]).loss
    loss = loss_for(loaded)
    assert loss is not None
    assert torch.allclose(loss(output, batch), theirs, rtol=1e-6)


def test_the_loss_has_a_gradient_for_every_parameter(folder: Folder) -> None:
    loaded = setpoint.load(folder("t5"))
    batch = batches_for(loaded, tokens=60, count=1)[0]
    loss = loss_for(loaded)
    assert loss is not None
    loss(loaded.forward(loaded.model, batch), batch).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in loaded.model.parameters())


@pytest.mark.parametrize("ending", ["npy", "safetensors"])
@pytest.mark.parametrize(("shape", "windows"), [((200,), 2), ((3, 40), 2), ((1, 5), 1)])
def test_token_ids_are_read_without_a_tokenizer(
    folder: Folder, tmp_path: Path, ending: str, shape: tuple[int, ...], windows: int
) -> None:
    path = tmp_path / f"ids.{ending}"
    ids = torch.arange(torch.Size(shape).numel(), dtype=torch.int32).reshape(shape)
    np.save(path, ids.numpy()) if ending == "npy" else save_file({"ids": ids}, path)
    loaded = replace(setpoint.load(folder("llama")), processor=None)
    batches = batches_for(loaded, path, tokens=32, count=2)
    assert len(batches) == windows
    assert all(batch["input_ids"].shape == (1, min(32, shape[-1])) for batch in batches)
    assert all(batch["input_ids"][0].diff().eq(1).all() for batch in batches)
    loaded.forward(loaded.model, batches[0])


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (np.zeros((4, 8)), r"integers, got float64 \(4, 8\)"),
        (np.zeros((1, 2, 3), dtype=np.int64), r"got int64 \(1, 2, 3\)"),
        (np.full((1, 8), -1), "from 0 on, got -1"),
        (np.full((1, 8), 400_000), r"ids\.npy gives token 400,000 but the model has"),
        (np.zeros(8, dtype=np.int64), r"has 8 tokens, 64 are needed \(2 windows of 32\)"),
    ],
)
def test_what_are_no_token_ids_of_the_model_is_an_error(
    folder: Folder, tmp_path: Path, ids: np.ndarray, words: str
) -> None:
    np.save(tmp_path / "ids.npy", ids)
    with pytest.raises(InputError, match=words):
        batches_for(setpoint.load(folder("llama")), tmp_path / "ids.npy", tokens=32, count=2)


@pytest.mark.parametrize("name", ["ids.npy", "ids.safetensors"])
def test_damaged_token_ids_are_an_error(folder: Folder, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"none")
    with pytest.raises(InputError, match="can't be read as token ids"):
        batches_for(setpoint.load(folder("llama")), tmp_path / name)


def test_a_model_without_tokenizer_asks_for_token_ids(folder: Folder) -> None:
    with pytest.raises(InputError, match=r"no tokenizer.*--data IDS\.npy"):
        batches_for(replace(setpoint.load(folder("llama")), processor=None))
