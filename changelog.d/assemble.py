"""Assemble the fragments of this folder into a section of CHANGELOG.md.

A change that a user would notice leaves one file here, ``NAME.KIND.md``, with a sentence or two. KIND is one of the
headings of Keep a Changelog in lower case. Since every change has a file of its own, work side by side never meets in
one file.

    python changelog.d/assemble.py                   print what is waiting
    python changelog.d/assemble.py VERSION DATE      move it into CHANGELOG.md and remove the fragments
"""

from __future__ import annotations

import sys
from pathlib import Path

KINDS = ("added", "changed", "deprecated", "removed", "fixed", "security")
WAITING = "## [Unreleased]"


def fragments(folder: Path) -> dict[str, list[Path]]:
    """Fragment files by kind, in the order of the headings; a name that is no fragment is an error."""
    found: dict[str, list[Path]] = {kind: [] for kind in KINDS}
    for path in sorted(folder.glob("*.md")):
        parts = path.name.split(".")
        if len(parts) != 3 or parts[1] not in KINDS:
            raise SystemExit(f"{path}: expected NAME.KIND.md with KIND one of {', '.join(KINDS)}; rename it")
        if not path.read_text(encoding="utf-8").strip():
            raise SystemExit(f"{path}: is empty; say in a sentence what changed, or remove it")
        found[parts[1]].append(path)
    return {kind: paths for kind, paths in found.items() if paths}


def assemble(folder: Path) -> str:
    """All fragments as Markdown: one heading a kind, one bullet a fragment."""
    sections = []
    for kind, paths in fragments(folder).items():
        bullets = ["- " + " ".join(path.read_text(encoding="utf-8").split()) for path in paths]
        sections.append(f"### {kind.capitalize()}\n\n" + "\n".join(bullets) + "\n")
    return "\n".join(sections)


def release(folder: Path, changelog: Path, version: str, date: str) -> None:
    """Put the assembled fragments under a heading of their own in ``changelog`` and remove them."""
    text = changelog.read_text(encoding="utf-8")
    new = assemble(folder)
    if not new:
        raise SystemExit(f"{folder}: no fragment is waiting; there is nothing to release")
    head, found, rest = text.partition(f"\n{WAITING}\n")
    if not found:
        raise SystemExit(f"{changelog}: has no heading {WAITING!r}; put it back above the latest version")
    note, separator, older = rest.partition("\n## ")
    body = f"{head}{found}{note.rstrip()}\n\n## [{version}] - {date}\n\n{new}{separator}{older}"
    changelog.write_text(body, encoding="utf-8")
    for paths in fragments(folder).values():
        for path in paths:
            path.unlink()


if __name__ == "__main__":
    here = Path(__file__).parent
    if len(sys.argv) == 1:
        print(assemble(here))
    elif len(sys.argv) == 3:
        release(here, here.parent / "CHANGELOG.md", *sys.argv[1:])
    else:
        raise SystemExit("usage: assemble.py [VERSION DATE]")
