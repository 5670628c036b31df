"""Pickled weights: only tensors are read, code is refused."""

from __future__ import annotations

import pickle
import re
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
        # torch's message is an essay; the unpickler's own sentence in it tells code from damage.
        reason = str(error).partition("WeightsUnpickler error:")[2].strip() or str(error)
        if damage := re.match(r"Unsupported operand|Invalid|.*magic", reason):
            raise InputError(f"{path} is not a file of weights, or is damaged: {damage.group()}") from error
        named = re.search(r"GLOBAL (\S+)", reason)
        raise InputError(
            f"{path} is refused: it pickles {named[1] if named else 'Python objects'}, not only tensors, and reading "
            f"that would run code; save model.state_dict() with safetensors instead"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise InputError(f"{path} is truncated or damaged: {one_line(error)}") from error
    if isinstance(state, nn.Module) or not isinstance(state, dict):
        raise InputError(f"{path} holds a {type(state).__name__}; expected a dict from names to tensors")
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise InputError(f"{path} holds no tensors, only {', '.join(map(str, list(state)[:3]))}")
    return tensors
