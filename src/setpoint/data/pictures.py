"""Pictures for image models: those inside scikit-image, or a folder of the user's, and the transform to tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from setpoint.errors import InputError
from setpoint.extras import require

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")

_PICTURES = (
    "chelsea.png",
    "coffee.png",
    "astronaut.png",
    "rocket.jpg",
    "motorcycle_left.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "retina.jpg",
    "camera.png",
    "coins.png",
    "horse.png",
    "page.png",
    "moon.png",
    "grass.png",
    "gravel.png",
    "brick.png",
)
"""What scikit-image ships inside its package; photographs in colour first."""


@dataclass(frozen=True, slots=True)
class ImageTransform:
    """Resize the short side, cut out the centre, scale to [0, 1], normalize per channel.

    Args:
        crop: Side of the square that is cut out, in pixels.
        resize: Length that the short side is brought to, in pixels; at least ``crop``.
        mean, std: Per channel, red green blue, on the scale of [0, 1].

    >>> from PIL import Image
    >>> ImageTransform(crop=32, resize=36)(Image.new("RGB", (64, 48))).shape
    torch.Size([3, 32, 32])
    """

    crop: int = 224
    resize: int = 256
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        if not 0 < self.crop <= self.resize:
            raise InputError(f"expected 0 < crop <= resize, got crop {self.crop} and resize {self.resize}")

    def __call__(self, image: Image) -> Tensor:
        """Turn one picture into a ``(3, crop, crop)`` float32 tensor."""
        image = image.convert("RGB")
        scale = self.resize / min(image.size)
        width, height = (max(self.crop, round(side * scale)) for side in image.size)
        left, top = (width - self.crop) // 2, (height - self.crop) // 2
        # 2 is PIL's bilinear filter, which averages when it shrinks.
        image = image.resize((width, height), 2).crop((left, top, left + self.crop, top + self.crop))
        pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255.0).permute(2, 0, 1)
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return ((pixels - mean) / std).contiguous()


def picture_paths(count: int) -> list[Path]:
    """Files of the pictures inside scikit-image.

    Args:
        count: How many, at most 16.

    Returns:
        ``count`` paths, the same every time.

    Raises:
        InputError: scikit-image is not installed, or has fewer.
    """
    skimage = require("skimage", "vision", "for the default pictures (or give a folder of your own with --data)")
    folder = Path(str(skimage.__file__)).parent / "data"
    paths = [folder / name for name in _PICTURES if (folder / name).is_file()]
    if len(paths) < count:
        raise InputError(f"scikit-image ships {len(paths)} pictures, {count} were asked for; give a folder with --data")
    return paths[:count]


def folder_paths(folder: str | Path, count: int) -> list[Path]:
    """Pictures of a folder, in order of their names.

    Args:
        folder: Holds files that end in .jpg, .jpeg, .png, .bmp or .webp; subfolders are searched too.
        count: How many are wanted; fewer are returned if there are fewer.

    Returns:
        Between one and ``count`` paths.

    Raises:
        InputError: There is no such folder, or no picture in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise InputError(f"{folder} {what}; an image model reads a folder of pictures")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise InputError(f"{folder} holds no picture (looked for {', '.join(SUFFIXES)})")
    return paths[:count]


def read_images(paths: list[Path], transform: Any) -> Tensor:
    """Read pictures and stack them.

    Args:
        paths: Picture files.
        transform: From a PIL image to a ``(3, height, width)`` tensor.

    Returns:
        ``(len(paths), 3, height, width)``.

    Raises:
        InputError: A picture is damaged; it is named.
    """
    pil = require("PIL.Image", "vision", "to read pictures")
    tensors = []
    for path in paths:
        try:
            with pil.open(path) as image:
                image.load()
                tensors.append(transform(image))
        except (OSError, SyntaxError, ValueError, pil.DecompressionBombError) as error:
            reason = " ".join(str(error).split()).replace(str(path), path.name)
            raise InputError(f"{path} is not a picture that can be read: {reason}") from error
    return torch.stack(tensors)
