"""Writing a changed model: a folder that appears when it is whole, and not before."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from setpoint import __version__
from setpoint.errors import InputError
from setpoint.loading.fixed import (
    PREFIX,
    SCHEMA,
    STATEMENT,
    WEIGHTS,
    architecture,
    describe_base,
    digest,
    rebuilt,
    to_plain,
)
from setpoint.loading.quiet import quiet
from setpoint.staging import begin, finish, recover, remove
from setpoint.surgery.editing import ties

if TYPE_CHECKING:
    from setpoint.fixing.result import Fixed


def save(fixed: Fixed, folder: Path, *, force: bool = False) -> Path:
    """Write a model so that `setpoint.load` gives the same outputs.

    Args:
        fixed: What `setpoint.fix` returned.
        folder: Where to; it appears at once when everything is written.
        force: Replace a folder that an earlier fix wrote.

    Returns:
        The folder.

    Raises:
        InputError: Something is in the way, can't be written, or the model can't be described as data.
    """
    folder = folder.expanduser().absolute()
    refuse_target(folder, force=force)
    statement = _statement(fixed)
    plain = architecture(statement["base"])
    stock = plain is not None and _odd_place(fixed.model, plain) is None  # nothing but values is new
    if stock:
        statement["edits"] = []
    elif (odd := _odd_after_loading(fixed, statement)) is not None:
        raise InputError(
            f"the model would not load back as it is, for something else than these fixes changed it ({odd}); only "
            "what a fix does can be written down, so make that change in a fix of yours, or save the weights yourself"
        )
    try:
        staging = begin(folder)
    except OSError as error:
        raise InputError(f"{folder.parent} can't be written to: {error.strerror or error}") from error
    try:
        _write_weights(fixed.model, statement, staging)
        _write_config(statement, staging, stock=stock)
        _write_processor(fixed, statement, staging)
        _write_json(staging / STATEMENT, statement)
        finish(staging, folder)
    except OSError as error:
        raise InputError(f"{folder} could not be written: {error.strerror or error}") from error
    finally:
        remove(staging)
    return folder


def refuse_target(folder: Path, *, force: bool = False) -> None:
    """Say before hours of work that a folder can't be written.

    Raises:
        InputError: It exists (with ``force``: and is not of an earlier fix), or its parent doesn't.
    """
    if not folder.absolute().parent.is_dir():
        raise InputError(f"{folder} can't be written: the folder {folder.absolute().parent} does not exist")
    recover(folder.absolute().parent)
    if not folder.exists():
        return
    if not force:
        raise InputError(f"{folder} exists; give another name, or --force to replace it (in Python: force=True)")
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / STATEMENT).is_file()):
        raise InputError(f"{folder} holds something that no fix wrote, so it is not replaced; give another name")


def _statement(fixed: Fixed) -> dict[str, Any]:
    """Everything about the model but its weights."""
    made = fixed.loaded.made
    tied = ties(fixed.model)
    parameters = dict(fixed.model.named_parameters(remove_duplicate=False))
    return {
        "schema_version": SCHEMA,
        "setpoint": __version__,
        "fixes": list(made.fixes),
        "task": fixed.loaded.task,
        "source": fixed.loaded.source,
        "base": dict(made.base or describe_base(fixed.loaded)),
        "edits": [to_plain(edit) for edit in made.edits],
        "ties": tied,
        "tensors": {
            name: {
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "buffer": name not in parameters,
                "trained": name in parameters and tensor.requires_grad,
                "digest": digest(tensor),
            }
            for name, tensor in _tensors(fixed.model).items()
            if name not in tied
        },
        "change": asdict(fixed.change),
        "notes": list(fixed.notes),
    }


def _odd_after_loading(fixed: Fixed, statement: dict[str, Any]) -> str | None:
    """Where the model that loading gives differs from this one; None if nowhere, or if only its owner can load it."""
    try:
        again = rebuilt(statement, fixed.loaded.made.edits)
    except InputError as error:
        return str(error)
    return None if again is None else _odd_place(fixed.model, again)


def _odd_place(model: nn.Module, other: nn.Module) -> str | None:
    mine, theirs = _structure(model), _structure(other)
    return next((name for name in mine | theirs if mine.get(name) != theirs.get(name)), None)


def _structure(model: nn.Module) -> dict[str, Any]:
    """Everything about a model but values: its modules with their settings, shapes, and which tensors are one."""
    modules = {name: (type(m), m.extra_repr()) for name, m in model.named_modules(remove_duplicate=False)}
    tied = ties(model)
    return modules | {name: (tensor.shape, tied.get(name)) for name, tensor in _tensors(model).items()}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and the buffers that belong to the state, by the names that they have as attributes."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for path, module in model.named_modules(remove_duplicate=False):
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                found[f"{path}.{key}" if path else key] = buffer
    return found


def _write_weights(model: nn.Module, statement: dict[str, Any], staging: Path) -> None:
    from safetensors.torch import save_file

    held = _tensors(model)
    tensors = {name: held[name].detach().cpu().contiguous() for name in statement["tensors"]}
    storages: set[int] = set()
    for name, tensor in tensors.items():  # the format knows no views into one storage
        pointer = tensor.untyped_storage().data_ptr()
        if tensor.numel() and pointer in storages:
            tensors[name] = tensor.clone()
        storages.add(pointer)
    path = staging / WEIGHTS
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)  # what safetensors writes only its owner may read


def _write_config(statement: dict[str, Any], staging: Path, *, stock: bool) -> None:
    """The original configuration; marked so that transformers refuses it if it can't express the model any more."""
    base = statement["base"]
    if base["kind"] != "transformers":
        return
    config = dict(base["config"])
    if stock:
        config["architectures"] = [base["class"]]
        config["dtype"] = next((e["dtype"] for e in statement["tensors"].values() if "float" in e["dtype"]), "float32")
    else:
        config["model_type"] = PREFIX + str(config.get("model_type", ""))
        # A class that is called by its own name does not look at the type, and would fill in what is missing.
        config["dtype"] = "changed by setpoint: read this folder with setpoint.load"
    _write_json(staging / "config.json", config)


def _write_processor(fixed: Fixed, statement: dict[str, Any], staging: Path) -> None:
    from setpoint.data.pictures import ImageTransform

    processor = fixed.loaded.processor
    if isinstance(processor, ImageTransform):
        statement["image_transform"] = asdict(processor)
    elif hasattr(processor, "save_pretrained"):
        with quiet():
            processor.save_pretrained(staging)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    try:
        text = json.dumps(content, indent=1, allow_nan=True)
    except TypeError as error:
        raise InputError(f"the model's configuration can't be written as JSON: {error}") from error
    path.write_text(text + "\n", encoding="utf-8")
