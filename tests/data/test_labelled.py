from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from setpoint import data
from setpoint.errors import InputError


def test_digits_are_what_scikit_learn_loads() -> None:
    from sklearn.datasets import load_digits

    found, given = data.images("digits"), load_digits()
    pixels = torch.cat([found.train.images, found.valid.images, found.test.images]).flatten(1)
    assert np.array_equal(pixels.numpy(), given.data)
    assert torch.cat([found.train.labels, found.valid.labels, found.test.labels]).tolist() == given.target.tolist()
    assert found.shape == (1, 8, 8)


def test_inputs_have_zero_mean_and_unit_variance_over_train() -> None:
    found = data.images("digits")
    inputs = found.inputs(found.train.images)
    assert inputs.mean().item() == pytest.approx(0, abs=1e-5)
    assert inputs.std().item() == pytest.approx(1, abs=1e-3)


def test_batches_are_images_and_their_labels() -> None:
    found = data.images("digits")
    images, labels = next(iter(found.batches("train", 16, seed=1)))
    assert images.shape == (16, 1, 8, 8)
    assert images.dtype == torch.float32
    assert labels.shape == (16,)
    assert sum(len(labels) for _, labels in found.batches("test", 64)) == 300
    assert sum(len(labels) for _, labels in found.batches("test", 64, limit=100)) == 100
    whole = torch.cat([images for images, _ in found.batches("test", 64)])
    assert torch.equal(whole, found.inputs(found.test.images))


def write_idx(folder: Path, train: int = 5100, test: int = 20) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("t10k", test)):
        pixels = (np.arange(count * 784) % 251).astype(np.uint8)
        with gzip.open(folder / f"{split}-images-idx3-ubyte.gz", "wb", 1) as file:
            file.write(b"\0\0\x08\x03" + struct.pack(">III", count, 28, 28) + pixels.tobytes())
        with gzip.open(folder / f"{split}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(b"\0\0\x08\x01" + struct.pack(">I", count) + (np.arange(count) % 10).astype(np.uint8).tobytes())


def test_idx_files_keep_the_makers_test_set(cache: Path) -> None:
    write_idx(cache / "data" / "sets" / "mnist")
    found = data.images("mnist")
    assert [len(found.train), len(found.valid), len(found.test)] == [100, 5000, 20]
    assert found.train.images[0, 0, 0, :3].tolist() == [0, 1, 2]
    assert found.valid.labels[:3].tolist() == [0, 1, 2]


def test_a_damaged_idx_file_is_named(cache: Path) -> None:
    folder = cache / "data" / "sets" / "mnist"
    write_idx(folder)
    whole = (folder / "train-images-idx3-ubyte.gz").read_bytes()
    (folder / "train-images-idx3-ubyte.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"mnist in .* is damaged"):
        data.images("mnist")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    pil = pytest.importorskip("PIL.Image")
    for label, name in enumerate(("cats", "dogs")):
        (tmp_path / name).mkdir()
        for number in range(10):
            pil.new("RGB", (40, 48), (20 * number, 100 * label, 7)).save(tmp_path / name / f"{number}.png")
    return tmp_path


def test_a_folder_has_one_subfolder_a_class(pictures: Path) -> None:
    found = data.images(pictures, size=16)
    assert found.classes == ("cats", "dogs")
    assert [len(found.train), len(found.valid), len(found.test)] == [16, 2, 2]
    assert found.shape == (3, 16, 16)
    assert all(
        int(image[1, 0, 0]) == 100 * int(label)
        for image, label in zip(found.train.images, found.train.labels, strict=True)
    )


def test_copies_of_a_picture_are_left_out(pictures: Path) -> None:
    copy = (pictures / "cats" / "3.png").read_bytes()
    (pictures / "dogs" / "copy.png").write_bytes(copy)
    found = data.images(pictures)
    assert len(found.train) + len(found.valid) + len(found.test) == 20


def test_too_few_pictures_and_wrong_sources_are_named(pictures: Path) -> None:
    for path in list((pictures / "dogs").iterdir())[2:]:
        path.unlink()
    with pytest.raises(InputError, match="dogs has 2 different pictures"):
        data.images(pictures)
    with pytest.raises(InputError, match="has 0 subfolders"):
        data.images(pictures / "cats")
    with pytest.raises(InputError, match="is a file"):
        data.images(pictures / "cats" / "1.png")
    with pytest.raises(InputError, match=r"setpoint\.data\.text"):
        data.images("python-stdlib")
    with pytest.raises(InputError, match="train, valid, test"):
        data.images("digits").batches("dev", 1)
