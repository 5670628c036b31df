"""The packaged image models see what is in the pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from setpoint.data.pictures import ImageTransform, picture_paths, read_images
from setpoint.errors import InputError
from setpoint.loading import batches_for, loss_for
from setpoint.loading.mobilenet import MobileNetV2, load_mobilenet
from setpoint.loading.vit import load_vit

pytest.importorskip("skimage")
EGYPTIAN_CAT, TABBY, TIGER_CAT, ESPRESSO, SPACE_SHUTTLE = 285, 281, 282, 967, 812


def test_mobilenet_has_the_published_size() -> None:
    assert sum(parameter.numel() for parameter in MobileNetV2().parameters()) == 3_504_872


def test_mobilenet_sees_a_cat_a_coffee_and_a_rocket(packaged_model: Callable[[str], Any]) -> None:
    loaded = packaged_model("mobilenetv2")
    names = {path.stem: path for path in picture_paths(6)}
    images = read_images([names["chelsea"], names["coffee"], names["rocket"]], loaded.processor)
    with torch.no_grad():
        probabilities = loaded.forward(loaded.model, images).softmax(-1)
    assert probabilities.argmax(-1).tolist() == [EGYPTIAN_CAT, ESPRESSO, SPACE_SHUTTLE]
    assert probabilities[0, [EGYPTIAN_CAT, TABBY, TIGER_CAT]].sum() > 0.95
    assert probabilities[1, ESPRESSO] > 0.95


def test_mobilenet_keeps_its_batch_norms(packaged_model: Callable[[str], Any]) -> None:
    loaded = packaged_model("mobilenetv2")
    norms = [module for module in loaded.model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert len(norms) == 52
    assert all(norm.running_mean.abs().sum() > 0 for norm in norms)
    assert loaded.task == "image-classification"
    assert loss_for(loaded) is None
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())


def test_weights_of_another_net_are_refused(tmp_path: Path) -> None:
    torch.save(MobileNetV2(num_classes=10).state_dict(), tmp_path / "ten.pth")
    with pytest.raises(InputError, match=r"ten\.pth does not fit MobileNetV2") as error:
        load_mobilenet(tmp_path / "ten.pth", torch.float32)
    assert "\n" not in str(error.value)


def test_vit_default_pictures_give_tokens(packaged_model: Callable[[str], Any]) -> None:
    loaded = packaged_model("vit-s")
    batch = batches_for(loaded, count=2)[0]
    with torch.no_grad():
        output = loaded.forward(loaded.model, batch)
    assert output.last_hidden_state.shape == (2, 257, 384)
    assert loaded.task == "image-features"


def test_vit_computes_what_its_graph_computes(packaged_model: Callable[[str], Any]) -> None:
    loaded = packaged_model("vit-s")
    import onnx
    from onnx.reference import ReferenceEvaluator

    from setpoint.loading.shelf import find

    proto = onnx.load(str(find("vit-s")))
    graph = proto.graph
    last = [node.output[0] for node in graph.node if node.name.startswith("/backbone/layernorm")][-1]
    wanted, needed = {last}, []
    for node in reversed(graph.node):  # the decoder behind the backbone is left out
        if wanted & set(node.output):
            needed.append(node)
            wanted |= set(node.input)
    del graph.node[:], graph.output[:]
    graph.node.extend(needed[::-1])
    graph.output.append(onnx.ValueInfoProto(name=last))
    images = batches_for(loaded, count=1)[0]["pixel_values"]
    theirs = ReferenceEvaluator(proto).run(None, {graph.input[0].name: images.numpy()})[0]
    with torch.no_grad():
        ours = loaded.model(images).last_hidden_state.numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4)  # at a scale of 11


def test_a_damaged_onnx_file_is_named(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    (tmp_path / "v.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(InputError, match=r"v\.onnx is not"):
        load_vit(tmp_path / "v.onnx", torch.float32)


def test_images_follow_the_models_type(packaged_model: Callable[[str], Any]) -> None:
    loaded = packaged_model("mobilenetv2")
    assert batches_for(loaded, count=3)[0].shape == (3, 3, 224, 224)
    assert loaded.processor == ImageTransform(crop=224, resize=256)
