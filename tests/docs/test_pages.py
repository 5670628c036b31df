"""What the pages say is what the code does."""

from __future__ import annotations

import importlib.util
import re
import sys
import tomllib
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest

from setpoint.catalog.reader import parse, read_file
from setpoint.probe.registry import PROBES

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def module_from(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    return module_from(DOCS / "generate.py", "generate")


def test_generated_pages_are_current(generate: ModuleType) -> None:
    assert generate.stale() == [], "run python docs/generate.py"


def test_every_threshold_is_explained_on_the_page(generate: ModuleType) -> None:
    for probe in PROBES:
        section = generate._finding(probe)
        assert section.count("\n| `") == len(fields(probe))


def test_links_between_pages_lead_somewhere() -> None:
    for page in [*DOCS.glob("*.md"), ROOT / "CONTRIBUTING.md"]:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith("http"):
                continue
            name, _, anchor = target.partition("#")
            other = (page.parent / name) if name else page
            assert other.is_file(), f"{page.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", other.read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in headings, f"{page.name}: {target}"


def test_contributing_names_the_five_places() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for place in ("Code", "Catalogue", "Proof", "Test", "Changelog"):
        assert f". **{place}**" in text


def test_contributing_example_probe_works_as_its_example_tests_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, tests = blocks(ROOT / "CONTRIBUTING.md", "python")
    (tmp_path / "offset_example.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    namespace: dict[str, object] = {}
    try:
        exec(compile(tests.replace("setpoint.probe.offset", "offset_example"), "CONTRIBUTING.md", "exec"), namespace)
        checks = [value for name, value in namespace.items() if name.startswith("test_")]
        assert len(checks) == 3
        for check in checks:
            check()  # type: ignore[operator]
    finally:
        sys.modules.pop("offset_example", None)


def test_contributing_example_row_is_one_the_catalogue_takes(tmp_path: Path) -> None:
    (row,) = blocks(ROOT / "CONTRIBUTING.md", "toml")
    path = tmp_path / "offset.toml"
    path.write_text(row, encoding="utf-8")
    assert parse(row, "example") == tomllib.loads(row)
    assert read_file(path, "probe").items[0].id == "offset"
