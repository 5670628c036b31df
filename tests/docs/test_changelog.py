from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("assemble", ROOT / "changelog.d" / "assemble.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "b.added.md").write_text("A new\nthing.\n", encoding="utf-8")
    (tmp_path / "a.added.md").write_text("Another.", encoding="utf-8")
    (tmp_path / "c.fixed.md").write_text("A mended one.", encoding="utf-8")
    return tmp_path


def test_every_waiting_fragment_is_well_formed(tool: ModuleType) -> None:
    tool.assemble(ROOT / "changelog.d")


def test_fragments_are_sorted_under_their_headings(tool: ModuleType, folder: Path) -> None:
    assert tool.assemble(folder) == "### Added\n\n- Another.\n- A new thing.\n\n### Fixed\n\n- A mended one.\n"


def test_release_moves_fragments_above_the_older_versions(tool: ModuleType, folder: Path) -> None:
    log = folder / "LOG"
    log.write_text("# Changelog\n\n## [Unreleased]\n\nWaiting.\n\n## [0.1.0] - 2026-01-01\n\nold\n", encoding="utf-8")
    tool.release(folder, log, "0.2.0", "2026-02-01")
    text = log.read_text(encoding="utf-8")
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == ["## [Unreleased]", "## [0.2.0] - 2026-02-01", "## [0.1.0] - 2026-01-01"]
    assert "Waiting.\n\n## [0.2.0]" in text
    assert "- A mended one.\n\n## [0.1.0] - 2026-01-01\n\nold\n" in text
    assert not list(folder.glob("*.md"))
    with pytest.raises(SystemExit, match="nothing to release"):
        tool.release(folder, log, "0.3.0", "2026-03-01")


def test_changelog_can_take_a_first_release(tool: ModuleType, folder: Path) -> None:
    log = folder / "LOG"
    log.write_text((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), encoding="utf-8")
    tool.release(folder, log, "9.9.9", "2026-02-01")
    assert "\n\n## [9.9.9] - 2026-02-01\n\n### Added\n" in log.read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "text"), [("x.md", "text"), ("x.new.md", "text"), ("x.added.md", " ")])
def test_bad_fragment_is_named(tool: ModuleType, tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match=name):
        tool.assemble(tmp_path)
