"""The study on the page on proving runs, passes the suite, and is proved and found again by the page's own Python."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from setpoint.catalog import find
from setpoint.studies import find_studies, study_keys
from setpoint.types.proving import Criterion

PAGE = (Path(__file__).parents[2] / "docs" / "prove.md").read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "hidden_norm.py").write_text(python()[0], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SETPOINT_CACHE", str(tmp_path / "cache"))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("setpoint_study_"):
            del sys.modules[name]


def python() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_study_of_ones_own_passes_the_suite_and_is_proved(folder: Path) -> None:
    names: dict[str, Any] = {}
    for number, block in enumerate(python()[1:], start=1):
        exec(compile(block, f"prove.md, block {number}", "exec"), names)
    assert names["each"].key == "hidden-norm"
    (judgement,) = names["proof"].judgements
    assert len(judgement.pairs) == 2
    assert (folder / "proof.html").stat().st_size > 100_000
    (entry,) = names["setpoint"].results(store="mine.db")
    assert not entry.stale
    assert entry.proof.date == names["proof"].date


def test_a_change_of_the_studys_sizes_makes_its_result_stale(folder: Path) -> None:
    import setpoint

    setpoint.prove("hidden_norm.py", budget="smoke", jobs=1, store="mine.db")
    path = folder / "hidden_norm.py"
    (module,) = [  # other tests load studies too
        name for name, m in sys.modules.items() if name.startswith("setpoint_study_") and m.__file__ == str(path)
    ]
    del sys.modules[module]
    path.write_text(path.read_text(encoding="utf-8").replace('"steps": 20', '"steps": 21'), encoding="utf-8")
    assert setpoint.results(store="mine.db")[0].stale


def test_every_criterion_has_its_row() -> None:
    rows = re.findall(r"^\| `(\w+)\(", PAGE, re.MULTILINE)
    assert rows == [criterion.__name__ for criterion in get_args(Criterion)]


def test_the_methods_that_the_page_proves_have_studies() -> None:
    keys = set(re.findall(r"setpoint prove ([a-z][\w-]*)(?=\s)", PAGE))
    assert keys == {"batchnorm", "lns"}
    assert keys <= set(study_keys())
    assert all(study.takes_data for study in find_studies("lns"))
    assert find("batchnorm").proof == "batchnorm"
