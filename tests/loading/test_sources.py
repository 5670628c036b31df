"""The front door: what `load` takes, and what it says to what it doesn't."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import setpoint
from setpoint.errors import InputError


def test_a_module_is_taken_as_it_is() -> None:
    model = nn.Linear(2, 2).train()
    loaded = setpoint.load(model)
    assert loaded.model is model
    assert model.training
    assert (loaded.task, loaded.source, loaded.processor) == ("other", "Linear", None)
    assert loaded.forward(model, torch.ones(1, 2)).shape == (1, 2)


def test_a_module_of_transformers_is_recognised(folder: Callable[[str], Path]) -> None:
    model = setpoint.load(folder("llama")).model
    assert setpoint.load(model).task == "language-model"


def test_the_source_is_kept_as_typed(folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder("bert")
    monkeypatch.chdir(path.parent)
    assert setpoint.load("bert").source == "bert"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("smolm2", "no model is called 'smolm2'; nearest: smollm2, minilm, mobilenetv2"),
        ("vits", "no model is called 'vits'; nearest: vit-s"),
        ("./nothing/here.gguf", "./nothing/here.gguf does not exist; expected a model folder"),
        ("", "expected a model, got an empty name"),
    ],
)
def test_an_unknown_source_is_one_line(source: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}") as error:
        setpoint.load(source)
    assert "\n" not in str(error.value)


def test_something_else_than_a_source_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"expected a path, a name or a torch\.nn\.Module, got a int"):
        setpoint.load(3)  # type: ignore[arg-type]


def test_weights_alone_are_no_model(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    torch.save({"x": torch.zeros(2)}, tmp_path / "x.pt")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    (tmp_path / "x.onnx").write_bytes(b"onnx")
    for name, message in {
        "x.safetensors": "without an architecture; give the folder",
        "x.pt": "holds 1 weights without an architecture; give module:factory",
        "module.pt": "is refused: it pickles torch.nn.modules.linear.Linear",
        "x.onnx": "is not a model; expected a folder",
    }.items():
        with pytest.raises(InputError, match=message):
            setpoint.load(tmp_path / name)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"dtype": "float23"}, "dtype 'float23' is not a floating-point type"),
        ({"dtype": "int8"}, "dtype 'int8' is not a floating-point type"),
        ({"device": "toaster"}, "device 'toaster' can't be used here"),
    ],
)
def test_a_wrong_device_or_type_is_one_line(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        setpoint.load(nn.Linear(2, 2), **keywords)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "library", "extra"), [("smollm2", "transformers", "hf"), ("vit-s", "onnx", "vision")])
def test_a_missing_library_is_one_line_with_the_command(
    name: str, library: str, extra: str, monkeypatch: pytest.MonkeyPatch, packaged_model: Callable[[str], Any]
) -> None:
    packaged_model(name)  # skips where the package itself is absent
    for module in [module for module in sys.modules if module.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, module)
    original = builtins.__import__

    def without(module: str, *arguments: Any, **keywords: Any) -> Any:
        if module.partition(".")[0] == library:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)
        return original(module, *arguments, **keywords)

    def find_without(module: str) -> Any:
        if module.partition(".")[0] == library:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)
        return __import__("importlib").import_module(module)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr("setpoint.extras.import_module", find_without)
    with pytest.raises(InputError, match=rf"{library} is needed .* pip install 'setpoint\[{extra}\]'"):
        setpoint.load(name)


def test_importing_the_loading_room_imports_no_model_library() -> None:
    import subprocess

    libraries = ("transformers", "onnx", "skimage", "gguf")
    code = f"import setpoint.loading, sys; print([name for name in {libraries} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
