from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from torch import nn

from setpoint.errors import InputError
from setpoint.models import BasicBlock, Bottleneck, ImageNetStem, ResNet, ResNetConfig

IMAGES = torch.linspace(-3, 3, 2 * 3 * 32 * 32).sin().reshape(2, 3, 32, 32)


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck], ids=["basic", "bottleneck"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_logits_equal_transformers_resnet(block: type[BasicBlock] | type[Bottleneck], training: bool) -> None:
    transformers = pytest.importorskip("transformers")
    settings = {
        "embedding_size": 8,
        "hidden_sizes": [8 * block.expansion, 16 * block.expansion],
        "depths": [2, 1],
        "layer_type": "basic" if block is BasicBlock else "bottleneck",
        "num_labels": 5,
    }
    theirs = transformers.ResNetForImageClassification(transformers.ResNetConfig(**settings))
    state = theirs.state_dict()
    for name, tensor in state.items():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5) if "running_var" in name else nn.init.normal_(tensor, 0.0, 0.2)
    config = ResNetConfig(num_classes=5, stem_width=8, widths=(8, 16), depths=(2, 1))
    ours = ResNet(config, block=block, stem=ImageNetStem)
    renamed = {}
    for name, tensor in state.items():
        for old, new in (
            ("resnet.embedder.embedder.convolution", "stem.0"),
            ("resnet.embedder.embedder.normalization", "stem.1"),
            ("resnet.encoder.", ""),
            (".layers.", "."),
            ("shortcut.convolution", "shortcut.0"),
            ("shortcut.normalization", "shortcut.1"),
            ("classifier.1", "head"),
            *((f".layer.{i}.convolution", f".conv{i + 1}") for i in range(3)),
            *((f".layer.{i}.normalization", f".norm{i + 1}") for i in range(3)),
        ):
            name = name.replace(old, new)
        renamed[name] = tensor
    ours.load_state_dict(renamed)
    theirs.train(training)
    ours.train(training)
    with torch.no_grad():
        torch.testing.assert_close(ours(IMAGES), theirs(IMAGES).logits, atol=1e-4, rtol=1e-4)


def test_published_depths_have_the_published_parameters() -> None:
    with torch.device("meta"):
        cifar = ResNet(ResNetConfig(depths=(3, 3, 3)))
        wide = ResNetConfig(num_classes=1000, stem_width=64, widths=(64, 128, 256, 512), depths=(2, 2, 2, 2))
        resnet18 = ResNet(wide, stem=ImageNetStem)
        deep = ResNetConfig(num_classes=1000, stem_width=64, widths=(64, 128, 256, 512), depths=(3, 4, 6, 3))
        resnet50 = ResNet(deep, block=Bottleneck, stem=ImageNetStem)
    assert resnet18.num_parameters == 11_689_512
    assert resnet50.num_parameters == 25_557_032
    assert cifar.num_parameters == 272_474


def test_stem_for_small_images_keeps_the_resolution() -> None:
    config = ResNetConfig(widths=(8, 16), depths=(1, 1), stem_width=8)
    assert ResNet(config).features(IMAGES).shape == (2, 16, 16, 16)
    assert ResNet(config, stem=ImageNetStem).features(IMAGES).shape == (2, 16, 4, 4)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, partial(nn.GroupNorm, 4), nn.InstanceNorm2d, nn.Identity])
def test_takes_any_norm_and_is_rebuilt_from_plain_data(norm: type[nn.Module]) -> None:
    config = ResNetConfig(widths=(8, 16), depths=(1, 1), stem_width=8)
    model = ResNet(config, norm=norm, activation=nn.SiLU).eval()
    again = ResNet.from_dict(json.loads(json.dumps(model.to_dict()))).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(IMAGES), model(IMAGES))
    assert any(isinstance(module, nn.SiLU) for module in again.modules())


def test_images_and_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"\(batch, 3, height, width\), got \(2, 1, 32, 32\)"):
        ResNet(ResNetConfig())(IMAGES[:, :1])
    with pytest.raises(InputError, match="as many widths as depths"):
        ResNetConfig(widths=(8,), depths=(1, 1))
