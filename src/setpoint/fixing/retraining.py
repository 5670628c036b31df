"""Training a model after a fix that changed what it computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from setpoint import data
from setpoint.errors import InputError
from setpoint.train import AdamW, Cosine, train
from setpoint.types import Loaded

CONTEXT = 256


def retrain_on(
    loaded: Loaded, source: str, *, steps: int = 1000, batch_size: int = 8, lr: float = 3e-4, seed: int = 0
) -> Callable[[nn.Module], None]:
    """A training for the ``retrain`` argument of `setpoint.fix`.

    Args:
        loaded: A language model with its tokenizer.
        source: Text to train on: a data set's name, a file or a folder, as `setpoint.data.text` takes it.
        steps: Updates.
        batch_size: Windows in each.
        lr: Peak learning rate; a tenth of the steps warm up, and it falls along a cosine.
        seed: Of the order of the windows and of dropout.

    Returns:
        ``retrain(model)``, which trains in place.

    Raises:
        InputError: No language model, no tokenizer, or the text can't be used.
    """
    if loaded.task != "language-model" or loaded.processor is None:
        raise InputError(
            f"{loaded.source} is no language model with a tokenizer, so setpoint can't train it on {source}; in Python "
            "give retrain= a function of yours that trains the model"
        )
    limit = getattr(getattr(loaded.model, "config", None), "max_position_embeddings", CONTEXT)
    text = data.text(source, context=min(CONTEXT, int(limit)), tokenizer=loaded.processor)

    def forward(model: nn.Module, batch: Any) -> Any:
        return loaded.forward(model, {"input_ids": batch["tokens"]})

    def retrain(model: nn.Module) -> None:
        train(
            model,
            text.batches("train", batch_size, seed=seed),
            data.next_token_loss,
            steps=steps,
            optimizer=AdamW(lr=lr),
            schedule=Cosine(warmup=0.1),
            forward=forward,
            clip=1.0,
            seed=seed,
        )

    return retrain
