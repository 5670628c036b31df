"""Pickled weights: only tensors are read, code is refused."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.loading.wording import one_line


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Read a pickled state dict without running anything in it.

    Args:
        path: A ``.bin``, ``.pt`` or ``.pth`` file.

    Returns:
        Names to tensors.

    Raises:
        InputError: The file would run code, is damaged, or holds something else than tensors.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "GLOBAL" in str(error):
            raise InputError(
                f"{path} is refused: it pickles Python objects, not only tensors, and reading those would run code; "
                f"save model.state_dict() with safetensors instead"
            ) from error
        raise InputError(f"{path} is not a file of weights, or is damaged: {one_line(error)}") from error
    except (RuntimeError, EOFError, OSError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise InputError(f"{path} is truncated or damaged: {one_line(error)}") from error
    if isinstance(state, nn.Module) or not isinstance(state, dict):
        raise InputError(f"{path} holds a {type(state).__name__}; expected a dict from names to tensors")
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise InputError(f"{path} holds no tensors, only {', '.join(map(str, list(state)[:3]))}")
    return tensors
