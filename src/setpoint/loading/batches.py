"""Real inputs for a loaded model, and the loss that goes with its outputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from setpoint.data.batches import next_token_loss as target_loss
from setpoint.data.pictures import folder_paths, picture_paths, read_images
from setpoint.data.windows import IDS, default_text, id_windows, read_text, token_windows
from setpoint.errors import InputError
from setpoint.placing import follow
from setpoint.types import Loaded

_TEXT_TASKS = ("language-model", "encoder")
_IMAGE_TASKS = ("image-features", "image-classification")


def batches_for(
    loaded: Loaded, data: str | Path | None = None, *, tokens: int = 512, count: int = 4, seed: int = 0
) -> list[Any]:
    """Real inputs for a model, on its device.

    Args:
        loaded: From `setpoint.load`.
        data: A UTF-8 text file or a file of token ids (`setpoint.data.windows.id_windows`) for a model of text, a
            folder of pictures for a model of images; None for what came with the model, or else for the default:
            Python's own documentation, or scikit-image's pictures.
        tokens: Length of a text window, cut to what the model can take.
        count: Number of text windows, or of pictures.
        seed: Chooses other windows of the same text.

    Returns:
        Text: ``count`` dicts with ``input_ids`` of shape ``(1, tokens)``; a model with a decoder gets the first half
        of each window as ``input_ids`` and the second as ``decoder_input_ids``. Images: one tensor
        ``(count, 3, height, width)`` in a list (a dict with ``pixel_values`` for a model from transformers).

    Raises:
        InputError: The data does not fit the model, is damaged, or is too little.
    """
    if data is None and loaded.batches is not None:
        return [follow(batch, loaded.model) for batch in loaded.batches]
    if loaded.task in _TEXT_TASKS:
        return _text_batches(loaded, data, tokens, count, seed)
    if loaded.task in _IMAGE_TASKS:
        return _image_batches(loaded, data, count)
    raise InputError(
        f"{loaded.source} takes inputs that setpoint cannot guess; let the factory return (model, batches)"
        + (", --data is for models of text or images" if data is not None else "")
    )


def describe_data(loaded: Loaded, data: str | Path | None = None) -> str:
    """Where the inputs of `batches_for` come from, in a few words.

    Args:
        loaded: From `setpoint.load`.
        data: As for `batches_for`.

    Returns:
        For example "Python 3.11.7 reference documentation (pydoc_data.topics)".
    """
    if data is not None:
        return str(data)
    if loaded.batches is not None:
        return "batches that came with the model"
    return default_text().origin if loaded.task in _TEXT_TASKS else "pictures that ship with scikit-image"


def loss_for(loaded: Loaded) -> Callable[[Any, Any], Tensor] | None:
    """The loss that the model was trained with, as far as the inputs of `batches_for` allow one.

    Args:
        loaded: From `setpoint.load`.

    Returns:
        What came with the model; next-token cross-entropy (mean per predicted token, in nats) for a language model;
        None otherwise, since an encoder's or a classifier's loss needs labels.
    """
    if loaded.loss is not None:
        return loaded.loss
    return next_token_loss if loaded.task == "language-model" else None


def next_token_loss(output: Any, batch: Any) -> Tensor:
    """Cross-entropy of each token given those before it.

    Args:
        output: Logits ``(batch, tokens, vocabulary)``, or an output that has them as ``logits``.
        batch: Token ids ``(batch, tokens)``, or a dict with ``decoder_input_ids`` or ``input_ids``.

    Returns:
        Mean over all predicted tokens, in nats.

    >>> import math, torch
    >>> loss = next_token_loss(torch.zeros(1, 5, 100), torch.arange(5)[None])
    >>> math.isclose(loss.item(), math.log(100), rel_tol=1e-6)
    True
    """
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    ids: Tensor = batch if isinstance(batch, Tensor) else batch.get("decoder_input_ids", batch.get("input_ids"))
    return target_loss(logits[:, :-1], {"targets": ids[:, 1:].to(logits.device)})


def _text_batches(loaded: Loaded, data: str | Path | None, tokens: int, count: int, seed: int) -> list[Any]:
    tokens = min(tokens, _longest_input(loaded))
    if data is not None and Path(data).suffix in IDS:
        given, windows = str(data), id_windows(data, tokens=tokens, count=count, seed=seed)
    elif loaded.processor is None:
        raise InputError(
            f"{loaded.source} has no tokenizer, so text cannot be given to it; add tokenizer.json to it, or give token "
            "ids (--data IDS.npy or IDS.safetensors, integers (n,) or (batch, tokens))"
        )
    else:
        text = default_text() if data is None else read_text(data)
        given, windows = "the tokenizer", token_windows(text, loaded.processor, tokens=tokens, count=count, seed=seed)
    device, embeddings = _device(loaded.model), _embeddings(loaded.model)
    largest = max(int(window.max()) for window in windows)
    if embeddings is not None and largest >= embeddings:
        raise InputError(
            f"{loaded.source}: {given} gives token {largest:,} but the model has {embeddings:,} embeddings"
        )
    if getattr(getattr(loaded.model, "config", None), "is_encoder_decoder", False):
        halves = [(window.to(device), window.shape[1] // 2) for window in windows]
        return [{"input_ids": window[:, :half], "decoder_input_ids": window[:, half:]} for window, half in halves]
    return [{"input_ids": window.to(device)} for window in windows]


def _image_batches(loaded: Loaded, data: str | Path | None, count: int) -> list[Any]:
    if loaded.processor is None:
        raise InputError(f"{loaded.source} has no image transform; let the factory return (model, batches)")
    paths = picture_paths(count) if data is None else folder_paths(data, count)
    parameter = next(loaded.model.parameters())
    images = read_images(paths, loaded.processor).to(parameter.device, parameter.dtype)
    return [{"pixel_values": images}] if hasattr(loaded.model, "config") else [images]


def _longest_input(loaded: Loaded) -> int:
    """Tokens that positions and tokenizer allow; 2 ** 31 where neither says."""
    config = getattr(loaded.model, "config", None)
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    limits.append(getattr(loaded.processor, "model_max_length", None))
    known = [limit for limit in limits if isinstance(limit, int) and 0 < limit < 2**31]
    # RoBERTa and its kin number positions from the padding token's id + 1 upwards, and so have fewer than the table.
    reserved = [
        module.padding_idx + 1
        for name, module in loaded.model.named_modules()
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None
    ]
    return min(known, default=2**31) - max(reserved, default=0)


def _embeddings(model: nn.Module) -> int | None:
    """Rows of the token embedding, None where the model does not tell."""
    getter = getattr(model, "get_input_embeddings", None)
    table = getter() if callable(getter) else None
    return table.num_embeddings if isinstance(table, nn.Embedding) else None


def _device(model: nn.Module) -> Any:
    return next(model.parameters()).device
