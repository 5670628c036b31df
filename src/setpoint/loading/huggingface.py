"""Folders in Hugging Face's layout, and repositories of its hub.

``config.json`` names the class; weights come from safetensors, or from a pickle that holds tensors only. transformers
itself is lenient: weights that are missing, or of another shape, are drawn at random with a warning. Here they are
errors, because a check of random weights says nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from setpoint.data.pictures import IMAGENET_MEAN, IMAGENET_STD, ImageTransform
from setpoint.errors import InputError
from setpoint.extras import require
from setpoint.loading.pickles import read_pickle
from setpoint.loading.quiet import quiet
from setpoint.loading.tasks import forward_for, task_of
from setpoint.loading.wording import one_line
from setpoint.types import Loaded
from setpoint.words import listed

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer_config.json",
)
_JSON_FILES = ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "vocab.json")
_AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForImageClassification",
    "AutoModel",
)


def load_folder(folder: Path, dtype: torch.dtype, trust_code: bool) -> Loaded:
    """Build the model that a folder describes.

    Args:
        folder: Holds ``config.json`` and weights; a tokenizer or image settings where the model needs one.
        dtype: Type to run in.
        trust_code: Run model code that lies in the folder.

    Returns:
        The model in eval mode with its tokenizer or image transform.

    Raises:
        InputError: A file is missing, damaged or does not fit, or the folder asks to run code.
    """
    transformers = require("transformers", "hf", "to load Hugging Face folders")
    config = _read_json(folder / "config.json", folder)
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).is_file() and _read_json(folder / name, folder).get("auto_map") and not trust_code:
            raise InputError(
                f"{folder} is refused: its {name} asks to run code from the folder (auto_map); "
                f"if you have read that code, add --trust-code (in Python: trust_code=True)"
            )
    stored = _check_weights(folder)
    with quiet():
        kind = _model_class(transformers, config, folder, trust_code)
        model = _build(kind, folder, dtype, trust_code)
        task = task_of(model)
        processor = (
            _image_transform(folder, config) if task.startswith("image") else read_tokenizer(folder, model, trust_code)
        )
    notes = []
    if stored and stored != {str(dtype).removeprefix("torch.")}:
        notes.append(f"weights are stored as {', '.join(sorted(stored))}, run in {str(dtype).removeprefix('torch.')}")
    return Loaded(model.eval(), processor, task, forward_for(model), str(folder), tuple(notes))


def load_hub(name: str, dtype: torch.dtype, trust_code: bool) -> Loaded:
    """Download a repository of the Hugging Face hub into its usual cache, and load it as a folder.

    Args:
        name: ``owner/name``.
        dtype: Type to run in.
        trust_code: Fetch and run the model code in the repository.

    Returns:
        As `load_folder`.

    Raises:
        InputError: It cannot be reached or found, or what it holds cannot be loaded.
    """
    hub = require("huggingface_hub", "hf", "to download models")
    wanted = ["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors", *(["*.py"] if trust_code else [])]
    with quiet():
        try:
            folder = Path(hub.snapshot_download(name, allow_patterns=wanted))
            if not any(folder.glob("*.safetensors")):
                folder = Path(hub.snapshot_download(name, allow_patterns=[*wanted, "pytorch_model*.bin"]))
        except Exception as error:  # network, permission and name errors come from several libraries
            raise InputError(f"{name} could not be downloaded from the hub: {one_line(error)}") from error
    return load_folder(folder, dtype, trust_code)


def _read_json(path: Path, folder: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        ggufs = sorted(folder.glob("*.gguf"))
        hint = f"; give the file itself: {ggufs[0]}" if ggufs else ""
        raise InputError(f"{folder} holds no {path.name}, so it is not a model folder{hint}") from error
    except (ValueError, OSError) as error:
        raise InputError(f"{path} is not valid JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}; expected an object")
    return content


# --------------------------------------------------------------------------------------------------------------------
# Weights


def _check_weights(folder: Path) -> set[str]:
    """Open every file of weights before anything is built, and tell the types that are stored."""
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).is_file():
            shards = _read_json(folder / index, folder).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise InputError(f"{folder / index} names no files (weight_map)")
            files = [folder / str(name) for name in sorted(set(shards.values()))]
            break
    else:
        files = [path for name in ("model.safetensors", "pytorch_model.bin") if (path := folder / name).is_file()][:1]
    if not files:
        adapter = " (adapter_config.json is there: give the folder of the base model)"
        hint = adapter if (folder / "adapter_config.json").is_file() else ""
        raise InputError(f"{folder} holds no weights: expected model.safetensors or pytorch_model.bin{hint}")
    stored: set[str] = set()
    for path in files:
        if not path.is_file():
            raise InputError(f"{path} is missing, though the index of {folder} names it")
        stored |= _stored_types(path)
    return stored


def _stored_types(path: Path) -> set[str]:
    if path.suffix != ".safetensors":
        return {str(tensor.dtype).removeprefix("torch.") for tensor in read_pickle(path).values()}
    from safetensors import SafetensorError, safe_open

    spelled = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    try:
        with safe_open(path, framework="pt") as file:
            types = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is truncated or damaged: {one_line(error)}") from error
    return {spelled.get(kind, kind) for kind in types if "F" in kind}  # counters and masks are integers


# --------------------------------------------------------------------------------------------------------------------
# Model


def _model_class(transformers: Any, config: dict[str, Any], folder: Path, trust_code: bool) -> Any:
    if trust_code and isinstance(config.get("auto_map"), dict):
        for name in _AUTO_CLASSES:
            if name in config["auto_map"]:
                return getattr(transformers, name)
    names = config.get("architectures") or []
    if names and hasattr(transformers, str(names[0])):
        return getattr(transformers, str(names[0]))
    kind = config.get("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        raise InputError(
            f"{folder / 'config.json'} is of model_type {kind!r}, which transformers {transformers.__version__} "
            f"does not know"
        )
    return transformers.AutoModel


def _build(kind: Any, folder: Path, dtype: torch.dtype, trust_code: bool) -> Any:
    try:
        model, info = kind.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=trust_code,
            ignore_mismatched_sizes=True,  # so that they are reported below, by name, instead of in a table
            output_loading_info=True,
        )
    except ImportError as error:
        raise InputError(f"{folder} needs a library that is not installed: {one_line(error)}") from error
    except Exception as error:  # configs of a hundred families fail in as many ways
        raise InputError(f"{folder} could not be built by transformers: {one_line(error)}") from error
    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        name, found, expected = mismatched[0]
        more = f" (and {len(mismatched) - 1} more)" if len(mismatched) > 1 else ""
        raise InputError(
            f"{folder}: weight {name} has shape {tuple(found)}, config.json asks for {tuple(expected)}{more}"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise InputError(f"{folder} lacks the weights of {listed(missing)}, which {type(model).__name__} needs")
    if info.get("error_msgs"):
        raise InputError(f"{folder} could not be built by transformers: {info['error_msgs'][0]}")
    unexpected = sorted(info["unexpected_keys"])
    if unexpected and len(unexpected) >= len(model.state_dict()):
        raise InputError(f"{folder} holds weights of another model: {listed(unexpected)}")
    return model


# --------------------------------------------------------------------------------------------------------------------
# What feeds it


def read_tokenizer(folder: Path, model: Any, trust_code: bool = False) -> Any:
    """The tokenizer that lies in a folder, None if there is none.

    Args:
        folder: Holds the tokenizer's files.
        model: With its ``config``.
        trust_code: Run code in the folder.

    Raises:
        InputError: The files are damaged.
    """
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    for name in _JSON_FILES:
        if (folder / name).is_file():
            _read_json(folder / name, folder)
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    own = folder / "tokenizer.json"
    try:
        if own.is_file():
            Tokenizer.from_file(str(own))
        return AutoTokenizer.from_pretrained(
            folder, config=model.config, local_files_only=True, trust_remote_code=trust_code
        )
    except ImportError as error:
        raise InputError(f"the tokenizer of {folder} needs a library: {one_line(error)}") from error
    except Exception as error:  # the tokenizers library raises bare Exception
        culprit = own if own.is_file() else folder
        raise InputError(f"{culprit} holds no tokenizer that can be read: {one_line(error)}") from error


def _image_transform(folder: Path, config: dict[str, Any]) -> ImageTransform | None:
    """The transform that ``preprocessor_config.json`` describes, on squares.

    Models that squash a picture to a square get a centred square instead; their statistics are the same.
    """
    if config.get("num_channels", 3) != 3:
        return None
    path = folder / "preprocessor_config.json"
    settings = _read_json(path, folder) if path.is_file() else {}
    size = _side(settings.get("size")) or _side(config.get("image_size")) or 224
    crop = (_side(settings.get("crop_size")) if settings.get("do_center_crop") else None) or size
    # On the scale of [0, 1]; a few models scale by 1/127.5 instead of 1/255.
    unit = 255.0 * settings.get("rescale_factor", 1 / 255)
    normalized = settings.get("do_normalize", True)
    mean = settings.get("image_mean", IMAGENET_MEAN) if normalized else (0.0, 0.0, 0.0)
    std = settings.get("image_std", IMAGENET_STD) if normalized else (1.0, 1.0, 1.0)
    try:
        return ImageTransform(
            crop=crop,
            resize=max(size, crop),
            mean=tuple(float(value) / unit for value in mean),
            std=tuple(float(value) / unit for value in std),
        )
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"{path} describes no image transform: {one_line(error)}") from error


def _side(size: Any) -> int | None:
    """One side in pixels out of the ways in which configs spell a size."""
    if isinstance(size, dict):
        size = size.get("shortest_edge") or size.get("height")
    if isinstance(size, list | tuple):
        size = size[0] if size else None
    return int(size) if isinstance(size, int | float) and size > 0 else None
