"""What makes a stored run another run, on a package made for the purpose."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from setpoint.studies import study_keys
from setpoint.studies.engine import fingerprint
from setpoint.studies.engine.fingerprint import closure, code_digest, data_digest, has_changed, sources
from setpoint.studies.registry import FOLDER


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
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
        "lazy/__init__.py": "_HOME = {'late': 'library.lazy.late_home', 'short': 'near'}\ndef __getattr__(name): ...\n",
        "lazy/near.py": "from library.deep import helper as short\n",
        "lazy/late_home.py": "late = 1\n",
        "unused.py": "x = 1\n",
        "typed.py": "x = 1\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(fingerprint, "ROOT", "library")
    forget()
    yield root
    forget()


def forget() -> None:
    """Nothing that was found in one package is taken for the other's."""
    for cached in (fingerprint._file, fingerprint._exists, fingerprint._defining):
        cached.cache_clear()


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
    assert closure(study(package, "from library.lazy import short")) == ("library.deep",)


@pytest.mark.parametrize(
    "text",
    [
        "import library\nlibrary.nn.Act()",
        "import library.nn as layers\nlayers.Act()",
        "part = 'library.nn:Act'",
        "from importlib import import_module\nimport_module('library.nn.act')",
    ],
)
def test_what_is_named_without_being_imported_counts(package: Path, text: str) -> None:
    assert "library.nn.act" in closure(study(package, text))


def test_words_are_no_places(package: Path) -> None:
    text = "'library.nn:Act in a docstring'\ndef f():\n    'library.nn:Act'\nwords = 'of library.nn:Act', 'library.nn'"
    assert closure(study(package, text)) == ()


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
    before = sources(path)
    (package / changed).write_text(text)
    assert (code_digest(sources(path)) == code_digest(before)) is same
    assert has_changed(before, path) is not same


def test_code_that_is_gone_or_was_never_noted_has_changed(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = study(package, "from library.nn import Norm")
    before = sources(path)
    assert not has_changed(before, path)
    assert has_changed({}, path)
    monkeypatch.setattr(fingerprint, "EXECUTION", fingerprint.EXECUTION + 1)
    assert has_changed(before, path)
    monkeypatch.undo()
    path.unlink()
    assert has_changed(before, path)


def test_the_users_data_count_by_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("one")
    (tmp_path / "b").write_text("two")
    assert data_digest(None) == ""
    assert data_digest(tmp_path / "a") != data_digest(tmp_path / "b")
    (tmp_path / "b").write_text("one")
    assert data_digest(tmp_path / "a") == data_digest(tmp_path / "b")
    assert data_digest(tmp_path)


TRAINED = {"setpoint.studies._language", "setpoint.models.transformer", "setpoint.models.stack", "setpoint.train.loop"}
RECORDER = {
    "setpoint.probe.recorder",
    "setpoint.probe.recorder_hooks",
    "setpoint.probe.stat_kernels",
    "setpoint.surgery.anatomy",
}
REACHED = {
    "batchnorm": set(),  # what setpoint.nn calls BatchNorm1d is torch's own
    "dyt": TRAINED | RECORDER | {"setpoint.nn.norm.dyt", "setpoint.nn.norm.rmsnorm"},
    "layernorm": TRAINED | {"setpoint.nn.recurrent"},
    "lns": TRAINED | RECORDER | {"setpoint.nn.block.lns"},
    "massive-refined": TRAINED
    | RECORDER
    | {
        "setpoint.probe.interventions.massive",
        "setpoint.probe.interventions.hooks",
        "setpoint.optim.tvr",
        "setpoint.nn.attention.kv_bias",
        "setpoint.loading.gguf_file",
    },
    "peri-ln": TRAINED | RECORDER | {"setpoint.nn.block.peri_ln", "setpoint.nn.block.pre_ln"},
    "pre-ln": TRAINED | RECORDER | {"setpoint.nn.block.pre_ln"},
    "pre-rmsnorm": TRAINED
    | RECORDER
    | {f"setpoint.fixes.{name}" for name in ("pre_rmsnorm", "pre_crmsnorm")}
    | {f"setpoint.fixing.{name}" for name in ("engine", "spec", "exactness")}
    | {f"setpoint.surgery.{name}" for name in ("anatomy", "centre", "editing", "fold", "inserts", "stream", "writers")}
    | {"setpoint.nn.norm.rmsnorm"},
}
SHARED_BY_FIXES = {"setpoint.fixes.norm_sites", "setpoint.fixes.token_norms", "setpoint.fixes.fields"}
NEVER = ("setpoint.report", "setpoint.catalog", "setpoint.studies.engine", "setpoint.checkup", "setpoint.cli")


@pytest.mark.parametrize("key", study_keys())
def test_a_study_that_ships_reaches_what_its_figures_hang_on_and_no_other_method(key: str) -> None:
    """A study that is not in the table is held to the second half alone."""
    own = key.replace("-", "_")
    found = set(closure(FOLDER / f"{own}.py"))
    assert REACHED.get(key, set()) <= found
    named = REACHED.get(key, set())
    others = {name for name in found if name.startswith("setpoint.fixes.") and own not in name}
    assert others <= named | SHARED_BY_FIXES
    assert not any(name == head or name.startswith(head + ".") for name in found for head in NEVER)
    assert not found & {"setpoint.nn.norm.batchnorm", "setpoint.models.resnet", "setpoint.probe.registry"}


@pytest.mark.parametrize(
    ("text", "reached"),
    [
        ("from setpoint import fix\nfix(model, 'dyt:alpha=0.5,lns')", {"setpoint.fixes.dyt", "setpoint.fixes.lns"}),
        ("import setpoint\nsetpoint.fix(model, f'dyt:alpha={x}')", {"setpoint.fixes.dyt", "setpoint.nn.norm.dyt"}),
        ("from setpoint import check", {"setpoint.checkup", "setpoint.probe.massive"}),
        ("from setpoint import nn\nnn.DyT(4)", {"setpoint.nn.norm.dyt"}),
    ],
)
def test_a_study_of_ones_own_reaches_what_it_names(tmp_path: Path, text: str, reached: set[str]) -> None:
    path = tmp_path / "own.py"
    path.write_text(text)
    assert reached <= set(closure(path))


def test_the_name_of_a_method_is_no_use_of_its_fix(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text("from setpoint.nn import DyT\narm = 'lns'")
    assert "setpoint.fixes.lns" not in closure(path)
