from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from setpoint.data.pictures import ImageTransform, folder_paths, picture_paths, read_images
from setpoint.errors import InputError

Image = pytest.importorskip("PIL.Image")


def save(path: Path, width: int = 40, height: int = 30) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, size=(height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_the_transform_normalizes_each_channel() -> None:
    transform = ImageTransform(crop=8, resize=8, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))
    pixels = transform(Image.new("RGB", (8, 8), (255, 0, 51)))
    assert torch.allclose(pixels[:, 4, 4], torch.tensor([1.0, -1.0, 0.2]))


def test_the_transform_cuts_out_the_centre() -> None:
    picture = Image.new("RGB", (30, 10), (0, 0, 0))
    picture.paste((255, 255, 255), (10, 0, 20, 10))
    pixels = ImageTransform(crop=10, resize=10, mean=(0, 0, 0), std=(1, 1, 1))(picture)
    assert torch.equal(pixels, torch.ones(3, 10, 10))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_every_kind_of_picture_becomes_three_channels(mode: str) -> None:
    assert ImageTransform(crop=16, resize=20)(Image.new(mode, (50, 17))).shape == (3, 16, 16)


def test_a_crop_larger_than_the_picture_is_an_error() -> None:
    with pytest.raises(InputError, match="crop 9 and resize 8"):
        ImageTransform(crop=9, resize=8)


def test_scikit_image_has_pictures_for_everyone() -> None:
    pytest.importorskip("skimage")
    paths = picture_paths(16)
    assert len({path.name for path in paths}) == 16
    assert read_images(paths, ImageTransform(32, 32)).shape == (16, 3, 32, 32)
    with pytest.raises(InputError, match="ships 16 pictures, 17 were asked for"):
        picture_paths(17)


def test_a_folder_is_read_in_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.png", "a.JPG", "sub/c.jpeg"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    assert [path.name for path in folder_paths(tmp_path, 9)] == ["a.JPG", "b.png", "c.jpeg"]
    assert len(folder_paths(tmp_path, 2)) == 2


def test_an_empty_folder_a_file_and_nothing_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no picture"):
        folder_paths(tmp_path, 1)
    with pytest.raises(InputError, match="is a file; an image model reads a folder"):
        folder_paths(save(tmp_path / "a.png"), 1)
    with pytest.raises(InputError, match="does not exist"):
        folder_paths(tmp_path / "none", 1)


def test_a_broken_picture_is_named(tmp_path: Path) -> None:
    good, cut, fake = save(tmp_path / "a.png"), save(tmp_path / "b.png"), tmp_path / "c.jpg"
    cut.write_bytes(cut.read_bytes()[:200])
    fake.write_bytes(b"not a picture")
    for path in (cut, fake):
        with pytest.raises(InputError, match=rf"{path.name} is not a picture that can be read") as error:
            read_images([good, path], ImageTransform(8, 8))
        assert "\n" not in str(error.value)
