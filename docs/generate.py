"""Write the pages that say what the code says.

docs/check.md comes from the probes, docs/methods.md from the catalogue, and so does the table in docs/fix.md.

python docs/generate.py            write the pages
python docs/generate.py --check    exit with 1 if a page is not what the code says now
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from setpoint.catalog import items, methods
from setpoint.catalog.listing import import_line, shell_form
from setpoint.catalog.signature import signature
from setpoint.probe.base import Probe
from setpoint.probe.interventions import INTERVENTIONS
from setpoint.probe.registry import PROBES
from setpoint.probe.remedies import literature
from setpoint.types import Item, Method

HERE = Path(__file__).parent
MADE_BY = "<!-- Written by docs/generate.py; change the code and run it again. -->"

CHECK_HEAD = """\
# What `check` finds

`setpoint check MODEL` runs real inputs through a model once, takes statistics at the places that matter, and holds
them against thresholds. What crosses one is a *finding*. Each finding has a severity:

- **info**: worth knowing; nothing is wrong with the model as it stands.
- **warning**: something is wrong, or will be as soon as the model is trained on or put into fewer bits.
- **error**: the numbers are wrong already.

Look for one finding only with `--probe CODE`, leave one out with `--ignore ID` (an id is `code@place`, as the report
prints it) or `--ignore CODE`. In Python a probe is an object, and its thresholds are its arguments:
`MassiveActivation(absolute=50.0)`. `--deep` also intervenes: it changes something inside the model, looks at what
becomes of the output, and puts it back.
"""

FIXES_FROM, FIXES_TO = "<!-- The table is written by docs/generate.py. -->", "<!-- End of the table. -->"

METHODS_HEAD = """\
# The methods

Every method that this version of setpoint carries: its paper, what it does, and how it is called. At a shell
`setpoint list` prints them and `setpoint show KEY` one of them.
"""


def check_page() -> str:
    """One section a finding code, led by a table of contents."""
    contents = [f"| [`{p.code}`](#{p.code}) | {_escaped(p.title)} |" for p in PROBES]
    parts = [MADE_BY, CHECK_HEAD, "| finding | what it says |\n| --- | --- |\n" + "\n".join(contents) + "\n"]
    parts += [_finding(probe) for probe in PROBES]
    return "\n".join(parts)


def methods_page() -> str:
    """One section a method, by room."""
    parts = [MADE_BY, METHODS_HEAD]
    for room in sorted({method.room for method in methods.values()}):
        parts.append(f"## {room}\n")
        parts += [_method(method) for method in methods.values() if method.room == room]
    return "\n".join(parts)


def fix_page() -> str:
    """docs/fix.md as it stands, which is written by hand, with the table of fixes made anew."""
    before, start, rest = (HERE / "fix.md").read_text(encoding="utf-8").partition(FIXES_FROM)
    _, end, after = rest.partition(FIXES_TO)
    assert start, f"docs/fix.md lost its line {FIXES_FROM}"
    assert end, f"docs/fix.md lost its line {FIXES_TO}"
    rows = [
        f"| [`{item.id}`](methods.md#{method.key}) | {_escaped(item.does)} | {item.preserves} |"
        for method, item in items().values()
        if item.kind == "fix"
    ]
    table = "\n".join(["| fix | what it does | keeps |", "| --- | --- | --- |", *rows])
    return f"{before}{start}\n\n{table}\n\n{end}{after}"


def _finding(probe: Probe) -> str:
    words, arguments = _docstring(type(probe))
    method, _ = items()[probe.code]
    lines = [f"## {probe.code}\n", f"**{probe.title}.** {probe.explanation}\n", "How it is judged. " + words[0] + "\n"]
    lines += [paragraph + "\n" for paragraph in words[1:]]
    lines += ["| threshold | default | what it is and where it comes from |", "| --- | --- | --- |"]
    for field in fields(probe):  # type: ignore[arg-type]
        lines.append(f"| `{field.name}` | {getattr(probe, field.name):g} | {_escaped(arguments[field.name])} |")
    lines.append("")
    deep = [i for i in INTERVENTIONS if i.code == probe.code]
    for intervention in deep:
        lines.append(f"With `--deep`: {_docstring(type(intervention))[0][0]}\n")
    lines.append(f"Measured by `{type(probe).__module__}.{type(probe).__name__}`, after {_cited(method)}.\n")
    return "\n".join([*lines, *_remedies(probe.code)])


def _remedies(code: str) -> Iterator[str]:
    """What this version carries, then what only papers have, each with what can be done at once in front."""
    fixes = [(method, item) for method, item in items().values() if item.kind != "check" and code in item.treats]
    if fixes:
        yield "What treats it:\n"
        yield from (f"- {i.does} [`{i.id}`](methods.md#{m.key}), {m.reference}" for m, i in fixes)
        yield ""
    carried = {method.key for method, _ in fixes}
    papers = [paper for paper in literature().values() if code in paper.codes and paper.key not in carried]
    for when, words in (("now", "on the model as it is"), ("training", "when it is trained")):
        chosen = [paper for paper in papers if paper.when == when]
        if chosen:
            yield f"Papers that treat it {words}, not carried by this version:\n"
            yield from (f"- {paper.does}: {paper.reference}" for paper in chosen)
            yield ""


def _method(method: Method) -> str:
    lines = [f"### {method.key}\n", f"*{method.title}.* {_cited(method)}.\n", f"{method.summary}\n"]
    for item in method.items:
        lines += [_item(item), ""]
    return "\n".join(lines)


def _item(item: Item) -> str:
    found = signature(item.path)
    lines = [f"- `{item.id}` ({item.kind}): {item.does}"]
    if item.treats:
        says = "raises" if item.kind == "check" else "treats"
        lines.append(f"  - {says} " + ", ".join(f"[`{code}`](check.md#{code})" for code in item.treats))
    if item.preserves:
        lines.append(f"  - preserves: {item.preserves}")
    if shell_form(item):
        lines.append(f"  - shell: `{shell_form(item)}`")
    lines.append(f"  - Python: `{import_line(item)}`, then `{found.name}{found.call}`")
    return "\n".join(lines)


def _cited(method: Method) -> str:
    if not method.arxiv:
        return method.reference
    return f"{method.authors}, {method.year}, [arXiv {method.arxiv}](https://arxiv.org/abs/{method.arxiv})"


def _docstring(cls: type) -> tuple[list[str], dict[str, str]]:
    """Paragraphs before ``Args:``, and what is said of each argument."""
    text = (inspect.getdoc(cls) or "").replace("``", "`")
    head, _, tail = text.partition("\nArgs:\n")
    paragraphs = [" ".join(part.split()) for part in head.split("\n\n") if part.strip()]
    arguments: dict[str, str] = {}
    for entry in re.split(r"\n(?=    \S)", "\n" + tail):
        names, colon, words = entry.strip().partition(":")
        if colon:
            arguments |= dict.fromkeys(re.split(r",\s*", names), " ".join(words.split()))
    return paragraphs, arguments


def _escaped(text: str) -> str:
    """Text that stands in a table's cell."""
    return text.replace("|", "\\|")


PAGES = {"check.md": check_page, "fix.md": fix_page, "methods.md": methods_page}


def stale() -> list[str]:
    """Names of pages that are not what the code says now."""
    return [
        name
        for name, page in PAGES.items()
        if not (HERE / name).is_file() or (HERE / name).read_text(encoding="utf-8") != page()
    ]


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        raise SystemExit(f"{', '.join(stale())}: out of date; run python docs/generate.py" if stale() else 0)
    for name, page in PAGES.items():
        (HERE / name).write_text(page(), encoding="utf-8")
