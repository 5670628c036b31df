"""Sizes of transformers by number of parameters, for the default parts (SwiGLU; the token table is not counted).

A head has 32 channels up to 3 million parameters, 64 up to 300 million, and 128 beyond. Depth grows with width about as
in published families of language models.
"""

from __future__ import annotations

from setpoint.errors import InputError

SIZES: dict[str, dict[str, int]] = {
    "1M": {"dim": 128, "depth": 5, "num_heads": 4},
    "3M": {"dim": 192, "depth": 7, "num_heads": 6},
    "10M": {"dim": 320, "depth": 8, "num_heads": 5},
    "30M": {"dim": 512, "depth": 9, "num_heads": 8},
    "100M": {"dim": 768, "depth": 14, "num_heads": 12},
    "300M": {"dim": 1024, "depth": 24, "num_heads": 16},
    "1B": {"dim": 2048, "depth": 20, "num_heads": 16},
}


def sizes(name: str) -> dict[str, int]:
    """Width, depth and heads of a preset.

    Raises:
        InputError: There is none of that name; the message lists them.

    Example:
        >>> sizes("1M")
        {'dim': 128, 'depth': 5, 'num_heads': 4}
    """
    if name not in SIZES:
        raise InputError(f"no preset is called {name!r}; there are {', '.join(SIZES)}")
    return dict(SIZES[name])
