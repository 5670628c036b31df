"""The packaged ViT-S/14: weights out of an ONNX graph into a `transformers.Dinov2Model`.

The graph holds a DINOv2-small backbone and a decoder; only the backbone is taken. Two things of it are not stored
under their names. Weight matrices are anonymous constants of ``MatMul`` nodes: each is named after the bias that is
added to its product. And the position table was split, into the class token's row and the patches' 37 x 37 grid.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from setpoint.data.pictures import ImageTransform
from setpoint.errors import InputError
from setpoint.extras import require
from setpoint.loading.quiet import quiet
from setpoint.loading.tasks import forward_for
from setpoint.loading.wording import one_line
from setpoint.types import Loaded
from setpoint.words import listed

_RENAMED = (
    (re.compile(r"^backbone\."), ""),
    (re.compile(r"attention\.attention\.(query|key|value)\."), lambda match: f"attention.{match[1][0]}_proj."),
    (re.compile(r"attention\.output\.dense\."), "attention.o_proj."),
)
_POSITIONS, _POSITION_CONCAT = "onnx::Reshape_1962", "/backbone/embeddings/Concat_6"


def load_vit(path: Path, dtype: torch.dtype) -> Loaded:
    """Build the ViT-S/14 backbone from the packaged ONNX file.

    Args:
        path: The ONNX file.
        dtype: Type to run in.

    Returns:
        The model in eval mode with its image transform (224 pixels, 16 x 16 patches).

    Raises:
        InputError: onnx or transformers is not installed, or the file is damaged or of another model.
    """
    require("transformers", "hf", "to build the ViT")
    weights = _backbone_weights(path)
    with quiet():
        from transformers import Dinov2Config, Dinov2Model

        config = Dinov2Config(
            hidden_size=384, num_hidden_layers=12, num_attention_heads=6, mlp_ratio=4, patch_size=14, image_size=518
        )
        try:
            model, info = Dinov2Model.from_pretrained(
                None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
            )
        except (RuntimeError, ValueError) as error:
            raise InputError(f"{path} does not fit a ViT-S/14: {one_line(error)}") from error
    # The mask token is used in pre-training only; the graph does not hold it.
    absent = sorted(set(info["missing_keys"]) - {"embeddings.mask_token"})
    if absent:
        raise InputError(f"{path} lacks the weights of {listed(absent)}")
    with torch.no_grad():
        model.embeddings.mask_token.zero_()
    return Loaded(
        model=model.eval(),
        processor=ImageTransform(crop=224, resize=256),
        task="image-features",
        forward=forward_for(model),
        source=str(path),
        notes=("a ViT-S/14 with the names and shapes of DINOv2-small; whether it was fine-tuned is not stated",),
    )


def _backbone_weights(path: Path) -> dict[str, Tensor]:
    onnx = require("onnx", "vision", "to read the packaged ViT")
    try:
        graph = onnx.load(str(path)).graph
        arrays = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    except Exception as error:  # protobuf's DecodeError is not importable under one name in all its versions
        raise InputError(f"{path} is not an ONNX file, or is damaged: {type(error).__name__}") from error
    arrays.update(_named_matrices(graph, arrays))
    first = next((node.input[0] for node in graph.node if node.name == _POSITION_CONCAT), "")
    if first not in arrays or _POSITIONS not in arrays:
        raise InputError(f"{path} is not the packaged ViT-S/14: it has no position table where that one has it")
    grid = arrays[_POSITIONS]
    arrays["backbone.embeddings.position_embeddings"] = np.concatenate(
        [arrays[first].reshape(1, 1, -1), grid.reshape(1, -1, grid.shape[-1])], axis=1
    )
    return {
        _renamed(name): torch.from_numpy(np.array(array))
        for name, array in arrays.items()
        if name.startswith("backbone.")
    }


def _named_matrices(graph: Any, arrays: dict[str, Any]) -> dict[str, Any]:
    """Weight matrices under the names of their biases, ``(out, in)`` as `torch.nn.Linear` has them."""
    bias_after = {
        operand: other
        for node in graph.node
        if node.op_type == "Add"
        for operand, other in (tuple(node.input), tuple(node.input)[::-1])
        if other in arrays
    }
    named = {}
    for node in graph.node:
        bias = bias_after.get(node.output[0], "")
        if node.op_type == "MatMul" and node.input[1] in arrays and bias.endswith(".bias"):
            named[bias.removesuffix(".bias") + ".weight"] = arrays[node.input[1]].T
    return named


def _renamed(name: str) -> str:
    for pattern, replacement in _RENAMED:
        name = pattern.sub(replacement, name)
    return name
