"""Training a model after a fix that changed what it computes: on text by the next token, on images by their labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from setpoint import data
from setpoint.data import ImageData
from setpoint.data.pictures import ImageTransform
from setpoint.errors import InputError
from setpoint.placing import follow
from setpoint.running import Forward, evaluated, tensors_of
from setpoint.train import AdamW, Cosine, train
from setpoint.types import Loaded
from setpoint.words import listed

CONTEXT = 256


def retrain_on(
    loaded: Loaded, source: str, *, steps: int = 1000, batch_size: int = 8, lr: float = 3e-4, seed: int = 0
) -> Callable[[nn.Module], None]:
    """A training for the ``retrain`` argument of `setpoint.fix`.

    A language model learns the next token. An image classifier learns labels. A model that gives features of images is
    trained together with a linear classifier on top, which is thrown away afterwards.

    Args:
        loaded: A language model with its tokenizer, or a model of images with its transform.
        source: What to train on: a data set's name, a file or a folder, as `setpoint.data.text` or
            `setpoint.data.images` takes it. A folder of images has one subfolder for each class.
        steps: Updates.
        batch_size: Windows or images in each.
        lr: Peak learning rate; a tenth of the steps warm up, and it falls along a cosine.
        seed: Of the order of the windows or images, of dropout and of the classifier on top.

    Returns:
        ``retrain(model)``, which trains in place.

    Raises:
        InputError: A model of another kind, one without tokenizer or transform, or data that doesn't fit it.
    """
    otherwise = "in Python give retrain= a function of yours that trains the model"
    if loaded.task not in _LESSONS:
        raise InputError(
            f"{loaded.source} is no language model and no model of images, so setpoint can't train it; {otherwise}"
        )
    if loaded.processor is None:
        missing = "tokenizer" if loaded.task == "language-model" else "image transform"
        raise InputError(f"{loaded.source} has no {missing}, so setpoint can't train it; add it, or {otherwise}")
    lesson = _LESSONS[loaded.task](loaded, source, batch_size, seed)

    def retrain(model: nn.Module) -> None:
        train(
            lesson.around(model),
            lesson.batches,
            lesson.loss,
            steps=steps,
            optimizer=AdamW(lr=lr),
            schedule=Cosine(warmup=0.1),
            forward=lesson.forward,
            clip=1.0,
            seed=seed,
        )

    return retrain


@dataclass(frozen=True, slots=True)
class _Lesson:
    """What a model is trained on.

    Args:
        batches: Without end.
        loss: ``loss(output, batch)``.
        forward: ``forward(model, batch)``.
        around: From the model to what is trained, which has the model in it.
    """

    batches: Iterable[Any]
    loss: Callable[[Any, Any], Tensor]
    forward: Forward
    around: Callable[[nn.Module], nn.Module] = lambda model: model


def _next_tokens(loaded: Loaded, source: str, batch_size: int, seed: int) -> _Lesson:
    limit = getattr(getattr(loaded.model, "config", None), "max_position_embeddings", CONTEXT)
    text = data.text(source, context=min(CONTEXT, int(limit)), tokenizer=loaded.processor)
    return _Lesson(
        text.batches("train", batch_size, seed=seed),
        data.next_token_loss,
        lambda model, batch: loaded.forward(model, {"input_ids": batch["tokens"]}),
    )


def _labels(loaded: Loaded, source: str, batch_size: int, seed: int) -> _Lesson:
    images, run = _images(loaded, source), _on_pixels(loaded)
    logits: Any = _tried(loaded, images, run)
    numbers = _class_numbers(loaded, images, getattr(logits, "logits", logits).shape[-1])

    def loss(output: Any, batch: Any) -> Tensor:
        return data.label_loss(output, (batch[0], numbers.to(batch[1].device)[batch[1]]))

    return _Lesson(images.batches("train", batch_size, seed=seed), loss, lambda model, batch: run(model, batch[0]))


def _labels_by_features(loaded: Loaded, source: str, batch_size: int, seed: int) -> _Lesson:
    images, run = _images(loaded, source), _on_pixels(loaded)
    width = _pooled(_tried(loaded, images, run)).shape[-1]

    def around(model: nn.Module) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = nn.Linear(width, len(images.classes))
        return _Classifier(model, run, head.to(next(model.parameters())))

    batches = images.batches("train", batch_size, seed=seed)
    return _Lesson(batches, data.label_loss, lambda both, batch: both(batch[0]), around)


_LESSONS: dict[str, Callable[[Loaded, str, int, int], _Lesson]] = {
    "language-model": _next_tokens,
    "image-classification": _labels,
    "image-features": _labels_by_features,
}
"""What a model's outputs mean -> what it is trained on."""


class _Classifier(nn.Module):
    """A model of features with a linear classifier on top."""

    def __init__(self, model: nn.Module, run: Forward, head: nn.Linear) -> None:
        super().__init__()
        self.model, self.run, self.head = model, run, head

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits ``(images, classes)`` from ``(images, channels, height, width)``."""
        logits: Tensor = self.head(_pooled(self.run(self.model, pixels)))
        return logits


def _pooled(output: Any) -> Tensor:
    """One vector for each image: what the model pools itself, else the mean over tokens or places."""
    pooled = getattr(output, "pooler_output", None)
    if pooled is None:
        features = next(t for t in tensors_of(output) if t.is_floating_point())
        places = features.flatten(2).mT if features.dim() == 4 else features
        pooled = places.mean(1) if places.dim() == 3 else places
    return pooled.flatten(1)


def _images(loaded: Loaded, source: str) -> ImageData:
    """The images, on the scale that the model is used to; grey ones get three equal channels by the same means."""
    transform: ImageTransform = loaded.processor
    images = data.images(source, size=transform.crop)
    return replace(images, mean=transform.mean, std=transform.std)


def _on_pixels(loaded: Loaded) -> Forward:
    """``run(model, pixels)``, at the size, type and place that the model takes."""
    side = loaded.processor.crop
    by_name = hasattr(loaded.model, "config")

    def run(model: nn.Module, pixels: Tensor) -> Any:
        if pixels.shape[-2:] != (side, side):
            pixels = functional.interpolate(pixels, (side, side), mode="bilinear", antialias=True)
        return loaded.forward(model, follow({"pixel_values": pixels} if by_name else pixels, model))

    return run


def _tried(loaded: Loaded, images: ImageData, run: Forward) -> Any:
    """What the model gives for one image."""
    with evaluated(loaded.model):
        return run(loaded.model, images.inputs(images.train.images[:1]))


def _class_numbers(loaded: Loaded, images: ImageData, outputs: int) -> Tensor:
    """Which output of the model stands for each class of the data: the one of that name, else in order."""
    config = getattr(loaded.model, "config", None)
    named = {str(name).lower(): int(number) for name, number in (getattr(config, "label2id", None) or {}).items()}
    if all(name.lower() in named for name in images.classes):
        return torch.tensor([named[name.lower()] for name in images.classes])
    if len(images.classes) == outputs:
        return torch.arange(outputs)
    raise InputError(
        f"{loaded.source} tells {outputs:,} classes apart and {images.origin} has {len(images.classes):,} "
        f"({listed(images.classes)}); name the folders as the model names its classes, or give as many classes"
    )
