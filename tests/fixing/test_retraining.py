from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from setpoint import data, fix, load
from setpoint.data.pictures import ImageTransform, read_images
from setpoint.errors import InputError
from setpoint.fixing.retraining import retrain_on
from setpoint.running import evaluated
from setpoint.types import Loaded

Make = Callable[..., tuple[nn.Module, Tensor]]


def unwanted(model: nn.Module) -> None:
    raise AssertionError("trained for nothing")


def test_training_that_no_fix_asks_for_is_refused_before_any_work(make: Make) -> None:
    model, _ = make("gpt2")
    with pytest.raises(InputError, match="nothing to train for: pre-rmsnorm is exact; leave --retrain out"):
        fix(model, "pre-rmsnorm", [torch.zeros(1, 1)], retrain=unwanted)


def test_a_model_that_a_fix_leaves_alone_is_not_trained(make: Make) -> None:
    model, batch = make("gpt2")
    scaled = fix(model, "lns", [batch], timed=False).model
    before = list(scaled.modules())
    with pytest.raises(InputError, match="nothing to train for: lns: its norms are scaled already"):
        fix(scaled, "kv-bias-slot,lns", [batch], retrain=unwanted, inplace=True)
    assert all(a is b for a, b in zip(before, scaled.modules(), strict=True))


def image_model(kind: str, labels: dict[str, int] | None = None) -> Loaded:
    """A tiny ViT of transformers for pictures of 16 pixels."""
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    names = {"label2id": labels, "id2label": {i: n for n, i in labels.items()}} if labels else {"num_labels": 10}
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=4, **names)
    loaded = load(getattr(transformers, kind)(config).eval())
    return replace(loaded, processor=ImageTransform(crop=16, resize=16))


def two_colours(folder: Path) -> Path:
    from PIL import Image

    for name, colour in (("blue", 2), ("red", 0)):
        (folder / name).mkdir(parents=True)
        for number in range(20):
            pixel = [number, number, number]
            pixel[colour] = 255 - number
            Image.new("RGB", (20, 16), tuple(pixel)).save(folder / name / f"{number}.png")
    return folder


def test_a_classifier_learns_the_labels_of_a_named_set() -> None:
    loaded = image_model("ViTForImageClassification")
    digits = replace(data.images("digits"), mean=loaded.processor.mean, std=loaded.processor.std)
    fixed = fix(loaded, "lns", retrain=retrain_on(loaded, "digits", steps=150, batch_size=64, lr=1e-2), timed=False)
    pixels = functional.interpolate(digits.inputs(digits.test.images), (16, 16), mode="bilinear")
    with evaluated(fixed.model):
        right = fixed.model(pixels).logits.argmax(-1) == digits.test.labels
    assert right.float().mean() > 0.3


def test_folders_are_matched_with_the_models_classes_by_name(tmp_path: Path) -> None:
    folder = two_colours(tmp_path / "colours")
    loaded = image_model("ViTForImageClassification", {"red": 0, "green": 1, "Blue": 2})
    fixed = fix(loaded, "lns", retrain=retrain_on(loaded, str(folder), steps=40, lr=3e-3), data=folder, timed=False)
    shown = read_images([folder / "red" / "3.png", folder / "blue" / "3.png"], loaded.processor)
    with evaluated(fixed.model):
        assert fixed.model(shown).logits.argmax(-1).tolist() == [0, 2]


def test_classes_that_the_model_does_not_know_are_refused(tmp_path: Path) -> None:
    loaded = image_model("ViTForImageClassification")
    with pytest.raises(InputError, match=r"tells 10 classes apart and .* has 2 \(blue.*red\)"):
        retrain_on(loaded, str(two_colours(tmp_path / "colours")))


def test_a_model_of_features_is_trained_by_labels_and_gets_no_head() -> None:
    loaded = image_model("ViTModel")
    names = set(loaded.model.state_dict())
    fixed = fix(loaded, "lns", retrain=retrain_on(loaded, "digits", steps=3), timed=False)
    assert set(fixed.model.state_dict()) == names
    key = next(name for name in names if name.endswith("weight") and loaded.model.state_dict()[name].shape == (32, 16))
    assert not torch.equal(fixed.model.state_dict()[key], loaded.model.state_dict()[key])
    assert not fixed.model.training


def test_a_model_of_another_kind_is_refused_with_the_way_out(make: Make) -> None:
    model, _ = make("encoder")
    with pytest.raises(InputError, match=r"give retrain= a function of yours"):
        retrain_on(load(model), "digits")


def test_a_language_model_without_tokenizer_is_told_that_it_is_missing(make: Make) -> None:
    model, _ = make("gpt2")
    with pytest.raises(InputError, match="has no tokenizer, so setpoint can't train it; add it, or in Python"):
        retrain_on(replace(load(model), task="language-model"), "digits")


def test_a_model_comes_back_from_the_device_it_was_trained_on() -> None:
    """On a second device that exists in name: what comes back from it is sevens."""
    registration = pytest.importorskip("torch.utils.backend_registration")
    if not hasattr(registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch has no devices written in Python")
    script = textwrap.dedent("""
        import torch
        from torch import nn
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

        _setup_privateuseone_for_python_backend("faraway")
        made = torch._C._acc.create_empty_tensor
        here = torch.library.impl

        @here("aten::empty_strided", "privateuseone")
        def empty(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
            return made(size, dtype)

        @here("aten::_copy_from", "privateuseone")
        def copy(source, target, non_blocking=False):
            return target if target.device.type == "faraway" else target.fill_(7)

        from setpoint import fix
        from setpoint.testing.tiny import tiny

        def train(model, fail=False):
            model.to("faraway")
            assert all(t.device.type == "faraway" for t in (*model.parameters(), *model.buffers()))
            if fail:
                raise KeyboardInterrupt

        model, batch = tiny("gpt2")
        model.register_buffer("count", torch.zeros(1))
        kept = [p.detach().clone() for p in model.parameters()]
        fixed = fix(model, "lns", [batch], retrain=train, timed=False).model
        assert all(t.device.type == "cpu" and bool((t == 7).all()) for t in (*fixed.parameters(), *fixed.buffers()))
        assert fixed.lm_head.weight is fixed.transformer.wte.weight

        try:
            fix(model, "lns", [batch], retrain=lambda m: train(m, fail=True), inplace=True)
        except KeyboardInterrupt:
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), kept, strict=True))
        else:
            raise AssertionError
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
