"""Errors that are the user's to mend: one clear line, exit code 2 at the shell."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """Something that was given (a file, a name, a batch) can't be used; the message says what, why and what to do."""


def nearest(name: str, known: Iterable[str], count: int = 3, *, likeness: float = 0.0) -> list[str]:
    """The ``count`` names of ``known`` most like ``name``, best first.

    Those less alike than ``likeness`` are left out; from 0.6 on a name with a slip of the finger stays, and one that
    shares a few letters does not.

    >>> nearest("smolm2", ["smollm2", "minilm", "vit-s", "mobilenetv2"])
    ['smollm2', 'minilm', 'mobilenetv2']
    """
    return get_close_matches(name, list(known), n=count, cutoff=likeness)
