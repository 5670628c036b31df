"""Folders that `setpoint fix` writes: a known architecture, the edits that were made to it as data, and the weights.

``setpoint.json`` names the architecture, lists the modules that stand elsewhere than in it (`setpoint.types.Build`, so
classes of setpoint and torch alone), and gives a digest of every tensor. Loading builds the architecture, makes the
edits and puts the tensors in; nothing in the folder is run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.extras import require
from setpoint.loading.history import remember, remembered
from setpoint.loading.quiet import quiet
from setpoint.loading.tasks import forward_for
from setpoint.loading.wording import one_line
from setpoint.types import Build, Edit, Loaded, Made, Ref
from setpoint.words import listed

STATEMENT = "setpoint.json"
WEIGHTS = "model.safetensors"
SCHEMA = 1
PREFIX = "setpoint-"
"""In front of the ``model_type`` of an architecture that transformers can't express any more."""


def load_fixed(folder: Path, dtype: torch.dtype, trust_code: bool) -> Loaded:
    """Rebuild a model from a folder that a fix wrote.

    Args:
        folder: Holds ``setpoint.json`` and ``model.safetensors``.
        dtype: Type to run in.
        trust_code: Run the factory that the model came from, where it came from one.

    Returns:
        The model in eval mode, with its tokenizer or image transform.

    Raises:
        InputError: The folder is damaged, of a later version, or needs code to be run.
    """
    statement = read_statement(folder)
    base = statement["base"]
    if base["kind"] == "factory" and not trust_code:
        raise InputError(
            f"{folder} is refused: the model in it is built by your {base['source']}; to run that, add --trust-code "
            "(in Python: trust_code=True), or build it yourself and call setpoint.loading.restore(folder, model)"
        )
    with quiet():
        model = restore(folder, _build_base(base, folder), dtype=dtype)
    notes = [f"changed by {', '.join(statement['fixes'])}"] if statement["fixes"] else []
    stored = {entry["dtype"] for entry in statement["tensors"].values() if "float" in entry["dtype"]}
    if stored - {_name(dtype)}:
        notes.append(f"weights are stored as {', '.join(sorted(stored))}, run in {_name(dtype)}")
    return Loaded(
        model=model.eval(),
        processor=_processor(folder, statement, model),
        task=statement["task"],
        forward=forward_for(model),
        source=str(folder),
        notes=tuple(notes),
        made=remembered(model),
    )


def restore(folder: str | Path, model: nn.Module, *, dtype: torch.dtype | None = None) -> nn.Module:
    """Turn a model of the original architecture into the one that a folder holds.

    Args:
        folder: What a fix wrote.
        model: Built by you as it was before the fix, with any weights. Changed in place.
        dtype: Type to run in; None for the stored ones.

    Returns:
        The model.

    Raises:
        InputError: The folder is damaged, or is of another architecture.
    """
    from setpoint.surgery.editing import commit

    folder = Path(folder)
    statement = read_statement(folder)
    tensors = _read_weights(folder, statement)
    edits = _edits(statement, folder)
    commit(model, edits)
    _put(model, tensors, statement, folder, dtype)
    remember(model, Made(tuple(statement["fixes"]), edits, statement["base"]))
    return model


def architecture(base: Mapping[str, Any]) -> nn.Module | None:
    """The architecture in ``setpoint.json`` without weights, on the meta device; None where that takes code of a user.

    Raises:
        InputError: It can't be built.
    """
    if base["kind"] not in ("transformers", "setpoint"):
        return None
    with torch.device("meta"), quiet():
        return _build_base(base, Path())


def rebuilt(statement: Mapping[str, Any], edits: Sequence[Edit]) -> nn.Module | None:
    """What loading would give, without weights; None where that takes code of a user.

    Args:
        statement: What will be written.
        edits: Those of the architecture.

    Raises:
        InputError: The edits or the tensors don't fit the architecture.
    """
    from setpoint.surgery.editing import commit

    model = architecture(statement["base"])
    if model is None:
        return None
    with torch.device("meta"):
        commit(model, edits)
        tensors = {
            name: torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]))
            for name, entry in statement["tensors"].items()
        }
        _put(model, tensors, statement, Path(), None)
    return model


def read_statement(folder: Path) -> dict[str, Any]:
    """``setpoint.json`` of a folder.

    Raises:
        InputError: It is missing, damaged, or of a later version.
    """
    path = folder / STATEMENT
    try:
        statement = json.loads(path.read_text(encoding="utf-8"))
        version = statement["schema_version"]
    except FileNotFoundError:
        raise InputError(f"{folder} holds no {STATEMENT}, so no fix wrote it") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is damaged: {one_line(error)}") from error
    if version != SCHEMA:
        raise InputError(f"{path} has schema_version {version}; this version of setpoint reads {SCHEMA}")
    needed = {"base", "edits", "fixes", "task", "tensors", "ties"}
    if not isinstance(statement, dict) or needed - statement.keys():
        raise InputError(f"{path} lacks {listed(sorted(needed - statement.keys()))}")
    return statement


# the architecture ----------------------------------------------------------------------------------------------------


def describe_base(loaded: Loaded) -> dict[str, Any]:
    """The architecture of a model as data.

    Args:
        loaded: What was fixed; its class and configuration are those it had before.

    Returns:
        ``{"kind": ..., ...}`` for `load_fixed`. Kind ``"caller"`` if only the caller can build it again.
    """
    model = loaded.model
    kind = type(model)
    home = kind.__module__
    config: Any = getattr(model, "config", None)
    if home.startswith("transformers.models.") and hasattr(config, "to_dict"):
        written: dict[str, Any] = config.to_dict()
        data = {name: value for name, value in written.items() if name not in ("dtype", "torch_dtype")}
        attention = getattr(config, "_attn_implementation", None)
        return {"kind": "transformers", "class": kind.__name__, "config": data, "attention": attention}
    if home.startswith("setpoint.") and hasattr(model, "to_dict"):
        own: Any = model
        return {"kind": "setpoint", "class": f"{home}:{kind.__qualname__}", "config": own.to_dict()}
    if home == "setpoint.loading.mobilenet":
        return {"kind": "setpoint", "class": f"{home}:{kind.__qualname__}", "config": None}
    if ":" in loaded.source and not Path(loaded.source).exists():
        return {"kind": "factory", "source": loaded.source}
    return {"kind": "caller", "class": f"{home}:{kind.__qualname__}"}


def _build_base(base: Mapping[str, Any], folder: Path) -> nn.Module:
    try:
        if base["kind"] == "transformers":
            return _from_transformers(base)
        if base["kind"] == "setpoint":
            return _own(base)
        if base["kind"] == "factory":
            from setpoint.loading.factory import from_factory

            return from_factory(base["source"])[0]
    except InputError:
        raise
    except Exception as error:  # configs of a hundred families fail in as many ways
        raise InputError(f"{folder / STATEMENT}: the architecture could not be built: {one_line(error)}") from error
    raise InputError(
        f"{folder} holds a model of the class {base.get('class')}, which setpoint can't build; build it yourself and "
        "call setpoint.loading.restore(folder, model)"
    )


def _from_transformers(base: Mapping[str, Any]) -> nn.Module:
    transformers = require("transformers", "hf", "to build the model")
    kind: Any = getattr(transformers, base["class"], None)
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        raise InputError(f"transformers {transformers.__version__} has no model {base['class']!r}")
    family: Any = kind
    config = family.config_class.from_dict(dict(base["config"]))
    made: nn.Module = family._from_config(config, attn_implementation=base.get("attention"))
    return made


def _own(base: Mapping[str, Any]) -> nn.Module:
    module, _, name = base["class"].partition(":")
    if not module.startswith("setpoint."):
        raise InputError(f"expected a model of setpoint, got {base['class']!r}")
    kind = getattr(import_module(module), name)
    made: nn.Module = kind() if base["config"] is None else kind.from_dict(base["config"])
    return made


# edits and tensors ---------------------------------------------------------------------------------------------------


def to_plain(edit: Edit) -> dict[str, Any]:
    """An edit of a module as JSON; tensors are stored with the weights."""
    if isinstance(edit.value, Ref):
        return {"path": edit.path, "ref": edit.value.path}
    if isinstance(edit.value, Build):
        return {"path": edit.path, **_written(edit.value)}
    raise InputError(
        f"{edit.path} is a {type(edit.value).__name__} that a fix put there as it is, so the model can't be saved; let "
        "the fix describe it with setpoint.types.Build"
    )


def _written(value: Any) -> Any:
    if isinstance(value, Ref):
        return {"ref": value.path}
    if isinstance(value, Build):
        return {"build": value.target, "arguments": {name: _written(v) for name, v in value.arguments.items()}}
    return value


def _read(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "ref" in value:
        return Ref(value["ref"])
    return Build(value["build"], {name: _read(v) for name, v in value["arguments"].items()})


def _edits(statement: Mapping[str, Any], folder: Path) -> tuple[Edit, ...]:
    edits = []
    for entry in statement["edits"]:
        try:
            edits.append(Edit(entry["path"], _read(entry)))
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{folder / STATEMENT} holds an edit that is none: {entry!r}") from error
    return tuple(edits)


def digest(tensor: Tensor) -> str:
    """A digest of a tensor's bytes.

    >>> digest(torch.zeros(2)) == digest(torch.zeros(2)), digest(torch.zeros(2)) == digest(torch.ones(2))
    (True, False)
    """
    raw: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(raw, digest_size=16).hexdigest()


def _read_weights(folder: Path, statement: Mapping[str, Any]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except FileNotFoundError:
        raise InputError(f"{folder} holds no {WEIGHTS}") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is truncated or damaged: {one_line(error)}") from error
    expected = statement["tensors"]
    if tensors.keys() != expected.keys():
        differ = sorted(tensors.keys() ^ expected.keys())
        raise InputError(f"{path} does not go with {STATEMENT}: they differ in {listed(differ)}")
    for name, tensor in tensors.items():
        if digest(tensor) != expected[name]["digest"]:
            raise InputError(f"{path} does not go with {STATEMENT}: {name} was changed after it was written")
    return tensors


def _put(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    statement: Mapping[str, Any],
    folder: Path,
    dtype: torch.dtype | None,
) -> None:
    """Put every tensor where it belongs, each at all its places, and see that none of the model's is left over."""
    from setpoint.surgery.editing import settle

    placed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        entry = statement["tensors"][name]
        value = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        placed[name] = value if entry["buffer"] else nn.Parameter(value, requires_grad=entry["trained"])
    placed |= {name: placed[first] for name, first in statement["ties"].items()}
    for name, tensor in placed.items():
        try:
            settle(model, name, tensor)
        except AttributeError as error:
            raise InputError(f"{folder} is of another architecture: {name} has no place in it") from error
    held = dict(model.named_parameters(remove_duplicate=False))
    left = sorted(held.keys() - placed.keys())
    if left:
        raise InputError(f"{folder} lacks the weights of {listed(left)}")


def _processor(folder: Path, statement: Mapping[str, Any], model: nn.Module) -> Any:
    image = statement.get("image_transform")
    if image is not None:
        from setpoint.data.pictures import ImageTransform

        settings: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in image.items()}
        return ImageTransform(**settings)
    from setpoint.loading.huggingface import read_tokenizer

    return read_tokenizer(folder, model) if hasattr(model, "config") else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
