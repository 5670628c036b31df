"""Token data for language models: a corpus, tokenized once, kept on disk and mapped into memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from setpoint.data.batches import Batches, Index
from setpoint.data.cache import cache_folder, publish
from setpoint.data.corpora import SPLITS, Corpus, Document, corpus
from setpoint.data.tokenizers import Ids, Tokenizer, tokenizer_for
from setpoint.errors import InputError

_FORMAT = "1"
"""Part of the cache's key: raise it when what is written for the same corpus changes."""


@dataclass(frozen=True, eq=False)
class TokenData:
    """A tokenized corpus.

    Args:
        train, valid, test: Token ids, mapped from disk.
        tokenizer: What made them.
        context: Tokens that a model sees at once.
        bytes_of: Split -> bytes of text (UTF-8), for figures per byte.
        origin: Where the text came from.
        license: Its licence, "" for the user's own.
        notes: What was left out, and why.
        fingerprint: Changes with the text, its splits and the tokenizer.
    """

    train: Ids
    valid: Ids
    test: Ids
    tokenizer: Tokenizer
    context: int
    bytes_of: dict[str, int]
    origin: str
    license: str
    notes: tuple[str, ...]
    fingerprint: str

    @property
    def vocab_size(self) -> int:
        """Rows that a model's embedding needs."""
        return self.tokenizer.vocab_size

    def bits_per_byte(self, loss: float, split: str = "valid") -> float:
        """A loss per token in nats as bits per byte of text, which compares across tokenizers.

        Args:
            loss: Mean cross-entropy per token, in nats.
            split: The split it was measured on.
        """
        return loss / float(np.log(2)) * len(self._ids(split)) / self.bytes_of[split]

    def batches(
        self, split: str, batch_size: int, seed: int = 0, *, limit: int | None = None
    ) -> Batches[dict[str, Tensor]]:
        """Windows of ``context`` tokens, and the tokens that follow each of theirs.

        Args:
            split: ``"train"`` is endless: every epoch cuts the text at another offset and takes the windows in
                another order. ``"valid"`` and ``"test"`` are one pass over windows that do not overlap; fewer than
                ``context`` tokens at the end are left out.
            batch_size: Windows in a batch.
            seed: Order of the endless stream.
            limit: At most so many windows of a pass, spread evenly over the split.

        Returns:
            Batches ``{"tokens": (batch, context), "targets": (batch, context)}``, int64; ``targets`` are one token
            ahead. `setpoint.data.run_inputs` runs a model on them, `setpoint.data.next_token_loss` is their loss.

        Raises:
            InputError: An unknown split, or a batch larger than the split.
        """
        ids = self._ids(split)
        endless = split == "train"
        # In the endless stream the offset of an epoch takes up to context - 1 tokens from the front.
        count = max(1, (len(ids) - 1) // self.context - 1) if endless else (len(ids) - 1) // self.context
        every = 1.0
        if limit is not None and not endless:
            if limit < 1:
                raise InputError(f"expected a limit of at least one window, got {limit}")
            every = max(1.0, count / limit)
            count = min(count, limit)
        spare = len(ids) - 1 - count * self.context

        def make(windows: Index, epoch: int) -> dict[str, Tensor]:
            offset = 0
            if endless and spare:
                offset = int(np.random.default_rng([seed, epoch, 1]).integers(min(spare, self.context - 1) + 1))
            starts = (windows * every).astype(np.int64) * self.context + offset
            rows = ids[starts[:, None] + np.arange(self.context + 1)]
            both = torch.from_numpy(rows.astype(np.int64))
            return {"tokens": both[:, :-1], "targets": both[:, 1:]}

        return Batches(make, count, batch_size, seed if endless else None)

    def _ids(self, split: str) -> Ids:
        if split not in SPLITS:
            raise InputError(f"expected a split of {', '.join(SPLITS)}, got {split!r}")
        ids: Ids = getattr(self, split)
        return ids

    def __repr__(self) -> str:
        sizes = ", ".join(f"{split} {len(self._ids(split)):,}" for split in SPLITS)
        return f"TokenData({self.origin}; {self.tokenizer.name}, context {self.context}; {sizes} tokens)"


def text(
    source: str | Path,
    *,
    context: int,
    tokenizer: str | Path | Tokenizer | Any = "bytes",
    valid: float = 0.05,
    test: float = 0.05,
) -> TokenData:
    """Open a corpus as token data.

    The tokens are kept in the cache under a hash of the text, its splits and the tokenizer; the next call maps them.

    Args:
        source: A name (``"python-stdlib"``, ``"bibles/en"``, see ``setpoint data list``), a UTF-8 text file, or a
            folder of them.
        context: Tokens that a model sees at once.
        tokenizer: ``"bytes"``, a packaged model's name, a tokenizer file or object; see `tokenizer_for`.
        valid, test: Share of these splits.

    Returns:
        The data.

    Raises:
        InputError: The corpus can't be opened (see `corpus`), or a split has fewer tokens than one window needs.

    Example:
        >>> from setpoint import data
        >>> stdlib = data.text("python-stdlib", context=64)
        >>> batch = next(iter(stdlib.batches("train", 8, seed=0)))
        >>> batch["tokens"].shape, stdlib.vocab_size
        (torch.Size([8, 64]), 256)
    """
    if context < 1:
        raise InputError(f"expected a context of at least one token, got {context}")
    found, tokens = corpus(source, valid=valid, test=test), tokenizer_for(tokenizer)
    fingerprint = _fingerprint(found, tokens)
    folder = cache_folder() / "tokens" / fingerprint[:32]
    if not (folder / "sizes.json").is_file():
        publish(folder, lambda staging: _write(staging, found, tokens))
    sizes = json.loads((folder / "sizes.json").read_text())
    for split in SPLITS:
        if sizes[split]["tokens"] < context + 1:
            raise InputError(
                f"{found.origin}: the {split} split has {sizes[split]['tokens']:,} tokens, a window needs "
                f"{context + 1:,}; use more text, a shorter context or a larger share for {split}"
            )
    kind = _kind(tokens)
    arrays = {split: np.memmap(folder / f"{split}.bin", kind, "r") for split in SPLITS}
    return TokenData(
        train=arrays["train"],
        valid=arrays["valid"],
        test=arrays["test"],
        tokenizer=tokens,
        context=context,
        bytes_of={split: sizes[split]["bytes"] for split in SPLITS},
        origin=found.origin,
        license=found.license,
        notes=found.notes,
        fingerprint=fingerprint,
    )


def _kind(tokenizer: Tokenizer) -> np.dtype[Any]:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)


def _fingerprint(found: Corpus, tokenizer: Tokenizer) -> str:
    digest = hashlib.sha256(f"{_FORMAT} {tokenizer.fingerprint} {_kind(tokenizer)}".encode())
    for split in SPLITS:
        digest.update(f"\n{split}".encode())
        for document in found.splits[split]:
            digest.update(document.fingerprint.encode())
    return digest.hexdigest()


def _write(folder: Path, found: Corpus, tokenizer: Tokenizer) -> None:
    sizes = {split: _write_split(folder / f"{split}.bin", found.splits[split], tokenizer) for split in SPLITS}
    (folder / "sizes.json").write_text(json.dumps(sizes))


def _write_split(path: Path, documents: Iterable[Document], tokenizer: Tokenizer) -> dict[str, int]:
    """Documents end in a line break, so that one does not run into the next."""
    tokens = characters = 0
    with path.open("wb") as file:
        for document in documents:
            content = document.content if document.content.endswith("\n") else document.content + "\n"
            ids = tokenizer.encode(content)
            if len(ids) and int(ids.max()) >= tokenizer.vocab_size:
                raise InputError(f"{tokenizer.name} gave token {int(ids.max()):,} of {tokenizer.vocab_size:,}")
            file.write(ids.astype(_kind(tokenizer)).tobytes())
            tokens += len(ids)
            characters += len(content.encode())
    return {"tokens": tokens, "bytes": characters}
