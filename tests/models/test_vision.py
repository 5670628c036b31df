from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from setpoint.errors import InputError
from setpoint.models import ClassToken, MeanPooling, Normal, Position, Sinusoidal, VisionConfig, VisionTransformer
from setpoint.nn import DyT, LayerNorm, PeriNorm, ScaledPreNorm

CONFIG = VisionConfig(image_size=8, patch_size=2, channels=1, dim=16, depth=2, num_heads=4)
IMAGES = torch.linspace(-3, 3, 3 * 64).sin().reshape(3, 1, 8, 8)


@pytest.mark.parametrize("pooling", [MeanPooling(), ClassToken()], ids=["mean", "class"])
def test_logits_equal_a_transformers_vit(pooling: MeanPooling | ClassToken) -> None:
    transformers = pytest.importorskip("transformers")
    settings = {
        "image_size": 8,
        "patch_size": 2,
        "num_channels": 1,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "layer_norm_eps": 1e-6,
    }
    theirs = transformers.ViTModel(transformers.ViTConfig(**settings), add_pooling_layer=False).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, 0.1, 0.4)
    ours = VisionTransformer(
        replace(CONFIG, num_classes=0), pooling=ClassToken(), norm=partial(LayerNorm, eps=1e-6)
    ).eval()
    renamed = (
        ("embeddings.patch_embeddings.projection", "patches"),
        ("embeddings.cls_token", "class_token"),
        ("embeddings.position_embeddings", "position_embedding.weight"),
        ("layers.", "stack.blocks."),
        ("layernorm_before", "attention.norm"),
        ("layernorm_after", "feed_forward.norm"),
        *((f".attention.{letter}_proj", f".attention.sublayer.{letter}_proj") for letter in "qkvo"),
        ("mlp.fc1", "feed_forward.sublayer.up_proj"),
        ("mlp.fc2", "feed_forward.sublayer.down_proj"),
        ("layernorm.", "stack.final_norm."),
    )
    state = {}
    for name, tensor in theirs.state_dict().items():
        for old, new in renamed:
            name = name.replace(old, new)
        state[name] = tensor[0] if name == "position_embedding.weight" else tensor
    ours.load_state_dict(state)
    ours.pooling = pooling
    with torch.no_grad():
        tokens = theirs(IMAGES).last_hidden_state
        wanted = tokens[:, 0] if isinstance(pooling, ClassToken) else tokens.mean(1)
        torch.testing.assert_close(ours(IMAGES), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pooling", [MeanPooling(), ClassToken()], ids=["mean", "class"])
def test_patches_are_told_apart_by_positions_alone(pooling: MeanPooling | ClassToken) -> None:
    flipped = IMAGES.unflatten(2, (4, 2)).flip(2).flatten(2, 3)  # rows of patches in another order
    init = Normal(0.3)
    told = VisionTransformer(replace(CONFIG, embedding_std=1.0), pooling=pooling, init=init).eval()
    untold = VisionTransformer(CONFIG, pooling=pooling, position=Position(), init=init).eval()
    with torch.no_grad():
        assert not torch.allclose(told(IMAGES), told(flipped), atol=1e-4)
        torch.testing.assert_close(untold(IMAGES), untold(flipped), atol=1e-6, rtol=1e-5)


def test_takes_any_placement_norm_and_position() -> None:
    for parts in ({"block": PeriNorm()}, {"norm": DyT, "block": ScaledPreNorm()}, {"position": Sinusoidal()}):
        assert VisionTransformer(CONFIG, **parts)(IMAGES).shape == (3, 10)


def test_untrained_classifier_already_passes_gradients_on() -> None:
    model = VisionTransformer(CONFIG)
    nn.functional.cross_entropy(model(IMAGES), torch.tensor([1, 2, 3])).backward()
    assert all(
        p.grad is not None and bool(p.grad.any()) for name, p in model.named_parameters() if "k_proj.b" not in name
    )


def test_model_is_rebuilt_from_plain_data() -> None:
    model = VisionTransformer(CONFIG, pooling=ClassToken(), block=PeriNorm(), norm=partial(LayerNorm, eps=1e-6)).eval()
    again = VisionTransformer.from_dict(json.loads(json.dumps(model.to_dict()))).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(IMAGES), model(IMAGES))


def test_images_and_patches_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"\(batch, 1, 8, 8\), got \(3, 1, 8, 6\)"):
        VisionTransformer(CONFIG)(IMAGES[..., :6])
    with pytest.raises(InputError, match="divides image_size=8, got 3"):
        replace(CONFIG, patch_size=3)
