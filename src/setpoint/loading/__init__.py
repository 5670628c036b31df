"""Models as data, never as code: folders, GGUF files, packaged weights and the user's own modules."""

from setpoint.loading.batches import batches_for, describe_data, loss_for, next_token_loss
from setpoint.loading.fixed import restore
from setpoint.loading.shelf import PackagedModel, cache_folder, get, packaged
from setpoint.loading.sources import load

__all__ = [
    "PackagedModel",
    "batches_for",
    "cache_folder",
    "describe_data",
    "get",
    "load",
    "loss_for",
    "next_token_loss",
    "packaged",
    "restore",
]
