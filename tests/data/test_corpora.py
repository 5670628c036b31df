from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest

from setpoint.data import corpus
from setpoint.data.corpora import SPLITS
from setpoint.data.sword import plain, read_verses
from setpoint.errors import InputError


@pytest.fixture(scope="module")
def stdlib():  # type: ignore[no-untyped-def]
    return corpus("python-stdlib")


def names(found, split: str) -> set[str]:  # type: ignore[no-untyped-def]
    return {document.name for document in found.splits[split]}


def test_the_standard_library_is_split_by_file_without_copies(stdlib) -> None:  # type: ignore[no-untyped-def]
    assert not names(stdlib, "train") & (names(stdlib, "valid") | names(stdlib, "test"))
    assert not names(stdlib, "valid") & names(stdlib, "test")
    contents = [document.fingerprint for split in SPLITS for document in stdlib.splits[split]]
    assert len(contents) == len(set(contents)) > 400
    assert stdlib.license == "PSF-2.0"


def test_the_standard_library_leaves_out_tests_and_code_tables(stdlib) -> None:  # type: ignore[no-untyped-def]
    every = names(stdlib, "train") | names(stdlib, "valid") | names(stdlib, "test")
    assert "argparse.py" in every
    assert not [name for name in every if name.startswith(("test/", "encodings/", "site-packages/"))]


def test_shares_are_what_was_asked_for(stdlib) -> None:  # type: ignore[no-untyped-def]
    sizes = {split: sum(len(document.content) for document in stdlib.splits[split]) for split in SPLITS}
    total = sum(sizes.values())
    assert 8e6 < total < 20e6
    assert sizes["valid"] / total == pytest.approx(0.05, abs=0.005)
    assert sizes["test"] / total == pytest.approx(0.05, abs=0.005)


def test_a_folder_is_split_by_file_whatever_its_order(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"text number {number}\n" * 5)
    (tmp_path / "copy.txt").write_text("text number 7\n" * 5)
    (tmp_path / "image.bin").write_bytes(b"\xff\xfe\x00")
    (tmp_path / ".hidden").write_text("hidden")
    found = corpus(tmp_path, valid=0.2, test=0.2)
    kept = [document.name for split in SPLITS for document in found.splits[split]]
    assert len(kept) == 40
    assert len({"copy.txt", "7.txt"} & set(kept)) == 1
    assert len(found.splits["test"]) in (7, 8)
    assert "1 files" in found.notes[0]
    assert "image.bin" in found.notes[0]


def test_one_large_file_of_a_folder_goes_to_train(tmp_path: Path) -> None:
    (tmp_path / "large.txt").write_text("x" * 10_000)
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(f"{number}" * 300)
    found = corpus(tmp_path)
    assert "large.txt" in names(found, "train")
    assert len(found.splits["valid"]) == len(found.splits["test"]) == 1


def test_a_file_is_split_by_position_at_line_breaks(tmp_path: Path) -> None:
    lines = [f"line {number}\n" for number in range(1000)]
    (tmp_path / "book.txt").write_text("".join(lines))
    found = corpus(tmp_path / "book.txt", valid=0.1, test=0.1)
    pieces = [found.splits[split][0].content for split in SPLITS]
    assert "".join(pieces) == "".join(lines)
    assert all(piece.endswith("\n") for piece in pieces)
    assert len(pieces[2]) == pytest.approx(len("".join(lines)) / 10, rel=0.05)


def test_a_folder_of_two_files_is_split_by_position(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name}\n" * 1000)
    found = corpus(tmp_path)
    assert all(len(found.splits[split]) == 1 for split in SPLITS)


def test_bad_sources_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    for name, problem in (("empty.txt", "is empty"), ("latin.txt", "not UTF-8"), ("none.txt", "no data set is called")):
        with pytest.raises(InputError, match=problem):
            corpus(tmp_path / name)
    with pytest.raises(InputError, match="no text file"):
        corpus(tmp_path)
    with pytest.raises(InputError, match="nearest: bibles/en"):
        corpus("bibles/eng")
    with pytest.raises(InputError, match=r"setpoint\.data\.images"):
        corpus("digits")
    with pytest.raises(InputError, match="below 1 together"):
        corpus("python-stdlib", valid=0.6, test=0.5)
    with pytest.raises(InputError, match="setpoint data get bibles/en"):
        corpus("bibles/en")


def write_module(root: Path, entries: list[str], broken: bool = False) -> Path:
    """A SWORD module with one testament in one block."""
    folder = root / "modules" / "tiny"
    folder.mkdir(parents=True)
    block, places = b"", b""
    for entry in entries:
        data = entry.encode()
        places += struct.pack("<IIH", 0, len(block), len(data))
        block += data
    packed = zlib.compress(block)
    (folder / "ot.bzz").write_bytes(packed[:-9] if broken else packed)
    (folder / "ot.bzs").write_bytes(struct.pack("<III", 0, len(packed), len(block)))
    (folder / "ot.bzv").write_bytes(places)
    (root / "mods.d").mkdir()
    path = root / "mods.d" / "tiny.conf"
    path.write_text("[tiny]\nDataPath=./modules/tiny/\nModDrv=zText\nCompressType=ZIP\n")
    return path


BIBLE = [
    "",
    '<div osisID="Gen" type="book"/><title>Genesis</title> A preface.',
    '<chapter n="1" osisID="Gen.1" sID="Gen.1"/>',
    "In the <w>beginning</w>.",
    "",
    'The third. <chapter eID="Gen.1"/> A glossary.',
    '<chapter n="2" osisID="Gen.2" sID="Gen.2"/>',
    "Thus.",
    '<div osisID="Exod" type="book"/> Another preface.',
    '<chapter n="1" osisID="Exod.1" sID="Exod.1"/>',
    "Now.",
]


def test_verses_are_numbered_by_their_chapters(tmp_path: Path) -> None:
    assert read_verses(write_module(tmp_path, BIBLE)) == {
        "Gen.1.1": "In the beginning.",
        "Gen.1.3": "The third.",
        "Gen.2.1": "Thus.",
        "Exod.1.1": "Now.",
    }


def test_a_damaged_bible_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="damaged"):
        read_verses(write_module(tmp_path, BIBLE, broken=True))


def test_markup_leaves_no_trace() -> None:
    assert plain("<q>God</q><note>Hebrew: <i>Elohim</i></note>, &amp; light¶") == "God, & light"


def test_a_chapter_is_in_one_split_in_every_language(cache: Path) -> None:
    chapters = [[f'<chapter osisID="Ps.{n}" sID="x"/>', f"verse {n}"] for n in range(1, 151)]
    for name, module in (("en", "engKJV2006eb"), ("es", "spaRV1909eb")):
        root = cache / "data" / "sets" / f"bibles-{name}" / "usr" / "share" / "sword"
        given = chapters if name == "en" else chapters[20:]
        write_module(root, [entry for chapter in given for entry in chapter]).rename(root / "mods.d" / f"{module}.conf")
    english, spanish = corpus("bibles/en", valid=0.2, test=0.2), corpus("bibles/es", valid=0.2, test=0.2)
    for split in SPLITS:
        assert 20 < len(english.splits[split]) < 120
        assert names(spanish, split) == {name for name in names(english, split) if int(name[3:]) > 20}
