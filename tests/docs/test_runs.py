"""The pages' examples run."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

import setpoint

DOCS = Path(__file__).parents[2] / "docs"


def own_model_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / "own-model.md").read_text(encoding="utf-8"), re.DOTALL)


def test_five_lines_for_a_model_of_ones_own_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(own_model_blocks()[0], "own-model.md", "exec"), {})
    assert (tmp_path / "report.html").is_file()


def test_notebook_runs_and_finds_its_planted_fault() -> None:
    notebook = json.loads((DOCS / "check.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    namespace: dict[str, object] = {}
    for number, cell in enumerate(cells):
        exec(compile(cell, f"check.ipynb, code cell {number}", "exec"), namespace)
    healthy, report = namespace["healthy"], namespace["report"]
    assert "dead-units" not in {f.code for f in healthy.findings}  # type: ignore[attr-defined]
    assert "dead-units" in {f.code for f in report.findings}  # type: ignore[attr-defined]


def test_notebook_can_be_read_without_running_it() -> None:
    notebook = json.loads((DOCS / "check.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] for cell in cells[1:])


def test_factory_of_ones_own_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(own_model_blocks()[1], encoding="utf-8")
    try:
        report = setpoint.check("mine:build")
    finally:
        sys.modules.pop("mine", None)
    assert report.model.source == "mine:build"
