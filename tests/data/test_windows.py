from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from setpoint.data.windows import Text, default_text, read_text, token_windows
from setpoint.errors import InputError


class Characters:
    """A tokenizer with one token a character, and special tokens around a sequence if told so."""

    def __init__(self, before: tuple[int, ...] = (), after: tuple[int, ...] = ()) -> None:
        self.before, self.after = before, after

    def __call__(self, text: str, add_special_tokens: bool = True, **keywords: Any) -> dict[str, list[int]]:
        ids = [ord(character) for character in text]
        if not add_special_tokens:
            return {"input_ids": ids}
        mask = [1] * len(self.before) + [0] * len(ids) + [1] * len(self.after)
        return {"input_ids": [*self.before, *ids, *self.after], "special_tokens_mask": mask}


ALPHABET = Text("".join(chr(i) for i in range(1000, 2000)), "alphabet")


def test_the_default_text_is_long_english() -> None:
    text = default_text()
    assert len(text.content) > 200_000
    assert "expression" in text.content
    assert "Python" in text.origin


def test_windows_are_pieces_of_the_text_and_do_not_overlap() -> None:
    windows = token_windows(ALPHABET, Characters(), tokens=100, count=10)
    assert all(window.shape == (1, 100) and window.dtype == torch.int64 for window in windows)
    assert torch.equal(torch.cat(windows, 1)[0], torch.arange(1000, 2000))


def test_windows_are_the_same_every_time_and_others_for_another_seed() -> None:
    first, again, other = (
        torch.cat(token_windows(ALPHABET, Characters(), tokens=50, count=5, seed=seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_windows_leave_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    token_windows(ALPHABET, Characters(), tokens=50, count=5)
    assert torch.equal(torch.get_rng_state(), state)


def test_special_tokens_are_put_around_each_window() -> None:
    for window in token_windows(ALPHABET, Characters(before=(1,), after=(2, 3)), tokens=20, count=4):
        row = window[0].tolist()
        assert len(row) == 20
        assert (row[0], row[-2:]) == (1, [2, 3])
        assert all(1000 <= token < 2000 for token in row[1:-2])


def test_too_short_a_text_is_an_error_with_counts() -> None:
    with pytest.raises(InputError, match=r"alphabet has 1,000 tokens, 2,048 are needed \(4 windows of 512\)"):
        token_windows(ALPHABET, Characters(), tokens=512, count=4)


def test_a_window_without_room_is_an_error() -> None:
    with pytest.raises(InputError, match="no room for text"):
        token_windows(ALPHABET, Characters(before=(1,), after=(2,)), tokens=2, count=1)
    with pytest.raises(InputError, match="at least one window"):
        token_windows(ALPHABET, Characters(), tokens=5, count=0)


def test_a_text_longer_than_is_read_at_once_is_still_enough() -> None:
    words = Text("x" * (1 << 20) + "y" * 100, "long")

    class Rare(Characters):
        """One token in a hundred thousand characters, so that the first part is too short."""

        def __call__(self, text: str, add_special_tokens: bool = True, **keywords: Any) -> dict[str, list[int]]:
            return super().__call__(text[::100_000] if len(text) > 1 else text, add_special_tokens)

    with pytest.raises(InputError, match="long has 11 tokens"):
        token_windows(words, Rare(), tokens=12, count=1)
    assert token_windows(words, Rare(), tokens=11, count=1)[0].shape == (1, 11)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\t", "is empty"),
        ("naïve".encode("latin-1"), r"is not UTF-8 text \(byte 0xef at position 2\)"),
        ("text".encode("utf-16"), "is not UTF-8 text"),
    ],
)
def test_a_file_that_cannot_be_read_as_text_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "my.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"my\.txt {message}"):
        read_text(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*none\.txt: No such file"):
        read_text(tmp_path / "none.txt")
    with pytest.raises(InputError, match="is a folder"):
        read_text(tmp_path)


def test_a_file_is_read_with_its_path_as_origin(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("naïve", encoding="utf-8-sig")
    assert read_text(tmp_path / "a.txt") == Text("naïve", str(tmp_path / "a.txt"))
