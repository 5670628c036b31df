"""What makes a stored run another run, on a package made for the purpose."""

from __future__ import annotations

from pathlib import Path

import pytest

from setpoint.studies.engine import fingerprint
from setpoint.studies.engine.fingerprint import closure, code_digest, data_digest


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that re-exports names from modules, one of them on first use, and a study that imports them."""
    root = tmp_path / "library"
    files = {
        "__init__.py": "",
        "nn/__init__.py": (
            "from library.nn.norm import Norm as Norm\nfrom torch.nn import Linear\nfrom .act import Act\n"
        ),
        "nn/norm.py": "from library.deep import helper\nclass Norm:\n    '''Doc.'''\n    eps = 1\n",
        "nn/act.py": "class Act: pass\n",
        "deep.py": "def helper(): return 1\n",
        "lazy/__init__.py": "_HOME = {'late': 'library.lazy.late_home'}\ndef __getattr__(name): ...\n",
        "lazy/late_home.py": "late = 1\n",
        "unused.py": "x = 1\n",
        "typed.py": "x = 1\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(fingerprint, "ROOT", "library")
    for cached in (fingerprint._file, fingerprint._exists, fingerprint._defining):
        cached.cache_clear()
    return root


def study(package: Path, text: str) -> Path:
    path = package.parent / "study.py"
    path.write_text(text)
    return path


def test_a_re_exported_name_leads_to_its_own_module_only(package: Path) -> None:
    assert closure(study(package, "from library.nn import Norm")) == ("library.deep", "library.nn.norm")
    assert closure(study(package, "from library.nn import Act")) == ("library.nn.act",)


def test_imports_inside_functions_count_and_those_for_type_checkers_do_not(package: Path) -> None:
    for_checkers = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import library.typed\n"
    text = for_checkers + "def f():\n    import library.deep\n"
    assert closure(study(package, text)) == ("library.deep",)


def test_a_name_loaded_on_first_use_is_followed(package: Path) -> None:
    assert closure(study(package, "from library.lazy import late")) == ("library.lazy.late_home",)


def test_what_comes_from_elsewhere_is_not_hashed(package: Path) -> None:
    assert closure(study(package, "import torch\nfrom library.nn import Linear")) == ()


@pytest.mark.parametrize(
    ("changed", "text", "same"),
    [
        ("deep.py", "def helper(): return 2\n", False),
        ("deep.py", "# a remark\ndef helper():\n    '''Say why.'''\n    return 1\n", True),
        ("unused.py", "x = 2\n", True),
        ("nn/act.py", "class Act: y = 1\n", True),
    ],
)
def test_only_code_that_the_study_uses_changes_its_digest(package: Path, changed: str, text: str, same: bool) -> None:
    path = study(package, "from library.nn import Norm")
    before = code_digest(path)
    (package / changed).write_text(text)
    assert (code_digest(path) == before) is same


def test_the_users_data_count_by_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("one")
    (tmp_path / "b").write_text("two")
    assert data_digest(None) == ""
    assert data_digest(tmp_path / "a") != data_digest(tmp_path / "b")
    (tmp_path / "b").write_text("one")
    assert data_digest(tmp_path / "a") == data_digest(tmp_path / "b")
    assert data_digest(tmp_path)
