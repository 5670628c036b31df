from __future__ import annotations

from pathlib import Path

import pytest

from setpoint.data.cache import cache_folder, publish
from setpoint.errors import InputError


def test_a_folder_appears_whole(cache: Path) -> None:
    target = cache_folder() / "a" / "b"

    def fill(staging: Path) -> None:
        assert not target.exists()
        (staging / "file").write_text("content")

    assert publish(target, fill) == target
    assert (target / "file").read_text() == "content"
    assert [path.name for path in target.parent.iterdir()] == ["b"]


def test_the_quicker_of_two_processes_wins(cache: Path) -> None:
    target = cache_folder() / "b"

    def fill(staging: Path) -> None:
        (staging / "file").write_text("slow")
        if not target.exists():
            publish(target, lambda other: (other / "file").write_text("quick"))  # type: ignore[arg-type, return-value]

    publish(target, fill)
    assert (target / "file").read_text() == "quick"
    assert [path.name for path in target.parent.iterdir()] == ["b"]


def test_a_name_that_is_taken_by_a_file_is_an_error(cache: Path) -> None:
    target = cache_folder() / "b"
    target.parent.mkdir(parents=True)
    target.write_text("a file")
    with pytest.raises(InputError, match="cannot write"):
        publish(target, lambda staging: None)
