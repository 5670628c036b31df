"""Text for language models and encoders: a corpus that is on every machine, files of the user's, and token windows.

The default corpus is the reference documentation inside Python itself (`pydoc_data.topics`, what ``help("if")``
prints): about half a megabyte of technical English with code in it, under the PSF licence. It differs a little
between Python releases, so its origin names the release.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from setpoint.errors import InputError


@dataclass(frozen=True, slots=True)
class Text:
    """A text and where it came from.

    Args:
        content: The text itself.
        origin: Where it came from, for a report.
    """

    content: str
    origin: str


def default_text() -> Text:
    """The reference documentation that ships with Python.

    Returns:
        All topics, sorted by name.

    Raises:
        InputError: This Python was installed without it.

    >>> default_text().origin.startswith("Python ")
    True
    """
    try:
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
    except (ImportError, AttributeError) as error:
        raise InputError(
            "this Python has no pydoc_data.topics, the default text; give a text file with --data FILE"
        ) from error
    content = "\n\n".join(topics[name].strip() for name in sorted(topics))
    return Text(content, f"Python {platform.python_version()} reference documentation (pydoc_data.topics)")


def read_text(path: str | Path) -> Text:
    """Read a text file.

    Args:
        path: A file in UTF-8.

    Returns:
        Its content, with the path as origin.

    Raises:
        InputError: It is missing, is a folder, is empty, or is not UTF-8.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; a language model reads one text file")
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text (byte {error.object[error.start]:#04x} at position {error.start:,}); "
            f"convert it to UTF-8"
        ) from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    if not content.strip():
        raise InputError(f"{path} is empty")
    return Text(content, str(path))


def token_windows(text: Text, tokenizer: Any, *, tokens: int, count: int, seed: int = 0) -> list[Tensor]:
    """Cut a text into windows of tokens, none overlapping another.

    Windows are spread over the text (over its first part, if it is far longer than needed) and keep its order. The
    special tokens that the tokenizer puts around a sequence (a beginning-of-sequence token, BERT's ``[CLS]`` and
    ``[SEP]``) are put around each window and count towards its length.

    Args:
        text: What to cut.
        tokenizer: A transformers tokenizer.
        tokens: Length of a window.
        count: How many.
        seed: Chooses other windows of the same text.

    Returns:
        ``count`` integer tensors of shape ``(1, tokens)``.

    Raises:
        InputError: The text has fewer tokens than that, or the window has no room for text.
    """
    if tokens < 1 or count < 1:
        raise InputError(f"expected at least one window of at least one token, got {count} of {tokens}")
    before, after = _frame(tokenizer)
    room = tokens - len(before) - len(after)
    if room < 1:
        raise InputError(
            f"a window of {tokens} tokens has no room for text: "
            f"the tokenizer adds {len(before) + len(after)} special tokens"
        )
    needed = room * count
    ids = _tokenize(text.content, tokenizer, needed)
    if len(ids) < needed:
        raise InputError(
            f"{text.origin} has {len(ids):,} tokens, {needed:,} are needed ({count} windows of {tokens}); "
            f"give a longer text, or ask for fewer or shorter windows"
        )
    starts = _starts(len(ids), room, count, seed)
    return [torch.tensor([[*before, *ids[start : start + room], *after]]) for start in starts]


IDS = (".npy", ".safetensors")
"""Endings of files that hold token ids instead of text."""


def id_windows(path: str | Path, *, tokens: int, count: int, seed: int = 0) -> list[Tensor]:
    """Windows of the token ids that a file holds, for a model whose tokenizer is elsewhere.

    Args:
        path: A ``.npy`` file, or a ``.safetensors`` file of one tensor: integers ``(n,)``, cut like a text, or
            ``(batch, tokens)``, of which every row is a window.
        tokens: Length of a window; longer rows are cut to it.
        count: How many at most.
        seed: Chooses other windows of ``(n,)`` ids.

    Returns:
        Integer tensors of shape ``(1, tokens)``; shorter rows stay shorter.

    Raises:
        InputError: The file can't be read, holds something else, or too little.
    """
    ids = _read_ids(Path(path))
    if ids.dim() == 2:
        return [row[None, :tokens] for row in ids[:count]]
    if len(ids) < tokens * count:
        raise InputError(
            f"{path} has {len(ids):,} tokens, {tokens * count:,} are needed ({count} windows of {tokens}); give more, "
            "or shorter windows as rows of a tensor (batch, tokens)"
        )
    return [ids[None, start : start + tokens] for start in _starts(len(ids), tokens, count, seed)]


def _read_ids(path: Path) -> Tensor:
    try:
        if path.suffix == ".npy":
            found = [torch.from_numpy(np.load(path, allow_pickle=False))]
        else:
            found = list(load_file(path).values())
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise InputError(f"{path} can't be read as token ids: {' '.join(str(error).split())}") from error
    shapes = ", ".join(f"{t.dtype} {tuple(t.shape)}".removeprefix("torch.") for t in found) or "nothing"
    if len(found) != 1 or found[0].dtype not in _INTEGERS or found[0].dim() not in (1, 2) or not found[0].numel():
        raise InputError(f"{path}: expected one tensor of token ids (n,) or (batch, tokens), integers, got {shapes}")
    ids = found[0].long()
    if int(ids.min()) < 0:
        raise InputError(f"{path}: expected token ids from 0 on, got {int(ids.min())}")
    return ids


_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32)


def _starts(length: int, room: int, count: int, seed: int) -> list[int]:
    """Where windows start: none overlaps another, and they keep their order."""
    slots = torch.randperm(length // room, generator=torch.Generator().manual_seed(seed))[:count].sort().values
    return [slot * room for slot in slots.tolist()]


_CHARACTERS_PER_TOKEN = 8
"""More than real text needs on average (3 to 5), so that a prefix of the text is nearly always enough."""
_WHOLE = 1 << 20
"""Texts up to this many characters are tokenized whole."""


def _tokenize(content: str, tokenizer: Any, needed: int) -> list[int]:
    """Tokens of as much of the text as the windows can use: a library is not tokenized for four windows."""
    length = max(4 * needed * _CHARACTERS_PER_TOKEN, _WHOLE)
    ids: list[int] = tokenizer(content[:length], add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < needed and length < len(content):
        ids = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Special tokens that the tokenizer puts before and after a sequence, read off a short one."""
    probe = tokenizer("a", return_special_tokens_mask=True)
    ids, special = probe["input_ids"], probe["special_tokens_mask"]
    first = special.index(0) if 0 in special else len(ids)
    last = len(ids) - special[::-1].index(0) if 0 in special else len(ids)
    return ids[:first], ids[last:]
