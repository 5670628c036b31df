"""What a model's outputs mean, and how a batch is run through it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from setpoint.running import run_batch
from setpoint.types import Task


def task_of(model: nn.Module) -> Task:
    """What the model's outputs mean.

    Args:
        model: Any network.

    Returns:
        For a model of transformers, what its class is registered for there (an encoder-decoder with a head is a
        language model); ``"other"`` for anything else.
    """
    # A model of transformers cannot exist without transformers being imported; anything else needs no import.
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return "other"
    from transformers.models.auto import modeling_auto as auto

    name = next(
        (kind.__name__ for kind in type(model).__mro__ if kind.__module__.startswith("transformers.models")), ""
    )

    def registered(mapping: Mapping[str, Any]) -> bool:
        return any(name in ((value,) if isinstance(value, str) else value) for value in mapping.values())

    if registered(auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES):
        return "image-classification"
    if registered(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        return "language-model"
    if registered(auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES):
        return "language-model"
    inputs = getattr(model, "main_input_name", "")
    return {"pixel_values": "image-features", "input_ids": "encoder"}.get(inputs, "other")  # type: ignore[return-value]


def forward_for(model: nn.Module) -> Callable[[nn.Module, Any], Any]:
    """How a batch is run: models of transformers without the key-value cache, anything else by `run_batch`.

    Args:
        model: The network.

    Returns:
        ``forward(model, batch)``.
    """
    config = getattr(model, "config", None)
    return run_without_cache if hasattr(config, "use_cache") else run_batch


def run_without_cache(model: nn.Module, batch: Any) -> Any:
    """Run one batch without building a key-value cache, which nothing here reads.

    Args:
        model: A decoder of transformers.
        batch: A dict of keyword arguments, a tuple of positional ones, or the main input.

    Returns:
        The model's output.
    """
    if isinstance(batch, Mapping):
        return model(**{"use_cache": False, **batch})
    return model(*(batch if isinstance(batch, tuple | list) else (batch,)), use_cache=False)
