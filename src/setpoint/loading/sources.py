"""One door for every kind of model: `load` looks at what it is given and calls the loader for it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from setpoint.errors import InputError, nearest
from setpoint.loading import shelf
from setpoint.loading.factory import from_factory
from setpoint.loading.fixed import STATEMENT, load_fixed
from setpoint.loading.history import remembered
from setpoint.loading.tasks import forward_for, task_of
from setpoint.placing import device_named, dtype_named
from setpoint.running import unwrap
from setpoint.types import Loaded, Made

_FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def load(
    source: str | Path | nn.Module,
    *,
    hub: bool = False,
    trust_code: bool = False,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> Loaded:
    """Load a model as data: nothing in a file is run, and nothing is fetched unless asked for.

    Args:
        source: One of

            - a folder in Hugging Face's layout (``config.json`` and safetensors), or one that ``setpoint fix`` wrote,
            - a ``.gguf`` file,
            - ``module:factory``, a function of yours that returns a `torch.nn.Module`, ``(model, batches)``,
              ``(model, batches, loss)`` or ``(model, batches, loss, forward)``; the current directory is importable,
            - the short name of a model that a package ships (`packaged` lists them),
            - a hub id such as ``owner/name``, with ``hub=True`` only,
            - a `torch.nn.Module`, which is taken as it is, training mode included (``device`` and ``dtype`` move and
              cast it in place, as its own ``to`` does).
        hub: Allow a download from the Hugging Face hub.
        trust_code: Run the model code that a folder or hub repository brings along.
        device: Where to put the weights; None for the CPU, or where a given module is.
        dtype: Floating-point type to run in; float32 if None, whatever type is stored.

    Returns:
        The model with its tokenizer or image transform and notes on its weights; in eval mode, unless it was given
        as a module.

    Raises:
        InputError: The source is unknown, damaged, incomplete, or asks to run code.

    >>> from torch import nn
    >>> load(nn.Linear(2, 2)).task
    'other'
    """
    kind = None if dtype is None else dtype_named(dtype)
    if isinstance(source, nn.Module):
        return _placed(_described(source.to(dtype=kind), type(source).__name__), device)
    if not isinstance(source, str | Path):
        raise TypeError(f"expected a path, a name or a torch.nn.Module, got a {type(source).__name__}")
    loaded = _open(str(source), hub, trust_code, kind)
    return _placed(replace(loaded, source=str(source)), device)


def _open(source: str, hub: bool, trust_code: bool, dtype: torch.dtype | None) -> Loaded:
    if not source.strip():
        raise InputError(f"expected a model, got an empty name; packaged models are {', '.join(shelf.packaged())}")
    path, stored = Path(source).expanduser(), dtype or torch.float32
    if source in shelf.packaged() and not path.exists():
        return _packaged(source, stored)
    if (path / STATEMENT).is_file():
        return load_fixed(path, stored, trust_code)
    if path.is_dir():
        from setpoint.loading.huggingface import load_folder

        return load_folder(path, stored, trust_code)
    if path.is_file():
        return _file(path, stored)
    if _FACTORY.fullmatch(source) and ".py:" not in source:
        built = from_factory(source)
        described = _described(built.model.eval().to(dtype=dtype), source)
        loaded = replace(described, made=Made())  # whatever fixes the factory makes, it will make again
        forward = built.forward or loaded.forward
        return replace(loaded, batches=built.batches or None, loss=built.loss, forward=forward)
    if _HUB_ID.fullmatch(source) and hub:
        from setpoint.loading.huggingface import load_hub

        return load_hub(source, stored, trust_code)
    raise _unknown(source)


def _unknown(source: str) -> InputError:
    names = shelf.packaged()
    if Path(source + ".py").is_file():
        return InputError(f"{source}.py is Python; name the function in it that builds the model: {source}:FUNCTION")
    if source.endswith(":") and (Path(source[:-1] + ".py").is_file() or source[:-1].isidentifier()):
        return InputError(f"{source} names no function; give the one that builds the model: {source}FUNCTION")
    module, colon, attribute = source.partition(".py:")
    if colon:
        return InputError(f"{source} is a path; give the module's import name: {module.replace('/', '.')}:{attribute}")
    if re.fullmatch(r"[\w-]+", source):
        return InputError(
            f"no model is called {source!r}; nearest: {', '.join(nearest(source, names))}. A model of the "
            f"Hugging Face hub is given as owner/name with --hub (in Python: hub=True)"
        )
    if _HUB_ID.fullmatch(source):
        return InputError(
            f"{source} is neither a file nor a folder here; to download it from the Hugging Face hub add --hub "
            f"(in Python: hub=True)"
        )
    return InputError(
        f"{source} does not exist; expected a model folder, a .gguf file, module:factory or one of {', '.join(names)}"
    )


def _packaged(name: str, dtype: torch.dtype) -> Loaded:
    path = shelf.find(name)
    if name == "vit-s":
        from setpoint.loading.vit import load_vit

        return load_vit(path, dtype)
    if name == "mobilenetv2":
        from setpoint.loading.mobilenet import load_mobilenet

        return load_mobilenet(path, dtype)
    if path.is_dir():
        from setpoint.loading.huggingface import load_folder

        return load_folder(path, dtype, trust_code=False)
    return _file(path, dtype)


def _file(path: Path, dtype: torch.dtype) -> Loaded:
    if path.suffix == ".gguf":
        from setpoint.loading.gguf import load_gguf

        model, tokenizer, notes = load_gguf(path, dtype)
        return replace(_described(model, str(path)), processor=tokenizer, notes=notes)
    if path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json"):
        raise InputError(f"{path} holds weights without an architecture; give the folder with its config.json")
    if path.suffix in _PICKLES:
        from setpoint.loading.pickles import read_pickle

        tensors = read_pickle(path)
        raise InputError(
            f"{path} holds {len(tensors)} weights without an architecture; "
            f"give module:factory, a function of yours that builds the model and loads them"
        )
    if path.suffix == ".py":
        raise InputError(f"{path} is Python; name the function in it that builds the model: {path.stem}:FUNCTION")
    with path.open("rb") as file:
        if file.read(4) == b"GGUF":
            raise InputError(f"{path} is a GGUF file; rename it to end in .gguf")
    raise InputError(f"{path} is not a model; expected a folder, a .gguf file or module:factory")


def _described(model: nn.Module, source: str) -> Loaded:
    """A model with the task that its class tells, if it is one of transformers' own."""
    task = task_of(model)
    return Loaded(
        model=model,
        processor=None,
        task=task,
        forward=forward_for(model),
        source=source,
        made=remembered(unwrap(model)),
    )


def _placed(loaded: Loaded, device: str | torch.device | None) -> Loaded:
    return loaded if device is None else replace(loaded, model=loaded.model.to(device_named(device)))
