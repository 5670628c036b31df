"""From text to token ids: bytes, or a tokenizer that came with a model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from setpoint.errors import InputError
from setpoint.extras import require
from setpoint.loading.shelf import find, packaged

Ids = np.ndarray[Any, np.dtype[np.unsignedinteger[Any]]]


class Tokenizer(Protocol):
    """What `setpoint.data.text` needs of a tokenizer."""

    @property
    def name(self) -> str:
        """For a report."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    def fingerprint(self) -> str:
        """Differs between tokenizers that give different ids."""

    def encode(self, text: str) -> Ids:
        """Token ids of a text, without special tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""


@dataclass(frozen=True, slots=True)
class Bytes:
    """One token a byte of UTF-8; 256 of them.

    >>> Bytes().encode("né").tolist(), Bytes().decode([110, 195, 169])
    ([110, 195, 169], 'né')
    """

    name: str = "bytes"
    vocab_size: int = 256
    fingerprint: str = "bytes"

    def encode(self, text: str) -> Ids:
        """The bytes of a text."""
        return np.frombuffer(text.encode("utf-8"), np.uint8)

    def decode(self, ids: Sequence[int]) -> str:
        """The text; bytes that are no UTF-8 become the replacement character."""
        return bytes(ids).decode("utf-8", errors="replace")


class FromTransformers:
    """A tokenizer of transformers.

    Args:
        tokenizer: The object.
        name: For a report.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        self.name = name
        self._tokenizer = tokenizer
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        self.vocab_size = max(vocabulary.values()) + 1
        backend = getattr(tokenizer, "backend_tokenizer", None)
        content = backend.to_str() if backend is not None else repr(sorted(vocabulary.items()))
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()

    def encode(self, text: str) -> Ids:
        """Token ids without special tokens around them."""
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return np.asarray(ids, dtype=np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        """The text."""
        return str(self._tokenizer.decode(list(ids)))


def tokenizer_for(source: str | Path | Tokenizer | Any) -> Tokenizer:
    """A tokenizer by name, from a file, or around an object.

    Args:
        source: ``"bytes"``; a packaged model (``"smollm2"``, ``"minilm"``); a folder of transformers, a
            ``tokenizer.json`` or a ``.gguf`` file; a tokenizer of transformers; or anything with the methods of
            `Tokenizer`.

    Returns:
        The tokenizer.

    Raises:
        InputError: There is none under that name or in that file.

    >>> tokenizer_for("bytes").vocab_size
    256
    """
    if not isinstance(source, str | Path):
        if hasattr(source, "fingerprint"):
            return source
        if hasattr(source, "get_vocab"):
            return FromTransformers(source, getattr(source, "name_or_path", "") or type(source).__name__)
        raise InputError(f"expected the name of a tokenizer or a tokenizer, got {type(source).__name__}")
    if source == "bytes":
        return Bytes()
    if str(source) in packaged():
        return FromTransformers(_from_file(find(str(source))), str(source))
    path = Path(source)
    if not path.exists():
        models = [name for name, model in packaged().items() if model.task in ("language-model", "encoder")]
        known = ", ".join(["bytes", *models])
        raise InputError(f"no tokenizer is called {str(source)!r} and there is no such file; known: {known}")
    return FromTransformers(_from_file(path), path.name)


def _from_file(path: Path) -> Any:
    transformers = require("transformers", "hf", "for a tokenizer other than bytes")
    if path.suffix == ".gguf":
        from setpoint.loading.gguf import load_tokenizer

        return load_tokenizer(path)
    try:
        if path.is_file():
            return transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
        return transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise InputError(f"{path} holds no tokenizer that can be read: {' '.join(str(error).split())[:200]}") from error
