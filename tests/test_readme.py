"""The README's own words, held to: its Python runs, its commands exist."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_in_the_readme_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_the_readme_opens_with_its_two_commands() -> None:
    text = README.read_text()
    assert -1 < text.index("make demo") < text.index("make test") < text.index("```python")
    makefile = (README.parent / "Makefile").read_text()
    assert "\ndemo:" in makefile
    assert "\ntest:" in makefile


def test_what_the_readme_installs_is_declared() -> None:
    project = tomllib.loads((README.parent / "pyproject.toml").read_text())["project"]
    commands = re.findall(r"pip install (.*)", README.read_text())
    assert commands
    for command in commands:
        wanted = re.search(r'"\.\[([\w,]+)\]"', command)
        assert wanted, command
        assert set(wanted[1].split(",")) <= set(project["optional-dependencies"])


def test_pictures_that_the_readme_shows_are_there() -> None:
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README.read_text()):
        assert (README.parent / picture).is_file(), picture
