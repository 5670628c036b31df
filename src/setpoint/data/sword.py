"""Verses of a Bible in the compressed text format of the SWORD project (``ModDrv=zText``), read with nothing but zlib.

Three files hold a testament: ``.bzz`` the compressed blocks, ``.bzs`` where each block is (offset, length, length
when unpacked), ``.bzv`` one entry a verse (block, offset in the unpacked block, length). Chapters announce themselves
(``<chapter osisID="Gen.1" …>``) in an entry of their own, and the entries after it are the verses 1, 2, 3, …, so no
table of books is needed.
"""

from __future__ import annotations

import html
import re
import struct
import zlib
from pathlib import Path

from setpoint.errors import InputError

_CHAPTER = re.compile(r'<chapter [^>]*osisID="([^"]+)"[^>]*sID=')
_SPACED = re.compile(r"\s+(?=[,.;:!?])")
_NOTE = re.compile(r"<(note|title|reference)\b[^>]*?(?:/>|>.*?</\1>)", re.DOTALL)
_TAG = re.compile(r"<[^>]*>")


def read_verses(configuration: Path) -> dict[str, str]:
    """All verses of a Bible.

    Args:
        configuration: The module's ``mods.d/NAME.conf``; its ``DataPath`` counts from the folder above ``mods.d``.

    Returns:
        ``"Gen.1.1"`` -> the verse without markup, notes and headings, in the order of the Bible. Empty verses are
        left out.

    Raises:
        InputError: It is no Bible in that format, or it is damaged.
    """
    lines = configuration.read_text(encoding="utf-8", errors="replace").splitlines()
    settings = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    if settings.get("ModDrv") != "zText" or settings.get("CompressType", "ZIP") != "ZIP":
        raise InputError(f"{configuration} is no Bible in zText format compressed with ZIP")
    folder = configuration.parent.parent / settings["DataPath"]
    verses: dict[str, str] = {}
    for testament in ("ot", "nt"):
        if (folder / f"{testament}.bzv").is_file():
            try:
                verses.update(_testament(folder, testament))
            except (OSError, struct.error, zlib.error, IndexError, UnicodeDecodeError) as error:
                raise InputError(f"{folder}/{testament} is damaged: {error}") from error
    if not verses:
        raise InputError(f"{folder} holds no verses")
    return verses


def _testament(folder: Path, testament: str) -> dict[str, str]:
    packed = (folder / f"{testament}.bzz").read_bytes()
    places = (folder / f"{testament}.bzs").read_bytes()
    blocks = [zlib.decompress(packed[start : start + size]) for start, size, _ in struct.iter_unpack("<III", places)]
    verses = {}
    chapter, number = "", 0
    for block, start, size in struct.iter_unpack("<IIH", (folder / f"{testament}.bzv").read_bytes()):
        entry = blocks[block][start : start + size].decode("utf-8") if size else ""
        number += 1
        entry = entry.partition("<chapter eID")[0]  # what follows a chapter's end is a glossary or a preface
        if 'type="book"' in entry:
            chapter = ""
        if found := _CHAPTER.search(entry):
            chapter, number = found[1], 0
        elif chapter and (text := plain(entry)):
            verses[f"{chapter}.{number}"] = text
    return verses


def plain(markup: str) -> str:
    """The text of a verse without markup.

    >>> plain('In the <w lemma="x">beginning</w>, God<note>that is</note><q>said</q> <note>thus</note>. ')
    'In the beginning, God said.'
    """
    text = html.unescape(_TAG.sub("", _NOTE.sub(" ", markup)))
    return _SPACED.sub("", " ".join(text.replace("¶", " ").split()))
