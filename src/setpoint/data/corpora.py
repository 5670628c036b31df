"""Corpora: documents in three splits that share none.

A corpus is split by file where there are files: documents are taken in the order of a hash of their names, and the
first few per cent of the characters go to ``test``, the next to ``valid``, the rest to ``train``. So a split does not
depend on the order of a folder, and near copies within one file can't straddle two splits. A document whose content
came before under another name is left out. A single file is cut by position.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from setpoint.data.shelf import locate, named
from setpoint.data.sword import read_verses
from setpoint.data.windows import read_text
from setpoint.errors import InputError

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True, slots=True)
class Document:
    """A text with a name."""

    name: str
    content: str

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the content."""
        return hashlib.sha256(self.content.encode("utf-8", errors="surrogatepass")).hexdigest()


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents by split.

    Args:
        splits: ``"train"``, ``"valid"``, ``"test"`` -> documents in order.
        origin: Where it came from, for a report.
        license: Its licence, "" for the user's own.
        notes: What was left out, and why.
    """

    splits: Mapping[str, tuple[Document, ...]]
    origin: str
    license: str = ""
    notes: tuple[str, ...] = ()


def corpus(source: str | Path, *, valid: float = 0.05, test: float = 0.05) -> Corpus:
    """Open a corpus by name, or a text file or folder of the user's.

    Args:
        source: A name of ``setpoint data list``, a UTF-8 file, or a folder of such files (searched with its
            subfolders; hidden files and files that are no text are left out, and counted in ``notes``). A name wins
            over a file; write ``./NAME`` for the file.
        valid, test: Share of the characters in these splits.

    Returns:
        The corpus.

    Raises:
        InputError: An unknown name, a set that is not on this machine, a file that is empty or not UTF-8, shares that
            leave nothing to train on.
    """
    if not (0 < valid < 1 and 0 < test < 1 and valid + test < 1):
        raise InputError(f"expected valid and test above 0 and below 1 together, got valid={valid} and test={test}")
    shares = {"test": test, "valid": valid}
    if isinstance(source, str) and source in _NAMED:
        return _NAMED[source](source, shares)
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path, shares)
    if path.exists():
        return Corpus(_by_position(Document(path.name, read_text(path).content), shares), str(path))
    entry = named(str(source))
    raise InputError(f"{entry.name} holds {entry.kind}; open it with setpoint.data.{entry.kind}")


def verses(name: str) -> dict[str, str]:
    """All verses of a named Bible, aligned with the others by their keys.

    Args:
        name: ``"bibles/en"``, ``"bibles/en-web"`` or ``"bibles/es"``.

    Returns:
        ``"Gen.1.1"`` -> the verse.

    Raises:
        InputError: There is no such Bible, or it is not on this machine.
    """
    if not name.startswith("bibles/"):
        raise InputError(f"expected a Bible such as 'bibles/en', got {name!r}")
    return read_verses(locate(name)[0])


def _standard_library(name: str, shares: Mapping[str, float]) -> Corpus:
    root = locate(name)[0]
    documents, unread = [], 0
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if _LEFT_OUT & set(inside.parts) or inside.name.startswith("test_"):
            continue
        try:
            documents.append(Document(inside.as_posix(), path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError):
            unread += 1
    return Corpus(
        _by_document(documents, shares),
        f"Python {platform.python_version()} standard library, without tests",
        named(name).license,
        (f"{unread} files that are not UTF-8 left out",) if unread else (),
    )


_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings"}
"""Folders of the standard library that are no part of the corpus: tests are long and alike, and the 120 code tables
of ``encodings`` are near copies of one another, which would sit on both sides of a split by file."""


def _bible(name: str, shares: Mapping[str, float]) -> Corpus:
    chapters: dict[str, list[str]] = {}
    for key, verse in verses(name).items():
        chapters.setdefault(key.rpartition(".")[0], []).append(verse)
    documents = [Document(chapter, "\n".join(lines) + "\n") for chapter, lines in chapters.items()]
    # A chapter's place is drawn from its name alone: it is in the same split in every language.
    splits: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for document in documents:
        draw = int(_rank(document.name)[:13], 16) / 16**13
        splits["test" if draw < shares["test"] else "valid" if draw < sum(shares.values()) else "train"].append(
            document
        )
    entry = named(name)
    return Corpus({split: tuple(found) for split, found in splits.items()}, entry.what.partition(";")[0], entry.license)


_NAMED: dict[str, Callable[[str, Mapping[str, float]], Corpus]] = {
    "python-stdlib": _standard_library,
    "bibles/en": _bible,
    "bibles/en-web": _bible,
    "bibles/es": _bible,
}


def _folder(root: Path, shares: Mapping[str, float]) -> Corpus:
    documents, skipped = [], []
    for path in sorted(root.rglob("*")):
        inside = path.relative_to(root)
        if not path.is_file() or any(part.startswith(".") for part in inside.parts):
            continue
        try:
            documents.append(Document(inside.as_posix(), read_text(path).content))
        except InputError:
            skipped.append(inside.as_posix())
    if not documents:
        raise InputError(
            f"{root} holds no text file" + (f" ({len(skipped)} files are empty or not UTF-8)" if skipped else "")
        )
    notes = (f"{len(skipped)} files that are empty or not UTF-8 left out, {skipped[0]} first",) if skipped else ()
    if len(documents) < len(SPLITS):
        joined = Document(root.name, "\n".join(document.content for document in documents))
        return Corpus(_by_position(joined, shares), str(root), notes=notes)
    return Corpus(_by_document(documents, shares), str(root), notes=notes)


def _by_document(documents: Iterable[Document], shares: Mapping[str, float]) -> dict[str, tuple[Document, ...]]:
    """Whole documents by the order of a hash of their names; copies of a document that came before are left out."""
    unique: dict[str, Document] = {}
    for document in documents:
        if document.content.strip():
            unique.setdefault(document.fingerprint, document)
    waiting = sorted(unique.values(), key=lambda document: _rank(document.name))
    total = sum(len(document.content) for document in waiting)
    splits: dict[str, tuple[Document, ...]] = {}
    for split, share in shares.items():
        chosen: list[Document] = []
        room = share * total
        for document in waiting:
            # One large document must not swallow the split and half of the next; it waits for train.
            if len(document.content) <= room:
                chosen.append(document)
                room -= len(document.content)
        if not chosen and waiting:
            chosen.append(min(waiting, key=lambda document: len(document.content)))
        splits[split] = tuple(sorted(chosen, key=lambda document: document.name))
        taken = set(map(id, chosen))
        waiting = [document for document in waiting if id(document) not in taken]
    return {"train": tuple(sorted(waiting, key=lambda document: document.name)), **splits}


def _by_position(document: Document, shares: Mapping[str, float]) -> dict[str, tuple[Document, ...]]:
    """The end of a document is for test, what is before it for valid; cuts fall on line breaks where one is near."""
    content = document.content
    first = _cut(content, round(len(content) * (1 - sum(shares.values()))))
    second = _cut(content, round(len(content) * (1 - shares["test"])))
    pieces = {"train": content[:first], "valid": content[first:second], "test": content[second:]}
    return {split: (Document(f"{document.name}:{split}", piece),) for split, piece in pieces.items()}


def _cut(content: str, place: int) -> int:
    line = content.find("\n", place, place + 1000)
    return place if line < 0 else line + 1


def _rank(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()
