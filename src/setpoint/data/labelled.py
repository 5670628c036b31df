"""Images with labels, for classifiers: the named sets, or a folder of the user's with one subfolder a class."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from setpoint.data.batches import Batches, Index
from setpoint.data.origins import fingerprint
from setpoint.data.pictures import SUFFIXES, ImageTransform, read_images
from setpoint.data.shelf import locate, named
from setpoint.errors import InputError

_SPLITS = ("train", "valid", "test")


@dataclass(frozen=True, eq=False)
class Labelled:
    """One split: ``images`` (images, channels, height, width) as uint8, ``labels`` (images,) as int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class ImageData:
    """Images with labels in three splits.

    Args:
        train, valid, test: The splits.
        classes: Name of each label.
        white: Value of a white pixel in the stored images.
        mean, std: Per channel over the train split, on the scale of [0, 1].
        origin: Where they came from.
        license: Their licence, "" for the user's own.
        fingerprint: Changes with the images, labels and splits.
    """

    train: Labelled
    valid: Labelled
    test: Labelled
    classes: tuple[str, ...]
    white: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    origin: str
    license: str
    fingerprint: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        _, channels, height, width = self.train.images.shape
        return channels, height, width

    def inputs(self, images: Tensor) -> Tensor:
        """Stored images as a model takes them: float32, per channel zero mean and unit variance over ``train``.

        Args:
            images: uint8, ``(batch, channels, height, width)``.
        """
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (images.float() / self.white - mean) / std

    def batches(
        self, split: str, batch_size: int, seed: int = 0, *, limit: int | None = None
    ) -> Batches[tuple[Tensor, Tensor]]:
        """Images and their labels.

        Args:
            split: ``"train"`` is endless, every epoch in another order; ``"valid"`` and ``"test"`` are one pass.
            batch_size: Images in a batch.
            seed: Order of the endless stream.
            limit: At most so many images of a pass, spread evenly over the split.

        Returns:
            Batches ``(images, labels)``: float32 ``(batch, channels, height, width)`` and int64 ``(batch,)``.

        Raises:
            InputError: An unknown split, or a batch larger than the split.
        """
        if split not in _SPLITS:
            raise InputError(f"expected a split of {', '.join(_SPLITS)}, got {split!r}")
        part: Labelled = getattr(self, split)
        endless = split == "train"
        count, every = len(part), 1.0
        if limit is not None and not endless:
            if limit < 1:
                raise InputError(f"expected a limit of at least one image, got {limit}")
            every = max(1.0, count / limit)
            count = min(count, limit)

        def make(items: Index, epoch: int) -> tuple[Tensor, Tensor]:  # noqa: ARG001
            chosen = torch.from_numpy((items * every).astype(np.int64))
            return self.inputs(part.images[chosen]), part.labels[chosen]

        return Batches(make, count, batch_size, seed if endless else None)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{split} {len(getattr(self, split)):,}" for split in _SPLITS)
        return f"ImageData({self.origin}; {self.shape}, {len(self.classes)} classes; {sizes} images)"


def images(source: str | Path, *, size: int = 32) -> ImageData:
    """Open a set of images with labels.

    Args:
        source: A name (``"digits"``, ``"mnist"``, ``"mnist-5k"``, ``"fashion-mnist"``), or a folder with one
            subfolder of pictures for each class; its files are split 80, 10 and 10 per cent within each class by a hash
            of their content, and copies of a file are left out.
        size: Side in pixels that the pictures of a folder are brought to.

    Returns:
        The data.

    Raises:
        InputError: An unknown name, a set that is not on this machine, a damaged file, too few pictures.

    Example:
        >>> from setpoint import data
        >>> digits = data.images("digits")
        >>> images, labels = next(iter(digits.batches("train", 32, seed=0)))
        >>> images.shape, len(digits.classes)
        (torch.Size([32, 1, 8, 8]), 10)
    """
    if isinstance(source, str) and source in _NAMED:
        entry = named(source)
        path, origin = locate(source)
        try:
            parts, white = _NAMED[source](path)
        except (OSError, EOFError, zlib.error, ValueError, IndexError) as error:
            raise InputError(f"{source} in {path} is damaged: {error}") from error
        return _data(parts, white, _CLASSES[source], f"{source} ({origin.how})", entry.license)
    folder = Path(source).expanduser()
    if folder.is_dir():
        return _folder(folder, size)
    if folder.exists():
        raise InputError(f"{folder} is a file; give a folder with one subfolder of pictures for each class")
    entry = named(str(source))
    raise InputError(f"{entry.name} holds {entry.kind}; open it with setpoint.data.{entry.kind}")


def _data(parts: dict[str, Labelled], white: float, classes: tuple[str, ...], origin: str, license: str) -> ImageData:
    digest = hashlib.sha256()
    for split in _SPLITS:
        digest.update(parts[split].images.numpy().tobytes() + parts[split].labels.numpy().tobytes())
    pixels = parts["train"].images.transpose(0, 1).flatten(1).double() / white
    return ImageData(
        **parts,
        classes=classes,
        white=white,
        mean=tuple(pixels.mean(1).tolist()),
        std=tuple(pixels.std(1).clamp_min(1e-6).tolist()),
        origin=origin,
        license=license,
        fingerprint=digest.hexdigest(),
    )


def _labelled(pixels: Any, labels: Any) -> Labelled:
    return Labelled(torch.from_numpy(np.ascontiguousarray(pixels)), torch.from_numpy(labels.astype(np.int64)))


def _digits(path: Path) -> tuple[dict[str, Labelled], float]:
    """In the order of the file, which is by writer: no writer is on both sides except at the two cuts."""
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    pixels, labels = table[:, :64].reshape(-1, 1, 8, 8), table[:, 64]
    cuts = {"train": slice(0, 1297), "valid": slice(1297, 1497), "test": slice(1497, None)}
    return {split: _labelled(pixels[cut], labels[cut]) for split, cut in cuts.items()}, 16.0


def _mnist_5k(path: Path) -> tuple[dict[str, Labelled], float]:
    """The file is sorted by class; 400, 50 and 50 of each are drawn."""
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    pixels, labels = table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1]
    order = np.random.default_rng(0).permutation(len(labels))
    pixels, labels = pixels[order], labels[order]
    rank = np.zeros(len(labels), int)  # how many of its class came before
    for label in range(10):
        rank[labels == label] = np.arange((labels == label).sum())
    places = {"train": rank < 400, "valid": (rank >= 400) & (rank < 450), "test": rank >= 450}
    return {split: _labelled(pixels[place], labels[place]) for split, place in places.items()}, 255.0


def _idx(folder: Path) -> tuple[dict[str, Labelled], float]:
    """The makers' test set, and the last 5,000 of their training set to validate on."""
    parts = {}
    for split in ("train", "t10k"):
        pixels = _read_idx(folder / f"{split}-images-idx3-ubyte.gz")[:, None]
        parts[split] = pixels, _read_idx(folder / f"{split}-labels-idx1-ubyte.gz")
    pixels, labels = parts["train"]
    return {
        "train": _labelled(pixels[:-5000], labels[:-5000]),
        "valid": _labelled(pixels[-5000:], labels[-5000:]),
        "test": _labelled(*parts["t10k"]),
    }, 255.0


def _read_idx(path: Path) -> Any:
    """An array of bytes with its shape in front: two zeros, the type (8 for uint8), the rank, the sizes."""
    with gzip.open(path) as file:
        content = file.read()
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise InputError(f"{path} is no IDX file of bytes")
    shape = np.frombuffer(content, ">u4", content[3], offset=4).astype(int)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape).copy()


_DIGITS = tuple("0123456789")
_CLOTHES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
_NAMED: dict[str, Callable[[Path], tuple[dict[str, Labelled], float]]] = {
    "digits": _digits,
    "mnist": _idx,
    "mnist-5k": _mnist_5k,
    "fashion-mnist": _idx,
}
_CLASSES = {"digits": _DIGITS, "mnist": _DIGITS, "mnist-5k": _DIGITS, "fashion-mnist": _CLOTHES}


def _folder(root: Path, size: int) -> ImageData:
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    chosen: dict[str, list[tuple[Path, int]]] = {split: [] for split in _SPLITS}
    seen: set[str] = set()
    for label, folder in enumerate(folders):
        files = {}
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix.lower() in SUFFIXES and (content := fingerprint(path)) not in seen:
                seen.add(content)
                files[content] = path
        if len(files) < 3:
            raise InputError(f"{folder} has {len(files)} different pictures; a class needs 3, one for each split")
        ordered = [(files[content], label) for content in sorted(files)]
        held = max(1, len(ordered) // 10)
        chosen["test"] += ordered[:held]
        chosen["valid"] += ordered[held : 2 * held]
        chosen["train"] += ordered[2 * held :]
    if len(folders) < 2:
        raise InputError(f"{root} has {len(folders)} subfolders; a classifier needs one a class, and two classes")
    transform = ImageTransform(crop=size, resize=size, mean=(0.0,) * 3, std=(1.0,) * 3)
    parts = {}
    for split, pairs in chosen.items():
        pixels = (read_images([path for path, _ in pairs], transform) * 255).round().to(torch.uint8)
        parts[split] = Labelled(pixels, torch.tensor([label for _, label in pairs]))
    return _data(parts, 255.0, tuple(folder.name for folder in folders), str(root), "")
