"""Errors that are the user's to mend: one clear line, exit code 2 at the shell."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """Something that was given (a file, a name, a batch) can't be used; the message says what, why and what to do."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The ``count`` names of ``known`` most like ``name``, best first.

    >>> nearest("smolm2", ["smollm2", "minilm", "vit-s", "mobilenetv2"])
    ['smollm2', 'minilm', 'mobilenetv2']
    """
    return get_close_matches(name, list(known), n=count, cutoff=0.0)
