from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from setpoint import data
from setpoint.errors import InputError


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {number}\n" for number in range(2000)))
    return path


def test_targets_are_one_token_ahead(book: Path) -> None:
    batch = next(iter(data.text(book, context=16).batches("train", 4, seed=0)))
    assert batch["tokens"].shape == batch["targets"].shape == (4, 16)
    assert batch["tokens"].dtype == torch.int64
    assert torch.equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])


def test_a_pass_predicts_every_token_once(book: Path) -> None:
    found = data.text(book, context=16)
    targets = torch.cat([batch["targets"].flatten() for batch in found.batches("valid", 7)])
    whole = torch.from_numpy(np.array(found.valid[1:]).astype(np.int64))
    assert torch.equal(targets, whole[: len(targets)])
    assert len(whole) - len(targets) < 16


def test_a_limited_pass_is_spread_over_the_split(book: Path) -> None:
    found = data.text(book, context=16)
    some = torch.cat([batch["tokens"] for batch in found.batches("valid", 4, limit=5)])
    whole = torch.cat([batch["tokens"] for batch in found.batches("valid", 4)])
    assert len(some) == 5
    places = [int((whole == window).all(1).nonzero()[0]) for window in some]
    assert places[-1] > 0.7 * len(whole)
    assert places == sorted(set(places))


def test_epochs_cut_the_text_at_different_offsets(book: Path) -> None:
    found = data.text(book, context=16)
    stream = found.batches("train", 8, seed=3)
    epochs = [
        torch.cat([stream[i]["tokens"] for i in range(e * stream.per_epoch, (e + 1) * stream.per_epoch)])
        for e in (0, 1)
    ]
    windows = [{tuple(window) for window in epoch.tolist()} for epoch in epochs]
    assert len(windows[0]) == len(epochs[0])
    assert len(windows[0] & windows[1]) < len(windows[0]) / 4


def test_no_window_reaches_into_another_split(book: Path) -> None:
    found = data.text(book, context=16, valid=0.3, test=0.1)
    texts = {split: found.tokenizer.decode(list(getattr(found, split))) for split in ("train", "valid", "test")}
    lines = {split: set(text.split("\n")) - {""} for split, text in texts.items()}
    assert not lines["train"] & lines["valid"]
    assert not lines["train"] & lines["test"]
    assert not lines["valid"] & lines["test"]


def test_tokens_are_written_once_and_mapped(book: Path, cache: Path) -> None:
    first = data.text(book, context=16)
    assert isinstance(first.train, np.memmap)
    assert first.train.dtype == np.uint16
    (folder,) = (cache / "data" / "tokens").iterdir()
    times = [path.stat().st_mtime_ns for path in sorted(folder.iterdir())]
    again = data.text(book, context=32)
    assert again.fingerprint == first.fingerprint
    assert [path.stat().st_mtime_ns for path in sorted(folder.iterdir())] == times
    book.write_text(book.read_text() + "more\n")
    assert data.text(book, context=16).fingerprint != first.fingerprint


def test_an_interrupted_write_leaves_nothing_behind(book: Path, cache: Path) -> None:
    class Breaks(data.Bytes):
        def encode(self, text: str):  # type: ignore[no-untyped-def]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.text(book, context=16, tokenizer=Breaks())
    assert list((cache / "data" / "tokens").iterdir()) == []
    assert len(data.text(book, context=16).train) > 1000


def test_a_cache_that_cannot_be_written_is_named(book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("SETPOINT_CACHE", str(blocked))
    with pytest.raises(InputError, match="SETPOINT_CACHE"):
        data.text(book, context=16)


def test_fewer_tokens_than_a_window_is_an_error_with_counts(book: Path) -> None:
    with pytest.raises(InputError, match=r"train split has [\d,]+ tokens, a window needs 100,001"):
        data.text(book, context=100_000, valid=0.1)
    with pytest.raises(InputError, match="at least one token"):
        data.text(book, context=0)
    with pytest.raises(InputError, match="larger than the data"):
        data.text(book, context=16).batches("train", 100_000)
    with pytest.raises(InputError, match="train, valid, test"):
        data.text(book, context=16).batches("validation", 1)


def test_bits_per_byte_compare_across_tokenizers(book: Path) -> None:
    found = data.text(book, context=16)
    assert found.bits_per_byte(np.log(2)) == pytest.approx(1.0)
    assert found.bytes_of["valid"] == len(found.valid)


def test_a_tokenizer_of_transformers_is_taken(book: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    vocabulary = {"line": 0, "<unk>": 1, **{str(number): number + 2 for number in range(1990)}}
    built = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    built.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=built)
    found = data.text(book, context=16, tokenizer=wrapped)
    assert found.vocab_size == 1992
    assert found.train[:4].tolist() == [0, 2, 0, 3]
    built.save(str(tmp_path / "tokenizer.json"))
    again = data.text(book, context=16, tokenizer=tmp_path / "tokenizer.json")
    assert again.fingerprint == found.fingerprint
    assert found.bits_per_byte(1.0) < data.text(book, context=16).bits_per_byte(1.0)


def test_unknown_tokenizers_are_refused(book: Path) -> None:
    with pytest.raises(InputError, match="known: bytes, smollm2, minilm"):
        data.text(book, context=16, tokenizer="words")
    with pytest.raises(InputError, match="got int"):
        data.text(book, context=16, tokenizer=3)
    with pytest.raises(InputError, match="no tokenizer that can be read"):
        data.text(book, context=16, tokenizer=os.fspath(book))
